"""What a checkpoint holds of a model and its optimizers: tensors by name, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lrcompile.errors import TrainError


def prime(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let optimizers make their state, with a step of zero length from zero gradients: there is something to load into."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def tensors_of(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], rank: int, size: int
) -> dict[str, torch.Tensor]:
    """Every tensor that a run goes on from: parameters, buffers that are saved, and the optimizers' state.

    State that is quantised a shard at a time (8-bit moments) is kept a rank at a time, under names that say of how many.

    Raises:
        TrainError: an optimizer keeps something that is no tensor.
    """
    named = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, torch.Tensor] = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    kept = model.state_dict(keep_vars=True)
    found |= {f"model.{name}": b for name, b in model.named_buffers() if name in kept}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                name = f"optimizer.{type(optimizer).__name__}.{named[id(p)]}.{key}"
                if not isinstance(value, torch.Tensor):
                    raise TrainError(f"{name} is a {type(value).__name__}, and checkpoints hold tensors alone")
                found |= _parts(name, value, rank, size)
    return found


def held_bytes(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, int]:
    """Bytes of this rank's weights, gradients and optimizer state, counted on the tensors; shared storage counts once.

    Call it between an optimizer's step and the gradients' end.
    """
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    states = (value for o in optimizers for state in o.state.values() for value in state.values())
    return {
        "weights": _storage([*model.parameters(), *model.buffers()]),
        "gradients": _storage(gradients),
        "optimizer": _storage(value for value in states if isinstance(value, torch.Tensor)),
    }


def _storage(tensors: Iterable[torch.Tensor]) -> int:
    held: dict[int, int] = {}
    for tensor in tensors:
        local: Any = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        inner = [local]
        if hasattr(local, "__tensor_flatten__") and type(local) is not torch.Tensor:  # quantised, as 8-bit states
            inner = [getattr(local, name) for name in local.__tensor_flatten__()[0]]
        for part in inner:
            storage = part.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def _parts(name: str, value: torch.Tensor, rank: int, size: int) -> dict[str, torch.Tensor]:
    local: Any = value.to_local() if isinstance(value, DTensor) else value
    if not hasattr(local, "__tensor_flatten__") or type(local) is torch.Tensor:
        return {name: value}
    inner, _ = local.__tensor_flatten__()
    return {f"{name}.rank{rank}of{size}.{part}": getattr(local, part) for part in inner}
