"""Full finetuning, LoRA, QLoRA and ours: `lrcompile finetune` and `lrcompile eval` for each, then one table of what they wrote.

    python examples/financial/regimes.py --data DATA --out out/financial
    python examples/financial/regimes.py --show out/financial

README.md beside this file tells what comes before: the model and the data. What is there is not run again, and a run that was
killed goes on. Options that aren't known here are given to `lrcompile finetune`.

"half" is ours with half of what it changed (`lrcompile export --untuned`); what training held and took is ours'.

"commonest" is the accuracy of always giving the label that is right most often among the rows that were scored.

Of a regime the table reads OUT/REGIME.json (of `lrcompile eval`) and OUT/REGIME/metrics.jsonl; of half, ours.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lrcompile.errors import TrainError
from lrcompile.show import PLAIN, show
from lrcompile.tasks.command import with_error
from lrcompile.train.history import History, read

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "financial"
UNTUNED = "untuned"
REGIMES = {UNTUNED: "untuned", "full": "full", "lora": "LoRA", "qlora": "QLoRA", "ours": "ours", "half": "half of it"}
RUNS = {"half": "ours"}  # whose run another one's is
PARTS = ("weights", "gradients", "optimizer")
TASKS = "fpb:300,fiqa:300,tfns:300,boolq:200,piqa:200,winogrande:200,arc_easy:200,openbookqa:200"


# --- the runs ---------------------------------------------------------------------------------------------------------


def commands(regime: str, args: argparse.Namespace, more: Sequence[str]) -> list[list[str]]:
    """What is left to do for a regime, as words after `lrcompile`."""
    run, scores, left = args.out / regime, args.out / f"{regime}.json", list[list[str]]()
    model = args.model if regime == UNTUNED else str(run / "merged")
    if scores.is_file():
        return []
    if regime in RUNS:
        tuned, words = args.out / RUNS[regime] / "merged", ["--untuned", args.model, "--strength", "0.5"]
        left.append(["export", str(tuned), "--to", "hf", model, *words])
    elif regime != UNTUNED:
        own = ["--model.source", args.model, "--out", str(run), "--resume"]
        left.append(["finetune", str(CONFIGS / f"{regime}.toml"), *own, *more])
    asked = ["--tasks", args.tasks, "--data", args.data, "--dtype", "bfloat16", "--json", str(scores)]
    return [*left, ["eval", model, *asked]]


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """Of a regime: what `lrcompile eval` wrote, and its run; None for the untuned model."""

    scores: dict[str, Any]
    run: History | None

    @property
    def held(self) -> dict[str, int]:
        """Bytes of a step: weights, gradients, optimizer."""
        told = [event["held"] for event in self.run.events if "held" in event] if self.run else []
        return dict(told[-1]) if told else {}


def results(folder: Path) -> dict[str, Result]:
    """By regime, those that are there.

    Raises:
        SystemExit: there are none, or a file can't be read.
    """
    found = {}
    for regime in REGIMES:
        path = folder / f"{regime}.json"
        if path.is_file():
            try:
                scores = json.loads(path.read_text(encoding="utf-8"))
                scores["tasks"], scores["means"]
                found[regime] = Result(scores, None if regime == UNTUNED else read(folder / RUNS.get(regime, regime)))
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"{path} is not what lrcompile eval --json writes ({error!r}); remove it") from None
            except TrainError as error:
                raise SystemExit(f"{path} has no run beside it: {error}") from None
    if not found:
        raise SystemExit(
            f"{folder} holds no {UNTUNED}.json or other regime's; make them with --data DATA --out {folder}"
        )
    return found


def table(found: dict[str, Result]) -> Group:
    """Accuracies in per cent with standard errors, then what training held and took."""
    made = Table(title="Accuracy in % on test rows, before and after", **PLAIN)
    made.add_column("", no_wrap=True)
    first = next(iter(found.values())).scores
    floors = any(score.get("commonest") is not None for score in first["tasks"].values())  # older files have none
    if floors:
        made.add_column("commonest", justify="right", no_wrap=True)
    for regime in found:
        made.add_column(REGIMES[regime], justify="right", no_wrap=True)

    every = list(found.values())

    def row(label: str, cells: Iterable[str], style: str = "", floor: float | None = None) -> None:
        floor_cell = ["" if floor is None else with_error(floor)] if floors else []
        made.add_row(Text(label, style=style), *floor_cell, *cells)

    for group in ("financial", "general"):
        for name, score in first["tasks"].items():
            if score["group"] == group:
                cells = (_accuracy(r.scores["tasks"].get(name)) for r in every)
                row(f"{name} ({score['rows']})", cells, floor=score.get("commonest"))
        cells = (_accuracy(r.scores["means"].get(group)) for r in every)
        row(f"mean of the {group}", cells, "bold", first["means"].get(group, {}).get("commonest"))
        if UNTUNED in found:
            row("  over untuned", (_over(r, found[UNTUNED], group) for r in every))
        made.add_section()
    for part in PARTS:
        row(f"{part}, MB", (_mega(r.held.get(part)) for r in every))
    full = found["full"].held if "full" in found else {}
    for label, parts in (("weights + optimizer", ("weights", "optimizer")), ("all three", PARTS)):
        row(label, (_mega(sum(r.held[part] for part in parts)) if r.held else "" for r in every), "bold")
        row("  times less", (_less(full, r.held, parts) for r in every))
    made.add_section()
    runs = [r.run for r in every]
    row("numbers trained", (f"{run.facts['trained'] / 1e6:.1f}M" if run else "" for run in runs))
    row("tokens trained on", (f"{run.tokens[-1]:,.0f}" if run else "" for run in runs))
    row("seconds of training", (f"{run.seconds[-1]:.0f}" if run else "" for run in runs))
    own = [None if name in RUNS else run for name, run in zip(found, runs, strict=True)]
    row("held-out loss", (f"{run.held_out[-1, 1]:.3f}" if run and len(run.held_out) else "" for run in own))
    notes = ["bytes: of a step, counted on the tensors"]
    if floors:
        notes.insert(0, "commonest: the accuracy of always giving the label that is right most often")
    return Group(made, *(Text(note, style="dim") for note in notes))


def _accuracy(score: dict[str, Any] | None) -> str:
    return with_error(score["accuracy"], score["accuracy_stderr"]) if score else with_error(None)


def _over(result: Result, untuned: Result, group: str) -> str:
    means = [r.scores["means"].get(group) for r in (result, untuned)]
    return f"{100 * (means[0]['accuracy'] - means[1]['accuracy']):+.1f}" if all(means) and result.run else ""


def _mega(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f}"


def _less(full: dict[str, int], held: dict[str, int], parts: Sequence[str]) -> str:
    if not held or not full:
        return ""
    return f"{sum(full[part] for part in parts) / sum(held[part] for part in parts):.1f}x"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="the folder of the tasks' files")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct.Q4_1.gguf", help="as lrcompile finetune takes it")
    parser.add_argument("--tasks", default=TASKS, help="to evaluate on, as lrcompile eval takes them")
    parser.add_argument("--only", nargs="+", choices=list(REGIMES), default=list(REGIMES), metavar="REGIME")
    parser.add_argument("--out", type=Path, default=Path("out/financial"))
    parser.add_argument("--show", type=Path, metavar="DIR", help="print the table of a folder, and stop")
    args, more = parser.parse_known_args(argv)
    # They are for `lrcompile finetune`, which refuses those that it doesn't know: here nobody would see them.
    if more and (args.show is not None or set(args.only) <= {UNTUNED, *RUNS}):
        where = "--show" if args.show is not None else f"--only {' '.join(args.only)}"
        parser.error(
            f"unrecognized arguments: {' '.join(more)} (they are given to lrcompile finetune, which {where} doesn't run)"
        )
    if args.show is None:
        if args.data is None:
            raise SystemExit("give --data DIR, the folder of the tasks' files, or --show DIR for a table")
        args.out.mkdir(parents=True, exist_ok=True)
        for regime in args.only:
            for words in commands(regime, args, more):
                if words[0] == "export":  # what a killed one left is no model
                    shutil.rmtree(args.out / regime, ignore_errors=True)
                print("lrcompile", *words, flush=True)
                if code := subprocess.run([sys.executable, "-m", "lrcompile", *words]).returncode:
                    raise SystemExit(code)
    show(table(results(args.show or args.out)))


if __name__ == "__main__":
    main()
