"""The yardstick of every kernel's numbers: the error of the unfused torch computation in the same dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Sums taken in another order round differently, by less than this part of a result: where torch happens to be exact
# (a single number, say) a kernel may still be off by so much.
FLOOR = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-13, torch.float16: 2.0**-16}


def rms_error(got: Tensor, exact: Tensor) -> float:
    """RMS of the difference relative to the RMS of `exact` (fp64, finite)."""
    if exact.numel() == 0 or not exact.any():
        return float(got.double().abs().sum())
    scale = exact.abs().max()  # squares of large numbers overflow even fp64
    difference = (got.double().cpu() - exact) / scale
    return float(difference.square().mean().sqrt() / (exact / scale).square().mean().sqrt())


def assert_as_good(
    got: Tensor, unfused: Tensor, exact: Tensor, what: str = "result", independent: bool = False
) -> None:
    """At most 1.25 times the error of the unfused computation; same shape and dtype.

    independent: the two round different intermediates, so that their errors are two samples: the RMS of n of them is
    known to one part in sqrt(2 n), and is given three times that. In fp32 they always do: it rounds all along a sum, in
    an order that is the processor's own, where 16 bits round the results alone.
    """
    assert got.shape == unfused.shape and got.dtype == unfused.dtype, (what, got.shape, unfused.shape, got.dtype)
    ours, theirs = rms_error(got, exact), rms_error(unfused, exact)
    samples = (independent or got.dtype == torch.float32) and got.numel() > 0
    factor = 1.25 * (1 + 3 / (2 * got.numel()) ** 0.5) if samples else 1.25
    assert ours <= factor * theirs + FLOOR[got.dtype], f"{what}: {ours:.3g} against {theirs:.3g} unfused"


def assert_same(found: Any, expected: Any, dtype: torch.dtype, roundings: float = 1) -> None:
    """Two orders of the same sums, rounded to `dtype` at the end: apart by so many of its roundings, in norm, at most.

    In norm, since next to a number that cancels any difference is relatively large.

    Args:
        found, expected: tensors, or lists, tuples or dicts of them; dtypes have to agree too.
    """
    keys = (
        expected
        if isinstance(expected, dict)
        else range(len(expected))
        if isinstance(expected, (list, tuple))
        else None
    )
    if keys is not None:
        for key in keys:
            assert_same(found[key], expected[key], dtype, roundings)
        return
    assert found.shape == expected.shape and found.dtype == expected.dtype
    gap, size = (found.double() - expected.double()).norm(), expected.double().norm()
    assert gap <= roundings * torch.finfo(dtype).eps * size, f"{float(gap / size):.2g} of the norm"
