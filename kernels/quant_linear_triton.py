# mypy: allow-untyped-defs
"""The Triton code of products with a quantised matrix, a low-rank pair's added in the same kernel or not.

quant_linear.py and quant_lowrank_linear.py tell what is computed and when. Sizes: m tokens, k in_features, n
out_features, rank. The quantised matrix comes as decode_triton's seven pointers; accumulation is in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrcompile.kernels import decode
from lrcompile.kernels.aot import Specimen
from lrcompile.kernels.decode_triton import OPTIONS, constants, decode_tile, pointers
from lrcompile.kernels.launch import Tile, input_precision, on_device, padded

_POINTERS = ("codes", "scale", "zero", "table", "nested_scale", "nested_table", "nested_offset")
_SIDE = 8  # blocks of tokens that neighbouring programs cover before moving to the next columns


@triton.jit
def place(blocks_m, blocks_n, SIDE: tl.constexpr):
    """Which block of tokens and of columns a program owns: neighbours share both, so the L2 cache serves both."""
    pid = tl.program_id(0)
    stripe = SIDE * blocks_n
    top = pid // stripe * SIDE
    height = tl.minimum(blocks_m - top, SIDE)
    return top + pid % stripe % height, pid % stripe // height


@triton.jit
def forward_kernel(x, codes, scale, zero, table, nested_scale, nested_table, nested_offset, bias, h, b, y, factor,
                   m, n, k, rank, stride, share, HAS_BIAS: tl.constexpr, HAS_PAIR: tl.constexpr,
                   LAYOUT: tl.constexpr, GROUP: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
                   WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
                   SIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """y[s] = x·Wᵀ over the s-th share of k, the first with + factor · h·Bᵀ + bias: h (m, rank), b (n, rank).

    The product is computed transposed, W·xᵀ: the decoded tile is the left operand, which tensor cores take from
    registers, where it was decoded.
    """
    dtype = x.dtype.element_ty
    block_m, block_n = place(tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), SIDE)
    s = tl.program_id(1)
    top = block_m.to(tl.int64) * BLOCK_M
    first = block_n.to(tl.int64) * BLOCK_N
    height = tl.minimum(m - top, BLOCK_M).to(tl.int32)
    rows = tl.minimum(n - first, BLOCK_N).to(tl.int32)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)
    x += top * stride
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if HAS_PAIR:
        if s == 0:
            r = tl.arange(0, BLOCK_R)
            h += top * rank
            b += first * rank
            for start in range(0, rank, BLOCK_R):
                at = start + r
                b_tile = tl.load(b + j[:, None] * rank + at[None, :], (j[:, None] < rows) & (at[None, :] < rank), 0.0)
                h_tile = tl.load(h + i[None, :] * rank + at[:, None], (i[None, :] < height) & (at[:, None] < rank), 0.0)
                acc = tl.dot(b_tile, h_tile, acc, input_precision=PRECISION)
            acc *= factor
    end = tl.minimum(k, (s + 1) * share)
    for left in range(s * share, end, BLOCK_K):
        w = decode_tile(codes, scale, zero, table, nested_scale, nested_table, nested_offset, first, left, n, k,
                        LAYOUT, GROUP, NESTED, ALIGNED, WORDS, dtype, BLOCK_N, BLOCK_K)  # fmt: skip
        col = left + c
        x_tile = tl.load(x + i[None, :] * stride + col[:, None], (i[None, :] < height) & (col[:, None] < end), 0.0)
        acc = tl.dot(w, x_tile, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + first + j, j < rows, 0.0).to(tl.float32)[:, None]
    y += s.to(tl.int64) * m * n + top * n + first
    mask = (i[None, :] < height) & (j[:, None] < rows)
    tl.store(y + i[None, :].to(tl.int64) * n + j[:, None], acc.to(y.dtype.element_ty), mask)


@triton.jit
def sum_kernel(parts, bias, y, m, n, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y = the PARTS of (m, n) summed in their order, + bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = m.to(tl.int64) * n
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        acc += tl.load(parts + part * size + at, at < size, 0.0)
    if HAS_BIAS:
        acc += tl.load(bias + at % n, at < size, 0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), at < size)


@triton.jit
def backward_kernel(dy, codes, scale, zero, table, nested_scale, nested_table, nested_offset, g, a, dx, factor,
                    m, n, k, rank, stride, HAS_PAIR: tl.constexpr,
                    LAYOUT: tl.constexpr, GROUP: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
                    WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
                    SIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dX = dY·W + factor · g·A for BLOCK_M tokens and BLOCK_K columns, summed over n: g (m, rank), a (rank, k)."""
    dtype = dy.dtype.element_ty
    block_m, block_k = place(tl.cdiv(m, BLOCK_M), tl.cdiv(k, BLOCK_K), SIDE)
    top = block_m.to(tl.int64) * BLOCK_M
    left = block_k * BLOCK_K
    height = tl.minimum(m - top, BLOCK_M).to(tl.int32)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    col = left + tl.arange(0, BLOCK_K)
    dy += top * stride
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if HAS_PAIR:
        r = tl.arange(0, BLOCK_R)
        g += top * rank
        for start in range(0, rank, BLOCK_R):
            at = start + r
            g_tile = tl.load(g + i[:, None] * rank + at[None, :], (i[:, None] < height) & (at[None, :] < rank), 0.0)
            a_tile = tl.load(
                a + at[:, None].to(tl.int64) * k + col[None, :], (at[:, None] < rank) & (col[None, :] < k), 0.0
            )
            acc = tl.dot(g_tile, a_tile, acc, input_precision=PRECISION)
        acc *= factor
    for start in range(0, n, BLOCK_N):
        row = start + j
        dy_tile = tl.load(dy + i[:, None] * stride + row[None, :], (i[:, None] < height) & (row[None, :] < n), 0.0)
        first = tl.full((), 0, tl.int64) + start
        w = decode_tile(codes, scale, zero, table, nested_scale, nested_table, nested_offset, first, left, n, k,
                        LAYOUT, GROUP, NESTED, ALIGNED, WORDS, dtype, BLOCK_N, BLOCK_K)  # fmt: skip
        acc = tl.dot(dy_tile, w, acc, input_precision=PRECISION)
    mask = (i[:, None] < height) & (col[None, :] < k)
    tl.store(dx + top * k + i[:, None].to(tl.int64) * k + col[None, :], acc.to(dtype), mask)


class Pair(NamedTuple):
    """What a low-rank pair adds to a product: factor · narrow · wide, the narrow side computed beforehand.

    Attributes:
        narrow: x·Aᵀ forward, dY·B backward; (m, rank), contiguous.
        wide: B (n, rank) forward, A (rank, k) backward; contiguous, in the same dtype.
        factor: the pair's scale.
    """

    narrow: Tensor
    wide: Tensor
    factor: float


def forward(
    x: Tensor, packed: Sequence[Tensor], layout: str, group: int, bias: Tensor | None, tile: Tile, splits: int = 1,
    pair: Pair | None = None,
) -> Tensor:  # fmt: skip
    """y (m, n) of x (m, k), which has unit stride along k.

    Args:
        splits: shares of k, summed in a fixed order by a second launch where there is more than one.
    """
    m, k = x.shape
    n = decode.out_features(packed, layout, k)
    h, b, factor = pair or (None, None, 0.0)
    rank = 0 if b is None else b.shape[1]
    share = tile.block_k * triton.cdiv(k, tile.block_k * splits)
    parts = triton.cdiv(k, share)
    y = x.new_empty(m, n)
    out = y if parts == 1 else x.new_empty((parts, m, n), dtype=torch.float32)
    last = bias if parts == 1 else None
    with on_device(x):
        forward_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n), parts)](
            x, *pointers(packed, layout), last, h, b, out, factor, m, n, k, rank, x.stride(0), share,
            HAS_BIAS=last is not None, HAS_PAIR=pair is not None, **constants(packed, layout, group, k),
            **_blocks(tile, rank), PRECISION=input_precision(x.dtype), **tile.options, **OPTIONS,
        )  # fmt: skip
        if parts > 1:
            sum_kernel[(triton.cdiv(m * n, 1024),)](
                out, bias, y, m, n, PARTS=parts, HAS_BIAS=bias is not None, BLOCK=1024
            )
    return y


def backward(
    dy: Tensor, packed: Sequence[Tensor], layout: str, group: int, in_features: int, tile: Tile,
    pair: Pair | None = None,
) -> Tensor:  # fmt: skip
    """dX (m, in_features) of dy (m, n), which has unit stride along n."""
    m, n = dy.shape
    g, a, factor = pair or (None, None, 0.0)
    rank = 0 if a is None else a.shape[0]
    dx = dy.new_empty(m, in_features)
    with on_device(dy):
        backward_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(in_features, tile.block_k),)](
            dy, *pointers(packed, layout), g, a, dx, factor, m, n, in_features, rank, dy.stride(0),
            HAS_PAIR=pair is not None, **constants(packed, layout, group, in_features),
            **_blocks(tile, rank), PRECISION=input_precision(dy.dtype), **tile.options, **OPTIONS,
        )  # fmt: skip
    return dx


def _blocks(tile: Tile, rank: int) -> dict[str, int]:
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return blocks | {"BLOCK_R": min(64, padded(rank)) if rank else 16, "SIDE": _SIDE}


def specimen(kernel: str, row: dict[str, Any], layout: str = "nf4", group: int = 64, pair: bool = True) -> Specimen:
    """What a row of the tuning table compiles to, in bf16: with nested scales for nf4 and fp4, a bias and a pair."""
    tile = Tile(**row["tile"])
    nested = layout in ("nf4", "fp4")
    codes = "u8" if nested else "i8"
    pointers = {"codes": codes, "scale": codes if nested else "bf16" if layout == "int4" else "fp32"}
    pointers |= {"zero": "bf16"} if layout == "int4" else {}
    pointers |= dict.fromkeys(("table", "nested_scale", "nested_table", "nested_offset"), "fp32") if nested else {}
    forwards = kernel == "forward"
    pointers |= dict.fromkeys(("x", "bias", "y") if forwards else ("dy", "dx"), "bf16")
    pointers |= dict.fromkeys(("h", "b") if forwards else ("g", "a"), "bf16") if pair else {}
    function = forward_kernel if forwards else backward_kernel
    absent = [name for name in (*_POINTERS, "h", "b", "g", "a") if name in function.arg_names and name not in pointers]
    constants: dict[str, Any] = dict.fromkeys(absent)
    constants |= {"LAYOUT": layout, "GROUP": group, "NESTED": nested, "ALIGNED": True, "WORDS": True, "HAS_PAIR": pair}
    constants |= _blocks(tile, 64) | {"PRECISION": "ieee", "factor": 2.0} | ({"HAS_BIAS": True} if forwards else {})
    return Specimen(function, pointers, constants)
