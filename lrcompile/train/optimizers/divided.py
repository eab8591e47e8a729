"""Optimizers that need whole matrices, when FSDP2 has cut the matrices into rows and given each rank some.

The work is divided: of every `world` jobs, each rank is the owner of one. All ranks send their rows of a job's matrices to
its owner, the owner computes, and sends each rank its rows of the result: two all-to-alls for `world` jobs. Each row
travels to one rank and back, where an all-gather would send it to all; and the owner computes what one process would, from
the same numbers, so a run doesn't depend on the number of ranks but for the rounding of its gradients. A rank may hold no
row at all, as in a factor whose rank is less than the number of ranks. State stays cut as the parameters are.

With HSDP each replica divides the work among its own ranks, and all replicas compute the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from lrcompile.errors import TrainError


class Job(ABC):
    """Work on matrices of which one rank must see all rows.

    Attributes:
        matrices: the parameters; (rows, columns) each, plain or sharded on dimension 0.
        widths: columns of each result.
    """

    matrices: tuple[torch.Tensor, ...]
    widths: tuple[int, ...]

    @abstractmethod
    def load(self) -> list[torch.Tensor]:
        """The rows here of what the owner needs: a float32 (rows here, any columns) for each matrix. Called once a step."""

    @abstractmethod
    def work(self, whole: list[torch.Tensor]) -> list[torch.Tensor]:
        """From all rows of what was loaded, all rows of the results: float32 (rows, width) for each matrix."""

    @abstractmethod
    def store(self, rows: list[torch.Tensor]) -> None:
        """Use the rows here of the results."""


class Rows(NamedTuple):
    """How the rows of a parameter lie on the ranks of a group.

    Attributes:
        group: the ranks; None where each has all rows.
        counts: rows on each rank.
        rank: of this process in the group.
    """

    group: dist.ProcessGroup | None
    counts: list[int]
    rank: int

    @classmethod
    def of(cls, parameter: torch.Tensor) -> Rows:
        """The layout of a plain tensor, or of a DTensor as `fully_shard` makes it.

        Raises:
            TrainError: it is sharded on another dimension, or over several.
        """
        rows = parameter.shape[0]
        if not isinstance(parameter, DTensor):
            return cls(None, [rows], 0)
        cut = [(i, p) for i, p in enumerate(parameter.placements) if not p.is_replicate()]
        if not cut:
            return cls(None, [rows], 0)
        axis, placement = cut[0]
        if len(cut) > 1 or type(placement) is not Shard or placement.dim != 0:
            raise TrainError(
                f"an orthogonalised optimizer takes parameters sharded by rows over one mesh dimension, and one of shape "
                f"{tuple(parameter.shape)} has placements {parameter.placements}; use fully_shard without a "
                "shard_placement_fn and without tensor parallelism, or optimizer adamw"
            )
        world = parameter.device_mesh.size(axis)
        most = -(-rows // world)
        counts = [max(0, min(most, rows - rank * most)) for rank in range(world)]
        return cls(parameter.device_mesh.get_group(axis), counts, parameter.device_mesh.get_local_rank(axis))

    @property
    def here(self) -> tuple[int, int]:
        """First row here, and the one after the last."""
        first = sum(self.counts[: self.rank])
        return first, first + self.counts[self.rank]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def alike(rows: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor (rows here, ...) as state of a parameter: a DTensor cut as the parameter is, so that it can be resharded."""
    if not isinstance(parameter, DTensor):
        return rows
    shape = torch.Size((parameter.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


def divide(jobs: Sequence[Job]) -> None:
    """Do the jobs, those on sharded matrices divided among the ranks. Every rank of a group must be given the same ones.

    Raises:
        TrainError: the matrices of one job are on different meshes, or sharded in another way than by rows.
    """
    shared: dict[dist.ProcessGroup, list[Job]] = {}
    for job in jobs:
        groups = {Rows.of(m).group for m in job.matrices}
        if len(groups) > 1:
            shapes = ", ".join(str(tuple(m.shape)) for m in job.matrices)
            raise TrainError(
                f"the sides of a pair, {shapes}, are sharded over different ranks; fully_shard one module with both"
            )
        group = groups.pop()
        if group is None:
            job.store(job.work(job.load()))
        else:
            shared.setdefault(group, []).append(job)
    for group, theirs in shared.items():
        # Jobs of a size side by side: all owners of a round are busy as long.
        ordered = sorted(theirs, key=lambda job: [m.shape for m in job.matrices])
        world = dist.get_world_size(group)
        for first in range(0, len(ordered), world):
            _round(ordered[first : first + world], group)


def _round(jobs: Sequence[Job], group: dist.ProcessGroup) -> None:
    """At most as many jobs as ranks, the i-th done by rank i."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    layouts = [[Rows.of(m).counts for m in job.matrices] for job in jobs]  # [job][matrix][rank]
    loaded = [job.load() for job in jobs]
    mine = layouts[rank] if rank < len(jobs) else []
    widths = [block.shape[1] for block in loaded[rank]] if mine else []
    spare: list[list[torch.Tensor]] = [[] for _ in range(world - len(jobs))]  # ranks that own nothing this round
    due = [[(n[q], width) for n, width in zip(mine, widths, strict=True)] for q in range(world)]
    device = loaded[0][0].device
    pieces = _exchange(loaded + spare, due, group, device)  # [rank][matrix]
    results: list[list[torch.Tensor]] = [[] for _ in range(world)]
    if mine:
        done = jobs[rank].work([torch.cat(rows) for rows in zip(*pieces, strict=True)])
        results = [list(rows) for rows in zip(*(d.split(n) for d, n in zip(done, mine, strict=True)), strict=True)]
    here = [
        [(n[rank], w) for n, w in zip(layout, job.widths, strict=True)]
        for job, layout in zip(jobs, layouts, strict=True)
    ]
    back = _exchange(results, here + [[] for _ in spare], group, device)
    for job, rows in zip(jobs, back[: len(jobs)], strict=True):
        job.store(rows)


def _exchange(
    send: Sequence[Sequence[torch.Tensor]],
    due: Sequence[Sequence[tuple[int, int]]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[torch.Tensor]]:
    """All-to-all: float32 matrices for each rank -> the matrices from each rank, of the shapes that are due from it."""
    flat = [block.reshape(-1) for blocks in send for block in blocks]
    out = torch.cat(flat) if flat else torch.empty(0, device=device)
    outgoing = [sum(block.numel() for block in blocks) for blocks in send]
    incoming = [sum(rows * width for rows, width in shapes) for shapes in due]
    got = torch.empty(sum(incoming), device=device)
    dist.all_to_all_single(got, out, incoming, outgoing, group=group)
    pieces = iter(got.split([rows * width for shapes in due for rows, width in shapes]))
    return [[next(pieces).view(rows, width) for rows, width in shapes] for shapes in due]


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What a closure returns, computed with gradients, as a step of torch's begins; None where there is no closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Divided(torch.optim.Optimizer, ABC):
    """An optimizer whose step is jobs, which are divided among the ranks; its state stays float32, whatever the parameters."""

    @abstractmethod
    def jobs(self) -> Iterator[Job]:
        """The jobs of one step, the same on every rank of a group."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure does."""
        loss = evaluated(closure)
        divide(list(self.jobs()))
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, but state keeps its dtype (torch's casts it to the parameter's) and isn't shared with what was given."""
        super().load_state_dict(dict(state_dict))
        parameters = list(chain.from_iterable(group["params"] for group in self.param_groups))
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                saved = state_dict["state"][number]
                self.state[parameter] = {k: v.detach().clone().to(parameter.device) for k, v in saved.items()}
