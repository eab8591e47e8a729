"""The yardstick of every kernel's numbers: the error of the unfused torch computation in the same dtype."""

from __future__ import annotations

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
    known to one part in sqrt(2 n), and is given three times that.
    """
    assert got.shape == unfused.shape and got.dtype == unfused.dtype, (what, got.shape, unfused.shape, got.dtype)
    ours, theirs = rms_error(got, exact), rms_error(unfused, exact)
    factor = 1.25 * (1 + 3 / (2 * got.numel()) ** 0.5) if independent and got.numel() else 1.25
    assert ours <= factor * theirs + FLOOR[got.dtype], f"{what}: {ours:.3g} against {theirs:.3g} unfused"
