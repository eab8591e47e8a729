# mypy: allow-untyped-defs
"""The epilogues (epilogue.py) on tiles in registers, all in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """gelu (erf), gelu_tanh or silu of a tile; as it is for ""."""
    if ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is sigmoid(2 u), with u = sqrt(2 / pi) (z + 0.044715 z^3)
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """The derivative of `activate`."""
    if ACTIVATION == "gelu":
        z = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        z = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        z = s * (1.0 + z * (1.0 - s))
    else:
        z = z * 0.0 + 1.0
    return z


@triton.jit
def finish(z, other, offsets, mask, OF_Z: tl.constexpr, OF_OTHER: tl.constexpr, JOIN: tl.constexpr):
    """The epilogue of a tile z (fp32); its operand stands at `offsets` from `other`."""
    z = activate(z, OF_Z)
    if JOIN == "mul":
        z *= activate(tl.load(other + offsets, mask, 0.0).to(tl.float32), OF_OTHER)
    elif JOIN == "add":
        z += tl.load(other + offsets, mask, 0.0).to(tl.float32)
    return z
