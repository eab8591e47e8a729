"""Quantised matrices: what the layouts hold, and their decoding: a plain-torch `reference` and the same in Triton.

A quantised matrix of shape (out_features, in_features) is a list of tensors, in this order, and the name of its layout:

=========  =======================  ====================  ==========================================================
layout     codes                    scale                 then
=========  =======================  ====================  ==========================================================
nf4, fp4   uint8 (out * in / 2, 1)  fp32 (out * in / g,)  with nested scales the scale is uint8 and three more follow:
                                                          its own scales fp32 (blocks / 256,), their table fp32
                                                          (256,), an offset fp32 ()
int8_row   int8 (out, in)           fp32 (out,)           a row's largest magnitude; a code is worth scale / 127
int8       int8 (out, in)           fp32 (out, in / g)    g divides in_features
int4       int8 (out, in / 2)       (in / g, out)         zero point of the same shape; both in the weight's dtype
=========  =======================  ====================  ==========================================================

nf4, fp4 and int8_row are bitsandbytes' layouts (2305.14314, 2208.07339): first of two values in the high nibble, groups
of g running over the flattened matrix. int8 and int4 are torchao's plain ones: even columns in the low nibble, codes
from -8 to 7, value = code * scale + zero point. A group of 0 is a whole row (int8 and int8_row). Decoded values are
bit-exact with those libraries'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrcompile.kernels.launch import DTYPES

# The NF4 quantiles as published in 2305.14314, appendix E; FP4's eight magnitudes relative to the largest, 12.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
LAYOUTS = ("nf4", "fp4", "int8_row", "int8", "int4")
NESTED_GROUP = 256  # bitsandbytes quantises the scales of nested formats in blocks of this many
ROW_UNIT = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it


def code_table(layout: str, device: torch.device) -> Tensor:
    """The value of each four-bit code of "nf4" or "fp4" relative to its block's largest: (16,) fp32."""
    if layout == "nf4":
        return torch.tensor(NF4, device=device)
    signed = [*_FP4_MAGNITUDES, 0.0, *(-value for value in _FP4_MAGNITUDES[1:])]  # zero has one sign
    return torch.tensor(signed, device=device) / 12.0


def out_features(packed: Sequence[Tensor], layout: str, in_features: int) -> int:
    """Rows of the matrix that these tensors hold."""
    codes = packed[0]
    return codes.numel() * 2 // in_features if layout in ("nf4", "fp4") else codes.shape[0]


def misfit(packed: Sequence[Tensor], layout: str, group: int, in_features: int) -> str:
    """What is wrong with the tensors of a matrix with so many columns; "" where they are as the layout has them.

    An nf4 or fp4 matrix doesn't tell its own width: any that divides its codes is taken.
    """
    if layout not in LAYOUTS:
        return f"there is no such layout; known: {', '.join(LAYOUTS)}"
    k, flat = in_features, layout in ("nf4", "fp4")
    if group < 0 or (group == 0 and layout in ("nf4", "fp4", "int4")) or (group and layout == "int8_row"):
        return "a whole row is a group of 0 (int8, int8_row); else the number of values that share a scale"
    if len(packed) not in {"int4": (3,)}.get(layout, (2, 5) if flat else (2,)):
        return f"it is held in {'2 or 5' if flat else 3 if layout == 'int4' else 2} tensors, not {len(packed)}"
    codes = packed[0]
    wanted: list[tuple[tuple[int, ...] | None, torch.dtype]]
    if flat:
        if codes.numel() == 0 or codes.numel() * 2 % k:
            return f"{codes.numel()} bytes of codes are no whole rows of {k}"
        blocks = -(-codes.numel() * 2 // group)
        wanted = [(None, torch.uint8), ((blocks,), torch.float32)]
        if len(packed) == 5:
            outer = -(-blocks // NESTED_GROUP)
            wanted = [wanted[0], ((blocks,), torch.uint8), ((outer,), torch.float32)]
            wanted += [((256,), torch.float32), ((), torch.float32)]
    elif codes.dim() != 2 or (group and k % group):
        return "codes are a matrix, and groups divide its columns"
    elif layout == "int4":
        scales = ((k // group, codes.shape[0]), packed[1].dtype)
        if packed[1].dtype not in DTYPES:
            return f"scales and zero points are {packed[1].dtype}, none of {', '.join(map(str, DTYPES))}"
        if k % 2:
            return f"two columns share a byte, and {k} is odd"
        wanted = [((codes.shape[0], k // 2), torch.int8), scales, scales]
    else:
        scale = (codes.shape[0],) if layout == "int8_row" else (codes.shape[0], k // (group or k))
        wanted = [((codes.shape[0], k), torch.int8), (scale, torch.float32)]
    for i, (t, (shape, dtype)) in enumerate(zip(packed, wanted, strict=True)):
        if t.dtype != dtype or (shape is not None and tuple(t.shape) != shape):
            return f"its tensor {i} is {tuple(t.shape)} {t.dtype}, where {shape or 'codes'} {dtype} belongs"
    return ""


def block_scales(packed: Sequence[Tensor]) -> Tensor:
    """Scales of an nf4 or fp4 matrix, nested ones unfolded: (blocks,) fp32."""
    if len(packed) == 2:
        return packed[1]
    _, codes, scale, table, offset = packed
    outer = scale.repeat_interleave(NESTED_GROUP)[: codes.numel()]
    return table.index_select(0, codes.int()) * outer + offset


def reference(packed: Sequence[Tensor], layout: str, group: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix in plain torch.

    Args:
        packed: the tensors of the layout, as in the table above.
        layout: one of LAYOUTS.
        group: values that share a scale, along in_features; 0 for a whole row.
        in_features: columns of the matrix.
        dtype: floating dtype of the result.

    Returns:
        (out_features, in_features) in dtype.
    """
    codes, scale = packed[0], packed[1]
    group = group or in_features
    if layout in ("nf4", "fp4"):
        table = code_table(layout, codes.device)
        both = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1)  # the pair that each byte stands for
        values = both.index_select(0, codes.reshape(-1).int()).view(-1)
        scales = block_scales(packed)
        if values.numel() % group:
            values = values * scales.repeat_interleave(group)[: values.numel()]
        else:
            values = (values.view(-1, group) * scales[:, None]).view(-1)
        return values.view(-1, in_features).to(dtype)
    if layout == "int8_row":
        return (codes * scale[:, None] * ROW_UNIT).to(dtype)
    if layout == "int8":
        return (codes.unflatten(1, (-1, group)).float() * scale[..., None]).flatten(1).to(dtype)
    both = torch.stack(((codes << 4) >> 4, codes >> 4), dim=-1).view(codes.shape[0], -1, group)
    return (both.to(scale.dtype) * scale.t()[..., None] + packed[2].t()[..., None]).flatten(1).to(dtype)
