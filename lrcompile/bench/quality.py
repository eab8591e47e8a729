"""Dense and low-rank twins trained on the same tokens in the same order, and what each one's held-out loss is.

The file says which (twins.py). Each variant's learning rate is chosen on the first seed, by the held-out loss at the end;
then all seeds run at it. Twins of a seed start from the same weights, but for what the pairs can't hold of them, and see the
same batches. A comparison at equal FLOPs or seconds is one of whole schedules: a variant that is cheaper a step
takes more steps, as many as cost what the best dense twin cost.

Each run lies in OUT/VARIANT/CHOICE/seedN, as `lrcompile pretrain` leaves it, its checkpoints aside once it is finished. The same
command goes on with what is stopped and leaves out what is finished.
"""

from __future__ import annotations

import gc
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from lrcompile.bench.outcome import Outcome, Tried, best_dense, table, told, write
from lrcompile.bench.twins import Choice, Twins, Variant, label, read
from lrcompile.errors import LrcompileError, TrainError
from lrcompile.show import show
from lrcompile.train import history, lines
from lrcompile.train.config import load_resolved, settings
from lrcompile.train.driver import train
from lrcompile.train.dry_run import dry_run
from lrcompile.train.history import History
from lrcompile.train.settings import Run
from lrcompile.train.start import CHECKPOINTS, CONFIG

_FREE = ("out", "log", "save", "parallel.compile", "parallel.kernels")  # what may change while a comparison goes on


def run(*, config: Path, out: Path, data: str | None = None, quick: bool = False) -> None:
    """Train what isn't trained yet, and write OUT/quality.json, quality.md and quality.png.

    Raises:
        TrainError: the file makes no comparison, OUT holds another one, or a signal stopped it.
    """
    words = ["lrcompile", "bench", "quality", str(config), "--out", str(out)]
    words += ["--data", data] if data is not None else []
    words += ["--quick"] if quick else []
    command = shlex.join(words)
    found = Comparison(read(config, data=data, quick=quick), out).go()
    rows = told(found)
    written = write(found, rows, out, command)
    show(table(rows))
    print(f"wrote {', '.join(map(str, written))}\nagain: {command}")


class Comparison:
    """The runs of a comparison, one after the other."""

    def __init__(self, twins: Twins, out: Path) -> None:
        self.twins, self.out = twins, out
        self.outcomes: dict[str, Outcome] = {}

    def go(self) -> list[Outcome]:
        """Train all; what they came to, in the file's order."""
        plain = [v for v in self.twins.variants if v.like is None]
        first, *others = self.twins.seeds
        self._refuse_early(plain)
        for variant in plain:
            tried = [
                Tried(choice, self._train(variant, variant.chosen(choice), choice, first)) for choice in variant.grid
            ]
            best = min(tried, key=lambda t: t.loss)
            self.outcomes[variant.name] = Outcome(variant, best.choice, [best.run] if best.run else [], tried)
        for variant in plain:
            self._all_seeds(variant, self.outcomes[variant.name], others)
        for variant in self.twins.variants[len(plain) :]:
            self._longer(variant)
        return list(self.outcomes.values())

    def _refuse_early(self, variants: list[Variant]) -> None:
        """Raise what a variant's run would raise at its start, before hours have gone into the others."""
        known = set()
        for variant in variants:
            if all(_ended(self._place(variant, choice, self.twins.seeds[0])) for choice in variant.grid):
                continue  # it did start
            for run in map(variant.chosen, variant.grid):
                asked = repr(
                    (run.recipe, run.optimizer.name, run.optimizer.rates, run.model, run.micro_batch, run.parallel)
                )
                if asked in known:
                    continue
                known.add(asked)
                try:
                    dry_run(run)
                except LrcompileError as error:
                    raise type(error)(f"variant {variant.name}: {error}") from error

    def _all_seeds(self, variant: Variant, outcome: Outcome, seeds: list[int]) -> None:
        if not outcome.runs:
            return  # every rate diverged
        for seed in seeds:
            self._add(outcome, variant.chosen(outcome.choice), seed)

    def _longer(self, variant: Variant) -> None:
        assert variant.like is not None and variant.budget is not None
        like, dense = self.outcomes[variant.like], best_dense(list(self.outcomes.values()))
        outcome = self.outcomes[variant.name] = Outcome(variant, like.choice)
        if not (like.runs and dense.runs):
            return
        for seed in self.twins.seeds:
            run = like.variant.chosen(like.choice)
            # Once begun, a run keeps its steps: measured seconds are never twice the same.
            config = self._place(variant, like.choice, seed) / CONFIG
            if config.exists():
                steps = load_resolved(config).steps
            else:
                steps = round(run.steps * dense.cost(variant.budget) / like.cost(variant.budget))
            self._add(outcome, replace(run, steps=steps), seed)

    def _add(self, outcome: Outcome, run: Run, seed: int) -> None:
        done = self._train(outcome.variant, run, outcome.choice, seed)
        if done is None:
            outcome.diverged.append(seed)
        else:
            outcome.runs.append(done)

    def _place(self, variant: Variant, choice: Choice, seed: int) -> Path:
        return self.out / variant.name / label(choice) / f"seed{seed}"

    def _train(self, variant: Variant, run: Run, choice: Choice, seed: int) -> History | None:
        """One run to its end, from where it is; None where it diverged."""
        place = self._place(variant, choice, seed)
        run = replace(run, seed=seed, out=str(place), save=replace(run.save, keep=1, merged=False))
        if _ended(place) is None:
            print(f"{variant.name}, {label(choice)}, seed {seed}: {place}", file=sys.stderr)
        _same(run, place)
        if _ended(place) is None:
            try:
                train(run, resume=(place / CONFIG).exists())
            except TrainError:
                if _ended(place) != "stopped":
                    raise
            finally:
                if run.parallel.compile:  # every run compiles the same code for other weights: so many would be refused
                    torch.compiler.reset()
                gc.collect()
        ended = _ended(place)
        if ended is None:
            raise TrainError(f"stopped at {place}; the same command goes on there")
        shutil.rmtree(place / CHECKPOINTS, ignore_errors=True)
        return None if ended == "stopped" else history.read(place, f"{variant.name}, seed {seed}")


def _ended(place: Path) -> str | None:
    """ "finished", "stopped" by a loss that isn't finite, or None: there is still something to do."""
    log = place / lines.NAME
    if not log.is_file():
        return None
    told = [str(e.get("text", "")) for e in lines.entries(log) if e["kind"] == "event"]
    if told and told[-1].startswith("finished"):
        return "finished"
    return "stopped" if told and told[-1].startswith("stopped at step") else None


def _same(told: Run, place: Path) -> None:
    """Raise TrainError where a run of other settings lies in the place."""
    if not (config := place / CONFIG).exists():
        return
    was, now = (
        {k: v for k, v in settings(r).items() if k not in _FREE and k.partition(".")[0] not in _FREE}
        for r in (load_resolved(config), told)
    )
    if other := [f"{name} was {was[name]}, is {now[name]}" for name in now if was[name] != now[name]]:
        raise TrainError(f"{place} is of another comparison: {'; '.join(other)}. Give another --out, or remove it")
