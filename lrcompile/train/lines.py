"""metrics.jsonl: one JSON object a line, each with a "kind" and the "step" it was told at.

Floats are written by repr, so that reading one gives the same bits back. JSON has no word for what is not finite: NaN and
the infinities are written as the strings "NaN", "Infinity" and "-Infinity", which Python's float() takes, and come back
as floats in "step" and "eval" lines. A process that dies in the middle of a write leaves a last line without its end;
that one is dropped. Anything else that can't be read is an error, never skipped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrcompile.errors import TrainError

NAME = "metrics.jsonl"
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def scalar(value: Any) -> Any:
    """A tensor or array of no dimensions as Python's number; all else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def plain(value: Any) -> Any:
    """What JSON can hold of a metric: scalars of torch and numpy become Python's, what is not finite a string.

    Raises:
        TypeError: it is none of number, string, bool, None, nor a list, tuple or dict of such.
    """
    value = scalar(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (str, int)):  # a bool is an int
        return value
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    raise TypeError(f"a metric is a number, a string, None, or a list or dict of such, not {type(value).__name__}")


def encode(entry: dict[str, Any]) -> bytes:
    """One line, its newline included."""
    text = json.dumps(plain(entry), ensure_ascii=False, allow_nan=False)
    # A lone surrogate, which a tokenizer's decoder may give, becomes \udc80: an escape that JSON knows too.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, one by one; a half-written last one is left out.

    Raises:
        TrainError: the file can't be opened, or a line is no metrics line; the message carries its number.
    """
    for _, entry in _lines(path):
        if entry is not None:
            yield entry


def truncate(path: Path, step: int) -> tuple[int, int, int]:
    """Drop what was told after a step, and a half-written last line. The new file takes the old one's place at once.

    Args:
        path: of the file; nothing is done where there is none.
        step: the last one to keep. 0: a run from its start, nothing is kept, what was told before its first step included.

    Returns:
        Lines kept, lines dropped, and the last step kept (0: none).

    Raises:
        TrainError: a line in the middle can't be read, or the disk is full.
    """
    if not path.exists():
        return 0, 0, 0
    kept = dropped = last = 0
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("wb") as out:
            for raw, entry in _lines(path):
                if entry is None or entry["step"] > step or step == 0:
                    dropped += 1
                    continue
                out.write(raw)
                kept += 1
                last = entry["step"] if entry["kind"] == "step" else last
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise TrainError(f"can't cut {path} back to step {step}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)
    return kept, dropped, last


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line as it stands and as it reads; None for a half-written last one."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise TrainError(f"can't read {path}: {error.strerror}") from error
    with file:
        # Bytes are split at \n alone; str.splitlines would split a sample's text at U+2028 and others too.
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                yield raw, None
                return
            yield raw, _decode(raw, f"{path}, line {number}")


def _decode(raw: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(raw)
    except ValueError as error:
        raise TrainError(f"{where}: not JSON ({error}); mend or remove that line") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str) or type(entry.get("step")) is not int:
        raise TrainError(f'{where}: a metrics line is an object with a "kind" and a whole "step"; mend or remove it')
    if entry["kind"] in ("step", "eval"):
        for key, value in entry.items():
            if isinstance(value, str) and value in _NOT_FINITE:
                entry[key] = _NOT_FINITE[value]
    return entry
