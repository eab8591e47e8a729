"""The linear with a quantised, frozen weight: y = x · decoded(Q)ᵀ + bias, and dX = dY · decoded(Q).

Two implementations: `fused`, one kernel that decodes Q tile by tile inside the product, from a single token (its sum
split over in_features, the shares added in a fixed order) to many; and `gemms`, Q decoded into a temporary matrix and
multiplied by the vendor's library, which is what a compiler without these kernels does. Nothing dense is kept for
backward, and `fused` forms no dense matrix at all. Which one runs is the cost model's word (`predict`).

A low-rank pair beside the quantised weight is part of both (quant_lowrank_linear.py has its operators).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lrcompile.cost import Choice, Cost, Device, choose, library_product, total
from lrcompile.errors import KernelError
from lrcompile.kernels import decode, launch
from lrcompile.kernels.launch import Tile, rows, tuned
from lrcompile.kernels.op import register

FAMILY = "quant_linear"

# Counted in the machine code of the shipped tiles for sm_80 and sm_90, all layouts: 7 to 9 instructions a value.
_DECODING = 8
_MOST_SPLITS = 8


def reference(
    x: Float[Tensor, "*batch in_features"],
    packed: Sequence[Tensor],
    layout: str,
    group: int,
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """The weight decoded, then F.linear: the oracle of every kernel of this family.

    Args:
        x: (..., in_features), floating.
        packed, layout, group: the quantised weight, as `decode.reference` takes it.
        bias: (out_features,) or None, in x's dtype.

    Returns:
        (..., out_features), in x's dtype.
    """
    return F.linear(x, decode.reference(packed, layout, group, x.shape[-1], x.dtype), bias)


@dataclass(frozen=True)
class Shape:
    """Sizes of a quantised linear.

    Attributes:
        tokens: rows of x, all leading dimensions together.
        in_features, out_features: of the weight.
        layout, group: how it is stored.
        nested: whether its scales are quantised too.
        rank: of the pair beside it; 0 for none.
    """

    tokens: int
    in_features: int
    out_features: int
    layout: str
    group: int
    nested: bool = False
    rank: int = 0

    @property
    def packed_bytes(self) -> float:
        """Bytes of the quantised weight."""
        scale = {"int4": 4.0}.get(self.layout, 1.0 + 4 / decode.NESTED_GROUP if self.nested else 4.0)
        code = 1.0 if self.layout in ("int8", "int8_row") else 0.5
        return self.in_features * self.out_features * (code + scale / (self.group or self.in_features))


def tile_for(kernel: str, tokens: int, dtype: torch.dtype, device: Device) -> Tile | None:
    """The shipped tile of the "forward" or "backward" kernel; None where it is not for this dtype."""
    return tuned(FAMILY, kernel, device.arch, launch.precision(dtype), tokens=tokens)


def splits_for(tokens: int, in_features: int, out_features: int, tile: Tile, device: Device) -> int:
    """Shares of in_features: two programs for each multiprocessor, and two blocks at least for each share."""
    blocks = math.ceil(tokens / tile.block_m) * math.ceil(out_features / tile.block_n)
    wanted = 2 * device.multiprocessors // max(1, blocks)
    return max(1, min(wanted, in_features // (2 * tile.block_k), _MOST_SPLITS))


def predict_forward(shape: Shape, dtype: torch.dtype, device: Device) -> Choice:
    """Which implementation computes y, and the predicted seconds."""
    m, k, n = shape.tokens, shape.in_features, shape.out_features
    predicted = {"gemms": _library(m, n, k, shape, dtype, device)}
    tile = tile_for("forward", m, dtype, device)
    if tile is not None:
        splits = splits_for(m, k, n, tile, device)
        parts = splits * m * n * 8 if splits > 1 else 0  # in fp32, written and read in the cache
        launches, steps = (1 if splits == 1 else 2), math.ceil(k / (splits * tile.block_k))
        predicted["fused"] = _fused(
            m, n, k, (tile.block_m, tile.block_n), shape, dtype, device, parts, splits, launches, steps
        )
    return choose(predicted)


def predict_backward(shape: Shape, dtype: torch.dtype, device: Device) -> Choice:
    """What computes dX, and the predicted seconds.

    Ours wherever a tile is shipped, slower too where tokens are many: a dense copy of the weight, which the library's
    product would need, is what a quantised base is there to avoid in training.
    """
    m, k, n = shape.tokens, shape.in_features, shape.out_features
    gemms = _library(m, k, n, shape, dtype, device)
    tile = tile_for("backward", m, dtype, device)
    if tile is None:
        return Choice("gemms", gemms, gemms)
    steps = math.ceil(n / tile.block_n)
    ours = _fused(m, k, n, (tile.block_m, tile.block_k), shape, dtype, device, steps=steps)
    return Choice("fused", ours, gemms)


def _library(m: int, wide: int, deep: int, shape: Shape, dtype: torch.dtype, device: Device) -> float:
    """Seconds to decode, and to multiply (m, deep) by the (deep, wide) matrix; with the pair's two thin products."""
    size, rate = dtype.itemsize, launch.precision(dtype)
    dense = wide * deep * size
    far = dense if dense > device.l2_bytes / 2 else 0  # a small one is read back from the cache
    count = wide * deep
    costs = [
        Cost(0, shape.packed_bytes + far, dense, instructions=_DECODING * count),
        library_product(m, wide, deep, (m * deep + m * wide) * size + far, device),
    ]
    if shape.rank:
        costs.append(_narrow(m, deep, shape.rank, size, device))
        costs.append(library_product(m, wide, shape.rank, (2 * m * wide + shape.rank * wide) * size, device))
    return total(costs, device, rate)


def _narrow(m: int, deep: int, rank: int, size: int, device: Device) -> Cost:
    return library_product(m, rank, deep, (m * deep + rank * deep) * size, device)


def _fused(
    m: int, wide: int, deep: int, block: tuple[int, int], shape: Shape, dtype: torch.dtype, device: Device,
    parts: float = 0, splits: int = 1, launches: int = 1, steps: int = 0,
) -> float:  # fmt: skip
    """Seconds of the fused kernel, and of the pair's narrow product before it."""
    size, rate, rank = dtype.itemsize, launch.precision(dtype), shape.rank
    high, across = math.ceil(m / block[0]), math.ceil(wide / block[1])
    again = (across - 1) * m * deep * size + (high - 1) * shape.packed_bytes + parts
    cost = Cost(
        2 * high * block[0] * wide * (deep + rank),
        shape.packed_bytes + (m * deep + m * wide + rank * wide) * size,
        again,
        programs=high * across * splits,
        launches=launches,
        steps=steps,
        instructions=_DECODING * high * wide * deep,
    )
    return total([cost] + ([_narrow(m, deep, rank, size, device)] if rank else []), device, rate)


def check(op: str, x: Tensor, packed: Sequence[Tensor], layout: str, group: int, bias: Tensor | None) -> None:
    """Raise KernelError for operands that don't fit together."""
    k = x.shape[-1] if x.dim() else 0
    wrong = decode.misfit(packed, layout, group, k) if k else "x needs features"
    if wrong:
        raise KernelError(f"{op}: x {tuple(x.shape)} and an {layout} weight in groups of {group}: {wrong}")
    if x.dtype not in launch.DTYPES or (bias is not None and bias.dtype != x.dtype):
        told, known = (
            f"x is {x.dtype}" + ("" if bias is None else f", the bias {bias.dtype}"),
            ", ".join(map(str, launch.DTYPES)),
        )
        raise KernelError(f"{op}: {told}; give both one dtype of {known}, or enter autocast")
    if bias is not None and tuple(bias.shape) != (decode.out_features(packed, layout, k),):
        raise KernelError(
            f"{op}: bias {tuple(bias.shape)} doesn't fit {decode.out_features(packed, layout, k)} columns"
        )
    devices = {t.device for t in (x, *packed, *([] if bias is None else [bias]))}
    if len(devices) > 1:
        raise KernelError(f"{op}: operands on {', '.join(sorted(map(str, devices)))}; move them to one device")


def frozen(op: str, packed: Sequence[Tensor]) -> None:
    """Raise KernelError for a quantised weight that is to be trained: its gradient would silently be none."""
    if any(t.requires_grad for t in packed):
        raise KernelError(f"{op}: a quantised weight is frozen, and a tensor of it wants a gradient; detach it")


def check_backward(op: str, dy: Tensor, packed: Sequence[Tensor], layout: str, group: int, in_features: int) -> None:
    """Raise KernelError where the gradient of the result doesn't fit the weight: a kernel would read beyond it."""
    wrong = decode.misfit(packed, layout, group, in_features)
    if wrong or dy.shape[-1] != decode.out_features(packed, layout, in_features):
        raise KernelError(f"{op}: dY {tuple(dy.shape)} doesn't fit an {layout} weight of {in_features} columns {wrong}")


def dense(packed: Sequence[Tensor], layout: str, group: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The decoded weight, by our kernel where it runs."""
    if launch.describe(packed[0].device) is None:
        return decode.reference(packed, layout, group, in_features, dtype)
    from lrcompile.kernels import decode_triton

    return decode_triton.dense(packed, layout, group, in_features, dtype)


def shape_of(tokens: int, in_features: int, packed: Sequence[Tensor], layout: str, group: int, rank: int = 0) -> Shape:
    """The sizes that `predict_forward` and `predict_backward` take."""
    n = decode.out_features(packed, layout, in_features)
    return Shape(tokens, in_features, n, layout, group, len(packed) == 5, rank)


def _forward(x: Tensor, packed: Sequence[Tensor], layout: str, group: int, bias: Tensor | None) -> Tensor:
    check(FAMILY, x, packed, layout, group, bias)
    packed, flat = [t.contiguous() for t in packed], rows(x)
    m, k = flat.shape
    device = launch.describe(x.device)
    shape = shape_of(m, k, packed, layout, group)
    variant = launch.pick(FAMILY, flat, device, lambda known: predict_forward(shape, x.dtype, known))
    if variant == "gemms" or device is None:
        y = F.linear(flat, dense(packed, layout, group, k, x.dtype), bias)
    else:
        from lrcompile.kernels import quant_linear_triton as kernels

        tile = launch.need(tile_for("forward", m, x.dtype, device), FAMILY, variant)
        splits = splits_for(m, k, shape.out_features, tile, device)
        y = kernels.forward(flat, packed, layout, group, bias, tile, splits)
    return launch.shaped(y, (*x.shape[:-1], shape.out_features))


def _forward_fake(x: Tensor, packed: Sequence[Tensor], layout: str, group: int, bias: Tensor | None) -> Tensor:
    check(FAMILY, x, packed, layout, group, bias)
    return x.new_empty((*x.shape[:-1], decode.out_features(packed, layout, x.shape[-1])))


def _backward(dy: Tensor, packed: Sequence[Tensor], layout: str, group: int, in_features: int) -> Tensor:
    """dX (..., in_features)."""
    check_backward(f"{FAMILY}_backward", dy, packed, layout, group, in_features)
    packed, flat = [t.contiguous() for t in packed], rows(dy)
    device = launch.describe(dy.device)
    shape = shape_of(flat.shape[0], in_features, packed, layout, group)
    name = f"{FAMILY}_backward"
    variant = launch.pick(name, flat, device, lambda known: predict_backward(shape, dy.dtype, known))
    if variant == "gemms" or device is None:
        dx = flat @ dense(packed, layout, group, in_features, dy.dtype)
    else:
        from lrcompile.kernels import quant_linear_triton as kernels

        tile = launch.need(tile_for("backward", flat.shape[0], dy.dtype, device), name, variant)
        dx = kernels.backward(flat, packed, layout, group, in_features, tile)
    return dx.view(*dy.shape[:-1], in_features)


def _backward_fake(dy: Tensor, packed: Sequence[Tensor], layout: str, group: int, in_features: int) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, ctx.layout, ctx.group, _ = inputs
    frozen(FAMILY, packed)
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(*packed)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    of_x, of_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    packed = ctx.saved_tensors
    dx = quant_linear_backward(dy, packed, ctx.layout, ctx.group, ctx.in_features) if of_x else None
    return dx, [None] * len(packed), None, None, rows(dy).sum(0) if of_bias else None


quant_linear_backward = register(
    f"{FAMILY}_backward",
    "(Tensor dy, Tensor[] packed, str layout, int group, SymInt in_features) -> Tensor",
    {"CPU": _backward, "CUDA": _backward},
    _backward_fake,
    cast=False,
)
quant_linear = register(
    FAMILY,
    "(Tensor x, Tensor[] packed, str layout, int group, Tensor? bias) -> Tensor",
    {"CPU": _forward, "CUDA": _forward},
    _forward_fake,
    (_autograd, _setup_context),
    promoted=(1,),  # scales and tables keep their precision
)
