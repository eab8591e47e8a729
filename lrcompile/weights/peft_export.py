"""Writing our pairs as a LoRA adapter of Hugging Face's peft, without peft."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lrcompile.errors import StateError
from lrcompile.graph.names import plain_name
from lrcompile.weights.adapters import beside_bases, refuse_absent
from lrcompile.weights.folder import absolute, publish
from lrcompile.weights.layers import AdoptedModule, one_product
from lrcompile.weights.peft_load import CONFIG, PREFIX, WEIGHTS
from lrcompile.weights.state import unwrapped

log = logging.getLogger("lrcompile")

_ELSE = "lrcompile.save_adapter(model, dir) keeps the pairs for lrcompile, lrcompile.merge(model) makes the model dense"


def export_peft(model: nn.Module, dir: str | os.PathLike[str], base_model_name: str | None = None) -> None:
    """Write the pairs as a LoRA adapter that `peft.PeftModel.from_pretrained(base, dir)` reads.

    Exact, up to the rounding of another order of operations, where peft puts them beside the same base:

    - base "dense" started by "zero": the original model.
    - a quantised base started by "zero" or "qera": the original model quantised to the very same numbers, such as by
      bitsandbytes for "nf4". Beside the dense original, the outputs differ by the error of quantising; that is logged.

    A base that "pissa" or "loftq" changed is no model that peft could be given, and is refused. Other trained parameters
    go along as `modules_to_save`.

    Args:
        model: adopted; also in torch.compile's or DDP's shell.
        dir: a new name, or an empty directory; it appears whole.
        base_model_name: what the configuration calls the base; by default the name the model was loaded by.

    Raises:
        StateError: naming the weight: a pair that isn't beside its original base, that stands in a weight's place, or belongs
            to a module that peft has no LoRA for; trained parameters that peft has no place for; the name is taken.
    """
    model = unwrapped(model)
    target = absolute(dir)
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise StateError(f"{target} exists; choose another name, or remove it")
    refuse_absent(model)
    adopted, entries = _exported(model)
    saved = _modules_to_save(model, adopted)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in adopted.items():
        for side, key in (("a", "lora_A"), ("b", "lora_B")):
            leaf = getattr(module, f"weight_{side}")
            tensors[f"{PREFIX}{name}.{key}.weight"] = leaf.detach().cpu().contiguous().clone()
    for name, module in model.named_modules(remove_duplicate=False):
        if any(plain_name(name).endswith(kept) for kept in saved):  # as peft matches them
            state = {plain_name(key): item for key, item in module.state_dict().items()}
            tensors |= {
                f"{PREFIX}{plain_name(name)}.{k}": t.detach().cpu().contiguous().clone() for k, t in state.items()
            }
    config = _config(model, adopted, saved, base_model_name)

    def write(work: Path) -> None:
        save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})
        (work / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))

    publish(target, write, (WEIGHTS, CONFIG))
    bases = {entry["base"] for entry in entries.values()} - {"dense"}
    beside = f"the original model quantised to {' and '.join(sorted(bases))}" if bases else "the original model"
    log.info(f"exported {len(adopted)} pairs to {target}: they belong beside {beside}")
    if bases:
        log.warning(
            f"peft has to load the base quantised as here ({', '.join(sorted(bases))}); beside the dense original the outputs "
            "differ by the error of quantising"
        )


def _exported(model: nn.Module) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """name -> module of every pair that peft can hold, and what was planned of each weight."""
    entries, _ = beside_bases(model)
    adopted: dict[str, Any] = {}
    for module_name, module in model.named_modules():
        if not isinstance(module, AdoptedModule):
            continue
        owner = plain_name(module_name)
        for name, form in module.lr_forms:
            full = f"{owner}.{name}" if owner else name
            if form.rank is None:
                continue  # a quantised base alone: part of the base that peft is given
            if full not in entries:
                raise StateError(
                    f"{full} became a plain pair of {form}, and peft has pairs beside weights only: adopt with weights="
                    f'"dense" or "nf4", or lrcompile.merge(model)'
                )
            if entries[full]["init"] not in ("zero", "qera"):
                raise StateError(
                    f"{full} was started by {entries[full]['init']!r}, which changed its base: beside the original one, where peft "
                    f'would put it, the pair means something else. Adopt with init="zero" to export; for this model, {_ELSE}'
                )
            parent = model.get_submodule(module_name.rpartition(".")[0])
            whole = name == "weight" and one_product(module.lr_base)
            if not whole or not owner or isinstance(parent, nn.MultiheadAttention):
                kind = module.lr_base.__name__ if whole is False else type(parent).__name__
                raise StateError(
                    f"{full} belongs to a {kind}, and peft has LoRA for named Linear and Conv1D modules: leave it out with "
                    f"exclude=[{full!r}] to export; for this model, {_ELSE}"
                )
            adopted[owner] = module
    if not adopted:
        raise StateError(f"no weight of the model has a pair beside a base; there is nothing to export. {_ELSE}")
    return adopted, entries


def _modules_to_save(model: nn.Module, adopted: Mapping[str, Any]) -> list[str]:
    """The modules that own trained parameters other than pairs, by name."""
    _, pairs = beside_bases(model)
    owners = {plain_name(n): m for n, m in model.named_modules(remove_duplicate=False)}
    found: list[str] = []
    for name, p in model.named_parameters(remove_duplicate=False):
        if not p.requires_grad or id(p) in pairs:
            continue
        owner = plain_name(name).rpartition(".")[0]
        if owner in adopted or not owner or isinstance(owners[owner], (nn.ParameterList, nn.ParameterDict)):
            why = "of a weight with a pair" if owner in adopted else "of no module that peft could save whole"
            raise StateError(
                f"{plain_name(name)} is trained, and peft has no place for a parameter {why}: freeze it before training "
                f"(trainable=), to export; for this model, {_ELSE}"
            )
        found.append(owner)
    found = list(dict.fromkeys(found))
    for name in adopted:
        inside = next((kept for kept in found if re.match(rf"(^|.*\.){kept}($|\..*)", name)), None)
        if inside:
            raise StateError(
                f"{name} has a pair inside {inside}, of which other parameters are trained: peft can't do both. {_ELSE}"
            )
    return found


def _config(model: nn.Module, adopted: Mapping[str, Any], saved: list[str], base: str | None) -> dict[str, Any]:
    forms = {name: dict(module.lr_forms)["weight"] for name, module in adopted.items()}
    ranks = {name: form.rank or 0 for name, form in forms.items()}
    alphas = {name: _alpha(form.scale, ranks[name]) for name, form in forms.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    kind = getattr(model, "lr_base", type(model))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": base or getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": all(form.stored_in_out for form in forms.values()),
        "target_modules": _targets(model, adopted),
        # peft looks these up as regular expressions, at the end of a name
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "modules_to_save": saved or None,
    }


def _alpha(scale: float, rank: int) -> int | float:
    """lora_alpha such that lora_alpha / √rank is the scale, a whole number where one gives it."""
    alpha = scale * math.sqrt(rank)
    return round(alpha) if math.isclose(round(alpha), alpha, rel_tol=1e-12) else alpha


def _targets(model: nn.Module, adopted: Mapping[str, Any]) -> list[str] | str:
    """What peft calls these modules and no other: the last parts of their names, their names, or an expression."""
    names = {plain_name(name) for name, _ in model.named_modules() if name}
    lasts = {name.rpartition(".")[2] for name in adopted}
    for targets in (lasts, set(adopted)):
        if {n for n in names if n in targets or any(n.endswith(f".{t}") for t in targets)} == set(adopted):
            return sorted(targets)
    return "|".join(re.escape(name) for name in sorted(adopted))
