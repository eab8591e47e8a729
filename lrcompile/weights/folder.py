"""Directories of safetensors and JSON that appear under their name whole or not at all, and are read back unharmed or refused.

Everything is written beside the name, flushed, and renamed; what a killed save left behind is removed by the next.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lrcompile.errors import StateError
from lrcompile.files import flush, sha256

log = logging.getLogger("lrcompile")


@dataclass(frozen=True)
class Kind:
    """What is kept in a directory of two files.

    Attributes:
        format: identifies it, with its version.
        weights, index: names of the two files.
        by: who writes it, for messages.
        texts: what the index holds as text, beside what `write_saved` adds.
    """

    format: str
    weights: str
    index: str
    by: str
    texts: tuple[str, ...] = ()


def write_saved(
    kind: Kind, dir: str | os.PathLike[str], tensors: dict[str, torch.Tensor], told: dict[str, Any]
) -> None:
    """Write tensors and an index that holds `told`, the format's name and checksums of both files.

    Raises:
        StateError: something that this kind didn't write stands under the name.
    """
    target = absolute(dir)

    def fill(work: Path) -> None:
        save_file(tensors, work / kind.weights, metadata={"format": kind.format})
        index = {
            "format": kind.format,
            "sha256": sha256(work / kind.weights),
            "bytes": (work / kind.weights).stat().st_size,
            **told,
        }
        index["checksum"] = checksum(index)
        (work / kind.index).write_text(json.dumps(index, indent=1))

    refuse_taken(target, kind)
    publish(target, fill, (kind.weights, kind.index))


def read_saved(kind: Kind, folder: Path) -> dict[str, Any]:
    """The index of a directory whose two files are as they were written.

    Raises:
        StateError: the directory is missing, foreign, truncated or altered.
    """
    index = _read_index(kind, folder)
    _check_weights(kind, folder, index)
    return index


def absolute(dir: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(dir))  # "." has no name that a directory could be moved to


def refuse_taken(target: Path, kind: Kind) -> None:
    """Raise StateError where replacing what stands under a name would lose something that this kind of save didn't write."""
    if not target.exists() and not target.is_symlink():
        return
    held = sorted(p.name for p in target.iterdir()) if target.is_dir() and not target.is_symlink() else None
    if held is None or (held and kind.index not in held):
        raise StateError(f"{target} exists and was not saved by {kind.by}; choose another name")
    others = [name for name in held if name not in (kind.index, kind.weights)]
    if others:
        raise StateError(f"{target} also holds {', '.join(others[:5])}, which would be lost; choose another name")


def publish(target: Path, fill: Callable[[Path], None], files: tuple[str, ...]) -> None:
    """Put a directory under a name, whole or not at all; one that stands there is replaced.

    Args:
        target: absolute.
        fill: writes the files into the empty directory that it is given.
        files: their names.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target, ".partial")
    work, held = _work_folder(target)
    try:
        fill(work)
        for path in (*(work / name for name in files), work):
            flush(path)
        # Made for the owner alone (mkdtemp, and safetensors' own file).
        os.chmod(work, 0o777 & ~_umask())
        for name in files:
            os.chmod(work / name, 0o666 & ~_umask())
        if target.exists():
            # Two renames: a crash between them leaves the old directory whole under the second name.
            old = work.with_suffix(".replaced")
            held += lock(target)
            os.rename(target, old)
            try:
                os.rename(work, target)
            except BaseException:
                os.rename(old, target)
                raise
            shutil.rmtree(old)
        else:
            os.rename(work, target)
        flush(target.parent)
        _remove_leftovers(target, ".replaced")
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        for handle in held:
            os.close(handle)


def _read_index(kind: Kind, folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        kept = sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*.replaced"))
        hint = f"; a save was interrupted between two renames, the one before is whole in {kept[-1]}" if kept else ""
        raise StateError(f"there is no directory {folder}{hint}")
    if not (folder / kind.index).is_file():
        raise StateError(f"{folder} was not saved by {kind.by}: it has no {kind.index}")
    try:
        index = json.loads((folder / kind.index).read_text())
    except ValueError as error:
        raise StateError(f"{folder / kind.index} is truncated or altered: {error}") from error
    if not isinstance(index, dict) or index.get("format") != kind.format:
        raise StateError(f"{folder} was not saved by this version of lrcompile (its format is not {kind.format!r})")
    if index.get("checksum") != checksum(index):
        raise StateError(f"{folder / kind.index} was altered since it was saved: its checksum doesn't match")
    if not (type(index.get("bytes")) is int and all(isinstance(index.get(k), str) for k in ("sha256", *kind.texts))):
        raise StateError(f"{folder / kind.index} lacks a part that lrcompile writes")
    return index


def _check_weights(kind: Kind, folder: Path, index: dict[str, Any]) -> None:
    weights = folder / kind.weights
    if not weights.is_file():
        raise StateError(f"{folder} lacks {kind.weights}; copy the whole directory again")
    size = weights.stat().st_size
    if size != index["bytes"]:
        raise StateError(f"{weights} is truncated: {size} of {index['bytes']} bytes; copy it again")
    if sha256(weights) != index["sha256"]:
        raise StateError(f"{weights} was altered since it was saved: its checksum doesn't match; copy it again")


def checksum(index: dict[str, Any]) -> str:
    body = {k: v for k, v in index.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def lock(folder: Path, wait: bool = True) -> list[int]:
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
            held = lock(work)
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
            held = lock(folder, wait=False)
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
