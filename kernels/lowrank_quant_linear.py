"""A pair with both factors quantised, for inference: y = (x · decoded(A)ᵀ) · decoded(B)ᵀ + bias.

Two of quant_linear's products, each by the implementation that its cost model names; between them stands the (tokens,
rank) intermediate in x's dtype. The gradient of x alone is known: quantised factors are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lrcompile.cost import Choice, Device
from lrcompile.kernels import decode, quant_linear
from lrcompile.kernels.launch import rows
from lrcompile.kernels.op import register
from lrcompile.kernels.quant_linear import Shape

FAMILY = "lowrank_quant_linear"


def reference(
    x: Float[Tensor, "*batch in_features"],
    packed_a: Sequence[Tensor],
    layout_a: str,
    group_a: int,
    packed_b: Sequence[Tensor],
    layout_b: str,
    group_b: int,
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """Both factors decoded, and two products in plain torch: the oracle of this family.

    Args:
        x: (..., in_features), floating.
        packed_a, layout_a, group_a: weight_a (rank, in_features), as `decode.reference` takes it.
        packed_b, layout_b, group_b: weight_b (out_features, rank), likewise.
        bias: (out_features,) or None, in x's dtype.

    Returns:
        (..., out_features), in x's dtype.
    """
    h = quant_linear.reference(x, packed_a, layout_a, group_a)
    return quant_linear.reference(h, packed_b, layout_b, group_b, bias)


def predict_forward(first: Shape, second: Shape, dtype: torch.dtype, device: Device) -> Choice:
    """What computes y, and the predicted seconds: the two products' choices, "fused" where one of them is."""
    both = [quant_linear.predict_forward(shape, dtype, device) for shape in (first, second)]
    variant = "fused" if any(choice.variant == "fused" for choice in both) else "gemms"
    return Choice(variant, sum(choice.seconds for choice in both), sum(choice.gemms for choice in both))


def _forward(
    x: Tensor, packed_a: Sequence[Tensor], layout_a: str, group_a: int, packed_b: Sequence[Tensor], layout_b: str,
    group_b: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    h = quant_linear._forward(x, packed_a, layout_a, group_a, None)
    return quant_linear._forward(h, packed_b, layout_b, group_b, bias)


def _forward_fake(
    x: Tensor, packed_a: Sequence[Tensor], layout_a: str, group_a: int, packed_b: Sequence[Tensor], layout_b: str,
    group_b: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    h = quant_linear._forward_fake(x, packed_a, layout_a, group_a, None)
    return quant_linear._forward_fake(h, packed_b, layout_b, group_b, bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed_a, ctx.layout_a, ctx.group_a, packed_b, ctx.layout_b, ctx.group_b, _ = inputs
    quant_linear.frozen(FAMILY, (*packed_a, *packed_b))
    ctx.in_features, ctx.of_a = x.shape[-1], len(packed_a)
    ctx.rank = decode.out_features(packed_a, ctx.layout_a, ctx.in_features)
    ctx.save_for_backward(*packed_a, *packed_b)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    packed_a, packed_b = ctx.saved_tensors[: ctx.of_a], ctx.saved_tensors[ctx.of_a :]
    dx = None
    if ctx.needs_input_grad[0]:
        g = quant_linear.quant_linear_backward(dy, packed_b, ctx.layout_b, ctx.group_b, ctx.rank)
        dx = quant_linear.quant_linear_backward(g, packed_a, ctx.layout_a, ctx.group_a, ctx.in_features)
    dbias = rows(dy).sum(0) if ctx.needs_input_grad[7] else None
    return dx, [None] * len(packed_a), None, None, [None] * len(packed_b), None, None, dbias


lowrank_quant_linear = register(
    FAMILY,
    "(Tensor x, Tensor[] packed_a, str layout_a, int group_a, Tensor[] packed_b, str layout_b, int group_b,"
    " Tensor? bias) -> Tensor",
    {"CPU": _forward, "CUDA": _forward},
    _forward_fake,
    (_autograd, _setup_context),
    promoted=(1, 4),  # scales and tables keep their precision
)
