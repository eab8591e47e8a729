"""A low-rank linear and what follows it in one: y = act(z), act(z) * other, z * act(other), z * other or z + other,
with z = (x @ weight_aᵀ) @ weight_bᵀ + bias, which is never stored.

Forward is lowrank_linear's `fused` or `narrow` kernel with an epilogue (epilogue.py), or `gemms`: the library's products
and a pointwise kernel. Backward starts from x: `fused` computes z again beside the pointwise work, in one kernel that
writes dz, dother and the thin x @ weight_aᵀ, and ends in lowrank_linear's backward.

z isn't saved, since that is cheaper in bytes: saving it takes one write and one read of (tokens, out_features), while
computing it again reads x, (tokens, in_features), and takes 2 tokens rank (in + out) FLOPs. For in = out at 16 bits an
element, an H100's 200 FLOPs a byte make these equal at rank 100, and at rank 290 for a projection four times as wide as
its input; above that time is paid for the memory. The cost model weighs it (`predict_backward`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lrcompile.cost import Choice, Cost, Device, choose
from lrcompile.errors import KernelError
from lrcompile.kernels import epilogue, launch, lowrank_linear
from lrcompile.kernels.epilogue import KINDS
from lrcompile.kernels.launch import Tile, rows, tuned
from lrcompile.kernels.lowrank_linear import (
    Shape,
    forward_seconds,
    fused_splits,
    lowrank_linear_backward,
    narrow_splits,
)
from lrcompile.kernels.op import register

FAMILY = "lowrank_epilogue"


def reference(
    x: Float[Tensor, "*batch in_features"],
    weight_a: Float[Tensor, "rank in_features"],
    weight_b: Float[Tensor, "out_features rank"],
    bias: Float[Tensor, " out_features"] | None,
    kind: str,
    other: Float[Tensor, "*batch out_features"] | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """The unfused sequence in plain torch, the oracle of this family.

    Args:
        x, weight_a, weight_b, bias: as lowrank_linear.reference takes them.
        kind: a key of epilogue.KINDS.
        other: (..., out_features), floating; None for the kinds that are an activation alone.

    Returns:
        (..., out_features), in the dtype that z and other promote to.
    """
    return epilogue.apply(KINDS[kind], lowrank_linear.reference(x, weight_a, weight_b, bias), other)


def tile_of(kernel: str, shape: Shape, precision: str, device: Device) -> Tile | None:
    """The shipped tile of "fused", "narrow" or "gradient"; None where that kernel is not for this shape."""
    sizes = {"tokens": shape.tokens} if kernel == "narrow" else {"rank": shape.rank}
    return tuned(FAMILY, kernel, device.arch, precision, **sizes)


def predict_forward(
    shape: Shape, kind: str, dtype: torch.dtype, device: Device, other: torch.dtype | None = None
) -> Choice:
    """Which of "fused", "narrow" and "gemms" computes y, and the predicted seconds.

    Args:
        shape, dtype, device: of the low-rank linear.
        kind: a key of epilogue.KINDS.
        other: dtype of the other operand, where there is one.

    Returns:
        Its `gemms` is the faster of the two ways without us: lowrank_linear, or the library's products, and then the
        pointwise kernel that Inductor makes, which reads z and writes y.
    """
    size = 0 if other is None else other.itemsize
    return _predict_forward(shape, kind, dtype.itemsize, size, launch.precision(dtype), device)


@functools.cache
def _predict_forward(shape: Shape, kind: str, size: int, other_size: int, precision: str, device: Device) -> Choice:
    what, elements = KINDS[kind], shape.tokens * shape.out_features
    y_size, reads = max(size, other_size), elements * other_size
    pair = forward_seconds(shape, size, precision, device)
    alone = Cost(0, _far(elements * size, device) + reads + elements * y_size, launches=1)
    extra = Cost(0, reads + elements * (y_size - size), launches=0)
    if what.join == "add":
        # Inductor adds within the kernel that comes next (a norm), which reads z and writes y. After us it reads y.
        alone = Cost(0, alone.bytes, launches=0)
        extra = Cost(0, extra.bytes + _far(elements * y_size, device), launches=0)
    more = extra.seconds(device, precision) + _pointwise(elements * what.operations(backward=False), device)
    predicted = {name: seconds + more for name, seconds in pair.items() if name != "gemms"}
    predicted = {name: s for name, s in predicted.items() if tile_of(name, shape, precision, device) is not None}
    return choose(predicted | {"gemms": min(pair.values()) + alone.seconds(device, precision)})


def _far(moved: int, device: Device) -> int:
    """Bytes that go through memory: what a kernel has just written is read from the cache where it is small."""
    return moved if moved > device.l2_bytes / 2 else 0


def _pointwise(operations: int, device: Device) -> float:
    """Seconds of arithmetic outside the tensor cores, which wait for it in our kernels."""
    return Cost(operations, 0, launches=0).seconds(device, "single")


Needed = tuple[bool, bool, bool, bool, bool]


def predict_backward(
    shape: Shape,
    kind: str,
    dtype: torch.dtype,
    device: Device,
    other: torch.dtype | None = None,
    needed: Needed = (True,) * 5,
) -> Choice:
    """Which of "fused" and "gemms" computes dz and dother, and the predicted seconds of the whole backward.

    Args:
        shape, kind, dtype, device, other: as predict_forward takes them.
        needed: whether x, weight_a, weight_b, the bias and other want their gradients.

    Returns:
        Its `gemms` is without us: Inductor's pointwise kernel reads the saved z, then the faster backward of the pair.
    """
    size = 0 if other is None else other.itemsize
    return _predict_backward(shape, kind, dtype.itemsize, size, launch.precision(dtype), dtype, device, needed)


@functools.cache
def _predict_backward(
    shape: Shape, kind: str, size: int, other_size: int, precision: str, dtype: torch.dtype, device: Device,
    needed: Needed,
) -> Choice:  # fmt: skip
    what, elements, of_z = KINDS[kind], shape.tokens * shape.out_features, any(needed[:4])
    reads_z = _reads_z(kind, needed[4])
    again, kept = (lowrank_linear.predict_backward(shape, dtype, device, needed[:4], kept=k) for k in (False, True))
    ours = (kept if reads_z else again).seconds * of_z
    theirs = min(again.seconds, kept.seconds, kept.gemms) * of_z
    if what.join == "add":
        return Choice("gemms", ours, theirs)
    z_read = elements * size * reads_z
    moved = _far(elements * max(size, other_size), device)  # dY
    moved += elements * (other_size + size * of_z + other_size * needed[4])
    once = Cost(0, moved + z_read, launches=1).seconds(device, precision)
    pair = forward_seconds(shape, size, precision, device)
    predicted = {"gemms": pair["gemms"] * reads_z + once}
    if reads_z and tile_of("gradient", shape, precision, device) is not None and "fused" in pair:
        reads = Cost(0, moved - elements * size, launches=0).seconds(device, precision)  # pair counts one result
        work = _pointwise(elements * what.operations(backward=True), device)
        predicted["fused"] = pair["fused"] + max(reads, 0.0) + work
    chosen = choose(predicted)
    return Choice(chosen.variant, chosen.seconds + ours, once + theirs)


def _reads_z(kind: str, of_other: bool) -> bool:
    what = KINDS[kind]
    return what.of_z != "" or (what.join == "mul" and of_other)


def check(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, kind: str, other: Tensor | None) -> None:
    """Raise KernelError for operands that don't fit together."""
    lowrank_linear.check(x, a, b, bias, FAMILY)
    if kind not in KINDS:
        raise KernelError(f"lowrank_epilogue: kind {kind!r} is none of {', '.join(KINDS)}")
    if (KINDS[kind].join != "") != (other is not None):
        raise KernelError(f"lowrank_epilogue: {kind!r} {'takes no' if other is not None else 'needs an'} other operand")
    shape = (*x.shape[:-1], b.shape[0])
    if other is not None and (other.shape != shape or other.dtype not in launch.DTYPES or other.device != x.device):
        told, known = (
            f"other is {tuple(other.shape)} {other.dtype} on {other.device}",
            ", ".join(map(str, launch.DTYPES)),
        )
        raise KernelError(f"lowrank_epilogue: {told}; {tuple(shape)} on {x.device} of one of {known} fits")


def _plan(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Device | None, Shape]:
    flat = rows(x)
    return flat, launch.describe(x.device), Shape(len(flat), a.shape[1], b.shape[0], b.shape[1], bias is not None)


def _forward(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, kind: str, other: Tensor | None) -> Tensor:
    check(x, a, b, bias, kind, other)
    flat, device, shape = _plan(x, a, b, bias)
    gate = None if other is None else rows(other)
    dtype = None if gate is None else gate.dtype
    predict = functools.partial(predict_forward, shape, kind, x.dtype, other=dtype)
    variant = launch.pick(FAMILY, flat, device, predict) if dtype != torch.float64 else "gemms"
    if variant == "gemms" or device is None:
        y = reference(flat, a, b, bias, kind, gate).contiguous()
    else:
        from lrcompile.kernels import lowrank_linear_triton as kernels

        precision = launch.precision(x.dtype)
        tile = launch.need(tile_of(variant, shape, precision, device), FAMILY, variant)
        run, splits = {"fused": (kernels.fused, fused_splits), "narrow": (kernels.narrow, narrow_splits)}[variant]
        parts = splits(shape, x.dtype.itemsize, tile, precision, device)
        y, _ = run(flat, a.contiguous(), b.contiguous(), bias, tile, parts, epilogue=KINDS[kind], other=gate)
    return launch.shaped(y, (*x.shape[:-1], b.shape[0]))


def _forward_fake(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, kind: str, other: Tensor | None) -> Tensor:
    check(x, a, b, bias, kind, other)
    dtype = x.dtype if other is None else torch.promote_types(x.dtype, other.dtype)
    return x.new_empty((*x.shape[:-1], b.shape[0]), dtype=dtype)


def _backward(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    kind: str,
    other: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dz in x's dtype, dother in other's and x @ weight_aᵀ, for the kinds whose backward reads z; empty where not needed.

    needed: whether dz (and with it x @ weight_aᵀ) and dother are.
    """
    check(x, a, b, bias, kind, other)
    if dy.shape != (*x.shape[:-1], b.shape[0]):
        raise KernelError(f"lowrank_epilogue_backward: dY {tuple(dy.shape)} doesn't fit x {tuple(x.shape)}")
    flat, device, shape = _plan(x, a, b, bias)
    flat_dy, gate, (of_z, of_other) = rows(dy), None if other is None else rows(other), needed
    dtype = None if gate is None else gate.dtype
    predict = functools.partial(
        predict_backward, shape, kind, x.dtype, other=dtype, needed=(of_z, of_z, of_z, of_z, of_other)
    )
    variant = launch.pick(f"{FAMILY}_backward", flat, device, predict) if dy.dtype != torch.float64 else "gemms"
    dz: Tensor | None
    dother: Tensor | None
    h: Tensor | None
    if variant == "gemms" or device is None:
        h = F.linear(flat, a)
        dz, dother = epilogue.gradients(KINDS[kind], flat_dy, F.linear(h, b, bias), gate)
    else:
        from lrcompile.kernels import lowrank_epilogue_triton as kernels

        precision = launch.precision(x.dtype)
        tile = launch.need(tile_of("gradient", shape, precision, device), f"{FAMILY}_backward", variant)
        splits = fused_splits(shape, x.dtype.itemsize, tile, precision, device)
        a, b, what = a.contiguous(), b.contiguous(), KINDS[kind]
        dz, dother, h = kernels.gradient(flat_dy, flat, a, b, bias, what, gate, (of_z, of_other), tile, splits)
    dz = dz.contiguous().view(dy.shape) if dz is not None and of_z else x.new_empty(0)
    dother = dother.contiguous().view(dy.shape) if dother is not None and of_other else _like(dy, other).new_empty(0)
    return dz, dother, h if h is not None and of_z else x.new_empty(0)


def _like(dy: Tensor, other: Tensor | None) -> Tensor:
    return dy if other is None else other


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    kind: str,
    other: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    of_z, of_other = needed
    thin = (math.prod(x.shape[:-1]), a.shape[0])
    dother = _like(dy, other).new_empty(dy.shape if of_other else 0)
    return x.new_empty(dy.shape if of_z else 0), dother, x.new_empty(thin if of_z else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # Only what a gradient will read is saved.
    x, a, b, bias, kind, other = inputs
    of_a, of_b, of_other = (ctx.needs_input_grad[i] for i in (1, 2, 5))
    ctx.kind, ctx.reads_z = kind, _reads_z(kind, of_other)
    keep_x = ctx.reads_z or of_a or of_b
    ctx.dtypes = (x.dtype, None if other is None else other.dtype)
    gate = other if KINDS[kind].join == "mul" else None
    ctx.save_for_backward(x if keep_x else None, a, b, bias if ctx.reads_z else None, gate)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, a, b, bias, other = ctx.saved_tensors
    of_x, of_a, of_b, of_bias, _, of_other = ctx.needs_input_grad
    of_z = of_x or of_a or of_b or of_bias
    dz: Tensor | None
    dother: Tensor | None
    h: Tensor | None = None
    if ctx.reads_z:
        dz, dother, h = lowrank_epilogue_backward(dy, x, a, b, bias, ctx.kind, other, [of_z, of_other])
    else:  # plain torch: the compiler fuses it with what comes before
        gated = dy if other is None else dy * epilogue.ACTIVATIONS[KINDS[ctx.kind].of_other](other)
        dz = gated.to(ctx.dtypes[0])
        dother = dy.to(ctx.dtypes[1]) if of_other else None
    found: tuple[Tensor | None, ...] = (None,) * 4
    if of_z:
        needed = [of_x, of_a, of_b, of_bias]
        gradients = lowrank_linear_backward(dz, x, h, a, b, needed)
        found = tuple(gradient if want else None for gradient, want in zip(gradients, needed, strict=True))
    return (*found, None, dother if of_other else None)


lowrank_epilogue_backward = register(
    f"{FAMILY}_backward",
    "(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor? bias, str kind, Tensor? other, bool[2] needed) "
    "-> (Tensor dz, Tensor dother, Tensor h)",
    {"CPU": _backward, "CUDA": _backward},
    _backward_fake,
    cast=False,
)
lowrank_epilogue = register(
    FAMILY,
    "(Tensor x, Tensor a, Tensor b, Tensor? bias, str kind, Tensor? other) -> Tensor",
    {"CPU": _forward, "CUDA": _forward},
    _forward_fake,
    (_autograd, _setup),
    promoted=(4, 5),
)
