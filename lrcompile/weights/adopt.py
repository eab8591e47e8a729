"""adopt(): write a Plan into a model, in place; and back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from lrcompile.errors import AdoptError, PlanError
from lrcompile.graph.capture import Inputs
from lrcompile.graph.names import plain_name
from lrcompile.live import Live
from lrcompile.recipe import Recipe
from lrcompile.weights.layers import PairedModule, read_extra_state
from lrcompile.weights.plan import Entry, Plan
from lrcompile.weights.planner import plan, refuse_adopted
from lrcompile.weights.replace import (
    Change,
    Factor,
    Pair,
    carry_out,
    dissolve,
    empty_pair,
    factored,
    refuse,
    settle,
    tell,
    warn_of_lists,
)

M = TypeVar("M", bound=nn.Module)


def adopt(model: M, plan_or_recipe: Plan | Recipe, example_inputs: Inputs | None = None) -> M:
    """Replace the planned weights by pairs, in place. Do it before the optimizer, DDP and `fully_shard`.

    The model stays ordinary PyTorch: the same module objects with leaves `weight_a` (rank, in_features) and
    `weight_b` (out_features, rank), of the dtype, device and requires_grad of the weight they replace. The
    factors are a truncated SVD of the present weights, computed one weight at a time: peak memory is the model plus one
    weight. On the `meta` device the shapes are made and nothing is computed. An optimizer built earlier follows, if it
    has not stepped.

    Args:
        model: not adopted, not wrapped.
        plan_or_recipe: a Plan of this model, or a Recipe to plan by.
        example_inputs: as for `plan`; only with a Recipe.

    Returns:
        the same model.

    Raises:
        PlanError: the Plan belongs to another model (the first difference is named).
        AdoptError: adopted already, sharded or wrapped already, NaN or Inf in a weight, a gradient hook on it, an
            optimizer that has stepped with it (each named).
    """
    start = time.perf_counter()
    if isinstance(plan_or_recipe, Recipe):
        if example_inputs is None:
            raise AdoptError(
                "adopting by a Recipe needs example inputs: lrcompile.adopt(model, recipe, example_inputs)"
            )
        refuse_wrapped(model)
        the_plan = plan(model, example_inputs, plan_or_recipe)
    elif isinstance(plan_or_recipe, Plan):
        if example_inputs is not None:
            raise AdoptError("example inputs go with a Recipe; a Plan has its decisions already")
        the_plan = plan_or_recipe
    else:
        raise AdoptError(f"adopt takes a Plan or a Recipe, got {type(plan_or_recipe).__name__}")
    refuse_adopted(model)
    refuse_wrapped(model)
    the_plan.check(model)
    pairs = write_plan(model, the_plan, factored(str(the_plan.recipe.get("svd", "auto"))))
    tell(the_plan.entries, [pair.entry for pair in pairs], the_plan.parameters, time.perf_counter() - start)
    return model


def write_plan(model: nn.Module, the_plan: Plan, factor: Factor, *, computes: bool = True) -> list[Pair]:
    """Install every pair of a Plan, each in all the modules that share its weight.

    Everything that can be wrong with a model is found before the first weight is touched.
    """
    return _install(model, _changes(model, the_plan), factor, computes, the_plan.recipe)


def _changes(model: nn.Module, the_plan: Plan) -> list[Change]:
    parameters = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    return [Change(entry, parameters[entry.key]) for entry in the_plan.pairs]


def _install(
    model: nn.Module, changes: Sequence[Change], factor: Factor, computes: bool, recipe: dict[str, Any]
) -> list[Pair]:
    live = Live.sweep()
    refuse(changes, live, computes=computes)
    pairs = carry_out(changes, live, factor, recipe)
    settle(model.parameters(), recipe)
    warn_of_lists(pairs, live)
    return pairs


def refuse_wrapped(model: nn.Module) -> None:
    """Raise AdoptError where the parameters are in somebody's hands already: DTensors, FSDP, DDP."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise AdoptError(
                f"{name or 'the model'} is wrapped in {kind} already; call lrcompile.adopt(model, ...) before wrapping it"
            )
    for name, p in model.named_parameters():
        if _is_sharded(p):
            raise AdoptError(f"{name} is a DTensor (sharded); call lrcompile.adopt(model, ...) before fully_shard")


def _is_sharded(p: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)


def plan_of(model: nn.Module) -> Plan:
    """The Plan that an adopted model carries in its modules."""
    entries: dict[int, Entry] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    size: dict[str, int] = {}
    names: dict[int, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        paired = module.lr_pairs if isinstance(module, PairedModule) else {}
        for name, p in module._parameters.items():
            stem = name[:-2] if name[:-2] in paired and name[-2:] in ("_a", "_b") else name
            full = plain_name(f"{module_name}.{stem}" if module_name else stem)
            if p is None or full in shapes:
                continue
            told = (
                Entry(**{**paired[stem], "names": (), "shape": tuple(paired[stem]["shape"])})
                if stem in paired
                else None
            )
            shapes[full] = told.shape if told else tuple(p.shape)
            size[full] = p.element_size()
            names.setdefault(id(p), []).append(full)
            if told:
                entries.setdefault(id(p), told)
    found = [replace(e, names=tuple(names[key])) for key, e in entries.items()]
    tied = [tuple(group) for group in names.values() if len(group) > 1]
    return Plan(found, shapes, tied, size)


def adopt_like(model: M, state_dict: dict[str, Any]) -> M:
    """Give a model the pairs that a saved state has, so that `load_state_dict` fits. Nothing is computed.

    Args:
        model: the untouched model the script builds, also inside torch.compile's or DDP's wrapper.
        state_dict: from `model.state_dict()` of an adopted model; wrappers' prefixes don't matter here, though they do
            to `load_state_dict`.

    Raises:
        StateError, AdoptError, PlanError: the state holds no Plan, is a whole checkpoint, or doesn't fit the model.
    """
    if not isinstance(state_dict, Mapping):
        raise AdoptError(f"adopt_like takes a state dict, got {type(state_dict).__name__}; torch.load it first")
    refuse_adopted(model)
    refuse_wrapped(getattr(model, "_orig_mod", model))
    pairs: dict[str, dict[str, Any]] = {}
    for key, item in state_dict.items():
        owner, _, last = str(key).rpartition(".")
        if last == "_extra_state":
            for name, told in (read_extra_state(item) or {}).items():
                pairs[plain_name(f"{owner}.{name}" if owner else name)] = told
    if not pairs:
        # {"model": state, "optimizer": ...}, whatever the script calls it.
        states = [k for k, v in state_dict.items() if isinstance(v, Mapping) and _holds_tensors(k, v)]
        if states:
            raise AdoptError(f"this is a whole checkpoint, not a model's state: pass checkpoint[{states[0]!r}]")
        raise AdoptError("the state holds no lrcompile Plan: it was not saved from an adopted model, load it as it is")
    places: dict[str, tuple[nn.Module, str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name in module._parameters:
            places[plain_name(f"{module_name}.{name}" if module_name else name)] = (module, name)
    todo: dict[int, Change] = {}
    for full, told in pairs.items():
        # As the state calls it, or without DDP's prefix.
        place = places.get(full) or places.get(full.removeprefix("module."))
        if place is None:
            raise PlanError(
                f"the state's Plan belongs to another model: it factors {full!r}, this model has no such parameter"
            )
        weight = place[0]._parameters[place[1]]
        entry = Entry(**{**told, "names": tuple(told["names"]), "shape": tuple(told["shape"])})
        if weight is None or tuple(weight.shape) != entry.shape:
            here = None if weight is None else tuple(weight.shape)
            raise PlanError(f"the state's Plan belongs to another model: {full!r} is {entry.shape} there, {here} here")
        todo.setdefault(id(weight), Change(entry, weight))
    _install(model, list(todo.values()), empty_pair, computes=False, recipe={})
    return model


def _holds_tensors(key: object, item: Mapping[Any, Any]) -> bool:
    return not str(key).endswith("_extra_state") and any(isinstance(x, torch.Tensor) for x in item.values())


def merge(model: M) -> M:
    """Back to dense modules, in place: every weight becomes the product that it read, its class the one it had.

    An optimizer that held a pair holds the merged weight afterwards; state that it had for the pair is dropped, with a
    warning, and so are gradients of the pair.

    Raises:
        AdoptError: nothing of the model is adopted, or its leaves are sharded.
    """
    adopted: list[Any] = [m for m in model.modules() if isinstance(m, PairedModule)]
    if not adopted:
        raise AdoptError("the model is not adopted; there is nothing to merge")
    for full, p in model.named_parameters():
        if _is_sharded(p):
            raise AdoptError(f"{full} is a DTensor (sharded); load its full state into an unsharded model, merge that")
    dissolve(adopted, Live.sweep())
    return model
