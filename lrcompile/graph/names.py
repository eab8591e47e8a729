"""How parameters are called: by all their names, whatever wraps the model."""

from __future__ import annotations

from torch import nn

_WRAPPERS = ("_orig_mod.",)


def plain_name(name: str) -> str:
    """A parameter's or module's name without what torch.compile puts in front."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parameter_names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """id(parameter) -> every name it has in the model (tied parameters have several)."""
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), plain_name(name))
    return names
