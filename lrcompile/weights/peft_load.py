"""Reading LoRA adapters of Hugging Face's peft, without peft: `adapter_config.json` and `adapter_model.safetensors`.

peft computes W x + scaling · lora_B lora_A x (LoRA, 2106.09685) with lora_A (rank, in_features) and lora_B (out_features, rank):
our weight_a and weight_b. The scaling is lora_alpha / r, or with `use_rslora` lora_alpha / √r (2312.03732), our Recipe's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lrcompile.errors import StateError
from lrcompile.graph.capture import Inputs
from lrcompile.graph.names import plain_name
from lrcompile.recipe import PAIR_DTYPES, Recipe
from lrcompile.weights.adapters import fill, refuse_absent
from lrcompile.weights.adopt import adopt, refuse_wrapped
from lrcompile.weights.plan import Entry
from lrcompile.weights.planner import plan, refuse_adopted
from lrcompile.weights.state import unwrapped

log = logging.getLogger("lrcompile")
M = TypeVar("M", bound=nn.Module)
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# What a configuration may say: what is computed with here, and what only trains, finds or starts pairs. Anything else has
# to be unset, since it changes what the adapter computes.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
_NO_MATTER = {
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "lora_dropout",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config", "ensure_weight_tying",
}  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base


@dataclass
class Lora:
    """An adapter as read.

    Attributes:
        pairs: name of a module -> lora_A (rank, in_features), lora_B (out_features, rank).
        scales: name of a module -> what the product is multiplied by.
        others: name of a parameter or buffer -> its value, saved whole.
    """

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scales: dict[str, float]
    others: dict[str, torch.Tensor]


def load_peft(model: M, dir: str | os.PathLike[str], example_inputs: Inputs, *, weights: str = "dense") -> M:
    """Adopt a model with the LoRA adapter that peft saved in a directory: its ranks, scalings and values, what it saved beside.

    With `weights="dense"` the outputs are those of peft's model. The pairs are of the dtype they are saved in. They require
    gradients, as does what the adapter saved beside them; all else is frozen.

    Args:
        model: the untouched base model, as a rule of transformers, on its device.
        dir: with `adapter_config.json` and `adapter_model.safetensors`; pickled adapters are refused.
        example_inputs: as the model is called, see `lrcompile.plan`.
        weights: "dense", or a number format for the bases under the pairs: "nf4" as in QLoRA. The outputs then differ by the
            error of quantising.

    Returns:
        the same model.

    Raises:
        StateError: the directory is missing, truncated or no LoRA adapter, uses what lrcompile has not (DoRA, trained biases,
            embeddings, ...: it is named), or doesn't fit the model.
        AdoptError, RecipeError, PlanError, CaptureError: as `lrcompile.adopt`.
    """
    refuse_adopted(model)
    refuse_wrapped(model)
    folder, inner = Path(dir), unwrapped(model)
    refuse_absent(inner)
    lora = read_lora(folder)
    trained = _check_others(folder, inner, lora.others)
    recipe = Recipe(
        rank=1,  # each weight gets its own below
        weights=weights,
        init="zero",
        include=list(lora.pairs),
        trainable=trained,
    )
    _check_modules(folder, inner, lora)
    the_plan = plan(inner, example_inputs, recipe)
    entries = {name: entry for entry in the_plan.entries for name in entry.names}
    for name in lora.pairs:
        _check_pair(folder, inner, name, entries.get(f"{name}.weight"), lora)
    planned = [_planned(entry, lora) for entry in the_plan.entries]
    adopt(inner, replace(the_plan, entries=planned))
    leaves = dict([*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False)])
    values = {
        f"{name}.weight_{side}": t for name, pair in lora.pairs.items() for side, t in zip("ab", pair, strict=True)
    }
    fill({plain_name(name): leaf for name, leaf in leaves.items()}, values | lora.others)
    return model


def read_lora(folder: Path) -> Lora:
    """Read an adapter's two files.

    Raises:
        StateError: a file is missing, truncated or pickled, the adapter is no LoRA adapter, or of a kind that lrcompile has not.
    """
    config = _read_config(folder)
    _refuse_unsupported(folder, config)
    if not (folder / WEIGHTS).is_file():
        pickled = " as a pickle, which can run code as it is read" if (folder / "adapter_model.bin").exists() else ""
        fix = "save it again with peft's save_pretrained, which writes safetensors" if pickled else "copy it again"
        raise StateError(f"{folder} has its weights{pickled or ' missing'}, not in {WEIGHTS}; {fix}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise StateError(f"{folder / WEIGHTS} is truncated or altered: {error}; copy it again") from error
    lora, halves = Lora({}, {}, {}), {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(PREFIX))
        if found:
            halves[found[1], found[2]] = tensor
        elif re.search(r"\.(lora_|base_layer\b)", key):
            what = (
                "DoRA's magnitudes"
                if "magnitude" in key
                else "an embedding's pair"
                if "embedding" in key
                else "no plain pair"
            )
            raise StateError(f"{folder} holds {key!r}, {what}; lrcompile reads plain LoRA pairs of linear layers")
        else:
            lora.others[key.removeprefix(PREFIX)] = tensor
    for name in dict.fromkeys(name for name, _ in halves):
        lora.pairs[name] = _pair(folder, name, halves.get((name, "A")), halves.get((name, "B")), config)
        lora.scales[name] = _scale(folder, name, config)
    if not lora.pairs:
        raise StateError(f"{folder} holds no LoRA pair in {WEIGHTS}")
    if config.get("lora_dropout"):
        log.info(f"{folder} was trained with lora_dropout={config['lora_dropout']}, which lrcompile's pairs have not")
    return lora


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise StateError(f"there is no directory {folder}; an adapter on a hub has to be downloaded first")
    if not (folder / CONFIG).is_file():
        raise StateError(f"{folder} was not saved by peft: it has no {CONFIG}")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise StateError(f"{folder / CONFIG} is truncated or altered: {error}; copy it again") from error
    if not isinstance(config, dict):
        raise StateError(f"{folder / CONFIG} holds no configuration of peft's")
    return config


def _refuse_unsupported(folder: Path, config: Mapping[str, Any]) -> None:
    why = "which lrcompile can't read; merge it with peft's merge_and_unload and adopt the result"
    if config.get("peft_type") != "LORA":
        raise StateError(f"{folder} is an adapter of peft_type={config.get('peft_type')!r}, {why}")
    if config.get("bias", "none") != "none":
        raise StateError(f"{folder} has trained biases (bias={config['bias']!r}), {why}")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise StateError(
            f"{folder} was started by init_lora_weights={start!r}, which changes the base; convert it with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...), or merge it with merge_and_unload"
        )
    for name, value in config.items():
        if name not in _READ | _NO_MATTER and value not in (None, False, [], {}):
            raise StateError(f"{folder} uses {name}={value!r}, {why}")


def _pair(
    folder: Path, name: str, a: torch.Tensor | None, b: torch.Tensor | None, config: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    if a is None or b is None:
        raise StateError(f"{folder} holds one side only of the pair for {name!r}; copy it again")
    rank = _looked_up(folder, name, config, "r", "rank_pattern")
    if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
        raise StateError(
            f"{folder} contradicts itself: {name!r} is of rank {rank} by {CONFIG}, and its sides are {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    if a.dtype != b.dtype or str(a.dtype).removeprefix("torch.") not in PAIR_DTYPES:
        raise StateError(
            f"the pair for {name!r} in {folder} is {a.dtype} and {b.dtype}; save it in one of {', '.join(PAIR_DTYPES)}"
        )
    return a, b


def _looked_up(folder: Path, name: str, config: Mapping[str, Any], option: str, patterns: str) -> int | float:
    """An option, or the first of its patterns that fits the end of the module's name, as peft looks it up."""
    value = config.get(option, 8)  # peft's default of both
    for pattern, special in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise StateError(f"{folder / CONFIG} gives {name!r} {option}={value!r}; it has to be a number above 0")
    return value


def _scale(folder: Path, name: str, config: Mapping[str, Any]) -> float:
    rank, alpha = (
        _looked_up(folder, name, config, *o) for o in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


# --- does it fit ------------------------------------------------------------------------------------------------------


def _check_others(folder: Path, model: nn.Module, others: Mapping[str, torch.Tensor]) -> list[str]:
    """Refuse values saved whole that have no place in the model; the names of those that are parameters."""
    parameters = {plain_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    buffers = {plain_name(n): b for n, b in model.named_buffers(remove_duplicate=False)}
    for name, value in others.items():
        here = parameters.get(name, buffers.get(name))
        if here is None or here.shape != value.shape:
            spelled = "no such tensor" if here is None else list(here.shape)
            raise StateError(f"{folder} is of another model: {name!r} is {list(value.shape)} there, {spelled} here")
        for twin in (n for n, p in parameters.items() if p is here and n != name):
            if twin not in others or not torch.equal(others[twin], value):
                raise StateError(
                    f"{folder} has values of {name!r} alone, which this model ties to {twin!r}: untie them first, as peft does, "
                    f"by giving {name!r} a parameter of its own"
                )
    return [name for name in others if name in parameters]


def _check_modules(folder: Path, model: nn.Module, lora: Lora) -> None:
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    for name in lora.pairs:
        if name not in modules:
            raise StateError(f"{folder} is of another model: it has a pair for {name!r}, this model has no such module")
        weight = getattr(modules[name], "weight", None)
        if not isinstance(weight, nn.Parameter):
            kind = type(modules[name]).__name__
            raise StateError(f"{folder} has a pair for {name!r}, a {kind} here, which has no weight to put it beside")
        twins = [
            n for n, m in modules.items() if m is not modules[name] and any(p is weight for p in m._parameters.values())
        ]
        if twins:
            raise StateError(
                f"{folder} has a pair for {name!r}, whose weight this model ties to that of {twins[0]!r}, and the pair would act "
                "in both places: give it a parameter of its own first"
            )


def _check_pair(folder: Path, model: nn.Module, name: str, entry: Entry | None, lora: Lora) -> None:
    if entry is None or entry.form is None:
        why = "the example inputs don't reach it" if entry is None else entry.reason
        raise StateError(f"{folder} has a pair for {name!r}, which can't have one here: {why}")
    a, b = lora.pairs[name]
    if (b.shape[0], a.shape[1]) != (entry.out_features, entry.in_features):
        raise StateError(
            f"{folder} is of another model: the pair for {name!r} is of a ({b.shape[0]}, {a.shape[1]}) weight, here it is "
            f"({entry.out_features}, {entry.in_features})"
        )
    if a.shape[0] > min(entry.shape):
        raise StateError(
            f"{folder}: the pair for {name!r} has rank {a.shape[0]}, more than the weight's {min(entry.shape)}, which lrcompile "
            "has no use for; merge it with peft's merge_and_unload and adopt the result"
        )


def _planned(entry: Entry, lora: Lora) -> Entry:
    """The entry with the pair's own rank, scale and dtype; dense where the adapter has none."""
    name = next((n.removesuffix(".weight") for n in entry.names if n.removesuffix(".weight") in lora.pairs), None)
    if name is None:
        return entry if entry.form is None else replace(entry, rank=None, base=None, reason="not in the adapter")
    a, _ = lora.pairs[name]
    dtype = str(a.dtype).removeprefix("torch.")
    return replace(entry, rank=a.shape[0], scale=lora.scales[name], pair_dtype=dtype)
