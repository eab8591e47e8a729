"""Bytes that a training step holds, counted on its real tensors; storages that are shared count once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def weights_of(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and the scales that bitsandbytes keeps on the side."""
    found = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            found += [t for t in vars(state).values() if isinstance(t, Tensor)]
            state = getattr(state, "state2", None)  # gone where it is repacked for the CPU
    return found


def step_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Weights, gradients and optimizer state, after backward and step and before the gradients are dropped."""
    states: list[Any] = list(optimizer.state.values()) if optimizer else []
    return {
        "weights": storage_bytes(weights_of(model)),
        "gradients": storage_bytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": storage_bytes(t for state in states for t in state.values() if isinstance(t, Tensor)),
    }
