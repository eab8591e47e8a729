"""What `lrcompile eval`'s tasks can be trained on: their training rows, asked as it asks them, and never a test row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lrcompile.tasks.table import counted, read_rows
from lrcompile.train.data.sources import TASK, Row, Source

PROMPT, COMPLETION = "prompt", "completion"


def task_sources(tasks: Sequence[str], data: Path) -> list[Source]:
    """A source for each task, in the order given: the rows of its training side, and those of its validation side held out.

    Both sides are as `lrcompile.tasks.read_rows` makes them, so no text is on two sides.

    Args:
        tasks: names of lrcompile.tasks.TASKS; "NAME:N": of each side the first N rows, a fair sample.
        data: the folder of their files.

    Raises:
        EvalError: no such task, a task without a training side, a file is missing or a row malformed.
    """
    return [_source(name, data, limit) for name, limit in counted(tasks).items()]


def _source(name: str, data: Path, limit: int | None) -> Source:
    sides = {side: read_rows(name, data, side) for side in ("train", "validation")}
    files = dict.fromkeys([*sides["train"][1], *read_rows(name, data)[1]])  # a test row takes its text from the others
    size, rows = sum(path.stat().st_size for path in files), list[Row]()
    taken = [(side, row) for side, (found, _) in sides.items() for row in found[:limit]]
    for number, (side, row) in enumerate(taken, 1):
        values = dict(zip((PROMPT, COMPLETION), row.trained, strict=True))
        where = f"{name}, {side} row {number}"
        rows.append(Row(values, where, size * number // len(taken), held_out=side == "validation"))
    return Source(Path(name), TASK, tuple(files), tuple(rows))
