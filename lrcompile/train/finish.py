"""What a finished run leaves: the model as safetensors, for lrcompile.load, and merged, for transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_model
from torch import nn
from torch.distributed.tensor import DTensor

from lrcompile.train.data.tokens import FILE, SETTINGS
from lrcompile.train.materialise import allocate, fill
from lrcompile.weights.adapters import save_adapter
from lrcompile.weights.adopt import merge
from lrcompile.weights.plan import Plan
from lrcompile.weights.replace import settle
from lrcompile.weights.state import save


def export(model: nn.Module, twin: nn.Module, plan: Plan | None, out: Path, *, merged: bool, data: Path) -> list[str]:
    """Write a trained model to directories under `out`. Collective: rank 0 gathers and writes.

    Args:
        model: trained, sharded or not.
        twin: the same adopted model, not sharded, on `meta`; it is filled on rank 0, and used up.
        plan: None for a dense model.
        merged: write the dense model too, which other libraries load.
        data: the prepared data, whose tokenizer goes along.

    Returns:
        the directories' names: "model" (lrcompile.load), "adapter" (lrcompile.load_adapter; pairs beside bases), "merged"
        (transformers' from_pretrained, or model.safetensors).
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        allocate(twin, torch.device("cpu"))
    places = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        whole = p.full_tensor().detach() if isinstance(p, DTensor) else p.detach()
        if first:
            fill(places[name], whole.cpu())
    if not first:
        return []
    kept = dict(twin.named_buffers())
    for name, b in model.named_buffers():
        kept[name].copy_(b)
    twin.eval()
    written = []
    if plan is not None:
        settle(twin.parameters(), plan.recipe)
        save(twin, out / "model")
        written.append("model")
        if any(form.base and form.rank for m in twin.modules() for _, form in getattr(m, "lr_forms", ())):
            save_adapter(twin, out / "adapter")
            written.append("adapter")
    if merged or plan is None:
        if plan is not None:
            merge(twin)
        _write_dense(twin, out / "merged", data)
        written.append("merged")
    return written


def _write_dense(model: Any, out: Path, data: Path) -> None:
    if not hasattr(model, "save_pretrained"):
        out.mkdir(parents=True, exist_ok=True)
        save_model(model, str(out / "model.safetensors"))
        return
    model.save_pretrained(out)
    for name in (FILE, SETTINGS):
        if (data / name).is_file():
            shutil.copyfile(data / name, out / name)
