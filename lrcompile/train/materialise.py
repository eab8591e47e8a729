"""Gives a sharded model its values: units are divided among the ranks, each computes its pairs and hands them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lrcompile.errors import TrainError
from lrcompile.recipe import CALIBRATED
from lrcompile.train.build import Built
from lrcompile.train.data import Batch
from lrcompile.train.language import inputs
from lrcompile.train.values import Held
from lrcompile.weights.adopt import check_reached, moments_for
from lrcompile.weights.make import Maker, computed, parameters
from lrcompile.weights.plan import Entry


def materialise(built: Built, device: torch.device, calibration: Iterable[Batch] = ()) -> None:
    """Fill `built.model`, sharded or not, on `device`; afterwards every rank's shards hold the run's first values.

    The singular value decompositions of a unit (a block, or what is beside the blocks) are computed once, by one rank, on
    `device`, and broadcast: at most one dense unit a rank is in memory beside the shards. Collective: every rank calls it.

    Args:
        built: as `build` gives it.
        device: of this rank.
        calibration: batches for the starts that look at data, the same on every rank, which runs its dense model on them, on
            the CPU; not read where no start does.

    Raises:
        TrainError: a parameter that no unit gives a value.
        PlanError: a weight that no batch reaches.
    """
    model = built.model
    allocate(model, device)
    for name, buffer in built.values.buffers().items():
        _buffer(model, name).copy_(buffer)
    places = dict(model.named_parameters(remove_duplicate=False))
    entries = {name: entry for entry in (built.plan.adopted if built.plan else ()) for name in entry.names}
    moments = _moments(built, calibration)
    make = computed(built.plan.recipe if built.plan else {}, moments, measured=False)  # nobody asks for the errors
    missing = {id(p): name for name, p in places.items()}
    for name, value in _handed_out(built, entries, make, device):
        place = places[name]
        if id(place) in missing:  # else one that is shared, and was filled under another name
            del missing[id(place)]
            fill(place, value)
    if missing:
        raise TrainError(f"no values for {', '.join(list(missing.values())[:5])}")


def _moments(built: Built, calibration: Iterable[Batch]) -> Mapping[str, torch.Tensor]:
    """Of what goes into the weights whose start looks at data; nothing where there are none."""
    inits = {entry.init for entry in (built.plan.adopted if built.plan else ()) if entry.rank is not None}
    if not inits & set(CALIBRATED) or not isinstance(built.values, Held):
        return {}
    dense = built.values.model.eval()
    moments = moments_for(inits, dense, [inputs(dense, batch.tokens, batch.positions) for batch in calibration])
    assert built.plan is not None
    check_reached(built.plan, moments)
    return moments


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give a model's parameters memory on a device, without values, before its first step; what is shared stays so.

    FSDP takes the new parameters up when it first runs.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
                    made[id(p)].__dict__.update(p.__dict__)
                module._parameters[name] = made[id(p)]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = b.to(device)


def fill(place: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole value into a parameter, or the part of it that this rank holds."""
    with torch.no_grad():
        if isinstance(place, DTensor):
            # Every rank has the whole value already: nothing is sent.
            part = distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)
            place.to_local().copy_(part.to_local())
        else:
            place.copy_(value)


def _buffer(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    found = model.get_submodule(owner)._buffers[last]
    assert found is not None
    return found


def _handed_out(
    built: Built, entries: dict[str, Entry], make: Maker, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every leaf's name and value, the same on all ranks, in the units' order."""
    units: list[str | None] = [None, *built.blocks]
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    shapes = {name: (tuple(p.shape), p.dtype) for name, p in built.model.named_parameters(remove_duplicate=False)}
    for first in range(0, len(units), world):
        turn = units[first : first + world]
        made = _leaves(built, turn[rank], entries, make, device) if rank < len(turn) else {}
        for owner, unit in enumerate(turn):
            for name in _names(built, unit, entries):
                shape, dtype = shapes[name]
                value = made.pop(name) if owner == rank else torch.empty(shape, dtype=dtype, device=device)
                if world > 1:
                    dist.broadcast(value, owner)
                yield name, value


def _names(built: Built, unit: str | None, entries: dict[str, Entry]) -> list[str]:
    """The leaves that a unit's parameters become."""
    out: list[str] = []
    for name in built.values.names(unit):
        entry = entries.get(name)
        out += [name] if entry is None or entry.form is None else [name + suffix for suffix in entry.form.leaves]
    return out


def _leaves(
    built: Built, unit: str | None, entries: dict[str, Entry], make: Maker, device: torch.device
) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for name, weight in built.values.unit(unit).items():
        entry = entries.get(name)
        weight = nn.Parameter(weight.detach().to(device), weight.requires_grad)
        if entry is None or entry.form is None:
            out[name] = weight.detach().clone()
        else:
            made, _ = parameters(weight, entry, make)
            out |= {name + suffix: leaf.detach().contiguous() for suffix, leaf in made.items()}
    return out
