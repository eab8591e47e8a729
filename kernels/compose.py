"""The dense weight of an adopted module that has a base: W = base + scale · weight_b @ weight_a, as one operator.

Model code that reads `module.weight` gets this. One node in a graph, which the reassociate pass recognises and replaces, so
that a compiled model never forms the dense matrix. The base is quantised (a layout of decode.py) or dense; without a
pair this is decoding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrcompile.errors import KernelError
from lrcompile.kernels import decode
from lrcompile.kernels.op import register

DENSE = "dense"


def reference(
    base: Sequence[Tensor],
    layout: str,
    group: int,
    in_features: int,
    dtype: torch.dtype,
    weight_a: Tensor | None = None,
    weight_b: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The composed weight.

    Args:
        base: the packed tensors of the layout, or for layout "dense" one (out_features, in_features) tensor.
        layout, group, in_features: as `decode.reference` takes them.
        dtype: of the result.
        weight_a, weight_b: (rank, in_features) and (out_features, rank), or None.
        scale: of their product.

    Returns:
        (out_features, in_features) in dtype.

    Raises:
        KernelError: operands that don't fit together.
    """
    wrong = "" if layout == DENSE else decode.misfit(base, layout, group, in_features)
    if wrong or not dtype.is_floating_point:
        raise KernelError(
            f"compose: a {layout} base of {in_features} columns to {dtype}: {wrong or 'no floating type'}"
        )
    held = base[0].to(dtype) if layout == DENSE else decode.reference(base, layout, group, in_features, dtype)
    if weight_a is None or weight_b is None:
        return held.clone() if held is base[0] else held
    if weight_b.shape[0] != held.shape[0] or weight_a.shape[1] != in_features or weight_a.shape[0] != weight_b.shape[1]:
        told = f"weight_a {tuple(weight_a.shape)} and weight_b {tuple(weight_b.shape)}"
        raise KernelError(f"compose: {told} don't fit a base of {tuple(held.shape)}; (rank, in) and (out, rank) do")
    return torch.addmm(held, weight_b.to(dtype), weight_a.to(dtype), alpha=scale)


def _fake(
    base: Sequence[Tensor], layout: str, group: int, in_features: int, dtype: torch.dtype, a: Tensor | None,
    b: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    rows = base[0].shape[0] if layout == DENSE else decode.out_features(base, layout, in_features)
    return base[0].new_empty((rows, in_features), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, layout, _, _, _, a, b, ctx.scale = inputs
    ctx.count, ctx.of_base = len(base), base[0].dtype if layout == DENSE else None
    ctx.save_for_backward(a, b)


def _autograd(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    da = db = None
    if a is not None and ctx.needs_input_grad[5]:
        da = (b.to(gradient.dtype).t() @ gradient).mul(ctx.scale).to(a.dtype)
    if b is not None and ctx.needs_input_grad[6]:
        db = (gradient @ a.to(gradient.dtype).t()).mul(ctx.scale).to(b.dtype)
    of_base = [None] * ctx.count if ctx.of_base is None else [gradient.to(ctx.of_base)]
    return of_base, None, None, None, None, da, db, None


compose = register(
    "compose",
    "(Tensor[] base, str layout, int group, int in_features, ScalarType dtype, Tensor? a, Tensor? b, float scale)"
    " -> Tensor",
    {"CPU": reference, "CUDA": reference},
    _fake,
    (_autograd, _setup_context),
    cast=False,  # model code asks for the dtype that is stored
)
