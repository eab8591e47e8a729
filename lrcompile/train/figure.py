"""The curves of runs as one picture, by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrcompile.errors import MissingLibraryError
from lrcompile.train.history import History, smooth
from lrcompile.words import count

# Okabe and Ito's palette (jfly.uni-koeln.de/color): told apart by colour-blind eyes too. Black and yellow are left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_INK, _SOFT, _GRID = "#1d2129", "#667085", "#e3e6ec"
_MOST_POINTS = 4000  # of a curve; the picture has fewer columns of dots than that
_STYLE: Any = {  # matplotlib types the keys one by one
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": _INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
}


def png(runs: Sequence[History]) -> bytes:
    """Losses against steps, tokens and seconds; gradient norm, learning rate and tokens/s against steps.

    Raises:
        MissingLibraryError: matplotlib isn't installed.
    """
    with _picture(13.5, 7.4) as (figure, out):
        axes = figure.subplots(2, 3)
        for place, (axis, label) in zip(
            axes[0], (("step", "steps"), ("tokens", "tokens"), ("seconds", "seconds")), strict=True
        ):
            _losses(place, runs, axis)
            place.set(title=f"loss by {label}", xlabel=_under(label), ylabel="nats a token")
        _curves(axes[1][0], runs, "grad_norm", "gradient norm")
        _curves(axes[1][1], runs, "lr", "learning rate")
        _curves(axes[1][2], runs, "tokens_per_s", "tokens/s")
        _legend(figure, runs)
    return out.getvalue()


@dataclass(frozen=True)
class Band:
    """Held-out losses of one model over several seeds.

    Attributes:
        name: in the legend.
        places: axis -> (m,) where the evaluations lie on it.
        losses: (seeds, m).
    """

    name: str
    places: Mapping[str, np.ndarray]
    losses: np.ndarray


def bands(models: Sequence[Band], axes: Sequence[str]) -> bytes:
    """Held-out losses against each axis: the mean over seeds, and all of them as a band.

    Raises:
        MissingLibraryError: matplotlib isn't installed.
    """
    with _picture(4.5 * len(axes), 4.2) as (figure, out):
        later = [band.losses[:, band.losses.shape[1] // 4 :] for band in models]
        low, high = min(x.min() for x in later), max(x.max() for x in later)
        margin = 0.08 * (high - low) or 0.1
        places = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for place, axis in zip(places, axes, strict=True):
            for i, band in enumerate(models):
                style = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _dash(i)}
                x, mean = band.places[axis], band.losses.mean(0)
                place.plot(x, mean, linewidth=1.6, **style)
                place.fill_between(
                    x, band.losses.min(0), band.losses.max(0), color=style["color"], alpha=0.15, linewidth=0
                )
                place.plot(x[-1:], mean[-1:], color=style["color"], marker="o", markersize=5, markeredgecolor="white")
            label = {"flops": "FLOPs"}.get(axis, axis)
            place.set(title=f"held-out loss by {label}", xlabel=_under(label), ylim=(low - margin, high + margin))
            _finish(place)
        places[0].set_ylabel("nats a token")
        handles = [place.lines[2 * i] for i in range(len(models))]
        names = [band.name.replace("$", r"\$") for band in models]
        figure.legend(handles, names, loc="outside upper left", ncols=min(6, len(names)), frameon=False, fontsize=9.5)
    return out.getvalue()


@contextmanager
def _picture(width: float, height: float) -> Iterator[tuple[Any, io.BytesIO]]:
    """An empty figure, in inches, and where it is saved to once it is drawn."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingLibraryError("the picture needs matplotlib: pip install 'lrcompile[train]'") from error
    out = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure: Any = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        yield figure, out
        figure.savefig(out, format="png", dpi=130)


def _under(label: str) -> str:
    return "seconds of training, compilation and evaluation aside" if label == "seconds" else label


def _losses(axes: Any, runs: Sequence[History], axis: str) -> None:
    for i, run in enumerate(runs):
        colour, loss = _COLOURS[i % len(_COLOURS)], run.columns["loss"]
        x = run.at(run.step, axis)
        if not np.isfinite(x).any():
            continue
        axes.plot(*_thin(x, _finite(loss)), color=colour, alpha=0.22, linewidth=0.7)
        axes.plot(*_thin(x, smooth(loss)), color=colour, linewidth=1.6, linestyle=_dash(i))
        if len(run.held_out):
            there = run.at(run.held_out[:, 0], axis), run.held_out[:, 1]
            axes.plot(*there, color=colour, linewidth=0.9, linestyle=":")
            axes.plot(
                *there,
                color=colour,
                linestyle="",
                marker="o",
                markersize=4,
                markeredgecolor="white",
                markeredgewidth=0.6,
            )
        if run.bad_steps.size:
            there = run.at(run.bad_steps, axis), np.full(run.bad_steps.size, 0.03)
            axes.plot(
                *there, color=colour, linestyle="", marker="x", markersize=5, transform=axes.get_xaxis_transform()
            )
    axes.set_ylim(*_loss_limits(runs))
    _finish(axes)


def _loss_limits(runs: Sequence[History]) -> tuple[float | None, float | None]:
    """From the least to where the smoothed curves stand after a tenth of the steps: the fall of the first steps would
    press everything else flat."""
    lows, highs = [], []
    for run in runs:
        curve = smooth(run.columns["loss"])
        later = curve[len(curve) // 10 :]
        lows += [np.nanmin(curve)] if np.isfinite(curve).any() else []
        highs += [np.nanmax(later)] if np.isfinite(later).any() else []
        lows += run.held_out[:, 1].min(keepdims=True).tolist() if len(run.held_out) else []
    if not lows or not highs:
        return None, None
    low, high = min(lows), max(highs)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _curves(axes: Any, runs: Sequence[History], name: str, title: str) -> None:
    least, most = math.inf, 0.0
    for i, run in enumerate(runs):
        colour, values = _COLOURS[i % len(_COLOURS)], _finite(run.columns[name])
        if name == "tokens_per_s":
            values = np.where(run.warm, values, np.nan)
        if not np.isfinite(values).any():
            continue
        if name != "lr":
            axes.plot(*_thin(run.step, values), color=colour, alpha=0.22, linewidth=0.7)
            values = smooth(values)
        # Schedules are often the same: a line that is covered shows on both sides of the one above it.
        width = 1.6 + (1.3 * (len(runs) - 1 - i) if name == "lr" else 0.0)
        axes.plot(*_thin(run.step, values), color=colour, linewidth=width, linestyle=_dash(i))
        least, most = min(least, float(np.nanmin(values))), max(most, float(np.nanmax(values)))
    if name == "grad_norm" and 0 < least * 5 < most:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if most < 30 * least and f"{y:.0e}"[0] in "25" else "")
        axes.set_ylim(least / 1.6, most * 1.6)
    elif name != "grad_norm" and most:
        axes.set_ylim(0, most * 1.1)
    if name == "tokens_per_s":
        axes.yaxis.set_major_formatter(lambda y, _: count(y) if y >= 10 else f"{y:g}")
    axes.set(title=title, xlabel="steps")
    _finish(axes)


def _finish(axes: Any) -> None:
    if not axes.lines:
        axes.text(0.5, 0.5, "not in the log", transform=axes.transAxes, ha="center", color=_SOFT)
        axes.set(xticks=[], yticks=[])
        return
    axes.margins(x=0.01)
    axes.xaxis.set_major_formatter(lambda x, _: count(x) if abs(x) >= 1000 else f"{x:g}")


def _legend(figure: Any, runs: Sequence[History]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_COLOURS[i % len(_COLOURS)], linewidth=2.2, linestyle=_dash(i), label=run.name)
        for i, run in enumerate(runs)
    ]
    handles.append(Line2D([], [], color=_SOFT, linewidth=1.6, label="training, smoothed"))
    if any(len(run.held_out) for run in runs):
        handles.append(
            Line2D([], [], color=_SOFT, linewidth=0.9, linestyle=":", marker="o", markersize=4, label="held-out")
        )
    if any(run.bad_steps.size for run in runs):
        handles.append(Line2D([], [], color=_SOFT, linestyle="", marker="x", markersize=5, label="not finite"))
    for handle in handles:
        # What stands between dollar signs would be read as mathematics, and a name that starts with _ left out.
        handle.set_label(str(handle.get_label()).replace("$", r"\$"))
    labels = [str(handle.get_label()) for handle in handles]
    figure.legend(handles, labels, loc="outside upper left", ncols=min(6, len(handles)), frameon=False, fontsize=9.5)


def _dash(i: int) -> Any:
    """Colours come round again after six runs; the dashes tell them apart."""
    return ("-", "--", "-.")[i // len(_COLOURS) % 3]


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every so many points, the last one among them."""
    stride = -(-len(x) // _MOST_POINTS)
    pick = np.arange(len(x) - 1, -1, -stride)[::-1]
    return x[pick], y[pick]
