"""Prepared data on disk: token files that are mapped, not read, and an index that says what they must be."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.errors import TrainError
from lrcompile.files import sha256
from lrcompile.train.data.tokens import check_saved

FORMAT = "lrcompile-shards-1"
INDEX, PROGRESS = "index.json", "progress.json"


def canonical(told: Any) -> str:
    """JSON that is the same for the same content; for checksums."""
    return json.dumps(told, sort_keys=True, separators=(",", ":"))


def checksum(told: Any) -> str:
    return hashlib.sha256(canonical(told).encode()).hexdigest()


def identity(index: dict[str, Any]) -> str:
    """One checksum over everything that decides which tokens a run sees; file names and sources don't."""
    parts = [[s["tokens_sha256"], s["documents_sha256"]] for s in index["shards"]]
    return checksum([index["format"], index["kind"], index["dtype"], index["tokenizer"], parts])


class Shards:
    """A prepared directory, read-only. Made by `open`.

    Attributes:
        path: the directory.
        kind: "text" or "prompts".
        documents, tokens: how many there are, the end tokens included.
        lengths: tokens of each document, int64 (documents,).
        prompts: how many of these no loss is taken on, int64 (documents,): 0 for text.
        fingerprint: checksum of the tokens, the documents' bounds and the tokenizer.
        tokenizer: what the index says of it: kind, fingerprint, end, vocab_size.
        vocab_size: tokens lie in [0, vocab_size).
    """

    def __init__(self, path: Path, index: dict[str, Any], files: list[np.ndarray], bounds: np.ndarray) -> None:
        self.path = path
        self.kind: str = index["kind"]
        self.fingerprint: str = index["fingerprint"]
        self.tokenizer: dict[str, Any] = index["tokenizer"]
        self.vocab_size: int = self.tokenizer["vocab_size"]
        self.lengths = bounds[:, 0].copy()
        self.prompts = bounds[:, 1].copy()
        self.documents = len(bounds)
        self.tokens = int(self.lengths.sum())
        counts = [shard["documents"] for shard in index["shards"]]
        self._files = files
        self._file_of = np.repeat(np.arange(len(files)), counts)
        starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]) if self.documents else np.zeros(0, np.int64)
        firsts = np.concatenate([[0], np.cumsum([len(f) for f in files])])
        self._start_of = starts - firsts[self._file_of]

    @classmethod
    def open(cls, dir: str | os.PathLike[str], verify: str = "sizes") -> Shards:
        """Map a directory that `prepare` wrote.

        Args:
            dir: DIR/train or DIR/validation.
            verify: "sizes" checks that every file is there at its full length, and all of the index, the documents'
                bounds and the tokenizer; "checksums" reads every token as well.

        Raises:
            TrainError: the directory is missing, unfinished or foreign; a shard is missing, truncated or altered; or
                the tokenizer has changed.
        """
        if verify not in ("sizes", "checksums"):
            raise TrainError(f'verify is "sizes" or "checksums", not {verify!r}')
        path = Path(dir)
        index = read_index(path)
        check_saved(path, index["tokenizer"])
        files, bounds = [], []
        for shard in index["shards"]:
            tokens, documents = open_shard(path, shard, np.dtype(index["dtype"]), verify == "checksums")
            files.append(tokens)
            bounds.append(documents)
        return cls(path, index, files, np.concatenate([np.zeros((0, 2), np.int64), *bounds]))

    def read(self, document: int) -> tuple[np.ndarray, np.ndarray | None]:
        """One document's tokens, uint16 or uint32 (length,), and for prompts which of them are targets, bool (length,)."""
        tokens = self.slice(document, 0, int(self.lengths[document]))
        if self.kind == "text":
            return tokens, None
        return tokens, np.arange(len(tokens)) >= self.prompts[document]

    def slice(self, document: int, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of a document: a view of the mapped file. The bounds are not checked."""
        start = self._start_of[document]
        found: np.ndarray = self._files[self._file_of[document]][start + begin : start + end]
        return found


def read_index(path: Path) -> dict[str, Any]:
    """The index of a prepared directory.

    Raises:
        TrainError: there is none (unfinished, or another directory is meant), or it is foreign or altered.
    """
    file = path / INDEX
    if not file.is_file():
        if not path.is_dir():
            raise TrainError(f"no prepared data in {path}: no such directory; make it with `lrcompile data`")
        if (path / "train" / INDEX).is_file():
            raise TrainError(f"{path} holds several parts; name one: {path / 'train'}")
        if (path.parent / PROGRESS).is_file():
            raise TrainError(f"{path} is not finished; run the `lrcompile data` command that began it once more")
        raise TrainError(f"{path} has no {INDEX}: it was not made by `lrcompile data`, or not all of it was copied")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        told = index.pop("checksum")
        foreign = index["format"] != FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainError(f"{file} can't be read ({error!r}); prepare the data again") from error
    if foreign:
        raise TrainError(
            f"{file} is of the format {index['format']!r}, this version reads {FORMAT}; prepare the data again"
        )
    if checksum(index) != told or identity(index) != index["fingerprint"]:
        raise TrainError(f"{file} has been altered: its checksum is wrong; prepare the data again")
    return dict(index)


def open_shard(path: Path, shard: dict[str, Any], dtype: np.dtype, deep: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A shard's tokens, mapped, and its documents' bounds, int64 (documents, 2); refused unless it is as its entry says."""
    sizes = {"tokens": shard["tokens"] * dtype.itemsize, "documents": shard["documents"] * 16}
    for part, size in sizes.items():
        file = path / f"{shard['name']}.{part}"
        if not file.is_file():
            raise TrainError(f"the shard {file} is missing; copy it again, or prepare the data again")
        if file.stat().st_size != size:
            raise TrainError(f"the shard {file} is truncated or altered: {file.stat().st_size} bytes, must be {size}")
        if (part == "documents" or deep) and sha256(file) != shard[f"{part}_sha256"]:
            raise TrainError(f"the shard {file} has been altered: its checksum is wrong; copy or prepare it again")
    with (path / f"{shard['name']}.tokens").open("rb") as handle:
        # A plain array over the mapping: slices of numpy.memmap cost several times as much.
        tokens = np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), dtype)
    documents = np.fromfile(path / f"{shard['name']}.documents", "<i8").reshape(-1, 2)
    return tokens, documents
