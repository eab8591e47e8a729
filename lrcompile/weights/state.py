"""Saved state: a directory of safetensors and the Plan as JSON, and the dense state dict of an adopted model.

A directory appears under its name whole or not at all: everything is written beside it, flushed, and renamed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lrcompile.errors import PlanError, StateError
from lrcompile.graph.names import plain_name
from lrcompile.weights.adopt import plan_of, refuse_wrapped, write_plan
from lrcompile.weights.layers import AdoptedModule, dense_weight
from lrcompile.weights.make import empty_leaves
from lrcompile.weights.plan import Plan
from lrcompile.weights.planner import refuse_adopted

log = logging.getLogger("lrcompile")
M = TypeVar("M", bound=nn.Module)
FORMAT = "lrcompile-model/1"
WEIGHTS, INDEX = "model.safetensors", "lrcompile.json"


def original_state_dict(model: nn.Module) -> OrderedDict[str, Any]:
    """The state dict with the dense keys and shapes back, in their order: loadable into the untouched model.

    Every adopted weight is what it reads as, such as weight_b @ weight_a, in its dtype. Shared weights are one
    tensor under all names.
    """
    model = _unwrapped(model)
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
    model = _unwrapped(model)
    the_plan = plan_of(model)
    if not the_plan.adopted:
        raise StateError("the model is not adopted; save a dense model with safetensors or torch.save")
    target = Path(os.path.abspath(dir))  # "." has no name that a directory could be moved to
    _refuse_taken(target)
    tensors, aliases = _unique_tensors(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target, ".partial")
    work, held = _work_folder(target)
    try:
        save_file(tensors, work / WEIGHTS, metadata={"format": FORMAT})
        index = {
            "format": FORMAT,
            "sha256": _sha256(work / WEIGHTS),
            "bytes": (work / WEIGHTS).stat().st_size,
            "aliases": aliases,
            "plan": the_plan.to_json(),
        }
        index["checksum"] = _checksum(index)
        (work / INDEX).write_text(json.dumps(index, indent=1))
        for path in (work / WEIGHTS, work / INDEX, work):
            _flush(path)
        # Both were made for the owner alone (mkdtemp, and safetensors' own file).
        os.chmod(work, 0o777 & ~_umask())
        os.chmod(work / WEIGHTS, 0o666 & ~_umask())
        if target.exists():
            # Two renames: a crash between them leaves the old directory whole under the second name.
            old = work.with_suffix(".replaced")
            held += _held(target)
            os.rename(target, old)
            try:
                os.rename(work, target)
            except BaseException:
                os.rename(old, target)
                raise
            shutil.rmtree(old)
        else:
            os.rename(work, target)
        _flush(target.parent)
        _remove_leftovers(target, ".replaced")
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        for handle in held:
            os.close(handle)


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
    folder, inner = Path(dir), _unwrapped(model)
    index = _read_index(folder)
    _check_weights(folder, index)
    try:
        tensors = load_file(folder / WEIGHTS)
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


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DDP's shells."""
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel"):
        model = model.get_submodule("_orig_mod" if hasattr(model, "_orig_mod") else "module")
    return model


def _refuse_taken(target: Path) -> None:
    """Raise StateError where replacing what stands under a name would lose something that `save` didn't write."""
    if not target.exists() and not target.is_symlink():
        return
    held = sorted(p.name for p in target.iterdir()) if target.is_dir() and not target.is_symlink() else None
    if held is None or (held and INDEX not in held):
        raise StateError(f"{target} exists and was not saved by lrcompile; choose another name")
    others = [name for name in held if name not in (INDEX, WEIGHTS)]
    if others:
        raise StateError(f"{target} also holds {', '.join(others[:5])}, which would be lost; choose another name")


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


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        kept = sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*.replaced"))
        hint = f"; a save was interrupted between two renames, the one before is whole in {kept[-1]}" if kept else ""
        raise StateError(f"there is no directory {folder}{hint}")
    if not (folder / INDEX).is_file():
        raise StateError(f"{folder} was not saved by lrcompile: it has no {INDEX}")
    try:
        index = json.loads((folder / INDEX).read_text())
    except ValueError as error:
        raise StateError(f"{folder / INDEX} is truncated or altered: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise StateError(f"{folder} was not saved by this version of lrcompile (its format is not {FORMAT!r})")
    if index.get("checksum") != _checksum(index):
        raise StateError(f"{folder / INDEX} was altered since it was saved: its checksum doesn't match")
    if not (type(index.get("bytes")) is int and all(isinstance(index.get(k), str) for k in ("sha256", "plan"))):
        raise StateError(f"{folder / INDEX} lacks a part that lrcompile writes")
    return index


def _check_weights(folder: Path, index: dict[str, Any]) -> None:
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise StateError(f"{folder} lacks {WEIGHTS}; copy the whole directory again")
    size = weights.stat().st_size
    if size != index["bytes"]:
        raise StateError(f"{weights} is truncated: {size} of {index['bytes']} bytes; copy it again")
    if _sha256(weights) != index["sha256"]:
        raise StateError(f"{weights} was altered since it was saved: its checksum doesn't match; copy it again")


def _checksum(index: dict[str, Any]) -> str:
    body = {k: v for k, v in index.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _held(folder: Path, wait: bool = True) -> list[int]:
    """Lock a folder until the handle is closed or the process dies; no handle where the file system has no locks.

    Raises:
        FileNotFoundError: it is gone.
        BlockingIOError: another save holds it, and `wait` is False.
    """
    import fcntl  # here: only POSIX has it, and loading works without

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(handle)
        if isinstance(error, OSError) and not isinstance(error, BlockingIOError):
            return []
        raise
    return [handle]


def _work_folder(target: Path) -> tuple[Path, list[int]]:
    """A new folder beside the target, and the handles that keep other saves from taking it for a leftover."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            held = _held(work)
        except FileNotFoundError:  # another save removed it before it was locked
            continue
        if work.exists():
            return work, held
        for handle in held:
            os.close(handle)


def _remove_leftovers(target: Path, suffix: str) -> None:
    """Remove what saves to this target left behind when they were killed; what a running one holds stays."""
    # Eight characters: what mkdtemp puts between the two.
    for folder in target.parent.glob(f".{glob.escape(target.name)}.{'?' * 8}{suffix}"):
        try:
            held = _held(folder, wait=False)
        except (FileNotFoundError, BlockingIOError):
            continue
        if held:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            log.warning(f"{folder} may be left of an interrupted save to {target}; remove it if no other is running")
        for handle in held:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
