"""The models that are measured: a plain GPT, and the same with its low-rank pairs written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT; the default is GPT-2 124M's."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    context: int = 1024


class HandPair(nn.Module):
    """A low-rank linear as one writes it by hand: two nn.Linear, the bias in the second."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


Linear = Callable[[str, int, int], nn.Module]


class Block(nn.Module):
    def __init__(self, shape: Shape, linear: Linear, name: str) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.qkv = linear(f"{name}.qkv", shape.width, 3 * shape.width)
        self.proj = linear(f"{name}.proj", shape.width, shape.width)
        self.up = linear(f"{name}.up", shape.width, 4 * shape.width)
        self.down = linear(f"{name}.down", 4 * shape.width, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder with tied embedding and head.

    Args:
        shape: its sizes.
        linear: makes the linears of the blocks from (name, in_features, out_features); nn.Linear where left out.
    """

    def __init__(self, shape: Shape, linear: Linear = lambda name, inputs, outputs: nn.Linear(inputs, outputs)) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape, linear, f"blocks.{i}") for i in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """ids, targets: (rows, length) int64 -> the mean cross-entropy, a scalar."""
        x = self.embed(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())
