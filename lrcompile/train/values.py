"""Where a model's first values come from: drawn a unit at a time from a seed, or held by a model that has them.

A unit is a block (one layer of the model), or what is left beside the blocks. Units are what ranks share the work of
starting by, so that nobody ever holds a whole dense model that is drawn.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from lrcompile.errors import TrainError


class Values(Protocol):
    """The dense values of a model, a unit at a time."""

    def names(self, unit: str | None) -> list[str]:
        """The names, in the model, of the parameters of a block (None: of those outside the blocks)."""

    def unit(self, name: str | None) -> dict[str, nn.Parameter]:
        """The parameters of the block of this name (None: those outside the blocks) by their names in the model, on the CPU."""

    def buffers(self) -> dict[str, torch.Tensor]:
        """Every buffer of the model by name, also those that no state dict holds."""


class Held:
    """Values of a dense model on the CPU, such as a pretrained one; it is left as it is."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self.model, self.blocks = model, blocks

    def names(self, unit: str | None) -> list[str]:
        return list(_parameters(self.model, unit, self.blocks))

    def unit(self, name: str | None) -> dict[str, nn.Parameter]:
        return _parameters(self.model, name, self.blocks)

    def buffers(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_buffers())


class Drawn:
    """Values drawn as transformers draws them, each unit from a seed of its own.

    A unit's numbers depend only on the seed and the unit's name, so that any rank may draw any unit, and a dense model
    and its low-rank twin start from the same weights.

    Args:
        model: of transformers, on the `meta` device, its buffers real; it is left as it is.
        blocks: names of its blocks.
        seed: of the run.

    Raises:
        TrainError: a parameter that the model's rules leave without a value.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], seed: int) -> None:
        self.model, self.blocks, self.seed = model, blocks, seed

    def names(self, unit: str | None) -> list[str]:
        return list(_parameters(self.model, unit, self.blocks))

    def unit(self, name: str | None) -> dict[str, nn.Parameter]:
        wanted = _parameters(self.model, name, self.blocks)
        real = {id(p): nn.Parameter(_unset(p), p.requires_grad) for p in wanted.values()}
        root = self.model if name is None else self.model.get_submodule(name)
        # A copy whose other parameters stay the model's own, on meta: initialising those too costs nothing.
        others: dict[int, Any] = {id(p): p for p in self.model.parameters()}
        others |= {id(b): b.clone() for b in root.buffers()}
        twin = copy.deepcopy(root, {**others, **real})
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(_seed(self.seed, name or ""))
            _initialise(twin, _governor(self.model, name))
        undrawn = [key for key, p in wanted.items() if p.is_floating_point() and real[id(p)].isnan().any()]
        if undrawn:
            raise TrainError(
                f"no rule of {type(self.model).__name__} draws {', '.join(undrawn[:5])}: save a model that has values "
                "(save_pretrained), and name its directory as model.source"
            )
        return {key: real[id(p)] for key, p in wanted.items()}

    def buffers(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_buffers())


def _unset(p: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU that shows where nothing is written."""
    made = torch.empty_like(p, device="cpu")
    return made.fill_(float("nan")) if made.is_floating_point() else made


def _parameters(model: nn.Module, unit: str | None, blocks: Sequence[str]) -> dict[str, nn.Parameter]:
    if unit is not None:
        return {f"{unit}.{key}": p for key, p in model.get_submodule(unit).named_parameters()}
    inside = {id(p) for block in blocks for p in model.get_submodule(block).parameters()}
    return {key: p for key, p in model.named_parameters() if id(p) not in inside}


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def _governor(model: nn.Module, name: str | None) -> Any:
    """The innermost model of transformers around a module: its rules draw the module's weights."""
    found, here = model, model
    for part in (name or "").split(".") if name else []:
        here = getattr(here, part)
        if hasattr(here, "_initialize_weights"):
            found = here
    if not hasattr(found, "_initialize_weights"):
        raise TrainError(f"{type(model).__name__} is no model of transformers, whose rules could draw its weights")
    return found


def _initialise(module: Any, governor: Any) -> None:
    """Children first, as transformers' own initialisation goes; a model inside a model follows its own rules."""
    own = module if hasattr(module, "_initialize_weights") else governor
    for child in module.children():
        _initialise(child, own)
    module._is_hf_initialized = False
    own._initialize_weights(module)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on `meta`, and their buffers for real: no file holds those."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # One that is on meta already is another module's too, and stays the same object.
        if param is not None and not param.is_meta:
            made = nn.Parameter(param.detach().to("meta"), param.requires_grad)
            made.__dict__.update(param.__dict__)
            param = made
        plain(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]
