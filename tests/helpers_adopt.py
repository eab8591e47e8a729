"""Toy models to adopt and to save, and how to compare them before and after."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrcompile
from lrcompile import Recipe, StateError
from lrcompile.weights.layers import AdoptedModule

WIDTH = 32
TORCHS_MARK = {"_is_torch_compile"}  # torch.compile leaves it on a module
X = (torch.zeros(4, WIDTH),)
IDS = (torch.arange(8).reshape(2, 4),)
FILES = ("lrcompile.json", "model.safetensors")


# --- models -----------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int = WIDTH, hidden: int = 48, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, dtype=dtype), nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(width, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Raw(nn.Module):
    """A parameter with no module of its own; some kept in torch's containers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, 48) / 6)
        self.more = nn.ParameterList([nn.Parameter(torch.randn(48, 48) / 7) for _ in range(2)])
        self.named = nn.ParameterDict({"out": nn.Parameter(torch.randn(48, WIDTH) / 7)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.w
        for w in self.more:
            y = torch.matmul(y, w).relu()
        return x + torch.einsum("bi,ij->bj", y, self.named["out"])


class Albert(nn.Module):
    """One module under two names, one weight in two modules, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        shared = Mlp()
        self.layers = nn.ModuleList([shared, shared, Mlp()])
        self.extra = nn.Linear(WIDTH, 48)
        self.extra.weight = shared.up.weight
        self.lm_head = nn.Linear(WIDTH, 64, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x + self.extra(x)[..., :WIDTH])


class Shared(nn.Module):
    """A shared module, a shared weight, a tied head, a buffer, a frozen weight, packed attention."""

    def __init__(self, hidden: int = 48, tie: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed, self.attn = nn.Embedding(64, WIDTH), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.up, self.down, self.side = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH), nn.Linear(WIDTH, hidden)
        self.again = self.down
        self.head = nn.Linear(WIDTH, 64, bias=False)
        self.register_buffer("scale", torch.full((WIDTH,), 2.0))
        self.register_buffer("scratch", None)
        if tie:
            self.side.weight, self.head.weight = self.up.weight, self.embed.weight
        self.down.weight.requires_grad_(False)
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(x))) + self.again(torch.tanh(self.side(x)))
        return self.head(x)


# --- adopting ---------------------------------------------------------------------------------------------------------


def adopted(model: nn.Module | None = None, rank: int = 4, inputs: Any = X, **recipe: Any) -> Any:
    return lrcompile.adopt(model or Mlp(), Recipe(rank=rank, **recipe), inputs)


def adopted_shared(model: nn.Module | None = None, **recipe: Any) -> Any:
    return lrcompile.adopt(model or Shared(), Recipe(**{"rank": 4, **recipe}), IDS)


# --- comparing --------------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    """Objects, classes and values, bit for bit: equal only where nothing was changed."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    held = [(n, id(t), t.requires_grad, t.dtype, None if t.is_meta else _bits(t)) for n, t in tensors]
    return [held, [(n, id(m), type(m), sorted({*vars(m)} - TORCHS_MARK), m.training) for n, m in model.named_modules()]]


def _bits(t: torch.Tensor) -> bytes:
    return t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def dense_twin(model: nn.Module) -> nn.Module:
    """The same function with dense weights, to compare outputs and gradients with."""
    return lrcompile.merge(copy.deepcopy(model))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same_function(model: nn.Module, *inputs: torch.Tensor, **kwargs: Any) -> None:
    twin = dense_twin(model)
    assert not any(isinstance(m, AdoptedModule) for m in twin.modules())
    close(model(*inputs, **kwargs), twin(*inputs, **kwargs))


def refused_load(dir: Path, model: nn.Module, said: str, error: type[Exception] = StateError) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=said):
        lrcompile.load(dir, model)
    assert snapshot(model) == before
