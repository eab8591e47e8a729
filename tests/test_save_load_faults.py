"""A saved directory is loaded whole or not at all: damage, forgery, other models, and saves cut short."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import Recipe, StateError
from lrcompile.weights import folder as folder_module
from lrcompile.weights.layers import AdoptedModule

from .helpers_adopt import FILES, IDS, Shared, adopted_shared, refused_load

# --- what is loaded, and what is not ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state") / "saved"
    lrcompile.save(adopted_shared(), folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((saved / name).read_bytes())
    lrcompile.load(folder, Shared())
    return folder


def test_the_saved_plan_is_whole(saved: Path) -> None:
    plan = lrcompile.Plan.from_json(json.loads((saved / "lrcompile.json").read_text())["plan"])
    plan.check(Shared())
    assert {n for e in plan.adopted for n in e.names} == {
        "attn.in_proj_weight", "attn.out_proj.weight", "up.weight", "side.weight", "down.weight", "again.weight",
    }  # fmt: skip
    model: Any = lrcompile.load(saved, Shared())
    assert isinstance(model.up, AdoptedModule) and all(0 < e.error < 1 for e in plan.adopted if e.error is not None)


@pytest.mark.parametrize("name", FILES)
def test_truncated_files_are_refused(name: str, copied: Path) -> None:
    whole, model = (copied / name).read_bytes(), Shared()
    for size in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1}:
        (copied / name).write_bytes(whole[:size])
        refused_load(copied, model, f"{name} is truncated")
    (copied / name).write_bytes(whole + b"\0")
    refused_load(copied, model, f"{name} is truncated")
    (copied / name).unlink()
    refused_load(copied, model, f"{name}")
    (copied / name).mkdir()
    refused_load(copied, model, f"{name}")


@pytest.mark.parametrize("name", FILES)
def test_an_altered_byte_is_refused(name: str, copied: Path) -> None:
    whole, model = (copied / name).read_bytes(), Shared()
    places = [*range(64), *range(64, len(whole), max(1, len(whole) // 150)), len(whole) - 1]
    ignored = 0
    for place in places:
        byte = bytes([whole[place] ^ 0x11])
        (copied / name).write_bytes(whole[:place] + byte + whole[place + 1 :])
        refused_load(copied, model, "altered|truncated|not saved by this version|lacks a part|can't be read")
        ignored += 1
    assert ignored == len(places)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """An attacker's index: altered, its checksum made right again."""
    index = json.loads((folder / "lrcompile.json").read_text())
    change(index)
    index["checksum"] = folder_module.checksum(index)
    (folder / "lrcompile.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i.update(format="lrcompile-model/99"),
        lambda i: i.update(plan="{}"),
        lambda i: i.update(plan=3),
        lambda i: i.update(plan=i["plan"].replace('"rank": 4', '"rank": 5')),
        lambda i: i.update(aliases=[]),
        lambda i: i.update(aliases={"up.weight_a": "nobody"}),
        lambda i: i.update(aliases={}),
        lambda i: i["aliases"].update(surprise="scale"),
        lambda i: i.update(bytes="many"),
        lambda i: i.update(sha256=None),
        *[lambda i, k=k: i.pop(k) for k in ("format", "sha256", "bytes", "aliases", "plan")],
    ],
)
def test_a_forged_index_is_refused(change: Any, copied: Path) -> None:
    rewritten(copied, change)
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Shared()
        refused_load(copied, model, str(copied))


@pytest.mark.parametrize("text", ["", "[]", "null", '"x"', "{}", "\x00", '{"format": "lrcompile-model/1"}'])
def test_an_index_that_is_none(text: str, copied: Path) -> None:
    (copied / "lrcompile.json").write_text(text)
    refused_load(copied, Shared(), "altered|truncated|not saved by this version")
    (copied / "lrcompile.json").write_bytes(b"\xff\xfe\x00")
    refused_load(copied, Shared(), "truncated or altered")


def test_other_directories_and_other_models_are_refused(saved: Path, tmp_path: Path) -> None:
    refused_load(tmp_path / "nowhere", Shared(), "there is no directory")
    refused_load(tmp_path, Shared(), "was not saved by lrcompile: it has no lrcompile.json")
    refused_load(saved / "model.safetensors", Shared(), "there is no directory")
    refused_load(saved, Shared(hidden=64), r"another model: 'up.weight' is \(48, 32\) there, \(64, 32\) here")
    refused_load(saved, Shared(tie=False), "another model:.* tied")
    refused_load(saved, nn.Linear(3, 3), "another model")
    more, less, other = Shared(), Shared(), Shared()
    more.register_buffer("extra", torch.zeros(2))
    del less.scale
    other.scale = torch.zeros(7)
    for model, said in [(more, "'extra' is missing there"), (less, "'scale'.*missing here"), (other, "'scale' is")]:
        refused_load(saved, model, f"another model: {said}")


# --- saves cut short --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> tuple[Any, Any]:
    return adopted_shared(), adopted_shared(rank=6)


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("where", ["save_file", "rename1", "rename2", "fsync1", "fsync2", "fsync3", "chmod", "write"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_save_leaves_what_was(
    where: str,
    error: BaseException,
    earlier: bool,
    two: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, (first, second) = tmp_path / "saved", two
    if earlier:
        lrcompile.save(first, target)
    elif where == "rename2":
        pytest.skip("one rename is enough where nothing stands")
    count = int(where[-1]) if where[-1].isdigit() else 1
    name = where.rstrip("123")
    owner: Any = {"save_file": folder_module, "write": Path}.get(name, os)
    attribute = "write_text" if name == "write" else name
    real, calls = getattr(owner, attribute), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == count:
            if name == "save_file":  # half a file
                Path(args[1]).write_bytes(b"\0" * 100)
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, failing)
        with pytest.raises(type(error)):
            lrcompile.save(second, target)
    assert [p.name for p in tmp_path.iterdir()] == (["saved"] if earlier else [])
    if earlier:
        assert torch.equal(lrcompile.load(target, Shared())(*IDS), first(*IDS))
    lrcompile.save(second, target)
    assert torch.equal(lrcompile.load(target, Shared())(*IDS), second(*IDS))


def test_dying_between_the_two_renames_tells_where_the_earlier_save_is(
    two: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, (first, second) = tmp_path / "saved", two
    lrcompile.save(first, target)
    renames, real = iter(range(9)), os.rename

    def rename(a: Any, b: Any) -> None:
        if next(renames):  # dead after the first: nothing more happens on the disk
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(folder_module.shutil, "rmtree", lambda *a, **k: None)
        with pytest.raises(KeyboardInterrupt):
            lrcompile.save(second, target)
    with pytest.raises(StateError, match="interrupted between two renames") as error:
        lrcompile.load(target, Shared())
    kept = re.search(r"whole in (\S+)$", str(error.value))
    assert kept and torch.equal(lrcompile.load(kept[1], Shared())(*IDS), first(*IDS))


KILLED = """
import sys, torch, lrcompile
model = torch.load(sys.argv[2], weights_only=False)
n = 0
while True:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(n)
    lrcompile.save(model, sys.argv[1])
    if n == 0:
        print("ready", flush=True)
    n += 1
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    target, pickled = tmp_path / "saved", tmp_path / "model.pt"
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
    torch.save(lrcompile.adopt(model, Recipe(rank=64), (torch.zeros(1, 256),)), pickled)

    def load() -> None:
        model = lrcompile.load(target, nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)]))
        values = {v.item() for p in model.parameters() for v in (p.min(), p.max())}
        assert len(values) == 1, values  # every tensor of one and the same save

    for delay in (0.0, 0.023):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(target), str(pickled)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(0.05 + delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        if not target.exists():  # between the two renames: the earlier one is whole beside it
            with pytest.raises(StateError, match="interrupted") as error:
                load()
            os.rename(str(error.value).rpartition(" ")[2], target)
        assert tuple(sorted(p.name for p in target.iterdir())) == FILES
        load()
    lrcompile.save(torch.load(pickled, weights_only=False), target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "saved"]  # what the killed ones left is gone


def test_leftovers_are_removed_unless_someone_holds_them_or_they_are_anothers(
    two: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(*names: str) -> list[Path]:
        folders = [tmp_path / name for name in names]
        for folder in folders:
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half")
        return folders

    stale, running = leave(".saved.aaaaaaaa.partial", ".saved.bbbbbbbb.partial")
    others = leave(".saved.v2.aaaaaaaa.partial", ".saved2.aaaaaaaa.partial", "saved.aaaaaaaa.partial")
    (replaced,) = leave(".saved.aaaaaaaa.replaced")
    handle = os.open(running, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with monkeypatch.context() as patch:
            patch.setattr(folder_module, "save_file", lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                lrcompile.save(two[0], tmp_path / "saved")
        assert not stale.exists() and replaced.exists(), "the earlier save stays until a later one is whole"
        lrcompile.save(two[0], tmp_path / "saved")
        lrcompile.save(two[1], tmp_path / "saved")
    finally:
        os.close(handle)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "saved", running, *others])

    def without_locks(*args: Any) -> None:
        raise OSError(38, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", without_locks)
        lrcompile.save(two[0], tmp_path / "saved")
    assert running.exists() and f"{running} may be left of an interrupted save" in caplog.text
    lrcompile.save(two[0], tmp_path / "saved")
    assert not running.exists()
    assert torch.equal(lrcompile.load(tmp_path / "saved", Shared())(*IDS), two[0](*IDS))


def test_a_folder_that_another_save_took_for_a_leftover_is_made_again(
    two: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = folder_module.tempfile.mkdtemp, []

    def mkdtemp(**kwargs: Any) -> str:
        made.append(real(**kwargs))
        if len(made) == 1:  # before it could be locked
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(folder_module.tempfile, "mkdtemp", mkdtemp)
    lrcompile.save(two[0], tmp_path / "saved")
    assert len(made) == 2 and [p.name for p in tmp_path.iterdir()] == ["saved"]
