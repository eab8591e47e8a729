"""Files that are whole or not there at all, and how one is known again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sha256(*files: Path) -> str:
    """Of the files' bytes, one file after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """See that a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit(file: Path, data: bytes) -> None:
    """A file that is there whole or not at all, whatever dies when."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, file)
    flush(file.parent)
