"""What a comparison of twins came to: numbers, one table, one picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from lrcompile.bench.twins import Choice, Variant, label
from lrcompile.files import commit
from lrcompile.show import as_text
from lrcompile.train.build import build
from lrcompile.train.figure import Band, bands
from lrcompile.train.history import History
from lrcompile.words import count

AXES = ("tokens", "flops", "seconds")
_NAMES = {"flops": "FLOPs"}


@dataclass
class Tried:
    """One choice of the grid, on the first seed.

    Attributes:
        run: None where it diverged.
    """

    choice: Choice
    run: History | None

    @property
    def loss(self) -> float:
        return math.inf if self.run is None else last_loss(self.run)


@dataclass
class Outcome:
    """One variant.

    Attributes:
        choice: of its grid, the best.
        runs: a seed each, at that choice.
        tried: every choice, on the first seed.
        diverged: seeds whose loss wasn't finite.
    """

    variant: Variant
    choice: Choice
    runs: list[History] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    diverged: list[int] = field(default_factory=list)

    @property
    def losses(self) -> dict[int, float]:
        """Held-out loss at the end, by seed."""
        return {seed_of(run): last_loss(run) for run in self.runs}

    @property
    def mean(self) -> float:
        """Of the held-out losses at the end, in nats a token; infinite where a seed diverged."""
        return statistics.fmean(self.losses.values()) if self.runs and not self.diverged else math.inf

    @property
    def at_edge(self) -> bool:
        """Whether the best choice is the lowest or highest of a grid: a better one may lie outside."""
        return any(
            len(values) > 1 and self.choice[name] in (min(values), max(values))
            for name, values in ((n, {t.choice[n] for t in self.tried}) for n in self.choice)
            if all(isinstance(v, (int, float)) for v in values)
        )

    def step(self, axis: str) -> float:
        """Tokens, FLOPs or seconds of one step. Seconds: the median over all steps of all seeds, so that what else the
        machine did counts little; evaluations, checkpoints and compilation aside."""
        tokens = self.runs[0].tokens[-1] / self.runs[0].step[-1]
        if axis == "seconds":
            return float(np.median(np.concatenate([run.columns["seconds"][run.warm] for run in self.runs])))
        return float(tokens) * (float(self.runs[0].facts["flops_per_token"]) if axis == "flops" else 1.0)

    def cost(self, axis: str) -> float:
        """Of a whole run."""
        return self.step(axis) * float(self.runs[0].step[-1])


def last_loss(run: History) -> float:
    """Held-out loss at the end of a run."""
    return float(run.held_out[-1, 1])


def seed_of(run: History) -> int:
    return int(run.path.name.removeprefix("seed"))


def best_dense(outcomes: Sequence[Outcome]) -> Outcome:
    """The dense twin that the others are measured by: the one with the lowest mean."""
    return min((o for o in outcomes if o.variant.dense), key=lambda o: o.mean)


def gaps(outcome: Outcome, dense: Outcome) -> list[float]:
    """Loss above the dense twin's of the same seed, for every seed that both have."""
    theirs = dense.losses
    return [loss - theirs[seed] for seed, loss in outcome.losses.items() if seed in theirs]


def compression(variant: Variant) -> float | None:
    """Numbers in the dense linear weights over those left; None of a dense variant."""
    run = variant.run
    if run.recipe.dense:
        return None
    built = build(run.model.source, run.recipe.make(), dtype=getattr(torch, run.model.dtype), length=run.data.length)
    assert built.plan is not None
    return float(built.plan.asked_compression)


def told(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Everything as JSON holds it, a row a variant."""
    dense = best_dense(outcomes)
    return [_row(outcome, dense) for outcome in outcomes]


def _row(outcome: Outcome, dense: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {
        "variant": outcome.variant.name,
        "like": outcome.variant.like,
        "budget": outcome.variant.budget or "tokens",
        "dense": outcome.variant.dense,
        "reference": outcome is dense,
        "choice": outcome.choice,
        "tried": [{"choice": t.choice, "loss": t.loss if t.run else None} for t in outcome.tried],
        "at_edge": outcome.at_edge,
        "diverged": outcome.diverged,
        "losses": {str(seed): loss for seed, loss in outcome.losses.items()},
    }
    if not outcome.runs:
        return row
    row |= {axis: outcome.cost(axis) for axis in AXES}
    row |= {
        "steps": int(outcome.runs[0].step[-1]),
        "parameters": outcome.runs[0].facts["parameters"],
        "compression": compression(outcome.variant),
        "mean": statistics.fmean(outcome.losses.values()),
        "gaps": gaps(outcome, dense),
        "curves": {str(seed_of(run)): run.held_out.tolist() for run in outcome.runs},
        "device": outcome.runs[0].facts["device"],
    }
    return row


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A row a variant; those at equal tokens first.

    Args:
        rows: what `told` gives.
    """
    dense = next(row for row in rows if row["reference"])
    shown = Table(box=box.HORIZONTALS, show_edge=False, pad_edge=False, header_style="bold")
    shown.caption = (
        f"held-out loss at the end, nats a token; gap: above {dense['variant']} of the same seed; mean ± standard deviation "
        "over seeds. * the best of a grid's edge: a wider grid may find better"
    )
    heads = ("variant", "budget", "chosen", "seeds", "loss", "gap", "steps", "FLOPs", "s/step", "parameters", "linear")
    for head in heads:
        shown.add_column(head, justify="left" if head in heads[:3] else "right", overflow="fold")
    for row in rows:
        chosen = label(row["choice"]).replace("optimizer.", "") + ("*" if row["at_edge"] else "")
        if not row["losses"]:
            shown.add_row(row["variant"], row["budget"], "every choice diverged", *["–"] * 8)
            continue
        shown.add_row(
            row["variant"],
            f"equal {_NAMES.get(row['budget'], row['budget'])}",
            chosen,
            f"{len(row['losses'])}" + (f", {len(row['diverged'])} diverged" if row["diverged"] else ""),
            spread(list(row["losses"].values())),
            "" if row is dense else spread(row["gaps"], "+"),
            f"{row['steps']:,}",
            count(row["flops"]),
            f"{row['seconds'] / row['steps']:.3f}",
            count(row["parameters"]),
            f"{row['compression']:.2f}x" if row["compression"] else "dense",
        )
    return shown


def spread(values: Sequence[float], sign: str = "") -> str:
    """ "4.6123 ± 0.0040"; of one value no spread is known."""
    if not values:
        return "–"
    text = f"{statistics.fmean(values):{sign}.4f}"
    return f"{text} ± {statistics.stdev(values):.4f}" if len(values) > 1 else text


def write(outcomes: Sequence[Outcome], rows: Sequence[dict[str, Any]], out: Path, command: str) -> list[Path]:
    """quality.json, quality.md and quality.png in `out`."""
    text = as_text(table(rows), 160).rstrip()
    files = {
        "quality.json": (json.dumps({"command": command, "variants": rows}, indent=1) + "\n").encode(),
        "quality.md": f"```\n{text}\n```\n\nAgain: `{command}`\n\n![held-out losses](quality.png)\n".encode(),
        "quality.png": bands([_band(o) for o in outcomes if o.runs], AXES),
    }
    for name, content in files.items():
        commit(out / name, content)
    return [out / name for name in files]


def _band(outcome: Outcome) -> Band:
    steps = outcome.runs[0].held_out[:, 0]
    # A seed that was evaluated elsewhere (it was stopped by hand) has no place in the mean.
    losses = np.array([r.held_out[:, 1] for r in outcome.runs if np.array_equal(r.held_out[:, 0], steps)])
    return Band(outcome.variant.name, {axis: steps * outcome.step(axis) for axis in AXES}, losses)
