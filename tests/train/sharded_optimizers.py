"""One rank of a test (test_optimizers.py): `python sharded_optimizers.py RANK WORLD STORE REPLICAS NAMES...`.

Each optimizer moves a sharded model and a whole one, which must stay the same. Prints what it checked.
"""

from __future__ import annotations

import copy
import functools
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lrcompile
from lrcompile.train.optimizers import optimizers

RANK = 2  # of the pairs: fewer than ranks where there are three
WIDTH = 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 31)
        self.down = nn.Linear(31, WIDTH, bias=False)
        self.dense = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dense(self.down(F.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 17, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@functools.cache
def _made() -> nn.Module:
    torch.manual_seed(0)
    ids = (torch.zeros(1, 3, dtype=torch.long),)
    return lrcompile.adopt(Model(), lrcompile.Recipe(rank=RANK, exclude=("*dense",)), ids)


def make() -> nn.Module:
    return copy.deepcopy(_made())


def sharded(mesh: DeviceMesh) -> nn.Module:
    model = make()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def same(whole: nn.Module, cut: nn.Module, tolerance: float) -> float:
    worst = 0.0
    for (name, p), q in zip(whole.named_parameters(), cut.parameters(), strict=True):
        off = (p.detach() - q.full_tensor()).abs().max().item()
        assert off <= tolerance, f"{name} {tuple(p.shape)} is off by {off}"
        worst = max(worst, off)
    return worst


def train(name: str, mesh: DeviceMesh, rank: int, world: int) -> float:
    """Five steps, each rank with its share of the batch."""
    whole, cut = make(), sharded(mesh)
    given = {"lr": 0.01, "factor_lr": 0.05 if name == "spectron" else None, "product_decay": 0.1}
    pairs = [optimizers(m, name, **given) for m in (whole, cut)]
    for step in range(5):
        ids = torch.randint(0, 17, (12, 6), generator=torch.Generator().manual_seed(step))
        for model, mine, theirs in ((whole, ids, pairs[0]), (cut, ids.chunk(world)[rank], pairs[1])):
            F.cross_entropy(model(mine).flatten(0, 1), mine.roll(1, 1).flatten()).backward()
            for optimizer in theirs:
                optimizer.step()
                optimizer.zero_grad()
    moved = max(
        (p - q).detach().abs().max().item() for p, q in zip(whole.parameters(), make().parameters(), strict=True)
    )
    assert moved > 0.01
    for optimizer in pairs[1]:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                assert isinstance(value, torch.Tensor)
                if key != "step":
                    assert isinstance(value, DTensor) and value.placements == p.placements
                    assert value.to_local().shape[0] == p.to_local().shape[0]
    return same(whole, cut, 2e-5)


def to_the_bit(name: str, mesh: DeviceMesh) -> None:
    """Given the same gradients, the same parameters and state."""
    whole, cut = make(), sharded(mesh)
    ours = optimizers(whole, name, lr=0.01, product_decay=0.1)[0]
    theirs = optimizers(cut, name, lr=0.01, product_decay=0.1)[0]
    torch.manual_seed(1)
    for _ in range(3):
        for p, q in zip(whole.parameters(), cut.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = rows_of(p.grad, q)
        ours.step()
        theirs.step()
    assert same(whole, cut, 0.0) == 0.0
    for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
        for key in a:
            assert torch.equal(a[key], b[key].full_tensor()), key
    state = copy.deepcopy(theirs.state_dict())
    again = optimizers(cut, name, lr=0.01)[0]
    again.load_state_dict(state)
    for a, b in zip(theirs.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(a[key].to_local(), b[key].to_local()) for key in a)


def rows_of(whole: torch.Tensor, like: DTensor) -> DTensor:
    axis = len(like.placements) - 1
    world, rank = like.device_mesh.size(axis), like.device_mesh.get_local_rank(axis)
    chunks = list(whole.chunk(world))
    mine = chunks[rank] if rank < len(chunks) else whole[:0]
    assert mine.shape == like.to_local().shape
    return DTensor.from_local(
        mine.clone(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def main(rank: int, world: int, store: str, replicas: int, *names: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    for name in [name for name in names if not name.startswith("adamw")]:
        to_the_bit(name, mesh)
    for name in names:
        off = train(name, mesh, rank, world)
        if rank == 0:
            print(f"{name} within {off:.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), *sys.argv[5:])
