"""adopt(): write a Plan into a model, in place; and back."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from lrcompile.errors import AdoptError, PlanError, RecipeError
from lrcompile.graph.capture import Inputs
from lrcompile.graph.names import plain_name
from lrcompile.live import Live
from lrcompile.recipe import CALIBRATED, Recipe
from lrcompile.weights.formats import format_of
from lrcompile.weights.layers import AdoptedModule, read_extra_state, read_trainable
from lrcompile.weights.library import as_dense, held
from lrcompile.weights.make import Maker, computed, empty_leaves
from lrcompile.weights.plan import Entry, Plan, check_form
from lrcompile.weights.planner import plan, refuse_adopted
from lrcompile.weights.replace import (
    Change,
    Made,
    carry_out,
    dissolve,
    refuse,
    refuse_format,
    settle,
    settled_by,
    tell,
    unsettle,
    warn_of_lists,
)
from lrcompile.weights.trainable import check_trainable, freeze

log = logging.getLogger("lrcompile")

M = TypeVar("M", bound=nn.Module)


def adopt(
    model: M,
    plan_or_recipe: Plan | Recipe,
    example_inputs: Inputs | None = None,
    *,
    calibration: Iterable[Inputs] | None = None,
) -> M:
    """Replace the planned weights by pairs or frozen bases, in place. Do it before the optimizer, DDP and `fully_shard`.

    The model stays ordinary PyTorch: the same module objects with leaves in the weight's place (`weight_a` (rank,
    in_features), `weight_b` (out_features, rank), a frozen `weight_base`; see form.py), of the device and requires_grad of
    the weight they replace. The numbers are computed from the present weights one at a time: peak memory is the model plus
    one weight. On the `meta` device the shapes are made and nothing is computed. An optimizer built earlier follows, if it
    has not stepped. Where the recipe says what is trained (`trainable`), everything else is frozen.

    Args:
        model: not adopted, not wrapped.
        plan_or_recipe: a Plan of this model, or a Recipe to plan by.
        example_inputs: as for `plan`; only with a Recipe.
        calibration: batches, each as example_inputs, for the starts that look at data ("data", "qera"): the model is run on
            each of them once, and the second moments of its linears' inputs are kept, in_features² numbers each.

    Returns:
        the same model.

    Raises:
        PlanError: the Plan belongs to another model (the first difference is named), a format can't hold a weight.
        RecipeError: a data-aware start without calibration.
        AdoptError: adopted already, sharded or wrapped already, NaN or Inf in a weight or in calibration data, a gradient hook,
            an optimizer that has stepped with it, a trained weight that would be frozen (each named).
    """
    start = time.perf_counter()
    if not isinstance(plan_or_recipe, (Plan, Recipe)):
        raise AdoptError(f"adopt takes a Plan or a Recipe, got {type(plan_or_recipe).__name__}")
    refuse_adopted(model)
    refuse_wrapped(model)
    shapes_alone = False
    if isinstance(plan_or_recipe, Recipe):
        recipe = plan_or_recipe
        if example_inputs is None:
            raise AdoptError(
                "adopting by a Recipe needs example inputs: lrcompile.adopt(model, recipe, example_inputs)"
            )
        moments = moments_for([recipe.start], model, calibration, recipe)
        the_plan = plan(model, example_inputs, recipe, covariances=moments)
    else:
        if example_inputs is not None:
            raise AdoptError("example inputs go with a Recipe; a Plan has its decisions already")
        the_plan = plan_or_recipe
        with as_dense(model, numbers=False):
            the_plan.check(model)
        inits = [e.init for e in the_plan.adopted if e.rank is not None]
        # On meta nothing is computed, so that there is nothing to look at data for.
        shapes_alone = calibration is None and all(p.is_meta for p in model.parameters())
        moments = {} if shapes_alone else moments_for(inits, model, calibration)
    if not shapes_alone:
        check_reached(the_plan, moments)
    made = write_plan(model, the_plan, computed(the_plan.recipe, moments))
    tell(the_plan.entries, [m.entry for m in made], the_plan.parameters, time.perf_counter() - start)
    return model


def moments_for(
    inits: Iterable[str], model: nn.Module, calibration: Iterable[Inputs] | None, recipe: Recipe | None = None
) -> Mapping[str, torch.Tensor]:
    """The second moments that these starts look at, of the weights that a recipe selects; nothing where none looks at data.

    Raises:
        RecipeError: they need calibration data and there are none, or the other way round.
    """
    inits = list(inits)
    init = next((i for i in inits if i in CALIBRATED), None)
    if init is not None and calibration is None:
        raise RecipeError(
            f"init={init!r} looks at data: lrcompile.adopt(model, recipe, example_inputs, calibration=batches), each batch as "
            "example_inputs"
        )
    if init is None and calibration is not None:
        told = f"init={inits[0]!r}" if inits else "a model without pairs"
        raise RecipeError(f"{told} looks at no data: leave calibration out, or choose from {', '.join(CALIBRATED)}")
    if calibration is None:
        return {}
    from lrcompile.graph.calibrate import covariances  # which stands on the floor above

    return covariances(model, calibration, recipe)


def check_reached(the_plan: Plan, moments: Mapping[str, torch.Tensor]) -> None:
    """Refuse a data-aware start of weights that no calibration batch went through, as those of experts never chosen."""
    blind = [e.key for e in the_plan.adopted if e.rank is not None and e.init in CALIBRATED and e.key not in moments]
    if blind:
        raise PlanError(
            f"no calibration batch reached {', '.join(blind[:5])}{', …' if len(blind) > 5 else ''}: give batches that do, or "
            "leave them out with exclude"
        )


def write_plan(model: nn.Module, the_plan: Plan, make: Maker, *, computes: bool = True) -> list[Made]:
    """Install what a Plan says of every weight, each in all the modules that share it; freeze what it says is not trained.

    Everything that can be wrong with a model is found before the first weight is touched.
    """
    trainable = the_plan.recipe.get("trainable")
    if trainable is not None:
        check_trainable(model, trainable)
    made = _install(model, _changes(model, the_plan, computes), make, computes, the_plan.recipe)
    if trainable is not None:
        freeze(model, trainable)
    return made


def _changes(model: nn.Module, the_plan: Plan, computes: bool) -> list[Change]:
    """What is to be done, in the model's own dtypes where it is computed: it may have been cast since it was planned."""
    parameters = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    changes = []
    for entry in the_plan.adopted:
        weight = parameters[entry.key]
        dtype = str(weight.dtype).removeprefix("torch.")
        if computes and weight.is_floating_point() and held(weight) is None and entry.dtype != dtype:
            entry = replace(entry, dtype=dtype)
            check_form(entry)
        changes.append(Change(entry, weight))
    return changes


def _install(
    model: nn.Module, changes: Sequence[Change], make: Maker, computes: bool, recipe: dict[str, Any]
) -> list[Made]:
    live = Live.sweep(model)
    refuse(changes, live, computes=computes, frozen=not computes or recipe.get("trainable") is not None)
    made = carry_out(changes, live, make, recipe)
    settle(model.parameters(), recipe)
    warn_of_lists(made, live)
    return made


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
    recipe: dict[str, Any] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        adopted = isinstance(module, AdoptedModule)
        leaves: dict[str, str] = module.lr_leaves if adopted else {}
        for leaf, p in module._parameters.items():
            name = leaves.get(leaf, leaf)
            full = plain_name(f"{module_name}.{name}" if module_name else name)
            if p is None or full in shapes:
                continue
            told = _entry(module.lr_told[name], ()) if leaf in leaves else None
            recipe = recipe or settled_by(p) or {}
            if adopted and module.lr_trainable is not None:  # which copies and states keep
                recipe = {"trainable": module.lr_trainable, **recipe}
            shapes[full] = told.shape if told else tuple(p.shape)
            size[full] = getattr(torch, told.dtype).itemsize if told else p.element_size()
            names.setdefault(id(p), []).append(full)
            if told:
                entries.setdefault(id(p), told)
    found = [replace(e, names=tuple(names[key])) for key, e in entries.items()]
    tied = [tuple(group) for group in names.values() if len(group) > 1]
    return Plan(found, shapes, tied, size, recipe)


def _entry(told: Mapping[str, Any], names: Sequence[str]) -> Entry:
    return Entry(**{**told, "names": tuple(names), "shape": tuple(told["shape"])})


def adopt_like(model: M, state_dict: dict[str, Any]) -> M:
    """Give a model the leaves that a saved state has, so that `load_state_dict` fits. Nothing is computed.

    Bases are frozen; and where the recipe of the model that was saved said what is trained (`trainable`), everything else
    is too. Where it did not, other parameters stay as they are.

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
    trainable: Sequence[str] | None = None
    for key, item in state_dict.items():
        owner, _, last = str(key).rpartition(".")
        if last == "_extra_state":
            trainable = read_trainable(item) if trainable is None else trainable
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
                f"the state's Plan belongs to another model: it adopts {full!r}, this model has no such parameter"
            )
        weight = place[0]._parameters[place[1]]
        entry = _entry(told, told["names"])
        if weight is None or tuple(weight.shape) != entry.shape:
            here = None if weight is None else tuple(weight.shape)
            raise PlanError(f"the state's Plan belongs to another model: {full!r} is {entry.shape} there, {here} here")
        todo.setdefault(id(weight), Change(entry, weight))
    _install(model, list(todo.values()), empty_leaves, computes=False, recipe={})
    if trainable is not None:
        freeze(model, trainable)
        for module in model.modules():
            if isinstance(module, AdoptedModule):
                module.lr_trainable = tuple(trainable)
    return model


def _holds_tensors(key: object, item: Mapping[Any, Any]) -> bool:
    return not str(key).endswith("_extra_state") and any(isinstance(x, torch.Tensor) for x in item.values())


def merge(model: M, *, weights: str | None = None) -> M:
    """Back to dense modules, in place: every weight becomes the product that it read, its class the one it had.

    An optimizer that held a pair holds the merged weight afterwards; state that it had for the pair is dropped, with a
    warning, and so are gradients of the pair.

    Args:
        model: adopted.
        weights: number format to quantise the merged weights: the model then has bases alone, without pairs. The error of
            quantising is logged; `lrcompile.weights.adopt.plan_of(model)` tells it weight by weight.

    Raises:
        RecipeError: no such format.
        PlanError: the format can't hold one of the weights; the model is as it was.
        AdoptError: nothing of the model is adopted (or, with `weights`, has a pair), or its leaves are sharded.
    """
    adopted: list[Any] = [m for m in model.modules() if isinstance(m, AdoptedModule)]
    if not adopted:
        raise AdoptError("the model is not adopted, or merged already; there is nothing to merge")
    if weights is not None:
        format_of(weights)
        adopted = [m for m in adopted if any(form.rank is not None for _, form in m.lr_forms)]
        if not adopted:
            raise AdoptError(
                "no weight of the model has a pair, or all are merged already; there is nothing to requantise"
            )
    for full, p in model.named_parameters():
        if _is_sharded(p):
            raise AdoptError(f"{full} is a DTensor (sharded); load its full state into an unsharded model, merge that")
    if weights is not None:
        refuse_format(adopted, weights)
    made = dissolve(adopted, Live.sweep(model), weights)
    unsettle(model.parameters())
    if made:
        settle(model.parameters(), {})
        worst = max(made, key=lambda e: e.error or 0.0)
        mean = sum(e.error or 0.0 for e in made) / len(made)
        log.info(
            f"merged {len(made)} weights into {weights}: mean relative error of quantising {mean:.3g}, at most "
            f"{worst.error:.3g} ({worst.key})"
        )
    return model
