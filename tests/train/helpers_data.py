"""Shards in memory, every token of which can be told from every other; and small files to prepare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.train.data import Shards


def shards_of(lengths: Sequence[int], prompts: Sequence[int] | None = None, files: int = 2) -> Shards:
    """Documents of these lengths whose tokens are 0, 1, 2 … through all of them; the end token, for padding, is the next."""
    bounds = np.array([lengths, prompts or [0] * len(lengths)], np.int64).T
    tokens = np.arange(sum(lengths))
    parts = np.array_split(np.arange(len(lengths)), min(files, len(lengths)))
    ends = np.cumsum(lengths)
    data = np.split(tokens, [ends[part[-1]] for part in parts[:-1]])
    index: dict[str, Any] = {
        "kind": "text" if prompts is None else "prompts",
        "fingerprint": "f" * 64,
        "tokenizer": {"kind": "bytes", "fingerprint": "t" * 64, "end": len(tokens), "vocab_size": len(tokens) + 1},
        "shards": [{"documents": len(part)} for part in parts],
    }
    return Shards(Path("memory"), index, data, bounds)


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
