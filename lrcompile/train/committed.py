"""A run's directory of checkpoints: each appears under its name whole or not at all, and is read back unharmed or refused.

`step-00000100/` holds safetensors files and `manifest.json`, which tells the size and the SHA-256 of each, and its own.
What bears another name is on its way in or out: `.step-00000100.partial` is being written, `.removed` being deleted, and
`.replaced` stands aside for another save of the same step, of which it is the only copy until that one has its name.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from lrcompile.errors import TrainError
from lrcompile.files import flush
from lrcompile.weights.folder import checksum

log = logging.getLogger("lrcompile")

FORMAT = "lrcompile-checkpoint/1"
MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
_NAME = re.compile(r"step-(\d{8,})")


def committed(dir: Path) -> dict[int, Path]:
    """The checkpoints of a directory by their step, the oldest first; none where there is no directory."""
    found = {int(m[1]): dir / m[0] for name in _listed(dir) if (m := _NAME.fullmatch(name))}
    return {step: found[step] for step in sorted(found) if found[step].is_dir()}


def recover(dir: Path) -> None:
    """Remove what killed saves left behind, and give the checkpoint back its name that was to be replaced and wasn't."""
    for name in _listed(dir):
        step, _, state = name.removeprefix(".").partition(".")
        if not name.startswith(".") or not _NAME.fullmatch(step):
            continue
        if state == "replaced" and not (dir / step).exists():
            os.rename(dir / name, dir / step)
        elif state in ("partial", "removed", "replaced"):
            _remove(dir / name)


def check_step(dir: Path, step: int) -> None:
    """Raise TrainError where a later step is committed, which would go on being the latest."""
    if type(step) is not int or step < 0:
        raise TrainError(f"a step is a whole number from 0 on, not {step!r}")
    later = [path for at, path in committed(dir).items() if at > step]
    if later:
        raise TrainError(f"{later[-1]} is of a later step: to go on from an earlier one, move what is later away")


def work_folder(dir: Path, step: int) -> Path:
    """Where the files of a step are written until `commit`."""
    return dir / f".step-{step:08d}.partial"


def commit(work: Path, told: dict[str, Any], files: dict[str, tuple[int, str]]) -> Path:
    """Give a folder its name, now that all its files are flushed.

    Args:
        work: from `work_folder`.
        told: what the manifest tells beside the files: "step", "world", "told".
        files: bytes and SHA-256 of each, by name.

    Raises:
        TrainError: the folder holds other files.
    """
    found = {name: (work / name).stat().st_size for name in _listed(work)}
    if found != {name: size for name, (size, _) in files.items()}:
        raise TrainError(
            f"{work} holds {_some(found)} where the ranks wrote {_some(files)}: is it one directory, shared by all of them?"
        )
    manifest: dict[str, Any] = {"format": FORMAT, **told, "files": {k: list(files[k]) for k in sorted(files)}}
    manifest["checksum"] = checksum(manifest)
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (work / MANIFEST, work):
        flush(path)
    target = work.with_name(f"step-{told['step']:08d}")
    if target.exists():
        aside = work.with_suffix(".replaced")
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(target, aside)
        os.rename(work, target)
        flush(target.parent)
        _remove(aside)
    else:
        os.rename(work, target)
        flush(target.parent)
    return target


def prune(dir: Path, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints. Each loses its name first: none is ever seen half removed."""
    for path in list(committed(dir).values())[:-keep]:
        gone = path.with_name(f".{path.name}.removed")
        try:
            os.rename(path, gone)
        except OSError as error:
            log.warning(f"{path} is no longer needed and can't be removed: {error}")
        else:
            _remove(gone)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint's manifest tells: "step", "world", "told", and "files" as `commit` takes them.

    Raises:
        TrainError: there is none, or it is truncated, altered or of another format.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise TrainError(f"there is no checkpoint {folder}")
    if not path.is_file():
        raise TrainError(f"{folder} lacks {MANIFEST}; copy the whole directory again")
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise TrainError(f"{path} is truncated or altered: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise TrainError(f"{folder} was not saved by this version of lrcompile (its format is not {FORMAT!r})")
    if manifest.get("checksum") != checksum(manifest):
        raise TrainError(f"{path} was altered since it was saved: its checksum doesn't match")
    files = manifest.get("files")
    well = all(type(manifest.get(k)) is int and manifest[k] >= 0 for k in ("step", "world"))
    if not (well and isinstance(manifest.get("told"), dict) and isinstance(files, dict)):
        raise TrainError(f"{path} lacks a part that lrcompile writes")
    for name, kept in files.items():
        # A name with a path in it would have a file elsewhere read.
        plain = name.endswith(SUFFIX) and name == os.path.basename(name) and "\0" not in name
        if not (plain and isinstance(kept, list) and [type(x) for x in kept] == [int, str]):
            raise TrainError(f"{path} lists {name!r}, which is no file that lrcompile writes")
    return manifest


def wrong_files(folder: Path, files: dict[str, list[Any]]) -> list[str]:
    """What is wrong with a checkpoint's files at first sight: missing, of another size, or not listed."""
    wrong = []
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{folder} lacks {name}; copy the whole directory again")
        elif (found := path.stat().st_size) != size:
            wrong.append(f"{path} is truncated or altered: {found} of {size} bytes; copy it again")
    # Nothing but safetensors is ever read, so that other files do no harm.
    strangers = [name for name in _listed(folder) if name.endswith(SUFFIX) and name not in files]
    return wrong + [f"{folder / name} is not of this checkpoint; remove it" for name in strangers]


def _listed(dir: Path) -> list[str]:
    return sorted(os.listdir(dir)) if dir.is_dir() else []


def _some(names: Any) -> str:
    names = sorted(names)
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "nothing"


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning(f"{folder} is left of an earlier save and can't be removed: {error}")
