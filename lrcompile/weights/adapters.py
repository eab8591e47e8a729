"""What finetuning changed, kept alone: the pairs beside frozen bases and whatever else was trained, without the bases.

An adapter belongs to its base, to the bit: a base that PiSSA or LoftQ left is not the plainly quantised weight, and a pair
beside the wrong one is silently wrong. So a fingerprint of everything that is not in the adapter goes along.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lrcompile.errors import StateError
from lrcompile.graph.names import plain_name
from lrcompile.weights.adopt import plan_of
from lrcompile.weights.folder import Kind, absolute, read_saved, refuse_taken, write_saved
from lrcompile.weights.layers import AdoptedModule
from lrcompile.weights.state import unwrapped

M = TypeVar("M", bound=nn.Module)
ADAPTER = Kind(
    "lrcompile-adapter/1", "adapter.safetensors", "adapter.json", "lrcompile.save_adapter", texts=("fingerprint",)
)


def save_adapter(model: nn.Module, dir: str | os.PathLike[str]) -> None:
    """Save the pairs beside bases, and every other parameter that requires gradients: trained norms, biases, a head.

    `adapter.safetensors` holds weight_a (rank, in_features), weight_b (out_features, rank) of each weight and the others, each
    once; `adapter.json` ranks, scales, formats of the bases, and the fingerprint of all that is left out: SHA-256 over name, dtype,
    shape and contents of the bases, of all frozen parameters and of the buffers that a state dict holds.

    Args:
        model: adopted with bases, on any device, also inside torch.compile's or DDP's shell.
        dir: appears whole; an adapter saved there before is replaced, anything else is refused.

    Raises:
        StateError: the name is taken by something else, no weight of the model has a pair beside a base, or the model
            holds no values of its own (meta, sharded).
    """
    model = unwrapped(model)
    entries, pairs = beside_bases(model)
    if not entries:
        raise StateError(
            "no weight of the model has a pair beside a base, so there is no adapter to keep alone; lrcompile.save(model, "
            "dir) keeps the whole model"
        )
    refuse_taken(absolute(dir), ADAPTER)  # before the work
    refuse_absent(model)
    kept = {n: p for n, p in _parameters(model).items() if id(p) in pairs or p.requires_grad}
    base = _digests(model, kept)
    tensors = {name: p.detach().contiguous().clone() for name, p in kept.items()}
    told = {"fingerprint": _fingerprint(base), "base": base, "entries": entries}
    write_saved(ADAPTER, dir, tensors, told)


def load_adapter(model: M, dir: str | os.PathLike[str]) -> M:
    """Load a saved adapter into a model adopted with the same bases. Values are copied in place: optimizers go on.

    What requires gradients stays as the model has it.

    Args:
        model: adopted as the one that was saved: the same weights, recipe and calibration data; also in a shell.
        dir: written by `save_adapter`.

    Returns:
        the same model.

    Raises:
        StateError: the directory is missing, foreign, truncated or altered; the adapter has other weights, ranks or scales,
            or belongs to another base. The first difference is named, and the model is left as it was.
    """
    inner, folder = unwrapped(model), Path(dir)
    index = read_saved(ADAPTER, folder)
    entries, _ = beside_bases(inner)
    if not entries:
        raise StateError(
            f"no weight of the model has a pair beside a base, where an adapter could go; first adopt the model as the one "
            f"that {folder} was saved from"
        )
    refuse_absent(inner)
    try:
        tensors = load_file(folder / ADAPTER.weights)
        _check_entries(folder, index["entries"], entries)
        there: dict[str, str] = dict(index["base"])
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{folder} can't be read: {type(error).__name__}: {error}") from error
    places = _parameters(inner)
    _check_tensors(folder, tensors, places, entries)
    _check_base(folder, index, there, _digests(inner, tensors), entries)
    fill(places, tensors)
    return model


def beside_bases(model: nn.Module) -> tuple[dict[str, dict[str, Any]], set[int]]:
    """name of each weight that has a pair beside a base -> rank, scale, base, init; and the ids of the pairs' sides."""
    inits = {name: e.init for e in plan_of(model).adopted for name in e.names}
    entries: dict[str, dict[str, Any]] = {}
    sides: set[int] = set()
    for module_name, module in model.named_modules():
        if not isinstance(module, AdoptedModule):
            continue
        for name, form in module.lr_forms:
            if form.base is None or form.rank is None:
                continue
            full = plain_name(f"{module_name}.{name}" if module_name else name)
            entries[full] = {"rank": form.rank, "scale": form.scale, "base": form.base, "init": inits[full]}
            sides |= {id(getattr(module, f"{name}_{side}")) for side in ("a", "b")}
    return entries, sides


def refuse_absent(model: nn.Module) -> None:
    """Raise StateError where the model's values are elsewhere: on no device (meta), or sharded."""
    from torch.distributed.tensor import DTensor

    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(t, DTensor):
            raise StateError(f"{name} is a DTensor (sharded); load its full state into an unsharded model and use that")
        if t.is_meta:
            raise StateError(f"{name} is on the meta device and holds no values; give the model values first")


def fill(places: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy values into parameters in place, whatever modes the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(name): p for name, p in model.named_parameters()}


# --- whose adapter it is ----------------------------------------------------------------------------------------------


def _digests(model: nn.Module, kept: Mapping[str, object]) -> dict[str, str]:
    """name -> "dtype [shape] digest" of every parameter and saved buffer that isn't kept; streamed, one tensor at a time."""
    found = {}
    for name, tensor in (*_parameters(model).items(), *_buffers(model)):
        if name not in kept:
            digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            numbers = tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu()
            digest.update(numbers.numpy().data)
            found[name] = f"{_spelled(tensor)} {digest.hexdigest()}"
    return found


def _buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for module_name, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield plain_name(f"{module_name}.{name}" if module_name else name), buffer


def _spelled(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _fingerprint(base: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()


def _check_entries(folder: Path, there: Mapping[str, Mapping[str, Any]], here: Mapping[str, Mapping[str, Any]]) -> None:
    fix = "adopt the model by the recipe of the one that was saved"
    for name in [*here, *there]:
        if name not in here or name not in there:
            which = "the model" if name not in here else "the adapter"
            raise StateError(f"{folder} doesn't fit: {which} has no pair beside a base for {name!r}; {fix}")
        for part in ("rank", "scale", "base"):
            if here[name][part] != there[name][part]:
                raise StateError(
                    f"{folder} doesn't fit: {name!r} has {part} {there[name][part]!r} there, {here[name][part]!r} here; {fix}"
                )


def _check_tensors(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    places: Mapping[str, torch.Tensor],
    entries: Mapping[str, object],
) -> None:
    fix = "load it into a model of the same class, sizes and dtypes, adopted alike"
    for name, tensor in tensors.items():
        if name not in places:
            raise StateError(f"{folder} doesn't fit: it holds {name!r}, which this model has not; {fix}")
        if _spelled(tensor) != _spelled(places[name]):
            here = _spelled(places[name])
            raise StateError(f"{folder} doesn't fit: {name!r} is {_spelled(tensor)} there, {here} here; {fix}")
    for name in places:
        weight, side = name[:-2], name[-2:]
        if side in ("_a", "_b") and weight in entries and name not in tensors:
            raise StateError(f"{folder} doesn't fit: it lacks {name!r}; {fix}")


def _check_base(
    folder: Path,
    index: Mapping[str, Any],
    there: Mapping[str, str],
    here: Mapping[str, str],
    entries: Mapping[str, Mapping[str, Any]],
) -> None:
    if _fingerprint(here) == index["fingerprint"]:
        return
    fix = (
        "build it from the same weights by the same recipe and calibration data, or load the very base from a whole model "
        "kept with lrcompile.save"
    )
    name = next((n for n in [*here, *there] if here.get(n) != there.get(n)), "")
    a, b = there.get(name, "missing").rpartition(" "), here.get(name, "missing").rpartition(" ")
    said = (
        f"{name!r} holds other numbers"
        if a[0] == b[0] != ""
        else f"{name!r} is {a[0] or a[2]} there, {b[0] or b[2]} here"
    )
    started = next((w for w in entries if name.startswith(f"{w}_base")), None)
    if started and entries[started]["init"] != index["entries"][started]["init"]:
        said += f" (started by {index['entries'][started]['init']!r} there, {entries[started]['init']!r} here)"
    raise StateError(f"{folder} is an adapter of another base: {said}; {fix}")
