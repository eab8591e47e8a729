"""Operands of products with quantised weights, shared by the interpreter's tests and the GPU's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lrcompile.kernels import decode
from lrcompile.weights.formats import format_of, quantise

FORMATS = ["nf4", "nf4-32-nested", "fp4", "int8-bnb", "int8", "int8-32", "int4-32"]


class Weight(NamedTuple):
    """A quantised weight, as the operators take it."""

    packed: list[Tensor]
    layout: str
    group: int

    def values(self, in_features: int, dtype: torch.dtype) -> Tensor:
        return decode.reference(self.packed, self.layout, self.group, in_features, dtype)


def quantised(name: str, dense: Tensor, device: str = "cpu") -> Weight:
    """A dense weight in this format, on a device."""
    form = format_of(name)
    packed = quantise(form, dense)
    return Weight([packed[key].to(device) for key in form.keys], form.layout, form.group)


@dataclass(frozen=True)
class Case:
    """Sizes and kind of the operands.

    Attributes:
        form: name of the number format.
        rank: of the pair beside the weight.
        layout: "plain", "columns" (a slice of wider rows), "transposed" (last dimension not the dense one), "batched".
        scale: factor on x.
    """

    form: str
    tokens: int
    in_features: int
    out_features: int
    rank: int = 5
    dtype: torch.dtype = torch.float32
    bias: bool = True
    layout: str = "plain"
    scale: float = 1.0
    seed: int = 0

    def operands(self, device: str = "cpu") -> tuple[Tensor, Weight, Tensor, Tensor, Tensor | None, Tensor]:
        """x, the weight, weight_a, weight_b, bias, and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(self.dtype)

        def laid_out(features: int, scale: float) -> Tensor:
            if self.layout == "columns":
                return draw(self.tokens, features + 5, scale=scale).to(device)[:, 3 : features + 3]
            if self.layout == "transposed":
                return draw(features, self.tokens, scale=scale).to(device).t()
            plain = draw(self.tokens, features, scale=scale).to(device)
            return plain.view(1, self.tokens, 1, features) if self.layout == "batched" else plain

        k, n = self.in_features, self.out_features
        weight = quantised(self.form, draw(n, k, scale=k**-0.5), device)
        a = draw(self.rank, k, scale=k**-0.5).to(device)
        b = draw(n, self.rank, scale=self.rank**-0.5).to(device)
        bias = draw(n).to(device) if self.bias else None
        return laid_out(k, self.scale), weight, a, b, bias, laid_out(n, 1.0)
