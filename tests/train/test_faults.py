"""What goes wrong in a run is told in one line, with its reason, by one rank, and leaves what was saved as it was."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lrcompile.cli import main
from lrcompile.train import world
from lrcompile.train.committed import committed
from lrcompile.train.data import Sampler, Shards

from .helpers_data import files_below
from .runs import Started, documents, events, finished, losses, refused, same_run, settings, write_data

DENSE = {"dense": True}  # no plan to make: these are quicker


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


# --- losses that are not finite ---------------------------------------------------------------------------------------


def _seed_of_a_late_fault(data: Path, ranks: int = 2) -> tuple[int, int, list[int]]:
    """A seed with which the bad token first comes in a step from 3 to 5, in one rank's rows alone; that step, its documents."""
    shards = Shards.open(data / "train")
    for seed in range(200):
        sampler = Sampler(shards, length=32, batch=8, seed=seed)
        for step in range(6):
            batch = sampler.rows(step, 0, 8)
            hit = (batch.tokens == ord("~")).any(1)
            if hit.any():
                halves = hit.view(ranks, -1).any(1)
                if step >= 3 and halves.sum() == 1:
                    return seed, step + 1, sorted({d for row in batch.documents for d in row})
                break
    raise AssertionError("no such seed")


@pytest.mark.parametrize(("model", "ranks"), [("broken", 2), ("steep", 1)])
def test_a_loss_or_gradient_that_is_not_finite(model: str, ranks: int, data: Path, tmp_path: Path) -> None:
    """The run stops before the step, names its documents and the last checkpoint; bad_loss=skip goes on without it."""
    seed, step, rows = _seed_of_a_late_fault(data)
    usual: dict[str, Any] = {"seed": seed, "model": {"source": f"inside:{model}"}, "save": {"every": 2}, "steps": 10}
    usual["recipe"] = DENSE
    told, out = settings(data, tmp_path / "out", **usual), tmp_path / "out"
    said = refused(told, ranks=ranks)
    last = step - 1 - (step - 1) % 2
    assert f"step {step}: loss " in said and f"checkpoints/step-{last:08d}" in said
    assert f"documents {', '.join(map(str, rows[:20]))}" in said
    if model == "broken":
        assert "loss nan" in said
    else:
        assert "gradient norm inf" in said or "gradient norm nan" in said
    before = files_below(out / "checkpoints")
    assert list(losses(out)) == list(range(1, step))
    assert f"step {step}: loss" in refused(told, "--resume", ranks=ranks)  # it is the same again
    assert files_below(out / "checkpoints") == before
    finished({**told, "bad_loss": "skip"}, "--resume", ranks=ranks)
    assert step not in losses(out) and 10 in losses(out)
    assert any(text.startswith(f"skipped step {step}: ") for text in events(out))
    # Never stopped, it is the same run.
    whole = finished({**told, "bad_loss": "skip", "out": str(tmp_path / "whole")}, ranks=ranks)
    same_run(whole, out)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a finished run, "out", and of the data it had, "data": tests take copies."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(data, folder / "data")
    finished(settings(folder / "data", folder / "out"))
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run in this process; what is refused with, in one line."""
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def run(told: dict[str, Any], *options: str) -> str:
        config = tmp_path / "config.json"
        config.write_text(json.dumps(told))
        assert main(["pretrain", str(config), *options]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in said if line.startswith("error: ")]
        assert len(errors) == 1 and errors[0] == said[-1], said
        return errors[0]

    return run


def _told(here: Path, **changes: Any) -> dict[str, Any]:
    return settings(here / "data", here / "out", **changes)


def test_a_directory_that_holds_a_run(here: Path, say: Any) -> None:
    before = files_below(here)
    assert "holds a run: --resume goes on with it, another --out starts a new one" in say(_told(here))
    (here / "out" / "config.json").unlink()
    assert "holds a run" in say(_told(here))
    assert "config.json is gone" in say(_told(here), "--resume")
    del before["out/config.json"]
    assert files_below(here) == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"length": 16}}, "data.length was 32, is 16"),
        ({"recipe": {"rank": 4}}, "recipe.rank was 8, is 4"),
        ({"optimizer": {"lr": 1e-3}}, "optimizer.lr was 0.003, is 0.001"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch": 16}, "batch was 8, is 16"),
        ({"parallel": {"precision": "bfloat16"}}, "parallel.precision was float32, is bfloat16"),
    ],
)
def test_a_changed_config(changes: dict[str, Any], reason: str, here: Path, say: Any) -> None:
    assert reason in say(_told(here, **changes), "--resume")


def test_a_changed_dataset_or_tokenizer(here: Path, tmp_path: Path, say: Any) -> None:
    other = write_data(tmp_path / "other", word="shape")
    assert "has changed since the checkpoint" in say({**_told(here), "data": _told(other.parent)["data"]}, "--resume")
    shutil.rmtree(tmp_path / "other")
    other = write_data(tmp_path / "other", tokenizer="bpe:258")
    said = say({**_told(here), "data": _told(other.parent)["data"]}, "--resume")
    assert "the tokenizer of" in said and "has changed since the checkpoint" in said
    mixed = {"data": {"validation": str(other / "validation")}}
    assert "another tokenizer" in say({**_told(here, **mixed), "out": str(tmp_path / "new")})


def test_a_changed_model(here: Path, say: Any) -> None:
    assert "another Plan" in say(_told(here, model={"source": "inside:wider"}), "--resume")


def _shard(here: Path) -> Path:
    return sorted((here / "data" / "train").glob("*.tokens"))[1]


def test_a_data_shard_that_is_not_as_it_was(here: Path, say: Any) -> None:
    shard = _shard(here)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    assert f"{shard} is truncated or altered" in say(_told(here), "--resume")
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert f"{shard} has been altered" in say(_told(here), "--resume")
    shard.unlink()
    assert f"{shard} is missing" in say(_told(here), "--resume")


def test_a_checkpoint_that_is_not_as_it_was(here: Path, say: Any) -> None:
    """The one before is named, which is as good."""
    older, newer = committed(here / "out" / "checkpoints").values()
    file = next(newer.glob("*.safetensors"))
    whole = file.read_bytes()
    instead = f"To go on from {older} instead, move {newer} away"
    file.write_bytes(whole[:-1])
    said = say(_told(here), "--resume")
    assert f"{file} is truncated" in said and instead in said
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said = say(_told(here), "--resume")
    assert f"{file} was altered" in said and instead in said
    manifest = newer / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    said = say(_told(here), "--resume")
    assert "manifest.json is truncated" in said and instead in said
    shutil.move(newer, here / "away")
    want = losses(here / "out")
    finished(_told(here), "--resume")
    assert losses(here / "out") == want


def test_data_and_model_that_do_not_fit(data: Path, tmp_path: Path, say: Any) -> None:
    out = tmp_path / "out"
    assert "a vocabulary of 257 tokens, and the model 100" in say(
        settings(data, out, model={"source": "inside:small_vocabulary"})
    )
    assert "no such file or directory: nowhere/config.json" in say(
        settings(data, out, model={"source": "nowhere/config.json"})
    )
    assert "no prepared data in" in say(settings(tmp_path / "nowhere", out))
    assert "batch=8: must be a multiple of micro_batch, 3" in say(settings(data, out, micro_batch=3))
    assert not (out / "config.json").exists()
    # A start that failed is no run: --resume isn't needed.
    finished(settings(data, out))


def test_a_directory_that_cannot_be_made(data: Path, tmp_path: Path, say: Any) -> None:
    (tmp_path / "file").write_text("")
    said = say(settings(data, tmp_path / "file" / "out"))
    assert str(tmp_path / "file" / "out") in said and "Not a directory" in said


def test_resume_without_a_run(data: Path, tmp_path: Path) -> None:
    """A job that is always started with --resume begins by itself, and tells so."""
    out = finished(settings(data, tmp_path / "out"), "--resume")
    assert any("nothing to resume" in text for text in events(out))
    same_run(finished(settings(data, tmp_path / "plain")), out)


@pytest.mark.parametrize(
    "what", ["a run", "changed", "shard", "checkpoint", "vocabulary", "batch", "setting", "unwritable"]
)
def test_refused_on_two_ranks(what: str, here: Path, tmp_path: Path) -> None:
    """Each is told once, and ends both ranks; also what only one of them notices."""
    new: dict[str, Any] = {**_told(here), "out": str(tmp_path / "new")}
    if what == "a run":
        assert "holds a run" in refused(_told(here), ranks=2)
    elif what == "changed":
        assert "optimizer.lr was" in refused(_told(here, optimizer={"lr": 1.0}), "--resume", ranks=2)
    elif what == "shard":
        whole = _shard(here).read_bytes()
        _shard(here).write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        assert "has been altered" in refused(new, ranks=2)  # the first rank alone reads every token
    elif what == "checkpoint":
        file = next(max((here / "out" / "checkpoints").iterdir()).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"~")
        assert "was altered" in refused(_told(here), "--resume", ranks=2)
    elif what == "vocabulary":
        assert "a vocabulary of" in refused({**new, "model": {"source": "inside:small_vocabulary"}}, ranks=2)
    elif what == "batch":
        assert "batch=12 can't be divided among 2 ranks" in refused({**new, "batch": 12, "micro_batch": 4}, ranks=2)
    elif what == "setting":
        assert "nonsense is no setting" in refused({**new, "nonsense": 1}, ranks=2)
    else:
        (tmp_path / "file").write_text("")
        told = {**new, "out": str(tmp_path / "file" / "out")}
        assert "Not a directory" in refused(told, ranks=2, said=tmp_path)


def test_signals_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that is repeated at once is one request; seconds later it ends the process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        _ask_thrice(monkeypatch)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def _ask_thrice(monkeypatch: pytest.MonkeyPatch) -> None:
    with world.Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert signals.asked == "SIGINT"
        monkeypatch.setattr(world, "TOGETHER", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# --- disks, and ranks that die ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_disk_that_fills_up(ranks: int, data: Path, small_disk: Path) -> None:
    """In a save, which is the first thing that takes room: the run ends; with room made it goes on from what was committed."""
    told = settings(data, small_disk / "out", save={"every": 1, "keep": 9}, recipe=DENSE)
    started = Started(told, ranks=ranks, said=small_disk.parent)
    codes = started.end(60)
    said = [line for line in started.text().splitlines() if line.startswith("error: ")]
    assert codes == [2] * ranks and len(said) == 1, started.text()
    assert "No space left on device: make room" in said[0] and "can't be saved" in said[0]
    assert "Traceback" not in started.text()
    there = committed(small_disk / "out" / "checkpoints")
    assert there and max(there) < 8
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    out = finished(told, "--resume", ranks=ranks, said=small_disk.parent)
    assert any(f"resumed from step {max(there)}" in text for text in events(out))
    same_run(finished({**told, "out": str(small_disk.parent / "whole")}, ranks=ranks), out)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_log_that_cannot_be_written(ranks: int, data: Path, tmp_path: Path) -> None:
    """Rank 0 alone writes it; the others end because it is gone."""
    told = settings(data, tmp_path / "out", recipe=DENSE)
    started = Started(told, ranks=ranks, before="full_log")
    assert started.end(60) == [2] * ranks, started.text()
    said = started.text()
    assert "Traceback" not in said
    first = started.said[0].read_text().splitlines()[-1]
    assert first.startswith("error: can't write") and "No space left on device" in first
    finished(told, "--resume", ranks=ranks)


def test_a_finished_model_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    """Nothing is lost: --resume finds all steps done, and writes it."""
    told, out = settings(data, tmp_path / "out"), tmp_path / "out"
    said = refused(told, ranks=2, before="full_at_the_end")
    assert "all 8 steps are done and saved" in said and "No space left on device" in said
    assert not (out / "model").exists()
    finished(told, "--resume", ranks=2)
    same_run(finished({**told, "out": str(tmp_path / "whole")}, ranks=2), out)


def test_one_rank_dies_while_the_others_compute(data: Path, tmp_path: Path) -> None:
    """They end by themselves, quickly, and say so."""
    started = Started(settings(data, tmp_path / "out", steps=1000, recipe=DENSE), ranks=4, before="telling")
    while not documents(tmp_path / "out", 4):
        assert started.processes[2].is_alive(), started.text()
        time.sleep(0.001)
    started.signal(signal.SIGKILL, 2)
    begun = time.monotonic()
    assert started.end(60) == [2, 2, -signal.SIGKILL, 2], started.text()
    assert time.monotonic() - begun < 60
    assert "another rank is gone" in started.text() and "Traceback" not in started.text()
