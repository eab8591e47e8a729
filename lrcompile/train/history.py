"""What a run told, read back from its directory and laid beside others: the numbers behind `lrcompile report`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.errors import TrainError
from lrcompile.train import lines
from lrcompile.words import count, size

COLUMNS = ("loss", "lr", "grad_norm", "tokens_per_s", "seconds", "tokens", "memory", "mfu", "mfu_dense")
LAST = 20  # steps whose mean is called the final training loss: one step's loss is noise


@dataclass
class History:
    """One run.

    Attributes:
        path: its directory.
        name: what it is called in a legend.
        step: (n,) int64, the steps in the log.
        columns: name -> (n,) float64, NaN where a step didn't tell it.
        cold: (n,) bool, steps in which something was compiled.
        held_out: (m, 2) float64: step and held-out loss of every evaluation, the finite ones, in order of steps.
        bad_steps: (k,) int64: the steps whose loss was told and not finite.
        samples: the lines of kind "sample".
        events: the lines of kind "event".
        facts: of the last event called "start": parameters, device, ...
        config: file name and text of the resolved config; None where there is none.
    """

    path: Path
    name: str
    step: np.ndarray
    columns: dict[str, np.ndarray]
    cold: np.ndarray
    held_out: np.ndarray
    bad_steps: np.ndarray
    samples: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    config: tuple[str, str] | None = None

    @property
    def warm(self) -> np.ndarray:
        """(n,) bool: the steps whose timing counts; all of them where every one was cold."""
        return ~self.cold if (~self.cold).any() else np.ones_like(self.cold)

    @property
    def tokens(self) -> np.ndarray:
        """(n,) float64, trained on after each step; NaN where not told."""
        return self.columns["tokens"]

    @property
    def seconds(self) -> np.ndarray:
        """(n,) float64 of training after each step, evaluations and checkpoints left out; a step that compiled counts as
        one of median length."""
        seconds = self.columns["seconds"]
        known = seconds[self.warm & np.isfinite(seconds)]
        if not known.size:
            return np.full_like(seconds, np.nan)
        return np.cumsum(np.where(self.warm & np.isfinite(seconds), seconds, np.median(known)))

    def at(self, steps: np.ndarray, axis: str) -> np.ndarray:
        """Where steps lie on an axis: "step", "tokens" or "seconds". Step 0 lies at 0."""
        if axis == "step":
            return steps.astype(float)
        values = self.tokens if axis == "tokens" else self.seconds
        place = np.searchsorted(self.step, steps, side="right")
        return np.concatenate([[0.0], values])[place]

    def median(self, name: str) -> float:
        """Of a column over the warm steps; NaN where it was never told."""
        values = self.columns[name][self.warm]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if values.size else math.nan

    @property
    def final_loss(self) -> float:
        """Mean training loss of the last steps, those that are finite."""
        values = self.columns["loss"][-LAST:]
        values = values[np.isfinite(values)]
        return float(values.mean()) if values.size else math.nan

    def held_out_at(self, place: float, axis: str) -> float:
        """Held-out loss at a place of an axis, linear between the two nearest evaluations; NaN outside of them."""
        if not len(self.held_out):
            return math.nan
        x = self.at(self.held_out[:, 0], axis)
        if not np.isfinite(x).all() or not x[0] <= place <= x[-1]:
            return math.nan
        return float(np.interp(place, x, self.held_out[:, 1]))


def read(path: str | Path, name: str | None = None) -> History:
    """A run's log and config.

    Args:
        path: the run's directory.
        name: to call it by; default: the directory's.

    Raises:
        TrainError: there is no run, it has taken no step yet, or a line of its log can't be read.
    """
    path = Path(path)
    log = path / lines.NAME
    if not log.is_file():
        raise TrainError(_no_run(path))
    told: dict[str, list[dict[str, Any]]] = {"step": [], "eval": [], "sample": [], "event": []}
    for entry in lines.entries(log):
        told.setdefault(entry["kind"], []).append(entry)
    taken = told["step"]
    if not taken:
        raise TrainError(f"{log} has no steps yet: nothing to report")
    columns = {key: np.array([_number(e.get(key)) for e in taken]) for key in COLUMNS}
    steps = np.array([e["step"] for e in taken], dtype=np.int64)
    bad = np.array([e.get("loss") is not None for e in taken]) & ~np.isfinite(columns["loss"])
    # A resumed run may evaluate the step it resumed from again: the last word counts.
    losses = {e["step"]: _number(e.get("loss")) for e in told["eval"]}
    held_out = np.array([(s, x) for s, x in sorted(losses.items()) if math.isfinite(x)], dtype=float).reshape(-1, 2)
    starts = [e for e in told["event"] if e.get("text") == "start"]
    return History(
        path,
        name or path.resolve().name,
        steps,
        columns,
        np.array([bool(e.get("cold")) for e in taken]),
        held_out,
        steps[bad],
        told["sample"],
        told["event"],
        starts[-1] if starts else {},
        _config(path),
    )


def read_all(paths: Sequence[str | Path]) -> list[History]:
    """Several runs, each under a name of its own: of its directory, or as much of the path as tells them apart.

    Raises:
        TrainError: as `read`; or no run is given, or one twice.
    """
    if not paths:
        raise TrainError("no run to report on: give the directory of one, or of several")
    whole = [Path(p).resolve() for p in paths]
    for path in whole:
        if whole.count(path) > 1:
            raise TrainError(f"{path} is given twice")
    names = [path.name for path in whole]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in whole]
    return [read(path, name) for path, name in zip(paths, names, strict=True)]


def compare(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    """The rows of a table: what is compared, and each run's figure. Rows that no run has a figure for are left out.

    Held-out losses at equal tokens and at equal seconds are those where the run that got least far had its last
    evaluation; behind another run's figure stands its distance from the first run's.
    """
    rows: list[tuple[str, list[str]]] = [("steps", [f"{run.step[-1]:,}" for run in runs])]
    rows.append(("tokens", [_write(run.tokens[-1], count) for run in runs]))
    rows.append(("seconds of training", [_write(run.seconds[-1], lambda x: f"{x:,.1f}") for run in runs]))
    rows.append((f"training loss, last {LAST} steps", _gaps([run.final_loss for run in runs])))
    if any(run.bad_steps.size for run in runs):
        rows.append(("steps with a loss that isn't finite", [f"{run.bad_steps.size:,}" for run in runs]))
    evaluated = [run.held_out for run in runs if len(run.held_out)]
    rows.append(
        ("held-out loss, last", _gaps([run.held_out[-1, 1] if len(run.held_out) else math.nan for run in runs]))
    )
    rows.append(("held-out loss, lowest", _gaps([run.held_out[:, 1].min(initial=math.inf) for run in runs])))
    if len(evaluated) > 1:
        for axis, write in (("tokens", lambda x: f"{count(x)} tokens"), ("seconds", lambda x: f"{x:,.0f} s")):
            ends = [run.at(run.held_out[-1:, 0], axis)[0] for run in runs if len(run.held_out)]
            if all(map(math.isfinite, ends)):
                rows.append(
                    (f"held-out loss at {write(min(ends))}", _gaps([run.held_out_at(min(ends), axis) for run in runs]))
                )
    rows.append(("tokens/s, median", [_write(run.median("tokens_per_s"), count) for run in runs]))
    for label, key in (("MFU, median", "mfu"), ("MFU, dense-equivalent", "mfu_dense")):
        rows.append((label, [_write(run.median(key), lambda x: f"{x:.1%}") for run in runs]))
    peaks = [run.columns["memory"][np.isfinite(run.columns["memory"])].max(initial=-math.inf) for run in runs]
    rows.append(("peak memory", [_write(peak, size) for peak in peaks]))
    rows.append(("parameters", [_write(_number(run.facts.get("parameters")), lambda x: f"{x:,.0f}") for run in runs]))
    return [(label, cells) for label, cells in rows if any(cell != "–" for cell in cells)]


def smooth(values: np.ndarray) -> np.ndarray:
    """A mean over the neighbours on both sides, a fiftieth of the curve in all: it doesn't lag where the curve falls.

    Near the start, where curves are steep, fewer are taken, as many on one side as on the other; at the end those on the
    left alone. NaN where a value isn't finite; such values count in no mean.
    """
    n = len(values)
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    i = np.arange(n)
    half = np.minimum(i, n // 100)
    low, high = i - half, np.minimum(i + half + 1, n)
    out = np.full(n, np.nan)
    out[good] = (sums[high] - sums[low])[good] / (counts[high] - counts[low])[good]
    return out


def _gaps(values: Sequence[float]) -> list[str]:
    """Four digits; behind each but the first the distance from the first."""
    cells = [_write(x, lambda x: f"{x:.4f}") for x in values]
    for i, value in enumerate(values):
        if i and math.isfinite(value) and math.isfinite(values[0]):
            cells[i] += f" ({value - values[0]:+.4f})"
    return cells


def _write(value: float, write: Any) -> str:
    return str(write(float(value))) if math.isfinite(value) else "–"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _config(path: Path) -> tuple[str, str] | None:
    file = path / "config.json"
    if not file.is_file():
        return None
    try:
        return file.name, file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise TrainError(f"can't read {file}: {error.strerror}") from error


def _no_run(path: Path) -> str:
    if not path.exists():
        return f"no run {path}: there is no such directory"
    inside = sorted(p.parent.name for p in path.glob(f"*/{lines.NAME}")) if path.is_dir() else []
    more = f"; there are runs in it: {', '.join(inside[:8])}{', …' * (len(inside) > 8)}" if inside else ""
    return f"no run {path}: it has no {lines.NAME}{more}"
