"""A run that was killed or stopped goes on as if nothing had been: the same losses, the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lrcompile.train.committed import committed

from .runs import (
    Started,
    documents,
    events,
    finished,
    losses,
    refused,
    same_run,
    settings,
    told_lines,
    weights,
    write_data,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def _kill(started: Started, out: Path, phase: str, nth: int, rank: int | None, delay: float) -> None:
    """Kill a rank, or all (None), a moment after a phase has begun for the nth time, over all starts."""
    watched, until = rank or 0, time.monotonic() + 60
    while told_lines(out, watched).count(f"begin {phase}") < nth:
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


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.important])])
def test_killed_at_random_moments(kills: int, data: Path, tmp_path: Path) -> None:
    """The ranks are killed in steps, saves and evaluations: one of them, whose fellow ends by itself, or both at once."""
    usual: dict[str, Any] = {"steps": 8 * kills + 4, "save": {"every": 3}, "evaluate": {"every": 4, "batches": 2}}
    usual |= {"model": {"source": "inside:dropping"}}
    whole = finished(settings(data, tmp_path / "whole", **usual), ranks=2)
    told, out, draw = settings(data, tmp_path / "killed", **usual), tmp_path / "killed", random.Random(7)
    latest, hit = 0, set()
    for kill in range(kills):
        phase, longest = ("step", "save", "evaluation")[kill % 3], 0.03
        rank = (None, 0, None, 1)[kill % 4]
        if kill % 6 == 5:  # and while the run starts, where torchrun would end the other rank
            phase, rank, longest = "start", None, 2.0
        nth = draw.randint(1, {"start": 1, "step": 6}.get(phase, 2))
        before = told_lines(out, rank or 0).count(f"begin {phase}")
        started = Started(told, "--resume", ranks=2, before="telling")
        begun = time.monotonic()
        _kill(started, out, phase, before + nth, rank, draw.uniform(0, longest))
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
        assert latest == 0 or resumed[-1] == latest or phase == "start"
        latest = there
    assert hit >= {"step", "save", "evaluation"} or kills < 20
    finished(told, "--resume", ranks=2)
    same_run(whole, out)


# --- other numbers of ranks -------------------------------------------------------------------------------------------

PAIRS: dict[str, Any] = {"rank": 8}
NF4: dict[str, Any] = {"preset": "finetune", "weights": "nf4", "rank": 4}


def _stopped(told: dict[str, Any], *options: str, at: int, ranks: int, number: int = signal.SIGTERM) -> None:
    """Run until a signal in the step `at`, after which all ranks save and end well."""
    everyone = ",".join(map(str, range(ranks)))
    finished(told, *options, ranks=ranks, before="signalled", SIGNAL=f"{int(number)} in {at} of {everyone}")
    assert max(committed(Path(told["out"]) / "checkpoints")) == at


@pytest.mark.parametrize(
    ("recipe", "optimizer"),
    [
        (PAIRS, "spectron"),
        (NF4, "adamw"),
        pytest.param(PAIRS, "adamw", marks=pytest.mark.slow),
        pytest.param(NF4, "spectron", marks=pytest.mark.slow),
        pytest.param(PAIRS, "muon", marks=pytest.mark.slow),
    ],
)
def test_other_numbers_of_ranks(recipe: dict[str, Any], optimizer: str, data: Path, tmp_path: Path) -> None:
    """Two ranks, then one, then four: each step has the documents that one process alone has, and the loss but for rounding."""
    usual: dict[str, Any] = {"steps": 9, "save": {"every": 100}, "recipe": recipe, "optimizer": {"name": optimizer}}
    whole = finished(settings(data, tmp_path / "whole", **usual), before="telling")
    told, out = settings(data, tmp_path / "moved", **usual), tmp_path / "moved"
    seen = {}
    _stopped(told, at=3, ranks=2)
    seen |= documents(out, 2)
    _stopped(told, "--resume", at=6, ranks=1)
    seen |= {step: rows for step, rows in documents(out, 1).items() if step >= 3}
    finished(told, "--resume", ranks=4, before="telling")
    seen |= {step: rows for step, rows in documents(out, 4).items() if step >= 6}
    assert seen == documents(whole, 1) and len(seen) == 9
    # Seen at most: 1e-7 of the losses, and 1e-7 in a weight, which nine steps of 3e-3 moved.
    assert losses(out) == pytest.approx(losses(whole), rel=5e-6)
    assert losses(out, "eval") == pytest.approx(losses(whole, "eval"), rel=5e-6)
    bits, others = weights(out), weights(whole)
    for name, value in bits.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, others[name], rtol=0, atol=5e-6)
        else:
            assert torch.equal(value, others[name]), name  # a base's codes


@pytest.mark.parametrize(("ranks", "replicate", "shard"), [pytest.param(2, 2, 1, marks=pytest.mark.slow), (4, 2, 2)])
def test_copies_of_the_parameters(ranks: int, replicate: int, shard: int, data: Path, tmp_path: Path) -> None:
    """HSDP computes what one process does."""
    one = finished(settings(data, tmp_path / "one", steps=4))
    parallel = {"replicate": replicate, "shard": shard}
    many = finished(settings(data, tmp_path / "many", steps=4, parallel=parallel), ranks=ranks)
    assert losses(many) == pytest.approx(losses(one), rel=5e-6)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(many)[name], value, rtol=0, atol=5e-6)  # seen: 6e-8


def test_bfloat16(data: Path, tmp_path: Path) -> None:
    """Products in bfloat16 on one rank and on two come near those in float32, and leave a base's codes as they are."""
    usual: dict[str, Any] = {"steps": 5, "recipe": NF4}
    exact = finished(settings(data, tmp_path / "exact", **usual))
    for ranks in (1, 2):
        told = settings(data, tmp_path / f"on{ranks}", **usual, parallel={"precision": "bfloat16"})
        out = finished(told, ranks=ranks)
        assert losses(out) == pytest.approx(losses(exact), rel=1e-3)  # seen: 1e-4
        assert losses(out) != losses(exact)
        ours, codes = weights(out), 0
        for name, value in weights(exact).items():
            assert ours[name].dtype == value.dtype
            if not value.is_floating_point():
                codes += 1
                assert torch.equal(ours[name], value), name
        assert codes


# --- stopped by a signal ----------------------------------------------------------------------------------------------


def _random(data: Path, out: Path) -> dict[str, Any]:
    """A run whose steps are random."""
    return settings(data, out, model={"source": "inside:dropping"}, recipe={"dense": True})


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing stops."""
    return finished(_random(data, tmp_path_factory.mktemp("whole") / "out"), ranks=2)


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "1"),
        (signal.SIGINT, "0"),
        pytest.param(signal.SIGTERM, "0,1", marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal(number: int, to: str, whole: Path, data: Path, tmp_path: Path) -> None:
    """Whichever ranks get it, all save after the step they are in and exit with 0."""
    told, out = _random(data, tmp_path / "out"), tmp_path / "out"
    finished(told, ranks=2, before="signalled", SIGNAL=f"{int(number)} in 3 of {to}")
    assert list(committed(out / "checkpoints")) == [3] and list(losses(out)) == [1, 2, 3]
    assert "stopped by a signal" in events(out)[-1] and not (out / "merged").exists()
    finished(told, "--resume", ranks=2)
    same_run(whole, out)


def test_stopped_from_outside(whole: Path, data: Path, tmp_path: Path) -> None:
    """The same, at a moment that nobody chose."""
    told, out = _random(data, tmp_path / "out"), tmp_path / "out"
    started = Started(told, ranks=2, before="telling")
    while "begin step" not in told_lines(out):
        assert started.processes[0].is_alive(), started.text()
        time.sleep(0.001)
    started.signal(signal.SIGTERM)
    assert started.end() == [0, 0], started.text()
    finished(told, "--resume", ranks=2)
    same_run(whole, out)


# --- states in 8 bits -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eight_bit_states(data: Path, tmp_path: Path) -> None:
    """They are quantised a shard at a time: resumed exactly by as many ranks, and refused by others."""
    usual: dict[str, Any] = {"optimizer": {"name": "adamw8bit"}, "recipe": {"dense": True}, "save": {"every": 100}}
    for ranks in (1, 2):
        one = finished(settings(data, tmp_path / f"whole{ranks}", **usual), ranks=ranks)
        told = settings(data, tmp_path / f"out{ranks}", **usual)
        _stopped(told, at=4, ranks=ranks)
        said = refused(told, "--resume", ranks=3 - ranks)
        assert f"on {ranks} rank" in said and "quantised a shard at a time" in said, said
        finished(told, "--resume", ranks=ranks)
        same_run(one, tmp_path / f"out{ranks}")


# --- torchrun ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_under_torchrun(whole: Path, data: Path, tmp_path: Path) -> None:
    """Ctrl-C there reaches the ranks twice, from the terminal and from torchrun: they save, and --resume goes on."""
    out = tmp_path / "out"
    told = _random(data, out)
    (tmp_path / "config.json").write_text(json.dumps(told))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
    command = [sys.executable, *torchrun, "localhost:0", "-m", "lrcompile", "pretrain", str(tmp_path / "config.json")]
    with (tmp_path / "said").open("w") as said:
        place: dict[str, Any] = {"cwd": Path(__file__).parent, "stdout": said, "stderr": said}
        first = subprocess.Popen(command, start_new_session=True, **place)
        metrics, until = out / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and '"kind": "step"' in metrics.read_text()):
            assert first.poll() is None and time.monotonic() < until, (tmp_path / "said").read_text()
            time.sleep(0.005)
        os.killpg(first.pid, signal.SIGINT)
        first.wait(120)
        assert committed(out / "checkpoints"), (tmp_path / "said").read_text()
        assert any("stopped by a signal" in text for text in events(out))
        assert subprocess.run([*command, "--resume"], **place).returncode == 0, (tmp_path / "said").read_text()
    same_run(whole, out)
