"""Seconds and memory of each rank to start GPT-2 1.5B from its config: built and adopted on `meta`, sharded, materialised.

Two ranks in two processes over gloo. Rank d/4 as in the reference point; the weights are drawn, their singular value
decompositions divided between the ranks. Memory is the peak of the whole process, beside the bytes of the dense model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
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
        f"GPT-2 of {dense / 4e9:.2f}B parameters, fp32, {ranks[0]['parameters'] / 1e9:.3f}B after adoption at rank d/4; {RANKS} ranks "
        f"of {ranks[0]['threads']} threads on one machine, load {before} at the start",
        highlight=False,
    )
    table = Table("figure", *(f"rank {rank}" for rank in range(RANKS)), title="materialise")
    for part in PARTS:
        table.add_row(f"{part}, seconds", *(f"{r['seconds'][part]:.1f}" for r in ranks))
    table.add_row("together, seconds", *(f"{sum(r['seconds'].values()):.1f}" for r in ranks))
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
    seconds: dict[str, float] = {}
    with _clocked(seconds, "plan", building, "plan"), _clocked(seconds, "build", None, None):
        built = build(config, Recipe.pretrain(rank_ratio=0.25))
    dense_bytes = sum(p.numel() * 4 for p in building.load_source(config)[0].parameters())
    parameters = sum(p.numel() for p in built.model.parameters())
    with _clocked(seconds, "shard", None, None):
        parallelise(built.model, built.blocks, over=mesh("cpu"))
    dist.barrier()
    with (
        _clocked(seconds, "draw", built.values, "unit"),
        _clocked(seconds, "decompose", materialising, "parameters"),
        _clocked(seconds, "all", None, None),
    ):
        materialising.materialise(built, torch.device("cpu"))
        dist.barrier()
    parts = {
        **{part: seconds[part] for part in ("plan", "shard", "draw", "decompose")},
        "build and adopt, all else": seconds["build"] - seconds["plan"],
        "hand out and fill": seconds["all"] - seconds["draw"] - seconds["decompose"],  # and wait for the other rank
    }
    held = [p.to_local() if isinstance(p, DTensor) else p for p in built.model.parameters()]
    found = {
        "seconds": parts,
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


@contextmanager
def _clocked(seconds: dict[str, float], part: str, where: Any, name: str | None) -> Iterator[None]:
    """Add up the seconds of all calls of where.name made inside, or those of the inside itself."""
    seconds[part] = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **keywords)
            finally:
                seconds[part] += time.perf_counter() - begun

        return call

    if name is None:
        begun = time.perf_counter()
        yield
        seconds[part] = time.perf_counter() - begun
        return
    plain = getattr(where, name)
    setattr(where, name, timed(plain))
    try:
        yield
    finally:
        setattr(where, name, plain)
