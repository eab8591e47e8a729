"""Checkpoints in one process: bit for bit, committed whole, and refused with the reason where anything was done to them."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from lrcompile.errors import TrainError
from lrcompile.train import checkpoint as checkpoint_module
from lrcompile.train import stored as stored_module
from lrcompile.train.checkpoint import Checkpoints
from lrcompile.weights.folder import checksum

from .checkpoint_ranks import same

FILE = "shard-00001-model-00001-of-00001.safetensors"


def tensors(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, generator=g)
    return {
        "weight": weight,
        "tied": weight,
        "transposed": torch.randn(4, 6, generator=g).t(),
        "part": torch.randn(9, 4, generator=g)[2:5, 1:],
        "half": torch.randn(7, generator=g).bfloat16(),
        "packed": torch.randint(0, 256, (11,), dtype=torch.uint8, generator=g),
        "count": torch.tensor(2**40 + seed),
        "step": torch.tensor(float(seed)),
        "flags": torch.tensor([True, False]),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
        "none": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(3, generator=g)),
    }


def zeros() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield checkpoints
    checkpoints.close()


@pytest.fixture
def saved(run: Checkpoints) -> Path:
    run.save(7, tensors(), {"step": 7})
    run.wait()
    path = run.latest()
    assert path is not None and path.name == "step-00000007"
    return path


def refused(run: Checkpoints, path: Path, said: str, given: dict[str, Tensor] | None = None) -> None:
    """Nothing is touched, and the reason is told."""
    before = zeros() if given is None else given
    after = {name: tensor.clone() for name, tensor in before.items()}
    with pytest.raises(TrainError, match=said):
        run.load(path, after)
    assert same(before, after)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_bit_for_bit(tmp_path: Path, asynchronous: bool) -> None:
    run = Checkpoints(tmp_path / "a" / "b", asynchronous=asynchronous)
    assert run.latest() is None
    told: dict[str, Any] = {"step": 3, "losses": [0.1, 1e-300], "name": "é", "none": None}
    given = tensors()
    with_keys = {**told, "keys": {2: "two", 10: "ten"}}
    run.save(3, given, with_keys)
    with_keys.clear()
    # What happens to what was given from here on isn't in the checkpoint.
    with torch.no_grad():
        for tensor in given.values():
            tensor.zero_()
    run.close()
    again, filled = Checkpoints(tmp_path / "a" / "b"), zeros()
    filled["parameter"].requires_grad_()
    latest = again.latest()
    assert latest is not None and again.load(latest, filled) == {**told, "keys": {"2": "two", "10": "ten"}}
    assert same(filled, tensors())
    again.close()


def test_a_file_is_no_larger_than_it_may_be(run: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_module, "FILE_BYTES", 64)
    run.save(1, tensors(), {})
    run.wait()
    path = run.dir / "step-00000001"
    assert len(list(path.glob("*.safetensors"))) > 4
    filled = zeros()
    run.load(path, filled)
    assert same(filled, tensors())


def test_the_last_are_kept(run: Checkpoints) -> None:
    for step in (1, 2, 10, 100000000, 100000001):
        run.save(step, tensors(step), {"at": step})
    run.wait()
    assert sorted(os.listdir(run.dir)) == ["step-100000000", "step-100000001"]
    filled, latest = zeros(), run.latest()
    assert latest is not None and run.load(latest, filled) == {"at": 100000001}
    assert same(filled, tensors(100000001))
    with pytest.raises(TrainError, match="keep at least 1"):
        Checkpoints(run.dir, keep=0)


def test_the_same_step_again_and_an_earlier_one(run: Checkpoints, saved: Path) -> None:
    run.save(7, tensors(1), {"again": True})
    run.wait()
    filled = zeros()
    assert run.load(saved, filled) == {"again": True} and same(filled, tensors(1))
    with pytest.raises(TrainError, match="step-00000007 is of a later step"):
        run.save(6, tensors(), {})
    assert os.listdir(run.dir) == ["step-00000007"]


def test_what_killed_saves_left_is_cleared(run: Checkpoints, saved: Path) -> None:
    run.close()
    dir = run.dir
    for name in (".step-00000008.partial", ".step-00000003.removed", ".step-00000007.replaced", ".kept", "mine"):
        (dir / name).mkdir()
        (dir / name / "file").write_text("x")
    # Killed between the two renames of a replacement: the only copy gets its name back.
    os.rename(saved, dir / ".step-00000009.replaced")
    shutil.copytree(dir / ".step-00000009.replaced", saved)
    again = Checkpoints(dir)
    assert sorted(os.listdir(dir)) == [".kept", "mine", "step-00000007", "step-00000009"]
    again.close()


def test_one_run_at_a_time_saves(run: Checkpoints, saved: Path) -> None:
    (run.dir / ".step-00000008.partial").mkdir()
    other = Checkpoints(run.dir)
    assert (run.dir / ".step-00000008.partial").exists()  # it may be being written
    filled = zeros()
    other.load(saved, filled)
    assert same(filled, tensors())
    with pytest.raises(TrainError, match="another run saves to"):
        other.save(9, tensors(), {})
    run.close()
    other.save(9, tensors(), {})
    other.close()
    assert sorted(os.listdir(run.dir)) == ["step-00000007", "step-00000009"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(extra=torch.ones(2)), "it holds no 'extra'"),
        (lambda t: t.pop("half"), "it holds 'half', which nothing asks for"),
        (lambda t: t.update(weight=torch.zeros(3, 5)), r"'weight' is \(5, 3\) there, and \(3, 5\) here"),
        (lambda t: t.update(half=torch.zeros(7)), "'half' is torch.bfloat16 there, and torch.float32 here"),
        (lambda t: t.update(step=torch.zeros(1)), r"'step' is \(\) there, and \(1,\) here"),
    ],
)
def test_another_models_tensors(run: Checkpoints, saved: Path, change: Any, said: str) -> None:
    given = zeros()
    change(given)
    refused(run, saved, said, given)


def test_some_of_the_tensors_if_asked(run: Checkpoints, saved: Path) -> None:
    filled = {"weight": torch.zeros(5, 3)}
    run.load(saved, filled, strict=False)
    assert torch.equal(filled["weight"], tensors()["weight"])


def test_what_no_checkpoint_can_hold(run: Checkpoints) -> None:
    from torch.nested import nested_tensor_from_jagged as jagged

    bad: dict[str, Any] = {
        "number": (3, "number is no tensor but int"),
        "far": (torch.empty(2, device="meta"), "far is on the meta device"),
        "sparse": (torch.eye(2).to_sparse(), "sparse is a Tensor that safetensors can't hold"),
        "subclass": (jagged(torch.ones(4), torch.tensor([0, 1, 4])), "subclass is a NestedTensor"),
    }
    for name, (value, said) in bad.items():
        with pytest.raises(TrainError, match=said):
            run.save(1, {name: value}, {})
    with pytest.raises(TrainError, match="not JSON serializable"):
        run.save(1, {}, {"x": object()})
    assert os.listdir(run.dir) == []


# --- damage and forgery -----------------------------------------------------------------------------------------------


def test_truncated_altered_and_missing(run: Checkpoints, saved: Path) -> None:
    whole = (saved / FILE).read_bytes()
    for place in {0, 8, 9, 500, len(whole) - 1}:
        (saved / FILE).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused(run, saved, f"{FILE} was altered since it was saved: its checksum doesn't match; copy it again")
    for cut in (b"", whole[:-1], whole + b"\0"):
        (saved / FILE).write_bytes(cut)
        refused(run, saved, f"{FILE} is truncated or altered: {len(cut)} of {len(whole)} bytes")
    (saved / FILE).unlink()
    refused(run, saved, f"lacks {FILE}; copy the whole directory again")
    (saved / FILE).write_bytes(whole)
    shutil.copy(saved / FILE, saved / "more.safetensors")
    refused(run, saved, "more.safetensors is not of this checkpoint; remove it")
    (saved / "more.safetensors").unlink()
    run.load(saved, zeros())
    refused(run, saved.with_name("step-00000008"), "there is no checkpoint")


def test_a_manifest_of_which_a_byte_is_altered(run: Checkpoints, saved: Path) -> None:
    path = saved / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        refused(run, saved, "altered|not saved by this version")
    for text in (b"", whole[:-5], b"[]", b"[" * 100000, b"\xff"):
        path.write_bytes(text)
        refused(run, saved, "altered|not saved by this version")
    path.unlink()
    refused(run, saved, "lacks manifest.json")


def forged(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest altered, its checksum made right again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["checksum"] = checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        *[lambda m, k=k: m.pop(k) for k in ("format", "step", "world", "told", "files")],
        lambda m: m.update(format="lrcompile-checkpoint/2"),
        lambda m: m.update(step=-1),
        lambda m: m.update(step="7"),
        lambda m: m.update(told=[]),
        lambda m: m.update(files=[FILE]),
        lambda m: m["files"].update({FILE: [True, "x"]}),
        lambda m: m["files"].update({FILE: {"bytes": 3}}),
        lambda m: m["files"].update({"../" + FILE: m["files"].pop(FILE)}),
        lambda m: m["files"].update({"/dev/zero": m["files"].pop(FILE)}),
        lambda m: m["files"].update({"a\0.safetensors": m["files"].pop(FILE)}),
        lambda m: m["files"].update({".metadata": m["files"].pop(FILE)}),
        lambda m: m["files"].pop(FILE),
    ],
)
def test_a_forged_manifest(run: Checkpoints, saved: Path, change: Any) -> None:
    forged(saved, change)
    refused(
        run, saved, "not saved by this version|lacks a part|is no file that lrcompile writes|not of this checkpoint"
    )


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_ever_opened(run: Checkpoints, saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    names = (".metadata", "__0_0.distcp", "__0.metadata", "model.pt")
    for name in names:
        (saved / name).write_bytes(bomb)
    filled = zeros()
    run.load(saved, filled)
    assert same(filled, tensors())
    torch.save(Bomb(mark), saved / FILE)
    forged(saved, lambda m: m["files"].update({FILE: kept(saved / FILE)}))
    refused(run, saved, "SafetensorError")
    (saved / FILE).write_bytes(bomb)
    forged(saved, lambda m: m["files"].update({FILE: kept(saved / FILE)}))
    refused(run, saved, "SafetensorError")
    (saved / "manifest.json").write_bytes(bomb)
    refused(run, saved, "altered")
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()


def kept(path: Path) -> list[Any]:
    return [path.stat().st_size, checkpoint_module.sha256(path)]


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_by_the_next_call(
    run: Checkpoints, saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    caplog.set_level(logging.CRITICAL)
    with monkeypatch.context() as patched:
        patched.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)
        run.save(8, tensors(1), {})
        with pytest.raises(TrainError, match="step 8 can't be saved to .*: No space left on device: make room"):
            run.save(9, tensors(1), {})
    with monkeypatch.context() as patched:
        patched.setattr("lrcompile.train.committed.flush", full)
        run.save(8, tensors(1), {})
        with pytest.raises(TrainError, match="step 8 can't be saved to .*: No space left on device"):
            run.wait()
    assert os.listdir(run.dir) == ["step-00000007"]
    run.load(saved, zeros())
    run.save(9, tensors(1), {})  # there is room again
    run.wait()
    assert run.latest() == run.dir / "step-00000009"


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root mounts")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        run = Checkpoints(disk / "run", keep=3)
        small, large = {"a": torch.ones(1000)}, {"a": torch.ones(1 << 19)}
        run.save(1, small, {})
        run.save(2, large, {})
        with pytest.raises(TrainError, match="step 2 can't be saved to .*No space left on device: make room"):
            run.wait()
        assert os.listdir(run.dir) == ["step-00000001"]
        filled = {"a": torch.zeros(1000)}
        run.load(run.dir / "step-00000001", filled)
        assert torch.equal(filled["a"], small["a"])
        run.save(2, small, {})
        run.close()
        assert sorted(os.listdir(run.dir)) == ["step-00000001", "step-00000002"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
