"""Which parameter is what to an optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from lrcompile.weights.layers import AdoptedModule


@dataclass(frozen=True)
class Pair:
    """The two sides of a plain pair that is trained: W = base + scale · b @ a.

    Attributes:
        a: (rank, in_features).
        b: (out_features, rank).
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]


@dataclass
class Roles:
    """Every trainable parameter of a model, in exactly one of these lists, each once whatever its names.

    Attributes:
        pairs: both sides trained.
        sides: of a pair of which the other side isn't trained, or belongs to another pair already.
        hidden: dense matrices of the blocks.
        outer: other parameters of two dimensions or more: the output head, convolutions, 3-D experts.
        plain: embeddings (and what is tied to one), norms, biases: never decayed.
    """

    pairs: list[Pair] = field(default_factory=list)
    sides: list[nn.Parameter] = field(default_factory=list)
    hidden: list[nn.Parameter] = field(default_factory=list)
    outer: list[nn.Parameter] = field(default_factory=list)
    plain: list[nn.Parameter] = field(default_factory=list)


def roles(model: nn.Module) -> Roles:
    """Sort the trainable parameters of a model, adopted or not, sharded or not.

    Blocks are what lies in an nn.ModuleList (nn.TransformerEncoder's, transformers', nanoGPT's); in a model without one,
    everything but embeddings and what `get_output_embeddings()` names.

    Embeddings are not decayed: their rows get a gradient only when their token occurs, and decay of them was seen to
    make training unstable (OLMo 2, arXiv 2501.00656).
    """
    found = Roles()
    seen: set[int] = set()

    def new(p: nn.Parameter) -> bool:
        if not p.requires_grad or id(p) in seen:
            return False
        seen.add(id(p))
        return True

    leaves: list[nn.Parameter] = []
    for a, b, scale in _pairs(model):
        if a.requires_grad and b.requires_grad and not {id(a), id(b)} & seen:
            found.pairs.append(Pair(a, b, scale))
            seen |= {id(a), id(b)}
        leaves += [a, b]
    found.sides = [p for p in leaves if new(p)]

    embeddings = _own(m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = _own([head] if isinstance(head, nn.Module) else [])
    blocks = {id(p) for m in model.modules() if isinstance(m, nn.ModuleList) for p in m.parameters()}
    for p in model.parameters():
        if not new(p):
            continue
        if id(p) in embeddings or p.dim() < 2:
            found.plain.append(p)
        elif p.dim() == 2 and min(p.shape) > 1 and id(p) not in heads and (id(p) in blocks or not blocks):
            found.hidden.append(p)
        else:
            found.outer.append(p)
    return found


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
    for module in model.modules():
        if isinstance(module, AdoptedModule):
            for name, form in module.lr_forms:
                if form.rank is not None and form.factors is None:
                    parts = module.lr_parts(name)
                    yield parts["_a"], parts["_b"], form.scale


def _own(modules: Iterator[nn.Module] | list[nn.Module]) -> set[int]:
    return {id(p) for m in modules for p in m.parameters(recurse=False)}


def flat(pairs: list[Pair]) -> list[torch.Tensor]:
    """a, b, a, b, …: how groups of pairs hold them."""
    return [side for pair in pairs for side in (pair.a, pair.b)]
