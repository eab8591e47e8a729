"""Seconds and memory of each rank to start GPT-2 1.5B from its config: built and adopted on `meta`, sharded, materialised.

Two ranks in two processes over gloo. Rank d/4 as in the reference point; the weights are drawn, their singular value
decompositions divided between the ranks. Memory is the peak of the whole process, beside the bytes of the dense model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor

import lrcompile.train.build as building
import lrcompile.train.materialise as materialising
from lrcompile import Recipe
from lrcompile.bench.llm import GPT2_1_5B, GPT2_TINY
from lrcompile.bench.results import apart, load, write
from lrcompile.train.build import build
from lrcompile.train.meter import peak_memory
from lrcompile.train.parallel import mesh, parallelise
from lrcompile.words import size

RANKS = 2
PARTS = ("plan", "build and adopt, all else", "shard", "draw", "decompose", "hand out and fill")


def run(*, quick: bool = False, out: Path | None = None) -> None:
    """Print where the time goes, and the peak memory of each rank.

    Args:
        quick: a tiny GPT-2.
        out: folder for materialise-MACHINE.json; None: print only.
    """
    before = load()
    with TemporaryDirectory(prefix="lrcompile-bench-") as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps(GPT2_TINY if quick else GPT2_1_5B), encoding="utf-8")
        ranks = apart(start, [(str(config), rank, RANKS, f"{folder}/store") for rank in range(RANKS)])
    dense = ranks[0]["dense_bytes"]
    console = Console()
    console.print(
        f"GPT-2 of {dense / 4e9:.2f}B parameters, fp32, {ranks[0]['parameters'] / 1e9:.2f}B after adoption at rank d/4; "
        f"{RANKS} ranks of {ranks[0]['threads']} threads on one machine, load {before} at the start",
        highlight=False,
    )
    table = Table(
        "figure",
        *(f"rank {rank}" for rank in range(RANKS)),
        title="materialise: seconds on the wall (CPU seconds), bytes",
    )
    for part in PARTS:
        table.add_row(part, *(_told(r["wall"][part], r["cpu"][part]) for r in ranks))
    table.add_row("together", *(_told(sum(r["wall"].values()), sum(r["cpu"].values())) for r in ranks))
    table.add_row("its shards", *(size(r["shard_bytes"]) for r in ranks))
    table.add_row("peak memory of the process", *(size(r["peak"]) for r in ranks))
    table.add_row("of that libraries, before the start", *(size(r["before"]) for r in ranks))
    table.add_row("the dense model", *(size(dense) for _ in ranks))
    table.add_row("peak over the dense model", *(f"{r['peak'] / dense:.2f}" for r in ranks))
    console.print(table)
    write(out, "materialise", {"load_before": before, "ranks": ranks})


def start(config: str, rank: int, size: int, store: str) -> dict[str, Any]:
    """What one rank does, in a process of its own; seconds by part, bytes."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    before = peak_memory("cpu")
    clock = _Clock()
    with clock.calls("plan", building, "plan"), clock.inside("build"):
        built = build(config, Recipe.pretrain(rank_ratio=0.25))
    dense_bytes = sum(p.numel() * 4 for p in building.load_source(config)[0].parameters())
    parameters = sum(p.numel() for p in built.model.parameters())
    with clock.inside("shard"):
        parallelise(built.model, built.blocks, over=mesh("cpu"))
    dist.barrier()
    with (
        clock.calls("draw", built.values, "unit"),
        clock.calls("decompose", materialising, "parameters"),
        clock.inside("all"),
    ):
        materialising.materialise(built, torch.device("cpu"))
        dist.barrier()
    held = [p.to_local() if isinstance(p, DTensor) else p for p in built.model.parameters()]
    found = {
        "wall": _parts(clock.wall),
        "cpu": _parts(clock.cpu),
        "before": before,
        "peak": peak_memory("cpu"),
        "dense_bytes": dense_bytes,
        "parameters": parameters,
        "shard_bytes": sum(p.numel() * p.element_size() for p in held),
        "finite": all(bool(torch.isfinite(p).all()) for p in held),
        "threads": torch.get_num_threads(),
    }
    dist.destroy_process_group()
    return found


def _parts(seconds: dict[str, float]) -> dict[str, float]:
    """By PARTS; what is handed out is waited for too."""
    rest = {
        PARTS[1]: seconds["build"] - seconds["plan"],
        PARTS[5]: seconds["all"] - seconds["draw"] - seconds["decompose"],
    }
    return {part: rest.get(part, seconds.get(part, 0.0)) for part in PARTS}


def _told(wall: float, cpu: float) -> str:
    return f"{wall:.1f} ({cpu:.1f})"


class _Clock:
    """Seconds on the wall and of this process's processor time, by part."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Add those of a with-block."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall[part] = self.wall.get(part, 0.0) + time.perf_counter() - wall
            self.cpu[part] = self.cpu.get(part, 0.0) + time.process_time() - cpu

    @contextmanager
    def calls(self, part: str, where: Any, name: str) -> Iterator[None]:
        """Add those of each call of where.name that is made in a with-block."""
        plain = getattr(where, name)

        def timed(*args: Any, **keywords: Any) -> Any:
            with self.inside(part):
                return plain(*args, **keywords)

        setattr(where, name, timed)
        try:
            yield
        finally:
            setattr(where, name, plain)
