"""The low-rank linear: y = (x @ weight_aᵀ) @ weight_bᵀ + bias, the dense product never formed.

Forward is one of: `fused`, one kernel that keeps x @ weight_aᵀ on the chip; `narrow`, two kernels for a few tokens at
any rank; `gemms`, two products of the vendor's library. Backward is `shared`, which reads dY once for both of its
products, or `gemms`. Which one runs is the cost model's word (`predict_forward`, `predict_backward`).

Two operators share them. `lowrank_linear` saves nothing but x for backward and computes x @ weight_aᵀ again, one more read
of x. `lowrank_linear_keep` saves the rank-wide intermediate too: more memory, rank / in_features of x, and less time.

The Triton code is in lowrank_linear_triton.py, imported where it is first launched.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lrcompile.cost import Choice, Cost, Device, choose, library_product, total
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


def forward_tile(variant: str, shape: Shape, precision: str, device: Device) -> Tile | None:
    """The shipped tile of "fused" or "narrow"; None where that kernel is not for this shape."""
    sizes = {"tokens": shape.tokens} if variant == "narrow" else {"rank": shape.rank}
    return tuned(FAMILY, variant, device.arch, precision, **sizes)


def fused_splits(shape: Shape, size: int, tile: Tile, precision: str, device: Device) -> int:
    """Programs that share a block of rows: more of them keep more multiprocessors busy, and each computes x·Aᵀ anew."""
    most = min(32, math.ceil(shape.out_features / tile.block_n))
    options = [1 << i for i in range(most.bit_length())]
    return min(options, key=lambda splits: _fused_cost(shape, size, tile, splits).seconds(device, precision))


def narrow_splits(shape: Shape, size: int, tile: Tile, precision: str, device: Device) -> int:
    """Shares of in_features: more of them keep more multiprocessors busy, and all are read by each second program."""
    options = [parts for parts in (1, 2, 4) if parts * tile.block_k <= shape.in_features] or [1]
    return min(options, key=lambda parts: total(_narrow_costs(shape, size, tile, parts), device, precision))


def _fused_cost(shape: Shape, size: int, tile: Tile, splits: int) -> Cost:
    m, k, n, rank = shape.tokens, shape.in_features, shape.out_features, shape.rank
    blocks = math.ceil(m / tile.block_m)
    done = blocks * tile.block_m * padded(rank)  # tiles are computed whole
    again = blocks * rank * (splits * k + n) * size + (splits - 1) * m * k * size
    least = (m * k + m * n + rank * (k + n)) * size
    steps = math.ceil(k / tile.block_k) + math.ceil(n / (tile.block_n * splits))
    return Cost(2 * done * (splits * k + n), least, again, programs=blocks * splits, steps=steps)


def _narrow_costs(shape: Shape, size: int, tile: Tile, parts: int) -> list[Cost]:
    m, k, n, rank = shape.tokens, shape.in_features, shape.out_features, shape.rank
    first, second = math.ceil(rank / tile.block_n), math.ceil(n / tile.block_n)
    flops = 2 * tile.block_m * rank
    turns = math.ceil(k / (tile.block_k * parts)), math.ceil(rank / tile.block_k)
    return [
        Cost(flops * k, rank * k * size, first * m * k * size, programs=first * parts, steps=turns[0]),
        Cost(flops * n, n * rank * size, second * parts * m * rank * 4, programs=second, steps=turns[1]),
    ]


def predict_forward(shape: Shape, dtype: torch.dtype, device: Device) -> Choice:
    """Which of "fused", "narrow" and "gemms" computes y, and the predicted seconds."""
    return choose(forward_seconds(shape, dtype.itemsize, launch.precision(dtype), device))


@functools.cache
def forward_seconds(shape: Shape, size: int, precision: str, device: Device) -> dict[str, float]:
    """The predicted seconds of "gemms", and of "fused" and "narrow" where they are for this shape.

    Args:
        shape, device: of the product.
        size: bytes of an element.
        precision: of the products, as Device.rate takes it.
    """
    m, k, n, rank = shape.tokens, shape.in_features, shape.out_features, shape.rank
    # A small intermediate is read back from the cache; a large one went to memory.
    far = m * rank * size if m * rank * size > device.l2_bytes / 2 else 0
    gemms = [
        library_product(m, rank, k, (m * k + rank * k) * size + far, device),
        library_product(m, n, rank, (n * rank + m * n) * size + far, device),
    ]
    predicted = {"gemms": total(gemms, device, precision)}
    tile = forward_tile("fused", shape, precision, device)
    if tile is not None:
        splits = fused_splits(shape, size, tile, precision, device)
        predicted["fused"] = _fused_cost(shape, size, tile, splits).seconds(device, precision)
    tile = forward_tile("narrow", shape, precision, device)
    if tile is not None:
        parts = narrow_splits(shape, size, tile, precision, device)
        predicted["narrow"] = total(_narrow_costs(shape, size, tile, parts), device, precision)
    return predicted


def check(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, op: str = FAMILY) -> None:
    """Raise KernelError for operands that don't fit together."""
    if a.dim() != 2 or b.dim() != 2 or x.dim() < 1:
        raise KernelError(f"{op}: x needs a dimension at least, weight_a and weight_b are matrices")
    shapes = f"x {tuple(x.shape)}, weight_a {tuple(a.shape)}, weight_b {tuple(b.shape)}"
    if x.shape[-1] != a.shape[1] or a.shape[0] != b.shape[1]:
        raise KernelError(f"{op}: {shapes} don't fit; (.., in), (rank, in) and (out, rank) do")
    if bias is not None and tuple(bias.shape) != (b.shape[0],):
        raise KernelError(f"{op}: bias {tuple(bias.shape)} doesn't fit weight_b {tuple(b.shape)}")
    given = [t for t in (x, a, b, bias) if t is not None]
    if len({t.dtype for t in given}) > 1 or x.dtype not in launch.DTYPES:
        told, known = (", ".join(map(str, dtypes)) for dtypes in ([t.dtype for t in given], launch.DTYPES))
        raise KernelError(f"{op}: operands are {told}; cast to one of {known}, or enter autocast")
    if len({t.device for t in given}) > 1:
        raise KernelError(f"{op}: operands on {', '.join(str(t.device) for t in given)}; move them to one")


def check_backward(op: str, dy: Tensor, x: Tensor | None, h: Tensor | None, a: Tensor, b: Tensor) -> None:
    """Raise KernelError for operands of a backward that don't fit together: a kernel would read beyond them."""
    tokens = dy.shape[:-1]
    fits = a.dim() == b.dim() == 2 and (*tokens, *b.shape) == (*dy.shape, a.shape[0])
    fits = fits and (x is None or x.shape == (*tokens, a.shape[1]))
    if not fits or (h is not None and h.shape != (math.prod(tokens), a.shape[0])):
        told = f"dY {tuple(dy.shape)}, x {None if x is None else tuple(x.shape)}, weight_a {tuple(a.shape)}"
        raise KernelError(f"{op}: {told}, weight_b {tuple(b.shape)} don't fit, or x @ weight_aᵀ that was kept doesn't")
    given = [t for t in (dy, x, h, a, b) if t is not None]
    if len({t.dtype for t in given}) > 1:
        raise KernelError(f"{op}: operands are {', '.join(str(t.dtype) for t in given)}; give them one dtype")


def _compute(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
    check(x, a, b, bias)
    flat, device = rows(x), launch.describe(x.device)
    shape = Shape(flat.shape[0], a.shape[1], b.shape[0], a.shape[0], bias is not None)
    variant = launch.pick(FAMILY, flat, device, functools.partial(predict_forward, shape, x.dtype))
    h: Tensor | None
    if variant == "gemms" or device is None:
        h = F.linear(flat, a)
        y = F.linear(h, b, bias)
    else:
        from lrcompile.kernels import lowrank_linear_triton as kernels

        precision = launch.precision(x.dtype)
        tile = launch.need(forward_tile(variant, shape, precision, device), FAMILY, variant)
        a, b = a.contiguous(), b.contiguous()
        run, splits = {"fused": (kernels.fused, fused_splits), "narrow": (kernels.narrow, narrow_splits)}[variant]
        y, h = run(flat, a, b, bias, tile, splits(shape, x.dtype.itemsize, tile, precision, device), keep)
    return launch.shaped(y, (*x.shape[:-1], b.shape[0])), h


def _forward(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return _compute(x, a, b, bias, keep=False)[0]


def _forward_keep(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    y, h = _compute(x, a, b, bias, keep=True)
    assert h is not None
    return y, h


def _forward_fake(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    check(x, a, b, bias)
    return x.new_empty((*x.shape[:-1], b.shape[0]))


def _forward_keep_fake(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _forward_fake(x, a, b, bias), x.new_empty((math.prod(x.shape[:-1]), a.shape[0]))


def backward_tile(shape: Shape, precision: str, device: Device) -> Tile | None:
    """The shipped tile of "shared"; None where that kernel is not for this shape."""
    return tuned(FAMILY, "shared", device.arch, precision, rank=shape.rank)


def predict_backward(
    shape: Shape,
    dtype: torch.dtype,
    device: Device,
    needed: tuple[bool, bool, bool, bool] = (True,) * 4,
    kept: bool = False,
) -> Choice:
    """Which of "shared" and "gemms" computes the gradients asked for, and the predicted seconds.

    Args:
        shape, dtype, device: of the forward.
        needed: whether x, weight_a, weight_b and the bias want theirs.
        kept: whether forward kept x @ weight_aᵀ.

    Returns:
        Its `gemms` is what Inductor does, which keeps it, whether we do or not.
    """
    return _predict_backward(shape, dtype.itemsize, launch.precision(dtype), device, needed, kept)


@functools.cache
def _predict_backward(
    shape: Shape, size: int, precision: str, device: Device, needed: tuple[bool, bool, bool, bool], kept: bool
) -> Choice:
    m, k, n, rank = shape.tokens, shape.in_features, shape.out_features, shape.rank
    of_x, of_a, of_b, of_bias = needed[0], needed[1], needed[2], needed[3] and shape.bias
    thin = m * rank * size if m * rank * size > device.l2_bytes / 2 else 0
    dy_bytes, x_bytes = m * n * size, m * k * size

    def onto_rank(wide: int, features: int) -> Cost:  # (m, features) times a weight
        return library_product(m, rank, features, wide + thin + features * rank * size, device)

    def over_tokens(wide: int, features: int) -> Cost:  # (features, m) times (m, rank)
        return library_product(features, rank, m, wide + thin + features * rank * size, device)

    twice = [onto_rank(dy_bytes, n)] * (of_x or of_a) + [over_tokens(dy_bytes, n)] * of_b
    twice += [Cost(m * n, dy_bytes, library=True)] * of_bias
    rest = [library_product(m, k, rank, x_bytes + thin + k * rank * size, device)] * of_x
    rest += [over_tokens(x_bytes, k)] * of_a
    again = [onto_rank(x_bytes, k)] * (of_b and not kept)
    predicted = {"gemms": total(again + twice + rest, device, precision)}
    tile = backward_tile(shape, precision, device)
    if tile is not None and (of_x or of_a) and of_b:
        blocks, of_h = math.ceil(m / tile.block_m), 0 if kept else k  # x's columns, where x @ weight_aᵀ is made of them
        parts = blocks * n * (rank + 1) * 4
        flops = 2 * blocks * tile.block_m * padded(rank) * (of_h + 2 * n)
        moved, weights = m * (of_h + n) * size + thin + parts, blocks * rank * (of_h + n) * size
        steps = of_h // tile.block_k + n // tile.block_n
        once = [
            Cost(flops, moved, weights, programs=blocks, steps=steps),
            Cost(parts / 4, parts, library=True),
        ]
        predicted["shared"] = total(once + rest, device, precision)
    chosen = choose(predicted)
    return Choice(chosen.variant, chosen.seconds, total(twice + rest, device, precision))


def predict(
    shape: Shape,
    dtype: torch.dtype,
    device: Device,
    needed: tuple[bool, bool, bool, bool] | None = None,
    kept: bool = False,
) -> Choice:
    """Forward, and backward where gradients are `needed`: lowrank_linear (or, `kept`, lowrank_linear_keep) against Inductor.

    The variant names both: "fused + shared".
    """
    forward = predict_forward(shape, dtype, device)
    if needed is None or not any(needed):
        return forward
    backward = predict_backward(shape, dtype, device, needed, kept)
    seconds, gemms = forward.seconds + backward.seconds, forward.gemms + backward.gemms
    return Choice(f"{forward.variant} + {backward.variant}", seconds, gemms)


def _backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, a: Tensor, b: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight_a, weight_b and the bias; an empty tensor for each that isn't needed.

    h (tokens, rank) is x @ weight_aᵀ where it was kept. x may be None where no gradient needs it.
    """
    of_x, of_a, of_b, of_bias = needed
    check_backward(f"{FAMILY}_backward", dy, x, h, a, b)
    flat_dy, device = rows(dy), launch.describe(dy.device)
    flat = None if x is None else rows(x)
    shape = Shape(flat_dy.shape[0], a.shape[1], b.shape[0], a.shape[0], of_bias)
    predict = functools.partial(
        predict_backward, shape, dy.dtype, needed=(of_x, of_a, of_b, of_bias), kept=h is not None
    )
    variant = launch.pick(f"{FAMILY}_backward", flat_dy, device, predict)
    none = dy.new_empty(0)
    g = db = dbias = none
    if variant == "shared" and device is not None:
        from lrcompile.kernels import lowrank_linear_triton as kernels

        if not of_b:
            raise KernelError("lowrank_linear_backward: 'shared' needs weight_b's gradient wanted; force 'gemms'")
        tile = launch.need(backward_tile(shape, launch.precision(dy.dtype), device), f"{FAMILY}_backward", variant)
        g, db, dbias = kernels.shared(flat_dy, flat, h, a.contiguous(), b.contiguous(), of_bias, tile)
    else:
        if of_x or of_a:
            g = flat_dy @ b
        if of_b:
            db = flat_dy.t() @ (_needed(flat) @ a.t() if h is None else h)
        if of_bias:
            dbias = flat_dy.sum(0)
    dx = (g @ a).view(*dy.shape[:-1], a.shape[1]) if of_x else none
    da = g.t() @ _needed(flat) if of_a else none
    # The results of an operator must be tensors of their own.
    dx, da, db, dbias = (t.clone() if t is none else t for t in (dx, da, db, dbias))
    return dx, da, db, dbias


def _needed(x: Tensor | None) -> Tensor:
    if x is None:
        raise KernelError("lowrank_linear_backward: this gradient needs x, and it was not given")
    return x


def _backward_fake(
    dy: Tensor, x: Tensor | None, h: Tensor | None, a: Tensor, b: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((*dy.shape[:-1], a.shape[1]), a.shape, b.shape, (b.shape[0],))
    dx, da, db, dbias = (dy.new_empty(shape if want else 0) for shape, want in zip(shapes, needed, strict=True))
    return dx, da, db, dbias


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], h: Tensor | None) -> None:
    # Only what a gradient will read is saved: of a frozen pair, neither x nor h.
    x, a, b, _ = inputs
    of_a, of_b = ctx.needs_input_grad[1:3]
    ctx.save_for_backward(x if of_a or (of_b and h is None) else None, h if of_b else None, a, b)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    _save(ctx, inputs, None)


def _setup_keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, dy: Tensor, *of_h: None) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad)
    gradients = lowrank_linear_backward(dy, *ctx.saved_tensors, needed)
    return tuple(gradient if want else None for gradient, want in zip(gradients, needed, strict=True))


lowrank_linear_backward = register(
    f"{FAMILY}_backward",
    "(Tensor dy, Tensor? x, Tensor? h, Tensor a, Tensor b, bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)",
    {"CPU": _backward, "CUDA": _backward},
    _backward_fake,
    cast=False,
)
lowrank_linear = register(
    FAMILY,
    "(Tensor x, Tensor a, Tensor b, Tensor? bias) -> Tensor",
    {"CPU": _forward, "CUDA": _forward},
    _forward_fake,
    (_autograd, _setup),
)
lowrank_linear_keep = register(
    f"{FAMILY}_keep",
    "(Tensor x, Tensor a, Tensor b, Tensor? bias) -> (Tensor y, Tensor h)",
    {"CPU": _forward_keep, "CUDA": _forward_keep},
    _forward_keep_fake,
    (_autograd, _setup_keep),
)
