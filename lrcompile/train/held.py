"""What a rank holds of a model while it trains, counted from shapes: no weights, no data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lrcompile.graph.names import parameter_names
from lrcompile.train.language import layers
from lrcompile.weights.layers import AdoptedModule

_QUANTISED_BLOCK = 256  # numbers that share a scale in torchao's AdamW8bit,
_QUANTISED_LEAST = 4096  # and the smallest tensor that it quantises the states of
_STATE = 4  # bytes of a number in the states that Muon and Spectron keep, whatever the parameter's dtype


def local_numel(p: torch.Tensor, shard: int) -> int:
    """Numbers that rank 0 holds of a parameter: fully_shard divides the first dimension, the last ranks getting less."""
    if p.dim() == 0 or shard == 1:
        return p.numel()
    return -(-p.shape[0] // shard) * math.prod(p.shape[1:])


def optimizer_bytes(model: nn.Module, name: str, shard: int = 1) -> dict[str, int]:
    """Bytes that an optimizer keeps of each trained parameter, on rank 0 of those that share a copy.

    adamw: two numbers of the parameter's dtype. adamw8bit: two bytes and the scales. muon: one fp32 number of each matrix in the
    blocks. spectron: one of each side of a pair, and a vector as long as it has rows. What the last two leave is AdamW's.
    """
    pairs: set[int] = set()
    for module in model.modules():
        if isinstance(module, AdoptedModule):
            for weight, form in module.lr_forms:
                if form.rank is not None and form.factors is None:
                    parts = module.lr_parts(weight)
                    pairs |= {id(parts["_a"]), id(parts["_b"])}
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    matrices = {id(p) for block in layers(model) for p in block.parameters() if p.dim() == 2} - embeddings
    found: dict[str, int] = {}
    for p, key in _trained(model):
        numbers = local_numel(p, shard)
        adamw = 2 * numbers * p.element_size()
        if name == "spectron" and id(p) in pairs:
            found[key] = _STATE * (numbers + local_numel(p[:, 0], shard))
        elif name == "muon" and (id(p) in pairs or id(p) in matrices):
            found[key] = _STATE * numbers
        elif name == "adamw8bit" and numbers >= _QUANTISED_LEAST and numbers % _QUANTISED_BLOCK == 0:
            found[key] = 2 * (numbers + 4 * numbers // _QUANTISED_BLOCK)
        else:
            found[key] = adamw
    return found


def _trained(model: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
    names = parameter_names(model)
    for p in model.parameters():
        if p.requires_grad:
            yield p, names[id(p)][0]


def gathered_bytes(model: nn.Module, shard: int, precision: torch.dtype) -> int:
    """Bytes of the weights in use at once, in the precision that is computed in.

    Two blocks and what is around the blocks where weights are sharded; a copy of those kept in another dtype where one rank
    holds all.
    """

    def used(parameters: Any) -> int:
        return sum(p.numel() * (precision.itemsize if p.is_floating_point() else p.element_size()) for p in parameters)

    if shard == 1:
        return used(p for p in model.parameters() if p.is_floating_point() and p.dtype != precision)
    held = [list(block.parameters()) for block in layers(model)]
    inside = {id(p) for layer in held for p in layer}
    around = used(p for p in model.parameters() if id(p) not in inside)
    return around + 2 * max(map(used, held), default=0)  # one computes while the next is fetched
