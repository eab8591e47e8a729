"""The low-rank linear: y = (x @ weight_aᵀ) @ weight_bᵀ + bias, the dense product never formed.

Forward is one of: `fused`, one kernel that keeps x @ weight_aᵀ on the chip; `narrow`, two kernels for a few tokens at
any rank; `gemms`, two products of the vendor's library. Backward starts from x alone, x @ weight_aᵀ is computed again:
`shared` reads dY once for both of its products, `gemms` twice. Which one runs is the cost model's word (`predict`).

The Triton code is in lowrank_linear_triton.py, imported where it is first launched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lrcompile.cost import Choice, Cost, Device, choose, total
from lrcompile.errors import KernelError
from lrcompile.kernels import launch
from lrcompile.kernels.launch import Tile, padded, rows, tuned
from lrcompile.kernels.op import register

FAMILY = "lowrank_linear"


def reference(
    x: Float[Tensor, "*batch in_features"],
    weight_a: Float[Tensor, "rank in_features"],
    weight_b: Float[Tensor, "out_features rank"],
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """Two thin products in plain torch, the oracle of every kernel of this family.

    Args:
        x: (..., in_features), floating.
        weight_a: (rank, in_features), same dtype.
        weight_b: (out_features, rank), same dtype.
        bias: (out_features,) or None.

    Returns:
        (..., out_features), in x's dtype (or autocast's).
    """
    return F.linear(F.linear(x, weight_a), weight_b, bias)


@dataclass(frozen=True)
class Shape:
    """Sizes of a low-rank linear.

    Attributes:
        tokens: rows of x, all leading dimensions together.
        in_features, out_features, rank: of the pair.
        bias: whether there is one.
    """

    tokens: int
    in_features: int
    out_features: int
    rank: int
    bias: bool = False


def forward_tile(variant: str, shape: Shape, dtype: torch.dtype, device: Device) -> Tile | None:
    """The shipped tile of "fused" or "narrow"; None where that kernel is not for this shape."""
    sizes = {"tokens": shape.tokens} if variant == "narrow" else {"rank": shape.rank}
    return tuned(FAMILY, variant, device.arch, launch.precision(dtype), **sizes)


def fused_splits(shape: Shape, tile: Tile, device: Device) -> int:
    """Programs for each block of rows: enough to give every multiprocessor one, as far as there are columns."""
    blocks = max(1, math.ceil(shape.tokens / tile.block_m))
    return max(1, min(device.multiprocessors // blocks, math.ceil(shape.out_features / tile.block_n)))


def narrow_splits(shape: Shape, tile: Tile, device: Device) -> int:
    """Shares of in_features: two programs for each multiprocessor, a share of four blocks at least, no more than 4."""
    blocks = math.ceil(shape.rank / tile.block_n)
    wanted = math.ceil(2 * device.multiprocessors / blocks)
    return max(1, min(wanted, shape.in_features // (4 * tile.block_k), 4))


def predict_forward(shape: Shape, dtype: torch.dtype, device: Device) -> Choice:
    """Which implementation computes y, and the predicted seconds."""
    m, k, n, rank, size = shape.tokens, shape.in_features, shape.out_features, shape.rank, dtype.itemsize
    rate = launch.precision(dtype)
    # Small intermediates are read back from the cache; large ones went to memory.
    h = m * rank * size
    far = h if h > device.l2_bytes / 2 else 0
    gemms = [
        Cost(2 * m * k * rank, (m * k + rank * k) * size + far, library=True),
        Cost(2 * m * rank * n, (n * rank + m * n) * size + far, library=True),
    ]
    predicted = {"gemms": total(gemms, device, rate)}
    least = (m * k + m * n + rank * (k + n)) * size
    tile = forward_tile("fused", shape, dtype, device)
    if tile is not None:
        splits = fused_splits(shape, tile, device)
        blocks = math.ceil(m / tile.block_m)
        done = blocks * tile.block_m * padded(rank)  # tiles are computed whole
        again = blocks * rank * (splits * k + n) * size + (splits - 1) * m * k * size
        cost = Cost(2 * done * (splits * k + n), least, again, programs=blocks * splits)
        predicted["fused"] = cost.seconds(device, rate)
    tile = forward_tile("narrow", shape, dtype, device)
    if tile is not None:
        parts = narrow_splits(shape, tile, device)
        first, second = math.ceil(rank / tile.block_n), math.ceil(n / tile.block_n)
        narrow = [
            Cost(2 * tile.block_m * k * rank, rank * k * size, first * m * k * size, programs=first * parts),
            Cost(2 * tile.block_m * n * rank, n * rank * size, second * parts * m * rank * 4, programs=second),
        ]
        predicted["narrow"] = total(narrow, device, rate)
    return choose(predicted)


def check(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Raise KernelError for operands that don't fit together."""
    if a.dim() != 2 or b.dim() != 2 or x.dim() < 1:
        raise KernelError("lowrank_linear: x needs a dimension at least, weight_a and weight_b are matrices")
    shapes = f"x {tuple(x.shape)}, weight_a {tuple(a.shape)}, weight_b {tuple(b.shape)}"
    if x.shape[-1] != a.shape[1] or a.shape[0] != b.shape[1]:
        raise KernelError(f"lowrank_linear: {shapes} don't fit; (.., in), (rank, in) and (out, rank) do")
    if bias is not None and tuple(bias.shape) != (b.shape[0],):
        raise KernelError(f"lowrank_linear: bias {tuple(bias.shape)} doesn't fit weight_b {tuple(b.shape)}")
    given = [t for t in (x, a, b, bias) if t is not None]
    if len({t.dtype for t in given}) > 1 or not x.is_floating_point():
        told = ", ".join(str(t.dtype) for t in given)
        raise KernelError(f"lowrank_linear: {told} differ or aren't floating; cast to one dtype, or enter autocast")
    if len({t.device for t in given}) > 1:
        raise KernelError(f"lowrank_linear: operands on {', '.join(str(t.device) for t in given)}; move them to one")


def _forward(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The operator on real tensors; on a device without our kernels always `gemms`."""
    check(x, a, b, bias)
    flat = rows(x)
    shape = Shape(flat.shape[0], a.shape[1], b.shape[0], a.shape[0], bias is not None)
    device = launch.describe(x.device) if x.is_cuda and launch.usable(x.device) else None
    variant = launch.forced(FAMILY)
    if variant is None:
        ours = device is not None and flat.numel() > 0 and x.dtype != torch.float64
        variant = predict_forward(shape, x.dtype, device).variant if ours and device else "gemms"
    if variant == "gemms":
        y = reference(flat, a, b, bias)
    else:
        if device is None:
            raise KernelError(f"lowrank_linear: {variant!r} needs Triton and a GPU, x is on {x.device}")
        from lrcompile.kernels import lowrank_linear_triton as kernels

        tile = launch.need(forward_tile(variant, shape, x.dtype, device), FAMILY, variant, f"{shape}, {x.dtype}")
        a, b = a.contiguous(), b.contiguous()
        if variant == "fused":
            y = kernels.fused(flat, a, b, bias, tile, fused_splits(shape, tile, device))
        else:
            y = kernels.narrow(flat, a, b, bias, tile, narrow_splits(shape, tile, device))
    return y.view(*x.shape[:-1], b.shape[0])


def _forward_fake(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    check(x, a, b, bias)
    return x.new_empty((*x.shape[:-1], b.shape[0]))


def predict_backward(
    shape: Shape, dtype: torch.dtype, device: Device, needed: tuple[bool, ...] = (True,) * 4
) -> Choice:
    """Which implementation computes the gradients asked for, and the predicted seconds.

    Args:
        shape, dtype, device: of the forward.
        needed: whether x, weight_a, weight_b and the bias want theirs.

    Returns:
        "gemms" or "shared". `Choice.gemms` is what Inductor does: x @ weight_aᵀ was saved and is read, not computed.
    """
    m, k, n, rank, size = shape.tokens, shape.in_features, shape.out_features, shape.rank, dtype.itemsize
    rate = launch.precision(dtype)
    of_x, of_a, of_b, of_bias = needed[0], needed[1], needed[2], needed[3] and shape.bias
    thin = m * rank * size if m * rank * size > device.l2_bytes / 2 else 0

    def product(wide: int, features: int) -> Cost:
        # One of the five products: between the tokens' `features` and the rank, through a (features, rank) weight.
        return Cost(2 * m * features * rank, wide + thin + features * rank * size, library=True)

    dy_read, x_sized = m * n * size, m * k * size
    recompute = [product(x_sized, k)] if of_b else []
    twice = [product(dy_read, n)] * ((of_x or of_a) + of_b) + [Cost(m * n, dy_read, library=True)] * of_bias
    rest = [product(x_sized, k)] * (of_x + of_a)
    predicted = {"gemms": total(recompute + twice + rest, device, rate)}
    tile = backward_tile(shape, dtype, device)
    if tile is not None and (of_x or of_a) and of_b:
        blocks = math.ceil(m / tile.block_m)
        done = blocks * tile.block_m * padded(rank)
        parts = blocks * n * (rank + 1) * 4
        once = [
            Cost(2 * done * (k + 2 * n), dy_read + x_sized + parts, blocks * rank * (k + n) * size, programs=blocks),
            Cost(parts / 4, parts, library=True),
        ]
        predicted["shared"] = total(once + rest, device, rate)
    chosen = choose(predicted)
    return Choice(chosen.variant, chosen.seconds, total(twice + rest, device, rate))


def backward_tile(shape: Shape, dtype: torch.dtype, device: Device) -> Tile | None:
    """The shipped tile of "shared"; None where that kernel is not for this shape."""
    return tuned(FAMILY, "shared", device.arch, launch.precision(dtype), rank=shape.rank)


def _backward(
    dy: Tensor, x: Tensor | None, a: Tensor, b: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight_a, weight_b and the bias; an empty tensor for each that isn't needed.

    x is None where only the gradients of x and the bias are.
    """
    of_x, of_a, of_b, of_bias = needed
    flat_dy, flat = rows(dy), None if x is None else rows(x)
    shape = Shape(flat_dy.shape[0], a.shape[1], b.shape[0], a.shape[0], of_bias)
    device = launch.describe(dy.device) if dy.is_cuda and launch.usable(dy.device) else None
    variant = launch.forced(f"{FAMILY}_backward")
    if variant is None:
        ours = device is not None and flat_dy.numel() > 0 and dy.dtype != torch.float64
        variant = predict_backward(shape, dy.dtype, device, tuple(needed)).variant if ours and device else "gemms"
    none = dy.new_empty(0)
    g, db, dbias = none, none, none
    if variant == "shared":
        if device is None or flat is None or not of_b:
            raise KernelError("lowrank_linear: 'shared' needs Triton, a GPU, and the gradient of weight_b wanted")
        from lrcompile.kernels import lowrank_linear_triton as kernels

        tile = launch.need(backward_tile(shape, dy.dtype, device), FAMILY, variant, f"{shape}, {dy.dtype}")
        g, db, summed = kernels.shared(flat_dy, flat, a.contiguous(), b.contiguous(), of_bias, tile)
        dbias = none if summed is None else summed
    else:
        g = flat_dy @ b if of_x or of_a else none
        if of_b:
            assert flat is not None
            db = flat_dy.t() @ (flat @ a.t())
        if of_bias:
            dbias = flat_dy.sum(0)
    dx = (g @ a).view(*dy.shape[:-1], a.shape[1]) if of_x else dy.new_empty(0)
    da = g.t() @ flat if of_a and flat is not None else dy.new_empty(0)
    return dx, da, db if of_b else dy.new_empty(0), dbias if of_bias else dy.new_empty(0)


def _backward_fake(
    dy: Tensor, x: Tensor | None, a: Tensor, b: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((*dy.shape[:-1], a.shape[1]), a.shape, b.shape, (b.shape[0],))
    dx, da, db, dbias = (dy.new_empty(shape if want else 0) for shape, want in zip(shapes, needed, strict=True))
    return dx, da, db, dbias


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, a, b, _ = inputs
    # A frozen pair needs nothing of x: only what a gradient will read is kept.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] else None, a, b)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, a, b = ctx.saved_tensors
    needed = list(ctx.needs_input_grad)
    gradients = lowrank_linear_backward(dy, x, a, b, needed)
    return tuple(gradient if want else None for gradient, want in zip(gradients, needed, strict=True))


lowrank_linear_backward = register(
    f"{FAMILY}_backward",
    "(Tensor dy, Tensor? x, Tensor a, Tensor b, bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)",
    {"CPU": _backward, "CUDA": _backward},
    _backward_fake,
    cast=False,
)
lowrank_linear = register(
    FAMILY,
    "(Tensor x, Tensor a, Tensor b, Tensor? bias) -> Tensor",
    {"CPU": _forward, "CUDA": _forward},
    _forward_fake,
    (_autograd, _setup_context),
)
