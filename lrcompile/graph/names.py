"""How parameters are called: by all their names, whatever wraps the model; and what a glob says of a name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lrcompile.words import fold

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


def dense_names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """`parameter_names` as the model has them before adoption: both sides of a pair, and a base, by their weight's."""
    names: dict[int, tuple[str, ...]] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        leaves = getattr(module, "lr_leaves", {})  # of an adopted module: weight_a -> weight
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = plain_name(f"{owner}.{leaves.get(name, name)}".removeprefix("."))
            names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def matches(name: str, glob: str | Iterable[str], *, around: bool = True) -> bool:
    """Whether a glob, or one of several, matches a parameter. The one meaning of every glob that a user writes (`include`,
    `exclude`, `trainable` and `shares` of a Recipe, `optimizer.rates` of a run).

    A glob matches a parameter where it matches, as a whole and in its own case, the parameter's dense name
    ("layers.0.linear1.weight", also when it is a pair by now: `weight_a` and `weight_b` are no names of their own), the name
    of the module that owns it ("layers.0.linear1"), or that of any module around it ("layers.0", "layers"). `*` stands for any
    text, dots too, `?` for one character, `[ab]` for one of these. So "*attn*" is what has attn anywhere in its name,
    "*.attn.*" what lies in a module called attn, "*.linear1" each module of that name below another, and "1" the outermost
    one called 1 alone, with all that is in it.

    Args:
        name: of a parameter, as `dense_names` has it.
        glob: one, or several of which one has to match.
        around: whether a module around its own counts.
    """
    parts = name.split(".")
    shortest = 1 if around else max(1, len(parts) - 1)
    called = [".".join(parts[:n]) for n in range(shortest, len(parts) + 1)]
    globs = (glob,) if isinstance(glob, str) else glob
    return any(fnmatchcase(known, g) for g in globs for known in called)


def among(names: Sequence[str], glob: str, most: int = 8) -> str:
    """What to say after "GLOB matches nothing": how to write it, if at another depth it would match, and what is there.

    Modules that own these parameters stand for them, repeated layers as one where there are many.
    """
    deeper = f"*.{glob}"
    hint = f"; write {deeper!r} to match it at any depth" if any(matches(name, deeper) for name in names) else ""
    owners = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    owners = owners if len(owners) <= most else fold(owners)
    return f"{hint}; the model has {', '.join(owners[:most])}{', …' if len(owners) > most else ''}"
