"""Adopted modules as plain linears, for tools that know nothing of pairs: a pair becomes two thin ones, one after the other.

What an exporter and a quantiser see is then nn.Linear alone. A form with a base (a frozen weight, with or without a pair
beside it) has one matrix product in the end, so it is merged; so is a weight outside a linear.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from lrcompile.weights.adopt import merge
from lrcompile.weights.form import Form
from lrcompile.weights.layers import AdoptedModule, one_product, plainly

M = TypeVar("M", bound=nn.Module)


class Pair(nn.Sequential):
    """x -> x · down · up, with a linear's own attributes: model code reads them."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.in_features, self.out_features = down.in_features, up.out_features


def unfold(model: M, *, multiple: int = 1) -> M:
    """Make every adopted module of a model an ordinary one, in place; transformers' Conv1D becomes nn.Linear too.

    Args:
        model: adopted, or not; in fp32, since the sides are computed in it.
        multiple: ranks are filled up with zeros to a multiple of this, which changes no product: 4-bit formats have groups.

    Returns:
        the same model. A pair is a `Pair` of `down` (in_features -> rank) and `up` (rank -> out_features, with the bias).
    """
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        form = _pair_of(module)
        if id(module) in made:
            pass  # shared, and so is what stands for it
        elif form is not None:
            made[id(module)] = _pair(module, form, multiple)
        elif _is_conv1d(module) and not isinstance(module, AdoptedModule):
            made[id(module)] = _linear(module.weight.t(), module.bias)
        if id(module) in made and name:
            _put(model, name, made[id(module)])
    if any(isinstance(module, AdoptedModule) for module in model.modules()):
        merge(model)
        return unfold(model, multiple=multiple)  # a merged Conv1D is one to replace
    return model


def _pair_of(module: nn.Module) -> Form | None:
    """The form of a module that is one product with a pair and nothing else; None for any other."""
    if not isinstance(module, AdoptedModule) or not one_product(module.lr_base):
        return None
    form = dict(module.lr_forms).get("weight")
    return form if form is not None and form.base is None and len(module.lr_forms) == 1 else None


def _pair(module: nn.Module, form: Form, multiple: int) -> Pair:
    assert isinstance(module, AdoptedModule)
    leaves = module.lr_parts("weight")
    with plainly(next(iter(leaves.values()))):
        a, b = (form.side(side, leaves, torch.float32).float() for side in "ab")
        fill = -len(a) % multiple
        a, b = nn.functional.pad(a, (0, 0, 0, fill)), nn.functional.pad(b, (0, fill))
    return Pair(_linear(a, None), _linear(b, module.bias))  # type: ignore[arg-type]


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    made.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made.eval()


def _is_conv1d(module: nn.Module) -> bool:
    base = module.lr_base if isinstance(module, AdoptedModule) else type(module)
    return base.__name__ == "Conv1D" and one_product(base)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)
