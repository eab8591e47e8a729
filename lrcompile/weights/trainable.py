"""What a recipe's `trainable` asks for: gradients for the pairs and for what its globs name, none for anything else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import nn

from lrcompile.errors import PlanError
from lrcompile.graph.names import among, dense_names, matches
from lrcompile.weights.layers import AdoptedModule


def check_trainable(model: nn.Module, globs: Sequence[str]) -> None:
    """Raise PlanError for a glob that matches no parameter of the model, nor a module that holds one."""
    names = list(chain.from_iterable(dense_names(model).values()))
    for glob in globs:
        if not any(matches(name, glob) for name in names):
            raise PlanError(
                f"trainable={glob!r} matches no parameter, and no module that holds one{among(names, glob)}"
            )


def freeze(model: nn.Module, trainable: Sequence[str]) -> None:
    """Leave gradients to the pairs, and to parameters that match a glob by name, or by a module that holds them.

    What is frozen loses the gradient that it has: an optimizer built earlier would move it once more.
    """
    leaves = {  # whether each is a side of a plain pair
        id(leaf): form.leaves[suffix].pair
        for module in model.modules()
        if isinstance(module, AdoptedModule)
        for name, form in module.lr_forms
        for suffix, leaf in module.lr_parts(name).items()
    }
    named = dense_names(model)
    for p in model.parameters():
        wanted = any(matches(name, trainable) for name in named[id(p)])
        p.requires_grad_(leaves.get(id(p), wanted))
        if not p.requires_grad:
            p.grad = None
