"""A model as a training script has it, its training loop, and what its optimizer holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lrcompile.weights.layers import AdoptedModule

VOCAB, WIDTH, BLOCKS = 50, 64, 3
EAGER = {"inner": "eager"}
AOT = {"inner": "aot_eager"}


class Block(nn.Module):
    """A residual MLP with dropout."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    """Embedding, blocks, head: token ids (batch, tokens) -> logits (batch, tokens, VOCAB)."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.checkpointed = checkpointed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def batch(rows: int = 4) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, 16))


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def train(model, optimizer, steps: int, ids: torch.Tensor, scheduler=None, accumulate: int = 1) -> list[float]:
    losses = []
    for _ in range(steps):
        for _ in range(accumulate):
            loss = loss_of(model, ids) / accumulate
            loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()) * accumulate)
    return losses


def pairs(model: nn.Module) -> int:
    return sum(isinstance(m, AdoptedModule) for m in model.modules())


def held(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(p) for g in optimizer.param_groups for p in g["params"]]


def check_followed(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    assert sorted(held(optimizer)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
