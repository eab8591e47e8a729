"""Shards as they are written: each under its name at once, the record of how far it got after them, the index last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.errors import TrainError
from lrcompile.files import commit
from lrcompile.train.data.shards import FORMAT, INDEX, checksum, identity
from lrcompile.train.data.tokens import Tokenizer


class Part:
    """The shards of train or of validation, and what waits to become the next one.

    Attributes:
        folder: where they go.
        shards: the index's entries of those that are on disk.
        waiting: tokens that are not.
    """

    def __init__(self, folder: Path, dtype: np.dtype, shards: list[dict[str, Any]]) -> None:
        self.folder, self.dtype, self.shards = folder, dtype, shards
        self._tokens: list[np.ndarray] = []
        self._bounds: list[np.ndarray] = []
        self.waiting = 0

    def add(self, tokens: np.ndarray, bounds: np.ndarray) -> None:
        """Documents one after the other: tokens (n,), bounds int64 (documents, 2), as in `Shards`."""
        self._tokens.append(tokens)
        self._bounds.append(bounds)
        self.waiting += len(tokens)

    def write(self) -> None:
        """Make a shard of what waits; a file of that name that a killed call left is replaced."""
        if not self.waiting:
            return
        tokens = np.concatenate(self._tokens).astype(self.dtype)
        bounds = np.concatenate(self._bounds).astype("<i8")
        entry = {"name": f"shard-{len(self.shards):05d}", "tokens": len(tokens), "documents": len(bounds)}
        for part, data in (("documents", bounds), ("tokens", tokens)):
            raw = data.tobytes()
            entry[f"{part}_sha256"] = hashlib.sha256(raw).hexdigest()
            commit(self.folder / f"{entry['name']}.{part}", raw)
        self.shards.append(entry)
        self._tokens, self._bounds, self.waiting = [], [], 0

    def finish(self, kind: str, tokenizer: Tokenizer, request: dict[str, Any]) -> None:
        """Write the index: from now on the directory can be opened."""
        index: dict[str, Any] = {
            "format": FORMAT,
            "kind": kind,
            "dtype": self.dtype.str,
            "tokenizer": tokenizer.describe(),
            "documents": sum(s["documents"] for s in self.shards),
            "tokens": sum(s["tokens"] for s in self.shards),
            "shards": self.shards,
            "request": request,
        }
        index["fingerprint"] = identity(index)
        index["checksum"] = checksum(index)
        commit_json(self.folder / INDEX, index)


def commit_json(file: Path, told: Any) -> None:
    commit(file, (json.dumps(told, indent=1) + "\n").encode())


@contextmanager
def disk_errors_told(out: Path) -> Iterator[None]:
    """A full or read-only disk as a TrainError."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        raise TrainError(
            f"can't go on with {where}: {error.strerror or error}; mend that and run the same command again, it goes on from "
            "its last shard"
        ) from error
