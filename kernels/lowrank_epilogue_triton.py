# mypy: allow-untyped-defs
"""The Triton code of lowrank_epilogue's backward; forward is lowrank_linear's kernels with an epilogue.

Sizes: m tokens, k in_features, n out_features, rank. All accumulation and all pointwise work is in fp32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lrcompile.kernels import lowrank_linear_triton
from lrcompile.kernels.aot import Specimen
from lrcompile.kernels.epilogue import KINDS, Epilogue
from lrcompile.kernels.epilogue_triton import activate, slope
from lrcompile.kernels.launch import Tile, on_device, padded
from lrcompile.kernels.lowrank_linear_triton import blocks, thin_product


@triton.jit
def gradient_kernel(dy, x, a, b, bias, other, dz, dother, kept, m, n, k, rank, stride, dy_stride, other_stride,
                    columns, HAS_BIAS: tl.constexpr, OF_DZ: tl.constexpr, OF_DOTHER: tl.constexpr, RANK: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
                    OF_Z: tl.constexpr, OF_OTHER: tl.constexpr, JOIN: tl.constexpr):  # fmt: skip
    """dz and dother for BLOCK_M rows and `columns` columns; z is computed here from x, and never stored.

    Beside dz goes x·Aᵀ, which the pair's own backward reads.

    The epilogue is one whose backward reads z: an activation of z, or a product with `other`.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.minimum(m - first, BLOCK_M).to(tl.int32)
    h = thin_product(x + first * stride, a, rows, k, rank, stride, RANK, BLOCK_M, BLOCK_K, PRECISION)
    h = h.to(x.dtype.element_ty)

    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK)
    left = tl.program_id(1).to(tl.int64) * columns
    width = tl.minimum(columns, n - left).to(tl.int32)
    b += left * rank
    dy += first * dy_stride + left
    if OF_DZ:
        dz += first * n + left
        if tl.program_id(1) == 0:
            kept += first * rank
            tl.store(kept + i[:, None] * rank + r[None, :], h, (i[:, None] < rows) & (r[None, :] < rank))
    if JOIN == "mul":
        other += first * other_stride + left
    if OF_DOTHER:
        dother += first * n + left
    for start in range(0, width, BLOCK_N):
        col = start + j
        b_tile = tl.load(b + col[None, :] * rank + r[:, None], (col[None, :] < width) & (r[:, None] < rank), 0.0)
        z = tl.dot(h, b_tile, input_precision=PRECISION)
        if HAS_BIAS:
            z += tl.load(bias + left + col, col < width, 0.0).to(tl.float32)[None, :]
        mask = (i[:, None] < rows) & (col[None, :] < width)
        place = i[:, None].to(tl.int64) * n + col[None, :]
        of_y = tl.load(dy + i[:, None] * dy_stride + col[None, :], mask, 0.0).to(tl.float32)
        of_z = of_y
        if JOIN == "mul":
            gate = tl.load(other + i[:, None] * other_stride + col[None, :], mask, 0.0).to(tl.float32)
            of_z = of_y * activate(gate, OF_OTHER)
            if OF_DOTHER:
                of_other = of_y * activate(z, OF_Z) * slope(gate, OF_OTHER)
                tl.store(dother + place, of_other.to(dother.dtype.element_ty), mask)
        if OF_DZ:
            tl.store(dz + place, (of_z * slope(z, OF_Z)).to(dz.dtype.element_ty), mask)


def gradient(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    epilogue: Epilogue,
    other: Tensor | None,
    needed: tuple[bool, bool],
    tile: Tile,
    splits: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz (m, n) and dother (m, n) where `needed`, in the dtypes of x and other, and x·Aᵀ beside dz; in one launch.

    dy (m, n), x (m, k) and other (m, n) have unit stride along their last dimension; a (rank, k) and b (n, rank) are
    contiguous.

    Args:
        splits: programs that share a block of rows, each with its part of the columns.
    """
    (m, k), (n, rank) = x.shape, b.shape
    dz = x.new_empty(m, n) if needed[0] else None
    dother = other.new_empty(m, n) if needed[1] and other is not None else None
    h = x.new_empty(m, rank) if needed[0] else None
    columns = tile.block_n * triton.cdiv(n, tile.block_n * splits)
    strides = (x.stride(0), dy.stride(0), 0 if other is None else other.stride(0))
    with on_device(dy):
        gradient_kernel[(triton.cdiv(m, tile.block_m), triton.cdiv(n, columns))](
            dy, x, a, b, bias, other, dz, dother, h, m, n, k, rank, *strides, columns, HAS_BIAS=bias is not None,
            OF_DZ=dz is not None, OF_DOTHER=dother is not None, RANK=padded(rank), **blocks(tile, x.dtype),
            **epilogue.constants,
        )  # fmt: skip
    return dz, dother, h


# The hungriest: erf on one side, and an operand of fp32 (a residual stream under autocast) to read and to write.
HUNGRIEST = KINDS["gelu_mul"]


def specimen(kernel: str, row: dict[str, Any], epilogue: Epilogue = HUNGRIEST) -> Specimen:
    """What a row of the tuning table compiles to: the hungriest of the shapes it serves, with the hungriest epilogue."""
    constants = epilogue.constants
    if kernel != "gradient":
        plain = lowrank_linear_triton.specimen(kernel, row)
        given = {name: value for name, value in plain.constants.items() if name != "other"} | constants
        if kernel == "fused":
            given |= {"KEEP": False, "kept": None}
        pointers = {name: kind for name, kind in plain.pointers.items() if name not in given}
        return dataclasses.replace(plain, pointers=pointers | {"other": "fp32", "y": "fp32"}, constants=given)
    plain = lowrank_linear_triton.specimen("fused", row)
    given = {name: value for name, value in plain.constants.items() if name not in ("KEEP", "other")} | constants
    pointers = {name: kind for name, kind in plain.pointers.items() if name != "y"}
    pointers |= {"dz": plain.pointers["x"], "dy": "fp32", "other": "fp32", "dother": "fp32"}
    return Specimen(gradient_kernel, pointers, given | {"OF_DZ": True, "OF_DOTHER": True})
