# mypy: allow-untyped-defs
"""Decoding a tile of a quantised matrix inside a kernel: the Triton twin of `decode.reference`, bit for bit.

The quantised matrix travels through kernels as seven pointers, in the order of `pointers`: codes, scale, zero point, the
table of four-bit values, and the nested scales' own scales, table and offset. Those that a layout lacks are None.

Kernels that decode must be launched with enable_fp_fusion=False (`OPTIONS`): a product and a sum that are rounded
separately here and in the libraries would otherwise become one fused multiply-add.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrcompile.kernels import decode
from lrcompile.kernels.launch import on_device

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
_NESTED_GROUP = tl.constexpr(decode.NESTED_GROUP)
_ROW_UNIT = tl.constexpr(decode.ROW_UNIT)


@triton.jit
def block_scale(scale, nested_scale, nested_table, nested_offset, index, mask, NESTED: tl.constexpr):
    """Scales at these indices, in fp32; nested ones unfolded."""
    value = tl.load(scale + index, mask, 0)
    if NESTED:
        outer = tl.load(nested_scale + index // _NESTED_GROUP, mask, 0.0)
        value = tl.load(nested_table + value) * outer + tl.load(nested_offset)
    return value.to(tl.float32)


@triton.jit
def spread(values, WIDTH: tl.constexpr):
    """(rows, groups) -> (rows, groups * WIDTH): each value WIDTH times."""
    rows: tl.constexpr = values.shape[0]
    groups: tl.constexpr = values.shape[1]
    return tl.broadcast_to(values[:, :, None], (rows, groups, WIDTH)).reshape(rows, groups * WIDTH)


@triton.jit
def decode_tile(codes, scale, zero, table, nested_scale, nested_table, nested_offset, first, left, n, k,
                LAYOUT: tl.constexpr, GROUP: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
                WORDS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Rows first to first + BLOCK_N and columns left to left + BLOCK_K of an (n, k) matrix.

    What lies outside the matrix comes out finite and arbitrary: the other operand must be zero there.

    Args:
        first: first row, int64. left: first column, a multiple of BLOCK_K.
        LAYOUT: of decode.LAYOUTS. GROUP: values that share a scale, a power of two; 0 for whole rows.
        ALIGNED: whether groups end where rows do; else they run over the flattened matrix (nf4 and fp4 only).
        WORDS: whether a row's codes fill whole 32-bit words, to be loaded as such.
    """
    j = tl.arange(0, BLOCK_N)[:, None]
    FOUR: tl.constexpr = LAYOUT == "nf4" or LAYOUT == "fp4" or LAYOUT == "int4"
    BITS: tl.constexpr = 4 if FOUR else 8
    HELD: tl.constexpr = (32 if WORDS else 8) // BITS  # values in what is loaded at a time
    width = k // HELD
    u = left // HELD + tl.arange(0, BLOCK_K // HELD)[None, :]
    rows = tl.minimum(n - first, BLOCK_N).to(tl.int32)
    if WORDS:
        codes = codes.to(tl.pointer_type(tl.uint32))
    else:
        codes = codes.to(tl.pointer_type(tl.uint8))
    held = tl.load(codes + first * width + j * width + u, (j < rows) & (u < width), 0).to(tl.uint32)
    TABLE: tl.constexpr = LAYOUT == "nf4" or LAYOUT == "fp4"
    if not TABLE:  # with its sign bit flipped a code counts from 0
        held = held ^ (0x88888888 if FOUR else 0x80808080)
    code = unpack(held, HELD, BITS, not TABLE).reshape(BLOCK_N, BLOCK_K)

    # The scales: one a row and tile where the tile lies in one group, one a group where it holds several.
    if GROUP == 0:
        index = first + j
        here = j < rows
    elif not ALIGNED:
        c = left + tl.arange(0, BLOCK_K)[None, :]
        index = (first * k + j * k + c) // GROUP
        here = (j < rows) & (c < k)
    else:
        g = left // GROUP + tl.arange(0, BLOCK_K // GROUP if BLOCK_K > GROUP else 1)[None, :]
        here = (j < rows) & (g < k // GROUP)
        if LAYOUT == "int4":
            index = g * n.to(tl.int64) + first + j
        else:
            index = first * (k // GROUP) + j * (k // GROUP) + g
    WIDE: tl.constexpr = ALIGNED and GROUP != 0 and BLOCK_K > GROUP
    factor = block_scale(scale, nested_scale, nested_table, nested_offset, index, here, NESTED)
    if WIDE:
        factor = spread(factor, GROUP)

    if TABLE:
        # A gather from registers, through shared memory: loads from `table` would be pipelined, value by value.
        entries = tl.load(table + tl.arange(0, 16))
        code = tl.gather(entries, code.reshape(BLOCK_N * BLOCK_K), 0).reshape(BLOCK_N, BLOCK_K)
    values = code * factor
    if LAYOUT == "int8_row":
        values = values * _ROW_UNIT
    if LAYOUT == "int4":
        shift = tl.load(zero + index, here, 0.0).to(tl.float32)
        if WIDE:
            shift = spread(shift, GROUP)
        # Scaling and shifting round in the scales' dtype, each of them.
        INNER: tl.constexpr = scale.dtype.element_ty
        values = (values.to(INNER).to(tl.float32) + shift).to(INNER)
    return values.to(DTYPE)


@triton.jit
def field(held, AT: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """The AT-th value of each entry: its bits as an integer or, for flipped signed ones, the number, in fp32."""
    MASK: tl.constexpr = (1 << BITS) - 1
    if FLOAT:
        # The bits go into a float's mantissa where they stand, under the exponent that makes its bit START count ones;
        # subtracting what else that float is worth is exact. Cheaper than to shift each value and convert it.
        SKIP: tl.constexpr = 0 if (AT + 1) * BITS < 23 else 16
        START: tl.constexpr = AT * BITS - SKIP
        EXPONENT: tl.constexpr = (127 + 23 - START) << 23
        number = (((held >> SKIP) & (MASK << START)) | EXPONENT).to(tl.float32, bitcast=True)
        value = number - ((1 << (23 - START)) + (1 << (BITS - 1)))
    else:
        value = ((held >> (AT * BITS)) & MASK).to(tl.int32)
    return value


@triton.jit
def unpack(held, HELD: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """The HELD values of each entry, in new last dimensions of two; of table codes, the first is in the high bits."""
    # Joined, not broadcast: joining keeps an entry's values in the thread that loaded it.
    F: tl.constexpr = 0 if FLOAT else 1
    if HELD == 1:
        values = field(held, 0, BITS, FLOAT)
    elif HELD == 2:
        values = tl.join(field(held, F, BITS, FLOAT), field(held, 1 - F, BITS, FLOAT))
    elif HELD == 4:
        even = tl.join(field(held, F, BITS, FLOAT), field(held, 2 + F, BITS, FLOAT))
        odd = tl.join(field(held, 1 - F, BITS, FLOAT), field(held, 3 - F, BITS, FLOAT))
        values = tl.join(even, odd)
    else:
        near = tl.join(field(held, F, BITS, FLOAT), field(held, 4 + F, BITS, FLOAT))
        far = tl.join(field(held, 2 + F, BITS, FLOAT), field(held, 6 + F, BITS, FLOAT))
        even = tl.join(near, far)
        near = tl.join(field(held, 1 - F, BITS, FLOAT), field(held, 5 - F, BITS, FLOAT))
        far = tl.join(field(held, 3 - F, BITS, FLOAT), field(held, 7 - F, BITS, FLOAT))
        values = tl.join(even, tl.join(near, far))
    return values


@functools.cache
def _table(layout: str, device: torch.device) -> Tensor:
    return decode.code_table(layout, device)


def pointers(packed: Sequence[Tensor], layout: str) -> tuple[Tensor | None, ...]:
    """The seven pointers of a quantised matrix, as kernels take them."""
    codes, scale = packed[0], packed[1]
    zero = packed[2] if layout == "int4" else None
    table = _table(layout, codes.device) if layout in ("nf4", "fp4") else None
    nested = tuple(packed[2:5]) if len(packed) == 5 else (None, None, None)
    return (codes, scale, zero, table, *nested)


def constants(packed: Sequence[Tensor], layout: str, group: int, in_features: int) -> dict[str, Any]:
    """The compile-time facts of a quantised matrix, as kernels take them."""
    return {
        "LAYOUT": layout,
        "GROUP": group,
        "NESTED": len(packed) == 5,
        "ALIGNED": group == 0 or in_features % group == 0,
        "WORDS": in_features % (8 if layout in ("nf4", "fp4", "int4") else 4) == 0 and packed[0].data_ptr() % 4 == 0,
    }


@triton.jit
def decode_kernel(codes, scale, zero, table, nested_scale, nested_table, nested_offset, out, n, k,
                  LAYOUT: tl.constexpr, GROUP: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
                  WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The dense matrix, a tile a program."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    left = tl.program_id(1) * BLOCK_K
    tile = decode_tile(codes, scale, zero, table, nested_scale, nested_table, nested_offset, first, left, n, k,
                       LAYOUT, GROUP, NESTED, ALIGNED, WORDS, out.dtype.element_ty, BLOCK_N, BLOCK_K)  # fmt: skip
    j = tl.arange(0, BLOCK_N)[:, None]
    c = left + tl.arange(0, BLOCK_K)[None, :]
    tl.store(out + first * k + j * k + c, tile, (first + j < n) & (c < k))


def dense(packed: Sequence[Tensor], layout: str, group: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """(out_features, in_features) in dtype: what `decode.reference` gives, in one launch."""
    n = decode.out_features(packed, layout, in_features)
    out = packed[0].new_empty((n, in_features), dtype=dtype)
    with on_device(out):
        decode_kernel[(triton.cdiv(n, 32), triton.cdiv(in_features, 128))](
            *pointers(packed, layout), out, n, in_features, **constants(packed, layout, group, in_features),
            BLOCK_N=32, BLOCK_K=128, **OPTIONS,
        )  # fmt: skip
    return out
