"""What may follow an up-projection in the same kernel: an activation, a gated product, a residual added.

y = join(of_z(z), of_other(other)), z the projection's result. The Triton code is in epilogue_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Epilogue:
    """One of KINDS.

    Attributes:
        of_z, of_other: "gelu" (erf), "gelu_tanh", "silu" or "" (as it is).
        join: "mul", "add" or "" (there is no `other`).
    """

    of_z: str = ""
    of_other: str = ""
    join: str = ""

    @property
    def needs_z(self) -> bool:
        """Whether backward reads z: all but a sum do."""
        return self.join != "add"

    @property
    def constants(self) -> dict[str, str]:
        """As the kernels take it."""
        return {"OF_Z": self.of_z, "OF_OTHER": self.of_other, "JOIN": self.join}

    def operations(self, backward: bool) -> int:
        """fp32 operations for each element of y, outside the tensor cores."""
        both = _OPERATIONS[self.of_z][backward] + _OPERATIONS[self.of_other][backward]
        return both + (self.join != "") * (3 if backward else 1)


# Of the function, and of it and its derivative: about 20 multiply-adds for erf, an exponential and a division for the others.
_OPERATIONS = {"gelu": (40, 60), "gelu_tanh": (25, 40), "silu": (15, 20), "": (0, 0)}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "": lambda x: x,
}

# Named from left to right: "silu_mul" is silu(z) * other, "mul_silu" is z * silu(other).
KINDS = {
    **{name: Epilogue(of_z=name) for name in ("gelu", "gelu_tanh", "silu")},
    **{f"{name}_mul": Epilogue(of_z=name, join="mul") for name in ("gelu", "gelu_tanh", "silu")},
    **{f"mul_{name}": Epilogue(of_other=name, join="mul") for name in ("gelu", "gelu_tanh", "silu")},
    "mul": Epilogue(join="mul"),
    "add": Epilogue(join="add"),
}


def apply(epilogue: Epilogue, z: Tensor, other: Tensor | None) -> Tensor:
    """y in plain torch; dtypes promote as in z * other."""
    y = ACTIVATIONS[epilogue.of_z](z)
    if other is None:
        return y
    gate = ACTIVATIONS[epilogue.of_other](other)
    return y * gate if epilogue.join == "mul" else y + gate


def gradients(epilogue: Epilogue, dy: Tensor, z: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of z and other in plain torch, each in the dtype of what it belongs to."""
    if epilogue.join == "add":
        assert other is not None
        return dy.to(z.dtype), dy.to(other.dtype)
    if other is None:
        return _backward(epilogue.of_z, dy, z), None
    of_z = _backward(epilogue.of_z, (dy * ACTIVATIONS[epilogue.of_other](other)).to(z.dtype), z)
    of_other = _backward(epilogue.of_other, (dy * ACTIVATIONS[epilogue.of_z](z)).to(other.dtype), other)
    return of_z, of_other


def _backward(activation: str, dy: Tensor, x: Tensor) -> Tensor:
    if activation == "":
        return dy
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh" if activation == "gelu_tanh" else "none")
