"""The records of a folder, and the table they make."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .methods import TITLES

Record = dict[str, Any]


def write(record: Record, path: Path) -> None:
    """Whole or not at all: a record that exists is a finished run."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read(folder: Path) -> list[Record]:
    """All records of a folder.

    Raises:
        SystemExit: one that can't be read.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(json.loads(path.read_text(encoding="utf-8")))
            records[-1]["method"], records[-1]["validation"]["accuracy"]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is no record of a run ({error}); remove it, and it is run again") from None
    return records


def goodness(record: Record) -> tuple[float, float]:
    """What the learning rate is chosen by: accuracy on the validation slice, then how sure it was; a diverged run is last."""
    if not math.isfinite(record["validation"]["nll"]):
        return -1.0, 0.0
    return record["validation"]["accuracy"], -record["validation"]["nll"]


def chosen(records: list[Record], method: str, task: str) -> Record | None:
    """The record of the learning rate that did best on the validation slice; it was tested, as the best so far always is."""
    mine = [r for r in records if r["method"] == method and r["task"] == task and r["test"]]
    return max(mine, key=goodness, default=None)


def show(folder: Path, console: Console) -> None:
    """Print a table for each task, and the means over the tasks of sentiment.

    Raises:
        SystemExit: no records.
    """
    records = read(folder)
    if not records:
        raise SystemExit(f"no records in {folder}; run with --out {folder} first")
    tasks = list(
        dict.fromkeys(r["task"] for r in sorted(records, key=lambda r: ("fpb", "tfns", "cfpb").index(r["task"])))
    )
    for task in tasks:
        console.print(_table(records, task))
    means = _means(records)
    if means.row_count:
        console.print(means)
    settings, said = records[0]["settings"], {r["machine"] for r in records}
    console.print(
        f"{records[0]['model']}; batches of {settings['batch_size']}, {settings['epochs']} epochs, "
        f"{settings['optimizer']}. acc., F1: in %. W+G+O: weights, gradients and optimizer state, in MB. saved: bytes "
        "that a token of a batch keeps for backward. speed: examples/s in training over full finetuning's, in processor "
        "seconds where one thread is used.",
        markup=False,
        highlight=False,
    )
    for line in [*tried(records), *in_bfloat16(records)]:
        console.print(line, markup=False, highlight=False)
    for machine in sorted(said):
        console.print(f"machine: {machine}", markup=False, highlight=False)


def tried(records: list[Record]) -> list[str]:
    """The learning rates that were chosen from; a method with others than most is named, since that is no fair choice."""
    grids: dict[tuple[float, ...], list[str]] = {}
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in records if r["trained"]):
        lrs = tuple(sorted(r["lr"] for r in records if (r["task"], r["method"]) == (task, method)))
        grids.setdefault(lrs, []).append(f"{TITLES[method]} on {task}")
    usual, *others = sorted(grids, key=lambda lrs: -len(grids[lrs])) or [()]
    lines = [f"learning rates to choose from: {', '.join(f'{lr:g}' for lr in usual)}"]
    return lines + [f"but {', '.join(f'{lr:g}' for lr in lrs)} for {', '.join(grids[lrs])}" for lrs in others]


def in_bfloat16(records: list[Record]) -> list[str]:
    """What full finetuning would hold were weights, gradients and moments in bfloat16: 8 bytes a parameter. Not measured."""
    full = next((r["trained"] for r in records if r["method"] == "full"), 0)
    ours = next((sum(r["bytes"].values()) for r in records if r["method"] == "ours"), 0)
    if not full or not ours:
        return []
    return [f"full finetuning all in bfloat16, calculated: {mega(8 * full)} MB, {8 * full / ours:.1f}x what ours holds"]


def mega(count: int) -> str:
    """Bytes in MB, two digits of them at least."""
    return f"{count / 1e6:.0f}" if count >= 1e7 or count == 0 else f"{count / 1e6:.2g}"


def _methods(records: list[Record], task: str) -> dict[str, Record]:
    found = {method: chosen(records, method, task) for method in TITLES}
    return {method: record for method, record in found.items() if record is not None}


def _table(records: list[Record], task: str) -> Table:
    first = next(r for r in records if r["task"] == task)
    commonest, sizes = first["commonest"], first["settings"]["sizes"]
    always = f"{100 * commonest['accuracy']:.1f}, F1 {100 * commonest['macro_f1']:.1f}"
    rows = "/".join(str(sizes[side]) for side in ("train", "validation", "test"))
    table = Table(title=f"{task}: {rows} rows to train/choose/test; always the commonest label: acc. {always}")
    table.add_column("method", no_wrap=True)
    for column in ("lr", "acc.", "F1", "trained", "W+G+O MB", "sum", "less", "saved", "speed"):
        table.add_column(column, justify="right", no_wrap=True)
    found = _methods(records, task)
    full = found.get("full")
    for method, r in found.items():
        held = [r["bytes"][part] for part in ("weights", "gradients", "optimizer")]
        trained = r["trained"] > 0
        less = f"{sum(full['bytes'].values()) / sum(held):.1f}x" if full and trained else ""
        speed = f"{r['examples_per_second'] / full['examples_per_second']:.2f}x" if full and trained else ""
        table.add_row(
            TITLES[method],
            f"{r['lr']:.0e}" if trained else "",
            f"{100 * r['test']['accuracy']:.1f}",
            f"{100 * r['test']['macro_f1']:.1f}",
            f"{r['trained'] / 1e6:.2f}M" if trained else "",
            "+".join(mega(part) for part in held),
            mega(sum(held)),
            less,
            f"{r['saved_bytes_per_token'] / 1e3:.0f}k" if trained else "",
            speed,
        )
    return table


def _means(records: list[Record]) -> Table:
    """The mean of the two tasks of sentiment, for methods that have both."""
    table = Table(title="mean of fpb and tfns")
    for column in ("method", "acc. %", "F1 %", "over untuned", "over full", "over commonest"):
        table.add_column(column, justify="left" if column == "method" else "right")
    both = [_methods(records, task) for task in ("fpb", "tfns")]
    means = {
        method: [sum(rows[method]["test"][key] for rows in both) / 2 * 100 for key in ("accuracy", "macro_f1")]
        for method in TITLES
        if all(method in rows for rows in both)
    }
    floors = [next((r["commonest"]["accuracy"] for r in records if r["task"] == task), 0.0) for task in ("fpb", "tfns")]
    floor = sum(floors) / 2 * 100
    for method, (accuracy, f1) in means.items():
        over = [f"{accuracy - means[m][0]:+.1f}" if m in means else "" for m in ("untuned", "full")]
        over.append(f"{accuracy - floor:+.1f}")
        table.add_row(TITLES[method], f"{accuracy:.1f}", f"{f1:.1f}", *over)
    return table
