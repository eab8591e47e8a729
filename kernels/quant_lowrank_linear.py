"""A quantised, frozen base with a trainable pair: y = x · decoded(Q)ᵀ + factor · (x · weight_aᵀ) · weight_bᵀ + bias.

`fused` computes the narrow product x · weight_aᵀ first, which is thin, and all the rest in one kernel: the base decoded
tile by tile, the pair's wide product added before anything is written. Doing the narrow product there too would repeat it
for every block of columns. `gemms` decodes the base into a temporary matrix and uses the vendor's library throughout.

Backward starts from x: gradients for x, weight_a, weight_b and the bias, none for the base. x · weight_aᵀ is computed
again, dX = dY · decoded(Q) + factor · (dY · weight_b) · weight_a is one kernel like the forward's. Kernels and cost model
are quant_linear's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lrcompile.errors import KernelError
from lrcompile.kernels import launch, lowrank_linear, quant_linear
from lrcompile.kernels.launch import rows
from lrcompile.kernels.op import register
from lrcompile.kernels.quant_linear import dense, predict_backward, predict_forward, shape_of, splits_for, tile_for

FAMILY = "quant_lowrank_linear"


def reference(
    x: Float[Tensor, "*batch in_features"],
    packed: Sequence[Tensor],
    layout: str,
    group: int,
    weight_a: Float[Tensor, "rank in_features"],
    weight_b: Float[Tensor, "out_features rank"],
    factor: float = 1.0,
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """The base decoded, and three products in plain torch: the oracle of every kernel of this family.

    Args:
        x: (..., in_features), floating.
        packed, layout, group: the base, as `decode.reference` takes it.
        weight_a, weight_b: the pair, in x's dtype.
        factor: of the pair.
        bias: (out_features,) or None.

    Returns:
        (..., out_features), in x's dtype.
    """
    base = quant_linear.reference(x, packed, layout, group, bias)
    return base + factor * F.linear(F.linear(x, weight_a), weight_b)


def check(
    x: Tensor, packed: Sequence[Tensor], layout: str, group: int, a: Tensor, b: Tensor, bias: Tensor | None
) -> None:
    """Raise KernelError for operands that don't fit together."""
    quant_linear.check(FAMILY, x, packed, layout, group, bias)
    n = quant_linear.decode.out_features(packed, layout, x.shape[-1])
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != x.shape[-1] or b.shape[0] != n or a.shape[0] != b.shape[1]:
        told = f"weight_a {tuple(a.shape)} and weight_b {tuple(b.shape)}"
        raise KernelError(f"{FAMILY}: {told} don't fit a base of {(n, x.shape[-1])}; (rank, in) and (out, rank) do")
    if {a.dtype, b.dtype} != {x.dtype} or {a.device, b.device} != {x.device}:
        told = ", ".join(f"{t.dtype} on {t.device}" for t in (x, a, b))
        raise KernelError(
            f"{FAMILY}: x, weight_a, weight_b are {told}; give them one dtype and device, or enter autocast"
        )


def _forward(
    x: Tensor, packed: Sequence[Tensor], layout: str, group: int, a: Tensor, b: Tensor, factor: float,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    check(x, packed, layout, group, a, b, bias)
    if not math.isfinite(factor):  # the library takes a factor of NaN for none
        raise KernelError(f"{FAMILY}: the factor of the pair is {factor}; give a finite one")
    packed, flat = [t.contiguous() for t in packed], rows(x)
    m, k = flat.shape
    device = launch.describe(x.device)
    shape = shape_of(m, k, packed, layout, group, a.shape[0])
    variant = launch.pick(FAMILY, flat, device, lambda known: predict_forward(shape, x.dtype, known))
    h = flat @ a.t()
    if variant == "gemms" or device is None:
        base = F.linear(flat, dense(packed, layout, group, k, x.dtype), bias)
        y = base.addmm_(h, b.t(), alpha=factor)
    else:
        from lrcompile.kernels import quant_linear_triton as kernels

        tile = launch.need(tile_for("forward", m, x.dtype, device), FAMILY, variant)
        splits = splits_for(m, k, shape.out_features, tile, device)
        y = kernels.forward(flat, packed, layout, group, bias, tile, splits, kernels.Pair(h, b.contiguous(), factor))
    return launch.shaped(y, (*x.shape[:-1], shape.out_features))


def _forward_fake(
    x: Tensor, packed: Sequence[Tensor], layout: str, group: int, a: Tensor, b: Tensor, factor: float,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    check(x, packed, layout, group, a, b, bias)
    return x.new_empty((*x.shape[:-1], b.shape[0]))


def _backward(
    dy: Tensor, x: Tensor | None, packed: Sequence[Tensor], layout: str, group: int, a: Tensor, b: Tensor,
    factor: float, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight_a and weight_b; an empty tensor for each that isn't needed.

    x is None where only its own gradient is.
    """
    of_x, of_a, of_b = needed
    quant_linear.check_backward(f"{FAMILY}_backward", dy, packed, layout, group, a.shape[1])
    lowrank_linear.check_backward(f"{FAMILY}_backward", dy, x, None, a, b)
    packed = [t.contiguous() for t in packed]
    flat_dy, flat = rows(dy), None if x is None else rows(x)
    dx, da, db = (dy.new_empty(0) for _ in needed)
    g = flat_dy @ b if of_x or of_a else dy.new_empty(0)
    if of_x:
        k = a.shape[1]
        device = launch.describe(dy.device)
        shape = shape_of(flat_dy.shape[0], k, packed, layout, group, a.shape[0])
        name = f"{FAMILY}_backward"
        variant = launch.pick(name, flat_dy, device, lambda known: predict_backward(shape, dy.dtype, known))
        if variant == "gemms" or device is None:
            dx = (flat_dy @ dense(packed, layout, group, k, dy.dtype)).addmm_(g, a, alpha=factor)
        else:
            from lrcompile.kernels import quant_linear_triton as kernels

            tile = launch.need(tile_for("backward", flat_dy.shape[0], dy.dtype, device), name, variant)
            dx = kernels.backward(flat_dy, packed, layout, group, k, tile, kernels.Pair(g, a.contiguous(), factor))
        dx = dx.view(*dy.shape[:-1], k)
    if of_a and flat is not None:
        da = (g.t() @ flat).mul_(factor)
    if of_b and flat is not None:
        db = (flat_dy.t() @ (flat @ a.t())).mul_(factor)
    return dx, da, db


def _backward_fake(
    dy: Tensor, x: Tensor | None, packed: Sequence[Tensor], layout: str, group: int, a: Tensor, b: Tensor,
    factor: float, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = ((*dy.shape[:-1], a.shape[1]), a.shape, b.shape)
    dx, da, db = (dy.new_empty(shape if want else 0) for shape, want in zip(shapes, needed, strict=True))
    return dx, da, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, ctx.layout, ctx.group, a, b, ctx.factor, _ = inputs
    quant_linear.frozen(FAMILY, packed)
    # Here, other than in backward, torch counts each tensor of a list. A frozen pair needs nothing of x.
    of_a, of_b = ctx.needs_input_grad[len(packed) + 3 : len(packed) + 5]
    ctx.save_for_backward(x if of_a or of_b else None, a, b, *packed)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, a, b, *packed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needed = [needs[0], needs[4], needs[5]]
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if any(needed):
        found = quant_lowrank_linear_backward(dy, x, packed, ctx.layout, ctx.group, a, b, ctx.factor, needed)
        gradients = tuple(gradient if want else None for gradient, want in zip(found, needed, strict=True))
    dbias = rows(dy).sum(0) if needs[7] else None
    return gradients[0], [None] * len(packed), None, None, gradients[1], gradients[2], None, dbias


quant_lowrank_linear_backward = register(
    f"{FAMILY}_backward",
    "(Tensor dy, Tensor? x, Tensor[] packed, str layout, int group, Tensor a, Tensor b, float factor, bool[3] needed)"
    " -> (Tensor, Tensor, Tensor)",
    {"CPU": _backward, "CUDA": _backward},
    _backward_fake,
    cast=False,
)
quant_lowrank_linear = register(
    FAMILY,
    "(Tensor x, Tensor[] packed, str layout, int group, Tensor a, Tensor b, float factor, Tensor? bias) -> Tensor",
    {"CPU": _forward, "CUDA": _forward},
    _forward_fake,
    (_autograd, _setup_context),
    promoted=(1,),  # scales and tables keep their precision
)
