"""A model as a directory for transformers: merged and dense, or factored, which lrcompile loads without code of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrcompile.errors import ExportError
from lrcompile.weights.adopt import merge
from lrcompile.weights.layers import AdoptedModule
from lrcompile.weights.state import save

DENSE = "dense"
_LOAD = """\
# Loads the model beside this file. It runs no code from here: the values are safetensors, the rest is JSON.
from pathlib import Path

import lrcompile
from transformers import AutoConfig, AutoModelForCausalLM

here = Path(__file__).parent
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(here / "dense"))
model = lrcompile.load(here, model).eval()
"""


def export_hf(model: Any, tokenizer: Any, folder: str | Path) -> int:
    """Merge a model of transformers in place and save it with its tokenizer; returns the bytes written.

    Args:
        model: adopted or dense.
        tokenizer: saved beside it; None: none.
        folder: not there yet, or empty.

    Raises:
        ExportError: something is there already, or it can't be written.
    """
    folder = _free(folder)
    if _adopted(model):
        merge(model)
    _write(folder, model, tokenizer)
    return _bytes(folder)


def export_factored(model: Any, tokenizer: Any, folder: str | Path) -> int:
    """Save an adopted model as it is (`lrcompile.save`), with what its dense model is made from; returns the bytes written.

    `dense/` beside the values has the config and the tokenizer, so that transformers alone finds no model here and can't take
    pairs for missing weights; `load.py` has the lines that load it.

    Raises:
        ExportError: something is there already, it can't be written, or nothing is factored.
    """
    folder = _free(folder)
    if not _adopted(model):
        raise ExportError("nothing in this model is factored; export it without --factored")
    try:
        save(model, folder)
        (folder / DENSE).mkdir()
        (folder / "load.py").write_text(_LOAD, encoding="utf-8")
    except OSError as error:
        raise ExportError(f"can't write {folder}: {error.strerror or error}") from error
    _write(folder / DENSE, model.config, getattr(model, "generation_config", None), tokenizer)
    return _bytes(folder)


def _adopted(model: Any) -> bool:
    return any(isinstance(module, AdoptedModule) for module in model.modules())


def _free(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} is there already; give a new directory")
    return folder


def _write(folder: Path, *parts: Any) -> None:
    try:
        for part in parts:
            if part is not None:
                part.save_pretrained(folder)
    except OSError as error:
        raise ExportError(f"can't write {folder}: {error.strerror or error}") from error


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
