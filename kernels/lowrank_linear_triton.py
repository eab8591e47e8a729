"""The Triton code of lowrank_linear and its launchers; lowrank_linear.py tells what is computed and when each is used.

A file of its own, imported where a kernel is first launched: the eager modules import lowrank_linear.py for its
reference, on machines that have no Triton too.

Sizes: m tokens, k in_features, n out_features, rank. All accumulation is in fp32. Rows are addressed in 64 bits (a scalar
base for each program), offsets inside a tile in 32.
"""

# mypy: allow-untyped-defs
# Functions under triton.jit have tensors and addresses of any type for arguments.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrcompile.kernels.aot import Specimen
from lrcompile.kernels.epilogue import Epilogue
from lrcompile.kernels.epilogue_triton import finish
from lrcompile.kernels.launch import Tile, input_precision, on_device, padded

PLAIN = Epilogue()


@triton.jit
def thin_product(x, a, rows, k, rank, stride, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """x·Aᵀ for BLOCK_M rows, whose first is where `x` points: (BLOCK_M, RANK) in fp32; `rows` of them exist."""
    i = tl.arange(0, BLOCK_M)
    r = tl.arange(0, RANK)
    c = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in range(0, k, BLOCK_K):
        col = start + c
        x_tile = tl.load(x + i[:, None] * stride + col[None, :], (i[:, None] < rows) & (col[None, :] < k), 0.0)
        a_tile = tl.load(a + r[None, :] * k + col[:, None], (r[None, :] < rank) & (col[:, None] < k), 0.0)
        acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def fused_kernel(x, a, b, bias, other, y, kept, m, n, k, rank, stride, other_stride, columns, HAS_BIAS: tl.constexpr,
                 KEEP: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, OF_Z: tl.constexpr = "",
                 OF_OTHER: tl.constexpr = "", JOIN: tl.constexpr = ""):  # fmt: skip
    """y for BLOCK_M rows and `columns` columns: the rank-wide intermediate never leaves the chip, unless it is kept.

    The epilogue named by the last three is applied before y is rounded.

    Programs beside each other in the second grid axis compute it again from x, which the L2 cache then holds.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.minimum(m - first, BLOCK_M).to(tl.int32)
    h = thin_product(x + first * stride, a, rows, k, rank, stride, RANK, BLOCK_M, BLOCK_K, PRECISION)
    h = h.to(x.dtype.element_ty)  # rounded as the unfused products round it

    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK)
    if KEEP:
        if tl.program_id(1) == 0:
            kept += first * rank
            tl.store(kept + i[:, None] * rank + r[None, :], h, (i[:, None] < rows) & (r[None, :] < rank))
    left = tl.program_id(1).to(tl.int64) * columns
    b += left * rank
    y += first * n + left
    if JOIN != "":
        other += first * other_stride + left
    width = tl.minimum(columns, n - left).to(tl.int32)
    for start in range(0, width, BLOCK_N):
        col = start + j
        b_tile = tl.load(b + col[None, :] * rank + r[:, None], (col[None, :] < width) & (r[:, None] < rank), 0.0)
        out = tl.dot(h, b_tile, input_precision=PRECISION)
        if HAS_BIAS:
            out += tl.load(bias + left + col, col < width, 0.0).to(tl.float32)[None, :]
        mask = (i[:, None] < rows) & (col[None, :] < width)
        out = finish(out, other, i[:, None] * other_stride + col[None, :], mask, OF_Z, OF_OTHER, JOIN)
        tl.store(y + i[:, None].to(tl.int64) * n + col[None, :], out.to(y.dtype.element_ty), mask)


@triton.jit
def narrow_kernel(x, w, bias, other, y, m, n, k, stride, other_stride, share, PARTS: tl.constexpr,
                  HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  PRECISION: tl.constexpr, OF_Z: tl.constexpr = "", OF_OTHER: tl.constexpr = "",
                  JOIN: tl.constexpr = ""):  # fmt: skip
    """y[s] = x·Wᵀ + bias for m <= BLOCK_M rows, over the s-th share of k: w (n, k) is read once, by rows.

    x comes in PARTS, (PARTS, m, k), which are summed in their order and rounded to w's dtype. The epilogue named by the
    last three is applied before y is rounded.
    """
    s = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    columns = tl.minimum(n - first, BLOCK_N).to(tl.int32)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)
    w += first * k
    end = tl.minimum(k, (s + 1) * share)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(s * share, end, BLOCK_K):
        col = start + c
        here = (i[:, None] < m) & (col[None, :] < end)
        x_ptrs = x + i[:, None] * stride + col[None, :]
        x_tile = tl.load(x_ptrs, here, 0.0)
        for part in tl.static_range(1, PARTS):
            x_tile += tl.load(x_ptrs + part * m * stride, here, 0.0)
        w_tile = tl.load(w + j[None, :] * k + col[:, None], (j[None, :] < columns) & (col[:, None] < end), 0.0)
        acc = tl.dot(x_tile.to(w.dtype.element_ty), w_tile, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + first + j, j < columns, 0.0).to(tl.float32)[None, :]
    y += s.to(tl.int64) * m * n + first
    mask = (i[:, None] < m) & (j[None, :] < columns)
    if JOIN != "":
        other += first
    acc = finish(acc, other, i[:, None] * other_stride + j[None, :], mask, OF_Z, OF_OTHER, JOIN)
    tl.store(y + i[:, None].to(tl.int64) * n + j[None, :], acc.to(y.dtype.element_ty), mask)


@triton.jit
def shared_kernel(dy, x, kept, a, b, g, db, dbias, m, n, k, rank, stride, dy_stride, HAS_BIAS: tl.constexpr,
                  KEPT: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """One read of dY for both products with it: g = dY·B, and this program's part of dB = dYᵀ·(x·Aᵀ) and of dbias.

    A program owns BLOCK_M rows and walks all n columns: g stays in registers to the end, the parts of dB (one for each
    program, summed afterwards in a fixed order) leave tile by tile. x·Aᵀ is computed here from x, unless it was kept.
    """
    pid = tl.program_id(0).to(tl.int64)
    first = pid * BLOCK_M
    rows = tl.minimum(m - first, BLOCK_M).to(tl.int32)
    dtype = dy.dtype.element_ty
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK)
    thin = i[:, None] * rank + r[None, :]
    inside = (i[:, None] < rows) & (r[None, :] < rank)
    if KEPT:
        h = tl.load(kept + first * rank + thin, inside, 0.0)
    else:
        h = thin_product(x + first * stride, a, rows, k, rank, stride, RANK, BLOCK_M, BLOCK_K, PRECISION).to(dtype)

    dy += first * dy_stride
    db += pid * n * rank
    dbias += pid * n
    acc = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in range(0, n, BLOCK_N):
        col = start + j
        dy_tile = tl.load(dy + i[:, None] * dy_stride + col[None, :], (i[:, None] < rows) & (col[None, :] < n), 0.0)
        mask = (col[:, None] < n) & (r[None, :] < rank)
        b_tile = tl.load(b + col[:, None] * rank + r[None, :], mask, 0.0)
        acc = tl.dot(dy_tile, b_tile, acc, input_precision=PRECISION)
        part = tl.dot(tl.trans(dy_tile), h, input_precision=PRECISION)
        tl.store(db + col[:, None] * rank + r[None, :], part, mask)
        if HAS_BIAS:
            tl.store(dbias + col, tl.sum(dy_tile.to(tl.float32), 0), col < n)
    tl.store(g + first * rank + thin, acc.to(dtype), inside)


def fused(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    tile: Tile,
    splits: int = 1,
    keep: bool = False,
    epilogue: Epilogue = PLAIN,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y (m, n) in one launch. x (m, k) has unit stride along k; a (rank, k) and b (n, rank) are contiguous.

    Args:
        splits: programs that share a block of rows, each with its part of the columns.
        keep: write x·Aᵀ (m, rank) too, and return it.
        epilogue, other: what follows, and its operand (m, n) with unit stride along n; y's dtype is promoted by it.
    """
    (m, k), (n, rank) = x.shape, b.shape
    y = _output(x, n, other)
    h = x.new_empty(m, rank) if keep else None
    columns = tile.block_n * triton.cdiv(n, tile.block_n * splits)
    grid = (triton.cdiv(m, tile.block_m), triton.cdiv(n, columns))
    with on_device(x):
        fused_kernel[grid](
            x, a, b, bias, other, y, h, m, n, k, rank, x.stride(0), _stride(other), columns, HAS_BIAS=bias is not None,
            KEEP=keep, RANK=padded(rank), **blocks(tile, x.dtype), **epilogue.constants,
        )  # fmt: skip
    return y, h


def _output(x: Tensor, n: int, other: Tensor | None) -> Tensor:
    return x.new_empty((len(x), n), dtype=x.dtype if other is None else torch.promote_types(x.dtype, other.dtype))


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def blocks(tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """What every kernel is launched with: the tile, and how fp32 operands are multiplied."""
    sides = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return {**sides, "PRECISION": input_precision(dtype), **tile.options}


def narrow(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    tile: Tile,
    splits: int = 1,
    keep: bool = False,
    epilogue: Epilogue = PLAIN,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y (m, n) for m <= tile.block_m, at any rank, in two launches; operands as `fused` takes them.

    Each launch reads its factor once, by rows, with as many programs as it has blocks of rows; between the two stands
    x·Aᵀ in fp32, `splits` parts of (m, rank), which never leaves the L2 cache. Owning a slice of the rank through both
    products instead would take as many launches (the partial outputs have to be summed), read b by columns, and write
    rank / slice times the output.

    Args:
        splits: shares of k that x·Aᵀ is summed from.
        keep: return x·Aᵀ (m, rank) too.
        epilogue, other: as `fused` takes them.
    """
    (m, k), (n, rank) = x.shape, b.shape
    share = tile.block_k * triton.cdiv(k, tile.block_k * splits)
    parts = triton.cdiv(k, share)
    h = x.new_empty((parts, m, rank), dtype=torch.float32)
    y = _output(x, n, other)
    same = blocks(tile, x.dtype)
    with on_device(x):
        narrow_kernel[(triton.cdiv(rank, tile.block_n), parts)](
            x, a, None, None, h, m, rank, k, x.stride(0), 0, share, PARTS=1, HAS_BIAS=False, **same
        )
        narrow_kernel[(triton.cdiv(n, tile.block_n), 1)](
            h, b, bias, other, y, m, n, rank, rank, _stride(other), rank, PARTS=parts, HAS_BIAS=bias is not None,
            **same, **epilogue.constants,
        )  # fmt: skip
    return y, h.sum(0).to(x.dtype) if keep else None


def shared(
    dy: Tensor, x: Tensor | None, h: Tensor | None, a: Tensor, b: Tensor, bias: bool, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """g = dY·B (m, rank), dB (n, rank) and dbias (n,), empty where not asked for, from one read of dY.

    dy (m, n) and x (m, k) have unit stride along their last dimension; a and b are contiguous. h (m, rank), contiguous,
    is x·Aᵀ where it was kept, and x isn't read then.
    """
    (m, n), (rank, k) = dy.shape, a.shape
    programs = triton.cdiv(m, tile.block_m)
    g = dy.new_empty(m, rank)
    db = dy.new_empty((programs, n, rank), dtype=torch.float32)
    dbias = dy.new_empty((programs, n if bias else 0), dtype=torch.float32)
    with on_device(dy):
        shared_kernel[(programs,)](
            dy, x, h, a, b, g, db, dbias, m, n, k, rank, _stride(x), dy.stride(0), HAS_BIAS=bias, KEPT=h is not None,
            RANK=padded(rank), **blocks(tile, dy.dtype),
        )  # fmt: skip
    return g, db.sum(0).to(dy.dtype), dbias.sum(0).to(dy.dtype)


def specimen(kernel: str, row: dict[str, Any]) -> Specimen:
    """What a row of the tuning table compiles to: the hungriest of the shapes it serves, all extras on."""
    tile = Tile(**row["tile"])
    element = "bf16" if row["precision"] == "half" else "fp32"
    constants: dict[str, Any] = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    constants |= {"HAS_BIAS": True, "PRECISION": "tf32" if row["precision"] == "tf32" else "ieee"}
    plain = {"other": None, **PLAIN.constants}
    if kernel == "narrow":  # its second launch: a bias, and fp32 parts to sum
        pointers = dict.fromkeys(("w", "bias", "y"), element) | {"x": "fp32"}
        return Specimen(narrow_kernel, pointers, constants | plain | {"PARTS": 4})
    constants |= {"RANK": padded(row["up_to"]["rank"])}
    if kernel == "fused":
        pointers = dict.fromkeys(("x", "a", "b", "bias", "y", "kept"), element)
        return Specimen(fused_kernel, pointers, constants | plain | {"KEEP": True})
    pointers = dict.fromkeys(("dy", "x", "a", "b", "g"), element) | {"db": "fp32", "dbias": "fp32"}
    return Specimen(shared_kernel, pointers, constants | {"kept": None, "KEPT": False})
