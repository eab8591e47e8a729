"""Checkpoints of several ranks: real processes over gloo, other world sizes, ranks that fail and ranks that die."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lrcompile.errors import TrainError
from lrcompile.train.checkpoint import Checkpoints

from .test_checkpoint import forged, same


def _start(rank: int, function: Callable[..., None], world: int, store: str, args: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    function(rank, *args)
    dist.destroy_process_group()


def on_ranks(world: int, tmp_path: Path, function: Callable[..., None], *args: Any) -> None:
    mp.start_processes(_start, (function, world, str(tmp_path / "store"), args), world, start_method="spawn")


# --- other world sizes ------------------------------------------------------------------------------------------------


def whole() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "even": torch.randn(12, 4, generator=g),
        "uneven": torch.randn(5, 3, generator=g).bfloat16(),
        "thin": torch.randn(2, 7, generator=g),
        "one": torch.randn(1, 4, generator=g),
        "columns": torch.randn(3, 5, generator=g),
        "packed": torch.randint(0, 256, (7,), dtype=torch.uint8, generator=g),
        "replicated": torch.randn(3, 3, generator=g),
        "scalar": torch.tensor(3.25),
        "plain": torch.arange(5),
        "step": torch.tensor(17.0),
    }


def placed(mesh: DeviceMesh, values: dict[str, Tensor], grouped: bool) -> dict[str, Tensor]:
    """The tensors as FSDP2 leaves them on a mesh; `grouped`: shards over its last dimension, replicas over the first."""
    tensors = {}
    for name, value in values.items():
        if name in ("plain", "step"):
            tensors[name] = value.clone()
            continue
        last = Replicate() if name in ("replicated", "scalar") else Shard(1 if name == "columns" else 0)
        tensors[name] = distribute_tensor(value, mesh, [Replicate(), last] if grouped else [last])
    return tensors


def gathered(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}


def reshard(rank: int, dir: Path) -> None:
    """A checkpoint goes from two ranks to one, to three, to two times two, and back to two."""
    values = whole()
    zeros = {name: torch.zeros_like(value) for name, value in values.items()}
    sizes: list[tuple[list[Any], bool]] = [([0, 1], False), ([2], False), ([0, 1, 3], False), ([[0, 1], [2, 3]], True)]
    last: Path | None = None
    for turn, (ranks, grouped) in enumerate([*sizes, sizes[0]]):
        mesh = DeviceMesh("cpu", ranks)
        members = mesh.mesh.flatten().tolist()
        group = dist.new_group(members)
        if rank in members:
            run = Checkpoints(dir / f"turn{turn}", group=group)
            tensors = placed(mesh, values if turn == 0 else zeros, grouped)
            if last is not None:
                assert run.load(last, tensors) == {"turn": turn - 1}
            assert same(gathered(tensors), values), turn
            run.save(1, tensors, {"turn": turn})
            run.close()
        dist.barrier()
        last = dir / f"turn{turn}" / "step-00000001"


def test_any_number_of_ranks(tmp_path: Path) -> None:
    on_ranks(4, tmp_path, reshard, tmp_path)
    run = Checkpoints(tmp_path / "turn0")
    for turn, files in enumerate((2, 1, 3, 4, 2)):
        filled = {name: torch.zeros_like(value) for name, value in whole().items()}
        path = tmp_path / f"turn{turn}" / "step-00000001"
        assert len(list(path.glob("*.safetensors"))) == files  # every rank wrote some
        assert run.load(path, filled) == {"turn": turn} and same(filled, whole())
    # A rank's file is gone and nothing tells of it: the manifest is forged.
    path = tmp_path / "turn2" / "step-00000001"
    gone = sorted(p.name for p in path.glob("*.safetensors"))[1]
    (path / gone).unlink()
    with pytest.raises(TrainError, match=f"lacks {gone}; copy the whole directory again"):
        run.load(path, filled)
    forged(path, lambda m: m["files"].pop(gone))
    with pytest.raises(TrainError, match="parts of 'even' are missing there"):
        run.load(path, filled)
    run.close()


# --- what fails on one rank fails on all ------------------------------------------------------------------------------


def raises(said: str, call: Callable[[], Any]) -> None:
    began = time.monotonic()
    with pytest.raises(TrainError, match=said):
        call()
    assert time.monotonic() - began < 20


def faults(rank: int, dir: Path) -> None:
    torch._C._log_api_usage_once = lambda *_: None
    ones = {"a": torch.ones(8), f"rank{rank}": torch.full((3,), float(rank))}
    run = Checkpoints(dir / "run")
    run.save(1, ones, {"at": 1})
    run.wait()
    first = run.latest()
    assert first is not None
    filled = {name: torch.zeros_like(value) for name, value in ones.items()}
    assert run.load(first, filled) == {"at": 1} and same(filled, ones)

    # Before anything is written.
    raises(r"bad is no tensor but int.*\(rank 1\)", lambda: run.save(2, ones | ({"bad": 1} if rank else {}), {}))  # type: ignore[dict-item]
    odd = {"a": torch.ones(8 + rank)}
    raises(r"a is torch.float32 \(9,\) on rank 1 and torch.float32 \(8,\) on another", lambda: run.save(2, odd, {}))
    # In the background.
    write_data = dcp.HuggingFaceStorageWriter.write_data

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for broken in (0, 1):
        if rank == broken:
            dcp.HuggingFaceStorageWriter.write_data = full  # type: ignore[method-assign]
        run.save(2, ones, {})
        raises(rf"No space left on device: make room.*\(rank {broken}\)|No space left on device: make room", run.wait)
        dcp.HuggingFaceStorageWriter.write_data = write_data  # type: ignore[method-assign]
    assert os.listdir(dir / "run") == [first.name]
    # In loading: one rank asks for what isn't there, or finds what another doesn't.
    raises("it holds no 'more'", lambda: run.load(first, filled | ({"more": torch.ones(1)} if rank else {})))
    raises(
        "it holds 'rank1', which nothing asks for", lambda: run.load(first, {"a": filled["a"], "rank0": torch.ones(3)})
    )
    run.save(2, ones, {})
    run.wait()
    second = run.latest()
    assert second is not None and second != first
    raises("different checkpoints there", lambda: run.load(second if rank else first, filled))
    raises(
        r"there is no checkpoint .*step-00000009 \(rank 1\)",
        lambda: run.load(dir / "run/step-00000009" if rank else first, filled),
    )
    dist.barrier()
    if rank == 0:
        file = sorted(first.glob("*.safetensors"))[1]
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    dist.barrier()
    raises("shard-00002-.* was altered since it was saved", lambda: run.load(first, filled))

    # A rank dies as it writes.
    if rank == 1:
        dcp.HuggingFaceStorageWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    run.save(3, ones, {})
    raises("step 3 can't be saved to ", run.wait)
    raises("another rank is gone", lambda: run.save(4, ones, {}))
    assert run.latest() == second and sorted(os.listdir(dir / "run")) == [first.name, second.name]
    (dir / "done").touch()
    os._exit(0)  # the process group can't be left in peace


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessExitedException, match="process 1 terminated with signal SIGKILL"):
        on_ranks(2, tmp_path, faults, tmp_path)
    assert (tmp_path / "done").exists()


# --- kill -9 ----------------------------------------------------------------------------------------------------------
