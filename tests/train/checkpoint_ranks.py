"""What several ranks do with checkpoints, run by test_checkpoint_ranks: `python checkpoint_ranks.py SCENARIO DIRECTORY`.

The ranks are forked from one process that has torch imported and no threads yet, which spares each the seconds of its own.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # DTensor's ops would import it in each of the ranks
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lrcompile.errors import TrainError
from lrcompile.train.checkpoint import Checkpoints


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the bit: NaNs and signed zeros too."""

    def bits(t: Tensor) -> Tensor:
        return t.detach().contiguous().reshape(-1).view(torch.uint8)

    return set(a) == set(b) and all(a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k])) for k in a)


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
        group = dist.new_group(members, backend="gloo")
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


# --- what fails on one rank fails on all ------------------------------------------------------------------------------


def raises(said: str, call: Callable[[], Any]) -> None:
    began = time.monotonic()
    with pytest.raises(TrainError, match=said):
        call()
    assert time.monotonic() - began < 20


def faults(rank: int, dir: Path) -> None:
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
    assert rank or os.listdir(dir / "run") == [first.name]
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


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def save_for_ever(rank: int, dir: Path) -> None:
    """Goes on from the latest checkpoint. In every one, all tensors are filled with the step's number."""
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    tensors: dict[str, Any] = {
        "sharded": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)]),
        "plain": torch.zeros(4),
    }
    run = Checkpoints(dir / "run", keep=2)
    latest, step = run.latest(), 0
    if latest is not None:
        step = run.load(latest, tensors)["step"]
        assert {float(x) for t in gathered(tensors).values() for x in t.flatten()} == {float(step)}
    while True:
        step += 1
        for tensor in tensors.values():
            tensor.fill_(step)
        run.save(step, tensors, {"step": step})
        if rank == 0 and step % 2:
            run.wait()
            with (dir / "reported").open("w") as file:
                file.write(str(step))


def kills(dir: Path) -> None:
    """Ranks that save for ever are killed at random moments, one or both at once; then the latest checkpoint is read."""
    chance, started, steps = random.Random(0), 0, []
    while len(steps) < 12:
        reported = dir / "reported"
        reported.unlink(missing_ok=True)
        children = forked(2, dir / f"store{started}", save_for_ever, dir)
        started += 1
        while not (reported.exists() and reported.read_text()):
            assert not any(os.waitpid(child, os.WNOHANG)[0] for child in children), "it ended by itself"
            time.sleep(0.005)
        time.sleep(chance.random() * 0.15)
        first = chance.randrange(2)
        os.kill(children[first], signal.SIGKILL)
        if chance.random() < 0.5:
            os.kill(children[1 - first], signal.SIGKILL)
        # The one that is left sees the other gone, and ends.
        ended = [os.waitpid(child, 0)[1] for child in children]
        assert os.WTERMSIG(ended[first]) == signal.SIGKILL and all(ended)
        told = int(reported.read_text() or 0)
        run = Checkpoints(dir / "run")
        assert not [name for name in os.listdir(run.dir) if name.startswith(".")]
        latest, filled = run.latest(), {"sharded": torch.zeros(5, 3), "plain": torch.zeros(4)}
        assert latest is not None
        steps.append(run.load(latest, filled)["step"])
        run.close()
        assert {float(x) for t in filled.values() for x in t.flatten()} == {float(steps[-1])}
        assert latest.name == f"step-{steps[-1]:08d}" and steps[-1] >= told, (steps, told)
    assert steps == sorted(set(steps))
    print("steps at the kills:", steps)


# --- ranks ------------------------------------------------------------------------------------------------------------


def forked(world: int, store: Path, function: Callable[..., None], *args: Any) -> list[int]:
    children = []
    for rank in range(world):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
                function(rank, *args)
                dist.destroy_process_group()
                code = 0
            except TrainError as error:
                print(rank, error)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return children


def main(scenario: str, dir: Path) -> None:
    if scenario == "kills":
        kills(dir)
    else:
        world, function, codes = {"reshard": (4, reshard, [0] * 4), "faults": (2, faults, [0, -signal.SIGKILL])}[
            scenario
        ]
        children = forked(world, dir / "store", function, dir)
        left, ended = set(children), {}
        while left:
            child, status = os.wait()
            left.remove(child)
            ended[child] = os.waitstatus_to_exitcode(status)
            if ended[child] == 1:
                for other in left:
                    os.kill(other, signal.SIGKILL)
        assert [ended[child] for child in children] == codes, list(ended.values())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
