"""What a run shows while it trains: a panel that updates in place on a terminal, plain lines elsewhere.

The panel is drawn by the training loop's own thread, when a step is told: no thread that could hold a lock at exit or be
torn in a fork. It is drawn at most four times a second, and less where drawing is slow: it takes at most half a percent
of the time.
"""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lrcompile.words import count, size

_BARS = "▁▂▃▄▅▆▇█"
_REFRESH_SECONDS = 0.25
_SHARE = 0.005  # of the time that may go into drawing
_COLUMNS = 100


class Screen(Console):
    """A console that tells of a pipe whose reader left, where rich's own would end the program."""

    def on_broken_pipe(self) -> None:
        raise  # called where the BrokenPipeError is caught


class Display(Protocol):
    """Where a RunLog shows things."""

    def step(self, step: int, metrics: dict[str, Any]) -> None: ...

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None: ...

    def sample(self, step: int, prompt: str, text: str) -> None: ...

    def event(self, step: int, text: str) -> None: ...

    def close(self) -> None: ...


def display(title: str, steps: int, first: int, live: bool, every: int, console: Console | None) -> Display:
    """The panel where it is asked for and stdout is a terminal that can move its cursor and draw; else plain lines."""
    console = console or Screen()
    # ascii_only: an encoding that is no UTF, in which bars and a sample's text would end the run.
    if live and console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only:
        return Panelled(title, steps, first, console)
    return Plain(steps, first, every, console)


# --- words ------------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """In one line, with what could move a terminal's cursor (an untrained model may well write escapes) taken out."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def clock(seconds: float | None) -> str:
    """3725 -> "1:02:05"; "–" for what isn't known."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, s = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    start = f"{days} d " if days else ""
    return f"{start}{hours}:{minutes:02}:{s:02}" if days or hours else f"{minutes}:{s:02}"


def figures(metrics: dict[str, Any]) -> dict[str, str]:
    """The metrics that are shown, as words, by what they are called there; those not known are left out."""
    said: dict[str, str] = {}
    for key, name, write in (
        ("loss", "loss", lambda x: f"{x:.4f}"),
        ("lr", "lr", lambda x: f"{x:.2e}"),
        ("grad_norm", "grad norm", lambda x: f"{x:.3g}"),
        ("tokens_per_s", "tokens/s", count),
        ("mfu", "MFU", lambda x: f"{x:.1%}"),
        ("mfu_dense", "dense-equivalent", lambda x: f"{x:.1%}"),
        ("memory", "memory", size),
        ("tokens", "tokens", count),
    ):
        value = metrics.get(key)
        if value is not None:
            said[name] = write(float(value)) if math.isfinite(value) else str(float(value))
    return said


class TimeLeft:
    """Seconds until the last step, by the mean of the steps since the last one that compiled, evaluations included."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._start: tuple[int, float] | None = None
        self._now = (0, 0.0)

    def step(self, step: int, cold: bool) -> None:
        self._now = (step, time.monotonic())
        if cold or self._start is None:
            self._start = self._now

    @property
    def seconds(self) -> float | None:
        """None before there is a step to judge by."""
        if self._start is None or self._now[0] <= self._start[0]:
            return None
        done = self._now[0] - self._start[0]
        return (self._now[1] - self._start[1]) / done * max(0, self._steps - self._now[0])


class Curve:
    """A curve of bounded memory: neighbours are averaged as it grows, and bars drawn of it."""

    def __init__(self, width: int = 60) -> None:
        self._width, self._per = width, 1
        self._means: list[float] = []
        self._sum, self._n = 0.0, 0

    def add(self, value: float) -> None:
        """One more value; what is not finite leaves no mark."""
        if not math.isfinite(value):
            return
        self._sum, self._n = self._sum + value, self._n + 1
        if self._n == self._per:
            self._means.append(self._sum / self._n)
            self._sum, self._n = 0.0, 0
            if len(self._means) == 2 * self._width:
                self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
                self._per *= 2

    def bars(self, width: int) -> str:
        """The last of it in at most so many characters, from its least to its greatest value."""
        means = self._means
        if len(means) > width:
            edges = [round(i * len(means) / width) for i in range(width + 1)]
            means = [sum(means[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
        if not means:
            return ""
        low, high = min(means), max(means)
        scale = 7.999 / (high - low) if high > low else 0.0
        return "".join(_BARS[int((value - low) * scale)] for value in means)


# --- the two of them --------------------------------------------------------------------------------------------------


class Plain:
    """A line of about 100 columns every so many steps, for files and pipes."""

    def __init__(self, steps: int, first: int, every: int, console: Console) -> None:
        self._out, self._steps, self._every = console.file, steps, every
        self._left = TimeLeft(steps)
        self._first = first + 1
        self._encoding = getattr(self._out, "encoding", None) or "utf-8"

    def _print(self, text: str) -> None:
        if self._every:
            self._out.write(text.encode(self._encoding, "replace").decode(self._encoding) + "\n")
            self._out.flush()

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        self._left.step(step, bool(metrics.get("cold")))
        if not self._every or (step % self._every and step not in (self._first, self._steps)):
            return
        said = figures(metrics)
        parts = [f"step {step:>{len(str(self._steps))}}/{self._steps}"]
        for name, short in (
            ("loss", "loss"),
            ("lr", "lr"),
            ("grad norm", "grad"),
            ("tokens/s", "tok/s"),
            ("MFU", "mfu"),
        ):
            if name in said:
                parts.append(f"{said[name]} {short}" if name == "tokens/s" else f"{short} {said[name]}")
        if "dense-equivalent" in said:
            parts[-1] += f" ({said['dense-equivalent']} dense)"
        parts += [said["memory"]] if "memory" in said else []
        self._print("  ".join([*parts, f"left {clock(self._left.seconds)}"]))

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        self._print(f"step {step}: held-out {_listed(metrics)}")

    def sample(self, step: int, prompt: str, text: str) -> None:
        line = printable(f"step {step}: {prompt}▸{text}")
        self._print(line if len(line) <= _COLUMNS else line[: _COLUMNS - 1] + "…")

    def event(self, step: int, text: str) -> None:
        self._print(f"step {step}: {printable(text)}")

    def close(self) -> None:
        pass


class Panelled:
    """A panel: progress, the current figures, the loss so far, the last evaluation and sample."""

    def __init__(self, title: str, steps: int, first: int, console: Console) -> None:
        self._title, self._steps, self._done = title, steps, first
        self._metrics: dict[str, Any] = {}
        self._evaluated = self._sampled = ""
        self._left, self._loss = TimeLeft(steps), Curve()
        self._next = 0.0
        self._console = console
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._panel)
        self._live.start()
        # A process that is killed can't give the cursor back: it is never taken.
        console.show_cursor(True)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        self._done, self._metrics = step, metrics
        self._left.step(step, bool(metrics.get("cold")))
        if (loss := metrics.get("loss")) is not None:
            self._loss.add(float(loss))
        self._refresh()

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        self._evaluated = f"step {step}: {_listed(metrics)}"
        self._refresh()

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._sampled = printable(f"{prompt}▸{text}")
        self._refresh()

    def event(self, step: int, text: str) -> None:
        self._console.print(Text(f"step {step}: {printable(text)}"))

    def close(self) -> None:
        # Where an exception is on its way up, Live prints the panel a last time, and the traceback follows beneath.
        self._live.stop()

    def _refresh(self) -> None:
        now = time.perf_counter()
        if now >= self._next:
            self._live.refresh()
            done = time.perf_counter()
            self._next = done + max(_REFRESH_SECONDS, (done - now) / _SHARE)

    def _panel(self) -> RenderableType:
        # The right end is kept free: a line that fills the terminal wraps, and the next panel is drawn one line too low.
        width = min(self._console.width - 1, _COLUMNS)
        inner = width - 4
        progress = Table.grid(padding=(0, 1), expand=False)
        share = self._done / self._steps if self._steps else 0.0
        said = f"{self._done:,}/{self._steps:,} steps  {share:.0%}  left {clock(self._left.seconds)}"
        bar = ProgressBar(total=max(1, self._steps), completed=self._done, width=max(10, inner - len(said) - 1))
        progress.add_row(bar, Text(said, style="bold"))
        rows: list[RenderableType] = [progress, self._figures(inner)]
        if bars := self._loss.bars(max(10, inner - 7)):
            rows.append(Text.assemble(("loss   ", "dim"), (bars, "green")))
        for name, text in (("eval   ", self._evaluated), ("sample ", self._sampled)):
            if text:
                line = Text.assemble((name, "dim"), text, no_wrap=True)
                line.truncate(inner, overflow="ellipsis")
                rows.append(line)
        return Panel(
            Group(*rows), title=Text(printable(self._title)), title_align="left", width=width, border_style="cyan"
        )

    def _figures(self, width: int) -> Text:
        """Name and figure in columns, as many a line as there is room for."""
        cell = 23
        per_line = max(1, width // cell)
        text = Text(no_wrap=True)
        for i, (name, said) in enumerate(figures(self._metrics).items()):
            if i and i % per_line == 0:
                text.append("\n")
            name = "(dense)" if name == "dense-equivalent" else name
            text.append(f"{name:<10}", style="dim")
            text.append(f"{said:<{cell - 10}}", style="bold" if name == "loss" else "")
        return text


def _listed(metrics: dict[str, Any]) -> str:
    shown = ((key, value) for key, value in metrics.items() if isinstance(value, (int, float)))
    return "  ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value:,}" for key, value in shown)
