"""What a recipe's `trainable` asks for: gradients for the pairs and for what its globs name, none for anything else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lrcompile.errors import PlanError
from lrcompile.graph.names import parameter_names, plain_name
from lrcompile.passes import Weight
from lrcompile.weights.layers import AdoptedModule


def check_trainable(model: nn.Module, globs: Sequence[str]) -> None:
    """Raise PlanError for a glob that matches no parameter of the model, nor a module that holds one."""
    names = tuple(plain_name(n) for n, _ in model.named_parameters(remove_duplicate=False))
    everything = Weight(names, (1, 1), torch.float32)
    for glob in globs:
        if not everything.matches(glob):
            raise PlanError(f"trainable={glob!r} matches no parameter, and no module that holds one")


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
    named = parameter_names(model)
    for p in model.parameters():
        wanted = any(Weight(named[id(p)], (1, 1), p.dtype).matches(glob) for glob in trainable)
        p.requires_grad_(leaves.get(id(p), wanted))
        if not p.requires_grad:
            p.grad = None
