"""How a language model is called, and which of its modules are its layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lrcompile.errors import TrainError


def blocks(model: nn.Module) -> list[str]:
    """Names of a model's layers: the members, those that hold parameters, of its outermost ModuleLists; a model without any
    is one piece. Of a member that is a list itself, and so never called, its members."""
    found: list[str] = []
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            found += _members(name, module)
    return found


def _members(name: str, module: nn.Module) -> list[str]:
    found: list[str] = []
    for key, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += _members(f"{name}.{key}", child)
        elif any(True for _ in child.parameters()):
            found.append(f"{name}.{key}")
    return found


def layers(model: nn.Module) -> list[nn.Module]:
    """The modules of `blocks`, each once."""
    return list(dict.fromkeys(model.get_submodule(name) for name in blocks(model)))


def check_decoder(model: nn.Module) -> None:
    """Raise TrainError for a transformers model with an encoder: its loss is no next token's."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TrainError(
            f"{type(model).__name__} has an encoder and a decoder; what is trained here is a decoder alone, on the next token"
        )


def check_length(model: nn.Module, length: int) -> None:
    """Raise TrainError where a transformers model has fewer positions than the sequences have tokens."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise TrainError(
            f"data.length={length}: the model has {limit} positions; shorten the sequences, or give it more"
        )


def example(model: nn.Module, length: int) -> Any:
    """Example inputs on the device of the model's parameters: one row of `length` tokens."""
    device = next(model.parameters()).device
    tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
    return inputs(model, tokens, torch.arange(length, device=device)[None])


def inputs(model: nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> Any:
    """What the model is called with: keywords of transformers where it has them, the tokens alone where not.

    Args:
        tokens: int64 (rows, length).
        positions: int64 (rows, length), from 0 in every document: most models of transformers keep attention inside a
            document by them (`evaluate.sees` finds out).
    """
    accepted = _accepted(model)
    if "position_ids" not in accepted:
        return (tokens,)
    given = {"input_ids": tokens, "position_ids": positions}
    return {**given, "use_cache": False} if "use_cache" in accepted else given


def args_of(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of what `inputs` gives."""
    return ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})


def logits_of(model: nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Call a model: (rows, length) tokens -> (rows, length, vocabulary) logits."""
    args, keywords = args_of(inputs(model, tokens, positions))
    return logits_in(model, model(*args, **keywords))


def logits_in(model: nn.Module, output: Any) -> torch.Tensor:
    """The logits in what a model returned.

    Raises:
        TrainError: there are none.
    """
    for found in (output, getattr(output, "logits", None), output[0] if isinstance(output, tuple) else None):
        if isinstance(found, torch.Tensor) and found.dim() == 3:
            return found
    raise TrainError(
        f"{type(model).__name__} returns {type(output).__name__}; a language model returns (rows, length, vocabulary) logits"
    )


def _accepted(model: nn.Module) -> set[str]:
    found = model.__dict__.get("lr_accepted")
    if found is None:
        found = set(inspect.signature(type(model).forward).parameters)
        model.__dict__["lr_accepted"] = found
    return found
