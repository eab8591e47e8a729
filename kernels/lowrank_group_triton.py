# mypy: allow-untyped-defs
"""The Triton code of lowrank_group and its launcher.

Sizes: m tokens, k in_features; of pair i, n_i out_features and rank_i. All accumulation is in fp32. Rows are addressed in
64 bits (a scalar base for each program), offsets inside a tile in 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lrcompile.kernels.aot import Specimen
from lrcompile.kernels.launch import Tile, on_device, padded
from lrcompile.kernels.lowrank_group import MOST
from lrcompile.kernels.lowrank_linear_triton import blocks


@triton.jit
def up_projection(h, b, bias, y, first, rows, n, rank, columns, RANK: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The columns of y that this program has, of the rows from `first` on: h·Bᵀ + bias."""
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK)
    left = tl.program_id(1).to(tl.int64) * columns
    b += left * rank
    y += first * n + left
    width = tl.minimum(columns, n - left).to(tl.int32)
    for start in range(0, width, BLOCK_N):
        col = start + j
        b_tile = tl.load(b + col[None, :] * rank + r[:, None], (col[None, :] < width) & (r[:, None] < rank), 0.0)
        out = tl.dot(h, b_tile, input_precision=PRECISION)
        if bias is not None:
            out += tl.load(bias + left + col, col < width, 0.0).to(tl.float32)[None, :]
        mask = (i[:, None] < rows) & (col[None, :] < width)
        tl.store(y + i[:, None].to(tl.int64) * n + col[None, :], out.to(y.dtype.element_ty), mask)


@triton.jit
def fused_kernel(x, a0, a1, a2, b0, b1, b2, bias0, bias1, bias2, y0, y1, y2, m, k, stride, n0, n1, n2, rank0, rank1,
                 rank2, columns0, columns1, columns2, RANK0: tl.constexpr, RANK1: tl.constexpr, RANK2: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Of up to three pairs (RANK of the absent ones is 0), BLOCK_M rows of y_i and `columns_i` columns.

    x is read once, for the intermediates of all pairs together; then the up-projections follow one by one.
    """
    dtype = x.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.minimum(m - first, BLOCK_M).to(tl.int32)
    i = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_K)
    x += first * stride
    r0 = tl.arange(0, RANK0)
    acc0 = tl.zeros((BLOCK_M, RANK0), tl.float32)
    if RANK1 > 0:
        r1 = tl.arange(0, RANK1)
        acc1 = tl.zeros((BLOCK_M, RANK1), tl.float32)
    if RANK2 > 0:
        r2 = tl.arange(0, RANK2)
        acc2 = tl.zeros((BLOCK_M, RANK2), tl.float32)
    for start in range(0, k, BLOCK_K):
        col = start + c
        x_tile = tl.load(x + i[:, None] * stride + col[None, :], (i[:, None] < rows) & (col[None, :] < k), 0.0)
        a_tile = tl.load(a0 + r0[None, :] * k + col[:, None], (r0[None, :] < rank0) & (col[:, None] < k), 0.0)
        acc0 = tl.dot(x_tile, a_tile, acc0, input_precision=PRECISION)
        if RANK1 > 0:
            a_tile1 = tl.load(a1 + r1[None, :] * k + col[:, None], (r1[None, :] < rank1) & (col[:, None] < k), 0.0)
            acc1 = tl.dot(x_tile, a_tile1, acc1, input_precision=PRECISION)
        if RANK2 > 0:
            a_tile2 = tl.load(a2 + r2[None, :] * k + col[:, None], (r2[None, :] < rank2) & (col[:, None] < k), 0.0)
            acc2 = tl.dot(x_tile, a_tile2, acc2, input_precision=PRECISION)
    up_projection(acc0.to(dtype), b0, bias0, y0, first, rows, n0, rank0, columns0, RANK0, BLOCK_M, BLOCK_N, PRECISION)
    if RANK1 > 0:
        h1 = acc1.to(dtype)
        up_projection(h1, b1, bias1, y1, first, rows, n1, rank1, columns1, RANK1, BLOCK_M, BLOCK_N, PRECISION)
    if RANK2 > 0:
        h2 = acc2.to(dtype)
        up_projection(h2, b2, bias2, y2, first, rows, n2, rank2, columns2, RANK2, BLOCK_M, BLOCK_N, PRECISION)


def fused(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Sequence[Tensor], tile: Tile, splits: int = 1
) -> list[Tensor]:
    """Every y_i (m, n_i) in one launch, of up to three pairs.

    x (m, k) has unit stride along k; every a_i (rank_i, k) and b_i (n_i, rank_i) is contiguous; bias is empty or has an
    (n_i,) for each.

    Args:
        splits: programs that share a block of rows, each with its part of every pair's columns.
    """
    (m, k), absent = x.shape, [None] * (MOST - len(a))
    offsets: list[Tensor | None] = [*bias] or [None] * len(a)
    widths, ranks = [len(right) for right in b], [len(left) for left in a]
    y = [x.new_empty(m, n) for n in widths]
    columns = [tile.block_n * triton.cdiv(n, tile.block_n * splits) for n in widths]
    programs = max(triton.cdiv(n, c) for n, c in zip(widths, columns, strict=True))
    none = [0] * len(absent)
    sizes = dict(zip((f"RANK{i}" for i in range(MOST)), [padded(rank) for rank in ranks] + none, strict=True))
    with on_device(x):
        fused_kernel[(triton.cdiv(m, tile.block_m), programs)](
            x, *a, *absent, *b, *absent, *offsets, *absent, *y, *absent, m, k, x.stride(0),
            *widths, *none, *ranks, *none, *columns, *none, **sizes, **blocks(tile, x.dtype),
        )  # fmt: skip
    return y


def specimen(kernel: str, row: dict[str, Any], pairs: int = MOST) -> Specimen:
    """What a row of the tuning table compiles to: the largest total rank it serves over two or three pairs, with biases."""
    tile, most = Tile(**row["tile"]), row["up_to"]["rank"]
    element = "bf16" if row["precision"] == "half" else "fp32"
    constants: dict[str, Any] = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    constants["PRECISION"] = "tf32" if row["precision"] == "tf32" else "ieee"
    ranks = [most // 2, most // 4, most // 4] if pairs == MOST else [most // 2, most // 2, 0]
    constants |= {f"RANK{i}": rank for i, rank in enumerate(ranks)}
    given = {f"{name}{i}": rank for name in ("a", "b", "bias", "y") for i, rank in enumerate(ranks)}
    constants |= {name: None for name, rank in given.items() if rank == 0}
    pointers = dict.fromkeys(("x", *(name for name, rank in given.items() if rank)), element)
    return Specimen(fused_kernel, pointers, constants)
