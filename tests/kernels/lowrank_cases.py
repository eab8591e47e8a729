"""Operands of a low-rank linear, and its checks against fp64: shared by the interpreter's tests and the GPU's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .numbers import assert_as_good

Op = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes and kind of the operands.

    Attributes:
        layout: "plain", "columns" (a slice of wider rows), "transposed" (last dimension not the dense one), "batched".
        scale: factor on x, its inverse on weight_a.
    """

    tokens: int
    in_features: int
    out_features: int
    rank: int
    dtype: torch.dtype = torch.float32
    bias: bool = True
    layout: str = "plain"
    scale: float = 1.0
    seed: int = 0

    def operands(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """x, weight_a, weight_b, bias, and the gradient of the output; all laid out as `layout` says."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, self.dtype)

        def laid_out(features: int, scale: float) -> Tensor:
            if self.layout == "columns":
                return draw(self.tokens, features + 5, scale=scale)[:, 3 : features + 3]
            if self.layout == "transposed":
                return draw(features, self.tokens, scale=scale).t()
            plain = draw(self.tokens, features, scale=scale)
            return plain.view(1, self.tokens, 1, features) if self.layout == "batched" else plain

        k, n = self.in_features, self.out_features
        a = draw(self.rank, k, scale=k**-0.5 / self.scale)
        b, bias = draw(n, self.rank, scale=self.rank**-0.5), draw(n) if self.bias else None
        return laid_out(k, self.scale), a, b, bias, laid_out(n, 1.0)


def gradients(op: Op, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of all operands, by name."""
    leaves = {"x": x, "weight_a": a, "weight_b": b, "bias": bias}
    given = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    y = op(given["x"], given["weight_a"], given["weight_b"], given.get("bias"))
    found = torch.autograd.grad(y, list(given.values()), dy.reshape(y.shape))
    return {"y": y.detach(), **{f"gradient of {name}": grad for name, grad in zip(given, found, strict=True)}}


def unfused(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.linear(x, a), b, bias)


def check(case: Case, op: Op, device: str = "cpu") -> None:
    """Output and gradients of `op` against fp64, measured by those of two plain products in the case's dtype."""
    x, a, b, bias, dy = case.operands(device)
    wide = [None if t is None else t.detach().cpu().double() for t in (x, a, b, bias, dy)]
    exact = gradients(unfused, *wide)  # type: ignore[arg-type]
    theirs, ours = gradients(unfused, x, a, b, bias, dy), gradients(op, x, a, b, bias, dy)
    for name in exact:
        assert_as_good(ours[name], theirs[name], exact[name], f"{name} of {case}")


def train(op: Op, dtype: torch.dtype, device: str = "cpu", steps: int = 20) -> list[float]:
    """Losses of two low-rank layers that learn a linear map with AdamW, from one seed."""
    case = Case(64, 48, 32, 24, dtype, seed=3)
    x, a, b, bias, y = case.operands(device)
    first = [t.requires_grad_() for t in (a, b, bias) if t is not None]
    second = [t.requires_grad_() for t in Case(1, 32, 32, 16, dtype, seed=4).operands(device)[1:4] if t is not None]
    optimizer = torch.optim.AdamW([*first, *second], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = (op(F.gelu(op(x, *first)), *second) - y).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
