"""adopt(): write a Plan into a model, in place; and back."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import nn

from lrcompile.errors import AdoptError, PlanError
from lrcompile.graph.capture import Inputs
from lrcompile.graph.names import plain_name
from lrcompile.recipe import Recipe
from lrcompile.weights.factor import check_finite, svd_pair
from lrcompile.weights.layers import (
    PairedModule,
    dense_weight,
    install_pair,
    plainly,
    read_extra_state,
    remove_pairs,
)
from lrcompile.weights.plan import Entry, Plan
from lrcompile.weights.planner import plan, refuse_adopted

log = logging.getLogger("lrcompile")
M = TypeVar("M", bound=nn.Module)

# Parameters that a Plan was written over, left dense on purpose: the backend must not plan them again.
_settled: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()


def settled(parameter: nn.Parameter) -> bool:
    """Whether a Plan has already decided about this very parameter."""
    return _settled.get(id(parameter)) is parameter


def settle(parameters: Sequence[nn.Parameter]) -> None:
    """Remember that a Plan has decided about these."""
    for p in parameters:
        _settled[id(p)] = p


def adopt(model: M, plan_or_recipe: Plan | Recipe, example_inputs: Inputs | None = None) -> M:
    """Replace the planned weights by pairs, in place. Do it before the optimizer, DDP and `fully_shard`.

    The model stays ordinary PyTorch: the same module objects with leaves `weight_a` (rank, in_features) and
    `weight_b` (out_features, rank), of the dtype, device and requires_grad of the weight they replace. The
    factors are a truncated SVD of the present weights, computed one weight at a time: peak memory is the model plus one
    weight. On the `meta` device the shapes are made and nothing is computed.

    Args:
        model: not adopted, not wrapped.
        plan_or_recipe: a Plan of this model, or a Recipe to plan by.
        example_inputs: as for `plan`; only with a Recipe.

    Returns:
        the same model.

    Raises:
        PlanError: the Plan belongs to another model (the first difference is named).
        AdoptError: adopted already, sharded or wrapped already, NaN or Inf in a weight (named).
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
    method = str(the_plan.recipe.get("svd", "auto"))
    write_plan(model, the_plan, lambda w, e: factored(w, e, method))
    log.info(adoption_line(the_plan.entries, plan_of(model).pairs, the_plan.parameters, time.perf_counter() - start))
    return model


def adoption_line(seen: Sequence[Entry], pairs: Sequence[Entry], parameters: tuple[int, int], seconds: float) -> str:
    """The one line that is logged: sites, parameters, compression, mean relative weight error, seconds."""
    linears = [e for e in seen if e.tokens]
    before, after = sum(e.dense_numel for e in pairs), sum(e.numel for e in pairs)
    errors = [e.error for e in pairs if e.error is not None]
    mean = f"{sum(errors) / len(errors):.3f}" if errors else "not computed"
    return (
        f"adopted {len(pairs)} of {len(linears)} linear weights: {before:,} -> {after:,} numbers "
        f"({before / after if after else 1:.2f}x), all parameters {parameters[0]:,} -> {parameters[1]:,}, "
        f"mean relative weight error {mean}, {seconds:.1f} s"
    )


Factor = Callable[[nn.Parameter, Entry], tuple[torch.Tensor, torch.Tensor, float | None]]


def write_plan(model: nn.Module, the_plan: Plan, factor: Factor) -> None:
    """Install every pair of a Plan, each in all the modules that share its weight.

    Everything that can be wrong with a model is found before the first weight is touched; then one weight at a time is
    factored, installed and let go.
    """
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    for module_name, module in model.named_modules(remove_duplicate=True):
        for name in module._parameters:
            owners.setdefault(plain_name(f"{module_name}.{name}" if module_name else name), []).append((module, name))
    todo: list[tuple[Entry, list[tuple[nn.Module, str]]]] = []
    for entry in the_plan.pairs:
        held = [place for name in entry.names for place in owners.get(name, [])]
        if not held:
            raise AdoptError(f"{entry.key} is no parameter of its own module; exclude it")
        refuse_taken(held, entry.key)
        check_finite(_weight(held), entry.key)
        todo.append((entry, held))
    for entry, held in todo:
        a, b, error = make_leaves(_weight(held), entry, factor)
        for module, name in held:
            install_pair(module, name, a, b, entry.stored_in_out, asdict(replace(entry, error=error)))
    settle(list(model.parameters()))


def _weight(held: Sequence[tuple[nn.Module, str]]) -> nn.Parameter:
    module, name = held[0]
    weight = module._parameters[name]
    assert weight is not None
    return weight


def make_leaves(weight: nn.Parameter, entry: Entry, factor: Factor) -> tuple[nn.Parameter, nn.Parameter, float | None]:
    """The two leaves that replace a weight: ordinary tensors, whatever modes the caller is in."""
    with plainly(weight):
        a, b, error = factor(weight, entry)
        leaves = [nn.Parameter(t, requires_grad=weight.requires_grad) for t in (a, b)]
    return leaves[0], leaves[1], error


def factored(weight: nn.Parameter, entry: Entry, method: str) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """weight_a, weight_b and the relative error of a weight's pair; shapes only on the `meta` device."""
    if weight.is_meta:
        return empty_pair(weight, entry)
    assert entry.rank is not None
    matrix = weight.detach().T if entry.stored_in_out else weight.detach()
    pair = svd_pair(matrix, entry.rank, method, entry.key)
    return pair.weight_a, pair.weight_b, pair.error


def empty_pair(weight: torch.Tensor, entry: Entry) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """Leaves of the right shape, to be filled by load_state_dict."""
    assert entry.rank is not None
    a = torch.zeros(entry.rank, entry.in_features, dtype=weight.dtype, device=weight.device)
    b = torch.zeros(entry.out_features, entry.rank, dtype=weight.dtype, device=weight.device)
    return a, b, entry.error


def refuse_taken(held: Sequence[tuple[nn.Module, str]], key: str) -> None:
    """Raise AdoptError where a module has attributes of its own under the names that its leaves would get."""
    for module, name in held:
        for leaf in (f"{name}_a", f"{name}_b"):
            if hasattr(module, leaf):
                kind = type(module).__name__
                raise AdoptError(f"{key}: its {kind} has a {leaf} of its own; leave it out with exclude=[{key!r}]")


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
    groups: dict[int, list[tuple[nn.Module, str]]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, p in module._parameters.items():
            places[plain_name(f"{module_name}.{name}" if module_name else name)] = (module, name)
            groups.setdefault(id(p), []).append((module, name))
    todo: dict[int, tuple[Entry, list[tuple[nn.Module, str]], nn.Parameter]] = {}
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
        if id(weight) not in todo:
            held = list(dict.fromkeys(groups[id(weight)]))
            refuse_taken(held, full)
            todo[id(weight)] = (entry, held, weight)
    for entry, held, weight in todo.values():
        a, b, error = make_leaves(weight, entry, empty_pair)
        for module, name in held:
            install_pair(module, name, a, b, entry.stored_in_out, asdict(replace(entry, error=error)))
    settle(list(model.parameters()))
    return model


def _holds_tensors(key: object, item: Mapping[Any, Any]) -> bool:
    return not str(key).endswith("_extra_state") and any(isinstance(x, torch.Tensor) for x in item.values())


def merge(model: M) -> M:
    """Back to dense modules, in place: every weight becomes the product that it read, its class the one it had.

    Raises:
        AdoptError: nothing of the model is adopted, or its leaves are sharded.
    """
    adopted: list[Any] = [m for m in model.modules() if isinstance(m, PairedModule)]
    if not adopted:
        raise AdoptError("the model is not adopted; there is nothing to merge")
    for full, p in model.named_parameters():
        if _is_sharded(p):
            raise AdoptError(f"{full} is a DTensor (sharded); load its full state into an unsharded model, merge that")
    made: dict[int, nn.Parameter] = {}
    for module in adopted:
        dense = {}
        for name, _ in module.lr_names:
            leaf = module._parameters[f"{name}_a"]
            if id(leaf) not in made:
                product = dense_weight(module, name)
                made[id(leaf)] = nn.Parameter(product, requires_grad=leaf.requires_grad)
            dense[name] = made[id(leaf)]
        remove_pairs(module, dense)
    return model
