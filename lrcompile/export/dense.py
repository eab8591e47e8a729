"""The merged, dense model as a directory that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrcompile.errors import ExportError
from lrcompile.weights.adopt import merge
from lrcompile.weights.layers import AdoptedModule


def export_hf(model: Any, tokenizer: Any, folder: str | Path) -> int:
    """Merge a model of transformers in place and save it with its tokenizer; returns the bytes written.

    Args:
        model: adopted or dense.
        tokenizer: saved beside it; None: none.
        folder: not there yet, or empty.

    Raises:
        ExportError: something is there already, or it can't be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} is there already; give a new directory")
    if any(isinstance(module, AdoptedModule) for module in model.modules()):
        merge(model)
    try:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise ExportError(f"can't write {folder}: {error.strerror or error}") from error
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
