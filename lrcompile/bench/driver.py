"""What the training driver costs over a bare loop: the same adopted model, optimizer, micro-batches and clipping, on the CPU.

The driver runs as it does for a user, but for what comes between its steps: instead of evaluations and checkpoints two
bare loops take the same step each, on models and optimizers of their own, with batches held ready. So all three are
measured in turns, the driver by its own meter (data, step and log). The second bare loop tells what the measurement can
tell apart. Where other processes want the cores too, CPU seconds of the process say more than those on the wall. All must
come to the same weights.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from lrcompile.bench.results import load, write
from lrcompile.train import lines
from lrcompile.train.data import Batch, prepare
from lrcompile.train.driver import _Run
from lrcompile.train.optimizers import optimizers
from lrcompile.train.settings import Data, Evaluate, Log, Model, RecipeTable, Run, Save, Schedule
from lrcompile.train.settings import Parallel as How
from lrcompile.train.world import joined

COLD = 5  # steps that warm up


@dataclass(frozen=True)
class Size:
    """A Llama over bytes, and how much of it is trained."""

    width: int = 256
    layers: int = 4
    length: int = 128
    rows: int = 4  # a micro-batch; two make a step
    steps: int = 200


QUICK = Size(width=64, layers=1, length=32, rows=2, steps=8)


@dataclass
class Times:
    """Seconds of each step that was measured, of the driver and both bare loops."""

    driver: list[float] = field(default_factory=list)
    bare: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def over(self) -> float:
        """The driver's over the bare loops', the median of all steps' ratios, minus 1."""
        pairs = zip(self.driver, *self.bare, strict=True)
        return statistics.median(2 * ours / (one + other) for ours, one, other in pairs) - 1

    def resolution(self) -> float:
        """The same of one bare loop over the other: what is no overhead, and measured nevertheless."""
        return statistics.median(one / other for one, other in zip(*self.bare, strict=True)) - 1


@dataclass
class Measured:
    """Seconds on the wall and of the processor, seconds that each step waited for data, and of what model."""

    wall: Times
    cpu: Times
    waited: list[float]
    parameters: int
    compression: float


def run(*, quick: bool = False, out: Path | None = None) -> None:
    """Print the overhead and the share of a step that waits for data.

    Args:
        quick: a tiny model and a few steps, which say nothing about the overhead.
        out: folder for driver-MACHINE.json; None: print only.
    """
    size, before = QUICK if quick else Size(), load()
    with TemporaryDirectory(prefix="lrcompile-bench-") as folder:
        found = measure(size, Path(folder))
    waiting = sum(found.waited) / sum(found.wall.driver)
    console = Console()
    console.print(
        f"Llama of {found.parameters / 1e6:.1f}M parameters at {found.compression:.2f}x, 2 x {size.rows} x {size.length} tokens "
        f"a step, fp32; {size.steps} steps; {torch.get_num_threads()} threads, load {before}",
        highlight=False,
    )
    table = Table("figure", "on the wall", "CPU seconds", title="driver: overhead over a bare loop")
    figures: dict[str, Any] = {"waiting": waiting, "size": vars(size), "parameters": found.parameters}
    for name, times in (("wall", found.wall), ("cpu", found.cpu)):
        bare, driver = statistics.median(sum(times.bare, [])), statistics.median(times.driver)
        figures[name] = {"bare": bare, "driver": driver, "overhead": times.over(), "resolution": times.resolution()}
    both = [figures["wall"], figures["cpu"]]
    table.add_row("bare loop, ms a step", *(f"{f['bare'] * 1e3:.1f}" for f in both))
    table.add_row("driver, ms a step", *(f"{f['driver'] * 1e3:.1f}" for f in both))
    table.add_row("overhead", *(f"{f['overhead']:+.1%}" for f in both))
    table.add_row("one bare loop against the other", *(f"{f['resolution']:+.1%}" for f in both))
    table.add_row("waiting for data", f"{waiting:.2%}", "")
    console.print(table)
    write(out, "driver", figures)


def measure(size: Size, folder: Path) -> Measured:
    """Train, and take the times.

    Args:
        folder: for the data and the run; left as they are.
    """
    run = settings(size, folder)
    with joined(alone=True) as world, ExitStack() as stack:
        found = _Beside(run, world, stack, resume=False)
        found.go()
    told = [e for e in lines.entries(folder / "out" / lines.NAME) if e["kind"] == "step"][COLD:]
    found.wall.driver = [e["seconds"] for e in told]
    parameters = sum(p.numel() for p in found.model.parameters())
    compression = found.built.plan.asked_compression if found.built.plan else 1.0
    return Measured(found.wall, found.cpu, [e["waited"] for e in told], parameters, compression)


def settings(size: Size, folder: Path) -> Run:
    """A run of this size; writes its model's config and its data."""
    config = folder / "config.json"
    config.write_text(json.dumps(_llama(size)), encoding="utf-8")
    words = random.Random(0)
    known = ["".join(words.choices("etaoinshrdlu", k=words.randint(2, 9))) for _ in range(500)]
    texts = [" ".join(words.choices(known, k=words.randint(20, 400))) for _ in range(300)]
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepare([str(source)], folder / "data", "bytes", workers=1)
    return Run(
        model=Model(source=str(config)),
        recipe=RecipeTable(compression=2.64),
        data=Data(
            train=str(next(path.parent for path in sorted((folder / "data").rglob("*.json")))), length=size.length
        ),
        schedule=Schedule(warmup=2),
        parallel=How(precision="float32", compile=False),
        save=Save(every=10**9),
        evaluate=Evaluate(every=10**9),
        log=Log(live=False, every=10**9),
        steps=COLD + size.steps,
        batch=2 * size.rows,
        micro_batch=size.rows,
        out=str(folder / "out"),
    )


def _llama(size: Size) -> dict[str, Any]:
    heads = max(2, size.width // 64)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": size.width,
        "intermediate_size": 11 * size.width // 4,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": size.length,
    }


class _Beside(_Run):
    """The driver, and two bare loops that take each of its steps after it."""

    def go(self) -> None:
        self.wall, self.cpu = Times(), Times()
        self.bare = [_Bare(copy.deepcopy(self.model), self.run) for _ in range(2)]
        self.mark = time.process_time()
        super().go()

    def _after(self) -> bool:
        cpu = time.process_time() - self.mark
        step, rows = self.done - 1, self.run.micro_batch
        if step >= COLD:
            self.cpu.driver.append(cpu)
        batches = [self.sampler.rows(step, i * rows, rows) for i in range(self.micro_batches)]
        rate = self.run.optimizer.lr * self.rate(step)
        order = list(zip(self.bare, self.wall.bare, self.cpu.bare, strict=True))
        for bare, wall, cpus in order if step % 2 else order[::-1]:
            start, mark = time.perf_counter(), time.process_time()
            bare.step(batches, rate)
            if step >= COLD:
                cpus.append(time.process_time() - mark)
                wall.append(time.perf_counter() - start)
        for bare in self.bare:
            self._same(bare)
        self.mark = time.process_time()
        return self.done == self.run.steps  # the end: nothing to save or export

    def _same(self, bare: _Bare) -> None:
        """Both did the same work, or there is nothing to compare."""
        for ours, theirs in zip(self.trained, bare.trained, strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach())


class _Bare:
    """The loop as one writes it in a script that does nothing else."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        chosen = run.optimizer
        self.model, self.clip = model, run.clip
        [self.optimizer] = optimizers(
            model, chosen.name, lr=chosen.lr, betas=chosen.betas, eps=chosen.eps, weight_decay=chosen.weight_decay
        )
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, batches: list[Batch], rate: float) -> float:
        targets = sum(int((batch.targets >= 0).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            logits = self.model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum") / targets
            loss.backward()
            total += float(loss.detach())
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total
