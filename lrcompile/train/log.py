"""The log of a run: metrics.jsonl always, a live display or plain lines, TensorBoard where asked.

Every line of metrics.jsonl has a "kind" and the "step" it belongs to, the number of optimizer steps done (the first
line of training says 1):

    {"kind": "step", "step": 12, "loss": ..., "lr": ..., "grad_norm": ..., "tokens_per_s": ..., "mfu": ..., "mfu_dense": ...,
     "memory": bytes, "seconds": of this step, "tokens": so far, "cold": true where it compiled}
    {"kind": "eval", "step": 12, "loss": held-out, ...}
    {"kind": "sample", "step": 12, "prompt": ..., "text": ...}
    {"kind": "event", "step": 12, "time": ISO 8601, "text": "start", "parameters": ..., ...}

These names are what the display and `lrcompile report` know; others are kept and travel along. How floats are written
stands in lines.py. Where a write fails (a full disk) the run is told by a TrainError; a terminal that goes away is no
reason to stop: the display ends and the log says so.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from lrcompile.errors import MissingLibraryError, TrainError
from lrcompile.train import lines
from lrcompile.train.display import Display, display


class RunLog:
    """What one run tells. On ranks other than 0 every method does nothing.

    Usable as a context manager; closes itself at exit too, so that an exception leaves the terminal as it was.
    """

    def __init__(
        self,
        dir: str | Path,
        *,
        live: bool,
        tensorboard: bool,
        rank: int,
        steps: int,
        resume_step: int = 0,
        every: int = 1,
        console: Console | None = None,
    ) -> None:
        """Open the log; on resume cut it back to the step resumed from.

        Args:
            dir: of the run; made if missing.
            live: a panel that updates in place, where stdout is a terminal. Else plain lines.
            tensorboard: write dir/tensorboard too.
            rank: of this process; only 0 logs.
            steps: of the whole run, for the time left.
            resume_step: steps that the checkpoint had done. Lines of later steps are dropped, so that none appears twice;
                an event says how many. 0: the run begins anew, and so does its log.
            every: steps from one plain line to the next; 0: no lines. The panel and the files take every step.
            console: to print on (default: stdout).

        Raises:
            TrainError: the directory can't be written, or its metrics.jsonl has a line that can't be read.
            MissingLibraryError: TensorBoard is asked for and not installed.
        """
        self._rank = rank
        self._last = resume_step
        self._file: Any = None
        self._board: Any = None
        self._display: Display | None = None
        if rank != 0:
            return
        self._dir = Path(dir)
        writer = _board_writer() if tensorboard else None
        path = self._dir / lines.NAME
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            kept, dropped, reached = lines.truncate(path, resume_step)
            # Unbuffered: a line is one write to the system, whole in the file when step() returns, whatever kills us next.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise TrainError(f"can't log to {path}: {error.strerror}") from error
        if writer is not None:
            # What TensorBoard already shows of the steps that will be taken again is hidden.
            purge = resume_step + 1 if resume_step else 0
            self._board = writer(log_dir=str(self._dir / "tensorboard"), purge_step=purge)
        self._display = display(self._dir.name, steps, resume_step, live, every, console)
        atexit.register(self.close)
        self._tell_resumed(resume_step, kept, dropped, reached)

    def _tell_resumed(self, step: int, kept: int, dropped: int, reached: int) -> None:
        if step and reached < step:
            self.event(f"the log ends at step {reached}, the checkpoint at {step}: the steps between are not in it")
        if step:
            self.event(f"resumed from step {step}; {_lines(dropped)} of later steps dropped")
        elif dropped:
            self.event(f"begun anew; {_lines(dropped)} of an earlier start dropped")

    # --- what a run tells ---------------------------------------------------------------------------------------------

    def step(self, step: int, **metrics: Any) -> None:
        """One optimizer step.

        Args:
            step: steps done, this one included; above the last one told.
            metrics: numbers by name; None where one isn't known (mfu without a known peak). Those that are shown: loss, lr,
                grad_norm, tokens_per_s, mfu, mfu_dense, memory (bytes), seconds, tokens, cold.

        Raises:
            TrainError: the step was told before, or the line can't be written.
        """
        if self._rank:
            return
        if step <= self._last:
            raise TrainError(f"step {step} is in the log already, which stands at {self._last}")
        self._last = step
        metrics = {name: lines.scalar(value) for name, value in metrics.items()}
        self._write({"kind": "step", "step": step, **metrics})
        if self._board is not None:
            self._scalars("train", step, metrics)
        self._show("step", step, metrics)

    def evaluation(self, step: int, **metrics: Any) -> None:
        """Held-out figures after a step; `loss` is the one that is shown and compared."""
        if self._rank:
            return
        metrics = {name: lines.scalar(value) for name, value in metrics.items()}
        self._write({"kind": "eval", "step": step, **metrics})
        if self._board is not None:
            self._scalars("eval", step, metrics)
        self._show("evaluation", step, metrics)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """What the model makes of a prompt; `text` is what follows it."""
        if self._rank:
            return
        self._write({"kind": "sample", "step": step, "prompt": prompt, "text": text})
        if self._board is not None:
            self._board.add_text("sample", _indented(prompt + text), step)
        self._show("sample", step, prompt, text)

    def event(self, text: str, **facts: Any) -> None:
        """Something that happened, after the last step told. "start" carries facts of the run (`parameters`, device, ...)."""
        if self._rank:
            return
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._write({"kind": "event", "step": self._last, "time": now, "text": text, **facts})
        if self._board is not None:
            self._board.add_text("event", _indented(text), self._last)
        self._show("event", self._last, text)

    def close(self) -> None:
        """Leave the terminal and the files as they should be; safe to call twice."""
        if self._rank:
            return
        atexit.unregister(self.close)
        try:
            self._end_display()
        finally:
            board, self._board = self._board, None
            if board is not None:
                board.close()
            if self._file is not None:
                self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- where it goes ------------------------------------------------------------------------------------------------

    def _write(self, entry: dict[str, Any]) -> None:
        if self._file is None or self._file.closed:
            raise TrainError(f"the log {self._dir / lines.NAME} is closed")
        line = lines.encode(entry)
        try:
            written = self._file.write(line)
        except OSError as error:
            self._file.close()
            raise TrainError(f"can't write {self._dir / lines.NAME}: {error.strerror}") from error
        if written != len(line):
            # The half line must stay the last one: resuming drops it, and would refuse it in the middle.
            self._file.close()
            raise TrainError(f"can't write {self._dir / lines.NAME}: the disk is full")

    def _scalars(self, group: str, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._board.add_scalar(f"{group}/{name}", value, step)

    def _show(self, what: str, *told: Any) -> None:
        if self._display is None:
            return
        try:
            getattr(self._display, what)(*told)
        except OSError as error:
            self._end_display()
            self.event(f"nothing more is displayed: {error.strerror}")

    def _end_display(self) -> None:
        shown, self._display = self._display, None
        if shown is not None:
            with contextlib.suppress(OSError):  # the terminal is gone: there is nothing left to restore
                shown.close()


def _board_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingLibraryError("log.tensorboard needs tensorboard: pip install 'lrcompile[train]'") from error
    return SummaryWriter


def _indented(text: str) -> str:
    """TensorBoard reads Markdown; an indented block is shown as it is."""
    return "\n".join("    " + line for line in text.split("\n"))


def _lines(n: int) -> str:
    return f"{n} line" if n == 1 else f"{n} lines"
