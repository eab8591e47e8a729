"""Triton's interpreter with bfloat16 put right, so that kernels can be run on the CPU in the dtype they are made for.

The interpreter (triton 3.7) keeps bfloat16 as its 16 bits in uint16: tl.dot multiplies those integers, and a cast from
fp32 cuts the lower bits off where the hardware rounds to the nearest, ties to even. Both are replaced here. Arithmetic on
bfloat16 itself stays wrong there; kernels compute in fp32, as they should.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16), rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def install() -> None:
    """Replace the interpreter's casts and products; once is enough."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "bfloat16_is_right", False):
        return
    builder.bfloat16_is_right = True
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widen(side.data), tl.float32) for side in (a, b))
        return dot(self, a, b, d, precision, imprecise)

    def rounded(self: Any, source: Any, kind: Any, plain: Any) -> Any:
        was, becomes = source.dtype.scalar, kind.scalar
        if was == tl.float32 and becomes == tl.bfloat16:
            return interpreter.TensorHandle(narrow(source.data), becomes)
        if was == tl.bfloat16 and becomes == tl.float32:
            return interpreter.TensorHandle(widen(source.data), becomes)
        return plain()

    builder.create_dot = create_dot
    builder.cast_impl = lambda self, source, kind: rounded(self, source, kind, lambda: cast(self, source, kind))
    builder.create_fp_to_fp = lambda self, source, kind, mode: rounded(
        self, source, kind, lambda: convert(self, source, kind, mode)
    )
