"""A run that was killed or stopped goes on as if nothing had been: the same losses, the same weights, bit for bit."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lrcompile.train.committed import committed

from .runs import (
    Started,
    documents,
    events,
    finished,
    losses,
    same_run,
    settings,
    told_lines,
    write_data,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def _kill(started: Started, out: Path, phase: str, nth: int, rank: int | None, delay: float) -> None:
    """Kill a rank, or all (None), a moment after a phase has begun for the nth time."""
    watched, until = rank or 0, time.monotonic() + 60
    before = told_lines(out, watched).count(f"begin {phase}")
    while told_lines(out, watched).count(f"begin {phase}") < before + nth:
        assert started.processes[watched].is_alive() and time.monotonic() < until, started.text()
        time.sleep(0.001)
    time.sleep(delay)
    started.signal(signal.SIGKILL, *([] if rank is None else [rank]))


def _inside(out: Path, rank: int) -> set[str]:
    """The phases that a killed rank was in."""
    lines = told_lines(out, rank)
    return {phase for phase in ("step", "save", "evaluation") if _last(lines, phase) == f"begin {phase}"}


def _last(lines: list[str], phase: str) -> str:
    return next((line for line in reversed(lines) if line in (f"begin {phase}", f"end {phase}")), "")


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, data: Path, tmp_path: Path) -> None:
    """The ranks are killed in steps, saves and evaluations: one of them, whose fellow ends by itself, or both at once."""
    usual: dict[str, Any] = {"steps": 8 * kills + 4, "save": {"every": 3}, "evaluate": {"every": 4, "batches": 2}}
    usual |= {"model": {"source": "inside:dropping"}}
    whole = finished(settings(data, tmp_path / "whole", **usual), ranks=2)
    told, out, draw = settings(data, tmp_path / "killed", **usual), tmp_path / "killed", random.Random(7)
    latest, hit = 0, set()
    for kill in range(kills):
        phase = ("step", "save", "evaluation")[kill % 3]
        rank = (None, 0, None, 1)[kill % 4]
        started = Started(told, "--resume", ranks=2, before="telling")
        begun = time.monotonic()
        _kill(started, out, phase, draw.randint(1, 6 if phase == "step" else 2), rank, draw.uniform(0, 0.03))
        killed = time.monotonic()
        codes = started.end(60)
        print(kill, phase, rank, codes, f"{killed - begun:.2f} s to the kill, {time.monotonic() - killed:.2f} s after")
        for one in range(2):
            assert codes[one] == (-signal.SIGKILL if rank in (None, one) else 2), started.text()
        if rank is None:
            hit |= _inside(out, 0) & _inside(out, 1)
        else:
            hit |= _inside(out, rank)
        there = max(committed(out / "checkpoints"), default=0)
        assert there >= latest, "a committed checkpoint is lost"
        resumed = [int(m[1]) for text in events(out) if (m := re.match(r"resumed from step (\d+)", text))]
        assert latest == 0 or resumed[-1] == latest
        latest = there
    assert hit >= {"step", "save", "evaluation"} or kills < 20
    finished(told, "--resume", ranks=2)
    same_run(whole, out)
