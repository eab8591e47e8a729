"""Saved state: a directory of safetensors and the Plan as JSON, and the dense state dict of an adopted model."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lrcompile.errors import PlanError, StateError
from lrcompile.graph.names import plain_name
from lrcompile.weights.adopt import plan_of, refuse_wrapped, write_plan
from lrcompile.weights.folder import Kind, absolute, read_saved, refuse_taken, write_saved
from lrcompile.weights.layers import AdoptedModule, dense_weight
from lrcompile.weights.make import empty_leaves
from lrcompile.weights.plan import Plan
from lrcompile.weights.planner import refuse_adopted

M = TypeVar("M", bound=nn.Module)
MODEL = Kind("lrcompile-model/1", "model.safetensors", "lrcompile.json", "lrcompile", texts=("plan",))


def original_state_dict(model: nn.Module) -> OrderedDict[str, Any]:
    """The state dict with the dense keys and shapes back, in their order: loadable into the untouched model.

    Every adopted weight is what it reads as, such as weight_b @ weight_a, in its dtype. Shared weights are one
    tensor under all names.
    """
    model = unwrapped(model)
    leaves: dict[str, tuple[AdoptedModule, str, str]] = {}  # every leaf's key -> module, parameter, the parameter's key
    own: set[str] = set()
    for module_name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdoptedModule):
            prefix = f"{module_name}." if module_name else ""
            leaves |= {prefix + leaf: (module, name, prefix + name) for leaf, name in module.lr_leaves.items()}
            own.add(f"{prefix}_extra_state")
    products: dict[int, torch.Tensor] = {}
    dense: OrderedDict[str, Any] = OrderedDict()
    state = model.state_dict()
    dense._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]  # the modules' versions
    for key, item in state.items():
        if key in own:
            if isinstance(item, dict):
                dense[key] = item["base"]
        elif key in leaves:
            module, name, full = leaves[key]
            if full in dense:  # the first of its leaves stood for it
                continue
            first = id(next(iter(module.lr_parts(name).values())))
            if first not in products:
                products[first] = dense_weight(module, name)  # type: ignore[arg-type]
            dense[full] = products[first]
        else:
            dense[key] = item
    return dense


def save(model: nn.Module, dir: str | os.PathLike[str]) -> None:
    """Save an adopted model: `model.safetensors` (every tensor once) and `lrcompile.json` (Plan, aliases, checksum).

    The directory appears whole under its name; one that lrcompile wrote before is replaced, anything else is refused.
    What an earlier save to the same name left beside it when it was killed is removed.

    Raises:
        StateError: the name is taken by something else, the model is not adopted, or it holds no values (meta).
    """
    model = unwrapped(model)
    the_plan = plan_of(model)
    if not the_plan.adopted:
        raise StateError("the model is not adopted; save a dense model with safetensors or torch.save")
    refuse_taken(absolute(dir), MODEL)  # before the work
    tensors, aliases = _unique_tensors(model)
    write_saved(MODEL, dir, tensors, {"aliases": aliases, "plan": the_plan.to_json()})


def load(dir: str | os.PathLike[str], model: M) -> M:
    """Adopt the saved Plan and load the saved tensors into an untouched model; nothing is computed.

    Args:
        dir: written by `save`.
        model: the dense model of the same class and sizes; also on the `meta` device, which is then filled.

    Returns:
        the same model.

    Raises:
        StateError: the directory is missing, foreign, truncated or altered, or doesn't fit the model.
        AdoptError: the model is adopted already.
    """
    refuse_adopted(model)
    refuse_wrapped(model)
    folder, inner = Path(dir), unwrapped(model)
    index = read_saved(MODEL, folder)
    try:
        tensors = load_file(folder / MODEL.weights)
        the_plan = Plan.from_json(index["plan"])
        tensors |= {name: tensors[source] for name, source in index["aliases"].items()}
    except (SafetensorError, PlanError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{folder} can't be read: {error}") from error
    # Everything is checked before the model is touched.
    try:
        the_plan.check(inner)
    except PlanError as error:
        raise StateError(f"{folder} is of another model: {str(error).split(': ', 1)[-1]}") from error
    _check_fit(folder, inner, the_plan, tensors)
    meta = any(p.is_meta for p in inner.parameters())
    write_plan(inner, the_plan, empty_leaves, computes=False)
    state = {key: tensors[plain_name(key)] for key in inner.state_dict()}
    inner.load_state_dict(state, strict=True, assign=meta)
    if meta:
        _tie_again(inner, the_plan)
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DDP's shells."""
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel"):
        model = model.get_submodule("_orig_mod" if hasattr(model, "_orig_mod") else "module")
    return model


def _check_fit(folder: Path, model: nn.Module, the_plan: Plan, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse tensors that the model, once adopted, has no place for, or places that no tensor fills."""
    forms = {name: entry.form for entry in the_plan.adopted for name in entry.names}
    expected: dict[str, tuple[int, ...]] = {}
    for key, item in model.state_dict().items():
        name, form = plain_name(key), forms.get(plain_name(key))
        if form is not None:
            expected |= {name + suffix: leaf.shape for suffix, leaf in form.leaves.items()}
            for suffix, leaf in form.leaves.items():
                held = tensors.get(name + suffix)
                if held is not None and held.dtype.is_floating_point != leaf.dtype.is_floating_point:
                    raise StateError(f"{folder} holds {name + suffix!r} as {held.dtype}, where {leaf.dtype} belongs")
        elif isinstance(item, torch.Tensor):
            expected[name] = tuple(item.shape)
    found = {name: tuple(t.shape) for name, t in tensors.items() if name.rpartition(".")[2] != "_extra_state"}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise StateError(
                f"{folder} is of another model: {name!r} is {found.get(name, 'missing')} there, "
                f"{expected.get(name, 'missing')} here"
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta and plain_name(name) not in tensors:
            raise StateError(f"{name} is a buffer on the meta device that no file holds; build the model on the CPU")


def _unique_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor of the state once, contiguous, and alias -> name for the rest."""
    from torch.distributed.tensor import DTensor

    unique: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, item in model.state_dict().items():
        if not isinstance(item, torch.Tensor):
            raise StateError(f"{name} of the state is no tensor and can't be saved safely")
        if isinstance(item, DTensor):
            raise StateError(
                f"{name} is a DTensor (sharded); load its full state into an unsharded model and save that"
            )
        if item.is_meta:
            raise StateError(f"{name} is on the meta device and holds no values; give the model values first")
        name = plain_name(name)
        place = (item.data_ptr(), item.device, item.dtype, item.shape, item.stride())
        if item.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            unique[name] = item.detach().contiguous().clone()
    return unique, aliases


def _tie_again(model: nn.Module, the_plan: Plan) -> None:
    """Assigning gave every name a parameter of its own: share again what the Plan says is tied."""
    owners = {plain_name(f"{n}.").lstrip("."): module for n, module in model.named_modules(remove_duplicate=False)}

    def place(name: str) -> tuple[dict[str, nn.Parameter | None], str]:
        path, dot, leaf = name.rpartition(".")
        return owners[path + dot]._parameters, leaf

    forms = {name: entry.form for entry in the_plan.adopted for name in entry.names}
    for group in the_plan.tied:
        form = forms.get(group[0])
        for suffix in form.leaves if form else ("",):
            parameters, leaf = place(group[0] + suffix)
            for name in group[1:]:
                others, other = place(name + suffix)
                others[other] = parameters[leaf]
