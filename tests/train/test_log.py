"""The log of a run: what its lines hold, how resuming cuts it, what a kill, a full disk or a lost terminal leave."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from lrcompile.errors import MissingLibraryError, TrainError
from lrcompile.train import lines
from lrcompile.train.display import Curve, Panelled, Plain, Screen, clock, printable
from lrcompile.train.log import RunLog


def run_log(dir: Path, **options: Any) -> RunLog:
    defaults: dict[str, Any] = {"live": False, "tensorboard": False, "rank": 0, "steps": 100, "every": 0}
    return RunLog(dir, **{**defaults, **options})


def told(dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    return [e for e in lines.entries(dir / lines.NAME) if kind in (None, e["kind"])]


def bits(x: float) -> bytes:
    return struct.pack("<d", x)


# --- the lines --------------------------------------------------------------------------------------------------------


def test_a_line_of_each_kind(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        log.event("start", parameters=12, ranks=[4, 8])
        log.step(1, loss=2.5, mfu=None, cold=True)
        log.evaluation(1, loss=2.25)
        log.sample(1, "a", " b\u2028c\n")
        # In the file at once, whatever becomes of this process.
        start, *rest = [json.loads(line) for line in (tmp_path / lines.NAME).read_bytes().split(b"\n")[:-1]]
    assert {**start, "time": ""} == {
        **{"kind": "event", "step": 0, "time": "", "text": "start"},
        **{"parameters": 12, "ranks": [4, 8]},
    }
    assert rest == [
        {"kind": "step", "step": 1, "loss": 2.5, "mfu": None, "cold": True},
        {"kind": "eval", "step": 1, "loss": 2.25},
        {"kind": "sample", "step": 1, "prompt": "a", "text": " b\u2028c\n"},
    ]


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.nan, math.inf, -math.inf]
    values += np.frombuffer(rng.bytes(8 * 500), dtype=np.float64)[:500].tolist()
    with run_log(tmp_path) as log:
        for i, value in enumerate(values):
            log.step(i + 1, loss=value)
    back = [e["loss"] for e in told(tmp_path, "step")]
    for value, found in zip(values, back, strict=True):
        assert math.isnan(found) if math.isnan(value) else bits(found) == bits(value)


def test_every_line_is_json_for_strict_readers(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        log.step(1, loss=math.nan, grad_norm=math.inf)
        log.sample(1, "\udcff", "NaN")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    raw = (tmp_path / lines.NAME).read_bytes().decode("utf-8").split("\n")[:-1]
    first, second = (json.loads(line, parse_constant=refuse) for line in raw)
    assert (first["loss"], first["grad_norm"]) == ("NaN", "Infinity")
    assert (second["prompt"], second["text"]) == ("\udcff", "NaN")
    assert told(tmp_path, "sample")[0]["text"] == "NaN"  # a word that a model wrote stays a word


def test_scalars_of_torch_and_numpy(tmp_path: Path) -> None:
    loss = torch.tensor(0.1)
    with run_log(tmp_path) as log:
        log.step(1, loss=loss, lr=np.float32(0.1), tokens=np.int64(7), grad_norm=np.float64(0.5))
    (step,) = told(tmp_path)
    assert (step["loss"], step["lr"], step["tokens"], step["grad_norm"]) == (
        loss.item(),
        float(np.float32(0.1)),
        7,
        0.5,
    )
    with run_log(tmp_path / "b") as log, pytest.raises(TypeError, match="not Tensor"):
        log.step(1, loss=torch.ones(2))


def test_a_step_is_told_once(tmp_path: Path) -> None:
    with run_log(tmp_path, resume_step=0) as log:
        log.step(1, loss=1.0)
        with pytest.raises(TrainError, match="step 1 is in the log already"):
            log.step(1, loss=1.0)


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    with run_log(tmp_path / "run", rank=1, live=True, tensorboard=True, every=1) as log:
        log.step(1, loss=1.0)
        log.evaluation(1, loss=1.0)
        log.sample(1, "a", "b")
        log.event("x")
    assert not (tmp_path / "run").exists()


# --- resuming ---------------------------------------------------------------------------------------------------------


def ten_steps(dir: Path) -> None:
    with run_log(dir) as log:
        log.event("start")
        for i in range(1, 11):
            log.step(i, loss=1 / i)
            if i % 5 == 0:
                log.evaluation(i, loss=2 / i)
                log.sample(i, "a", "b")


def test_resume_cuts_back_to_the_checkpoint(tmp_path: Path) -> None:
    ten_steps(tmp_path)
    before = (tmp_path / lines.NAME).read_bytes().split(b"\n")
    with (tmp_path / lines.NAME).open("ab") as file:
        file.write(b'{"kind": "step", "step": 11, "lo')
    with run_log(tmp_path, resume_step=5) as log:
        for i in range(6, 11):
            log.step(i, loss=-1.0)
    assert [e["step"] for e in told(tmp_path, "step")] == list(range(1, 11))
    assert [e["step"] for e in told(tmp_path, "eval")] == [5]
    assert [e["step"] for e in told(tmp_path, "sample")] == [5]
    assert (tmp_path / lines.NAME).read_bytes().split(b"\n")[:8] == before[:8]  # start, five steps, evaluation, sample
    # Steps 6 to 10, an evaluation, a sample, and half a line.
    assert told(tmp_path, "event")[-1]["text"] == "resumed from step 5; 8 lines of later steps dropped"
    assert sorted(p.name for p in tmp_path.iterdir()) == [lines.NAME]


def test_a_run_begun_anew_starts_an_empty_log(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        log.evaluation(0, loss=9.0)
    with run_log(tmp_path) as log:
        log.evaluation(0, loss=9.0)
    (event, evaluation) = told(tmp_path)
    assert event["text"] == "begun anew; 1 line of an earlier start dropped" and evaluation["kind"] == "eval"


def test_a_log_that_lost_its_end_says_so(tmp_path: Path) -> None:
    ten_steps(tmp_path)
    with run_log(tmp_path, resume_step=12) as log:
        log.step(13, loss=1.0)
    texts = [e["text"] for e in told(tmp_path, "event")]
    assert "the log ends at step 10, the checkpoint at 12: the steps between are not in it" in texts


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b'{"kind": "st\n', "not JSON"),
        (b"[1]\n", '"kind"'),
        (b'{"kind": "step", "step": "3"}\n', '"step"'),
        (b"\xff\n", "not JSON"),
    ],
)
def test_an_unreadable_line_in_the_middle_is_named_and_the_log_left_as_it_is(
    tmp_path: Path, bad: bytes, why: str
) -> None:
    ten_steps(tmp_path)
    path = tmp_path / lines.NAME
    good = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(good[:3] + [bad] + good[3:]))
    altered = path.read_bytes()
    with pytest.raises(TrainError, match=r"metrics\.jsonl, line 4") as caught:
        run_log(tmp_path, resume_step=5)
    assert why in str(caught.value)
    assert path.read_bytes() == altered and not list(tmp_path.glob("*.new"))


KILLED = """
import sys
from lrcompile.train.log import RunLog
log = RunLog(sys.argv[1], live=False, tensorboard=False, rank=0, steps=10**9, every=0)
for i in range(1, 10**9):
    log.step(i, loss=1 / i)
    if i == 200:
        print("going", flush=True)
"""


def test_kill_9_loses_no_step_that_was_told(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"going\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    steps = [e["step"] for e in told(tmp_path, "step")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 200
    with run_log(tmp_path, resume_step=150) as log:
        log.step(151, loss=1.0)
    assert [e["step"] for e in told(tmp_path, "step")] == list(range(1, 152))


# --- what fails -------------------------------------------------------------------------------------------------------


class FullDisk(io.RawIOBase):
    """Takes half of what is written to it, then nothing."""

    def __init__(self) -> None:
        self.held = b""

    def write(self, data: Any) -> int:
        if self.held:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.held = bytes(data[: len(data) // 2])
        return len(self.held)


def test_a_full_disk_is_told_and_nothing_written_behind_the_half_line(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    log._file.close()
    disk = log._file = FullDisk()
    with pytest.raises(TrainError, match="disk is full"):
        log.step(1, loss=1.0)
    held = disk.held
    with pytest.raises(TrainError, match="closed"):
        log.event("stopped")
    assert disk.held == held
    log.close()


def test_a_directory_that_cant_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match="can't log to .*file"):
        run_log(tmp_path / "file" / "run")


class Gone(io.StringIO):
    """A pipe whose reader left once something was said."""

    def write(self, text: str) -> int:
        if self.tell() > 6:  # two cursor codes of 6 go through, and one line
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return super().write(text)


@pytest.mark.parametrize("live", [False, True])
def test_a_reader_that_leaves_doesnt_stop_the_run(tmp_path: Path, live: bool) -> None:
    """The panel goes to a pipe where FORCE_COLOR says that it is a terminal."""
    console = Screen(file=Gone(), force_terminal=live, width=100, _environ={"TERM": "xterm"})
    with run_log(tmp_path, live=live, every=1, console=console) as log:
        for i in range(1, 5):
            log.step(i, loss=1.0)
    assert len(told(tmp_path, "step")) == 4
    assert told(tmp_path, "event")[-1]["text"] == "nothing more is displayed: Broken pipe"


def test_tensorboard_that_is_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'lrcompile\[train\]'"):
        run_log(tmp_path / "run", tensorboard=True)


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with run_log(tmp_path, tensorboard=True) as log:
        for i in range(1, 11):
            log.step(i, loss=1.0, mfu=None)
    with run_log(tmp_path, tensorboard=True, resume_step=5) as log:
        for i in range(6, 9):
            log.step(i, loss=2.0)
        log.evaluation(8, loss=3.0)
        log.sample(8, "a", "b")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [
        *((i, 1.0) for i in range(1, 6)),
        *((i, 2.0) for i in range(6, 9)),
    ]
    assert [(e.step, e.value) for e in board.Scalars("eval/loss")] == [(8, 3.0)]
    assert "train/mfu" not in board.Tags()["scalars"]


# --- what is shown ----------------------------------------------------------------------------------------------------


FIGURES = {
    "loss": 4.12345,
    "lr": 3e-4,
    "grad_norm": 0.8312,
    "tokens_per_s": 12345.6,
    "mfu": 0.412,
    "mfu_dense": 0.881,
    "memory": 5_300_000_000,
    "tokens": 4096,
}


def test_plain_lines(tmp_path: Path) -> None:
    out = io.StringIO()
    with run_log(tmp_path, live=True, every=5, console=Console(file=out), steps=12) as log:
        for i in range(1, 13):
            log.step(i, **FIGURES)
        log.evaluation(12, loss=4.0, tokens=1000)
        log.sample(12, "The", "\x1b[31m state\n" + "of " * 100)
        log.event("saved\rout")
    shown = out.getvalue().splitlines()
    assert [line.split("/")[0] for line in shown[:4]] == ["step  1", "step  5", "step 10", "step 12"]
    first = "step  1/12  loss 4.1235  lr 3.00e-04  grad 0.831  12.3k tok/s  mfu 41.2% (88.1% dense)  5.3 GB  left "
    assert shown[0] == first + "–" and re.fullmatch(re.escape(first.replace(" 1/", " 5/")) + r"\d+:\d\d", shown[1])
    assert shown[4] == "step 12: held-out loss 4.0000  tokens 1,000"
    assert shown[5].startswith("step 12: The▸ [31m state of of") and len(shown[5]) == 100
    assert shown[6] == "step 12: saved out" and len(shown) == 7
    assert max(map(len, shown)) <= 112


def test_unknown_figures_are_left_out(tmp_path: Path) -> None:
    out = io.StringIO()
    with run_log(tmp_path, every=1, console=Console(file=out)) as log:
        log.step(1, loss=math.nan, mfu=None)
    assert out.getvalue() == "step   1/100  loss nan  left –\n"


def test_a_terminal_that_cant_show_a_character_gets_a_question_mark(tmp_path: Path) -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    with run_log(tmp_path, every=1, console=Console(file=out)) as log:
        log.sample(1, "a", "中")
    assert raw.getvalue() == b"step 1: a??\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cant_draw_gets_lines(tmp_path: Path, encoding: str) -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    with run_log(tmp_path, live=True, every=1, console=Console(file=out, force_terminal=True)) as log:
        log.step(1, loss=2.5)
        log.event("中")
    assert raw.getvalue() == b"step   1/100  loss 2.5000  left ?\nstep 1: ?\n"


def terminal(out: io.StringIO) -> Console:
    return Console(file=out, force_terminal=True, width=100, height=30, color_system=None, legacy_windows=False)


def last_frame(out: io.StringIO) -> str:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    return text[text.rindex("╭") :]


def test_the_panel_shows_the_last_state(tmp_path: Path) -> None:
    out = io.StringIO()
    with run_log(tmp_path / "my-run", live=True, console=terminal(out)) as log:
        for i in range(1, 51):
            log.step(i, **{**FIGURES, "loss": 10.0 - i / 10})
        log.evaluation(50, loss=4.5)
        log.sample(50, "The state", "\x1b[2J of")
        log.event("saved")
    frame = last_frame(out)
    for word in ("my-run", "50/100 steps  50%", "5.0000", "12.3k", "41.2%", "88.1%", "5.3 GB", "step 50: loss 4.5000"):
        assert word in frame
    assert "The state▸ [2J of" in frame and "█" in frame and "▁" in frame
    assert "step 50: saved" in out.getvalue()
    widths = {len(line) for line in frame.splitlines() if line}
    assert widths == {99}


def test_the_panel_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    out, before = io.StringIO(), (sys.stdout, sys.stderr)
    with pytest.raises(ZeroDivisionError), run_log(tmp_path, live=True, console=terminal(out)) as log:
        assert sys.stdout is not before[0]  # what others print goes above the panel
        # A process killed now leaves a visible cursor too.
        assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l")
        log.step(1, loss=1 / 0)
    assert (sys.stdout, sys.stderr) == before
    assert out.getvalue().endswith("\x1b[?25h")
    log.close()  # once more does nothing


RAISES = """
import sys
from lrcompile.train.log import RunLog
from rich.console import Console
console = Console(force_terminal=True, width=100)
log = RunLog(sys.argv[1], live=True, tensorboard=False, rank=0, steps=10, console=console)
log.step(1, loss=1.0)
raise ValueError("what went wrong")
"""


def test_an_exception_that_nobody_catches_ends_the_panel_and_is_seen(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RAISES, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "what went wrong" in done.stdout + done.stderr
    assert done.stdout.rstrip("\n").endswith("\x1b[?25h")


def test_no_thread_is_started(tmp_path: Path) -> None:
    import threading

    before = threading.active_count()
    with run_log(tmp_path, live=True, console=terminal(io.StringIO())) as log:
        log.step(1, loss=1.0)
        assert threading.active_count() == before


def test_telling_a_step_costs_little(tmp_path: Path) -> None:
    out = io.StringIO()
    with run_log(tmp_path, live=True, steps=4000, console=terminal(out)) as log:
        begun, cpu = time.perf_counter(), time.process_time()
        for i in range(1, 2001):
            log.step(i, **FIGURES)
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        frames = out.getvalue().count("╭")
        assert cpu / 2000 < 0.2e-3  # 0.011e-3 seen; a panel drawn at every step takes 0.6e-3
        assert frames <= 2 + 4 * seconds


def test_slow_drawing_is_done_less_often(tmp_path: Path) -> None:
    panel = Panelled("run", 10, 0, terminal(io.StringIO()))
    try:
        panel._next = 0.0
        panel._live.refresh = lambda: time.sleep(0.02)  # type: ignore[method-assign]
        panel.step(1, {"loss": 1.0})
        assert panel._next - time.perf_counter() > 3.5  # 0.02 s is half a percent of four seconds
    finally:
        del panel._live.refresh
        panel.close()


def test_words() -> None:
    assert [clock(s) for s in (None, math.inf, 59.6, 3725, 90061)] == ["–", "–", "1:00", "1:02:05", "1 d 1:01:01"]
    assert printable("a\x1b[31m\tb\r\n c\u202e") == "a [31m b c"


def test_the_curve_keeps_bounded_memory() -> None:
    curve = Curve(width=8)
    for i in range(1000):
        curve.add(float(i))
        curve.add(math.nan)
    assert len(curve._means) < 16
    bars = curve.bars(8)
    assert len(bars) == 8 and list(bars) == sorted(bars) and bars[0] == "▁" and bars[-1] == "█"
    assert Curve().bars(8) == ""


def test_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lrcompile.train.display.time.monotonic", lambda: now[0])
    plain = Plain(10, 0, 0, Console(file=io.StringIO()))
    for step, at, cold in ((1, 60.0, True), (2, 120.0, True), (3, 122.0, False), (4, 124.0, False)):
        now[0] = at
        plain.step(step, {"cold": cold})
    assert plain._left.seconds == pytest.approx(12.0)  # six steps of 2 s: those that compiled don't count
