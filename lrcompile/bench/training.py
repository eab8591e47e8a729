"""Training steps of whole language models on a GPU: dense through torch.compile against lrcompile at a quarter of the rank.

Both are compiled a block at a time by the training driver's own `parallelise`, in bfloat16 throughout (weights, gradients
and AdamW's moments), with fused AdamW, and stand beside each other on the device, so that steps are taken in turns. The
numbers are random, as only shapes matter here. Peak memory is of each alone: what the other holds is taken off.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lrcompile import Recipe
from lrcompile.bench.llm import (
    GPT2_1_5B,
    GPT2_TINY,
    LLAMA_1B,
    LLAMA_TINY,
    built,
    filled,
    peak_of,
    synchronise,
)
from lrcompile.train.evaluate import summed_loss
from lrcompile.train.measure import flops_per_token
from lrcompile.train.meter import peak_flops
from lrcompile.train.optimizers import optimizers
from lrcompile.train.parallel import parallelise
from lrcompile.words import size

COMPRESSION = 2.64
WARM, MOST = 3, 40  # steps


@dataclass(frozen=True)
class Case:
    """A model to train.

    Attributes:
        name: of the shape.
        config: a config.json.
        recipe: fields of Recipe.pretrain.
        rows, length: sequences a step and tokens of each; rows are halved where memory runs out.
        recompute: activation checkpointing, as parallel.checkpoint.
    """

    name: str
    config: dict[str, Any]
    recipe: dict[str, Any]
    rows: int
    length: int
    recompute: str = "none"


CASES = (
    Case("GPT-2 1.5B", GPT2_1_5B, {"rank_ratio": 0.25}, 8, 1024),
    Case("Llama 1B", LLAMA_1B, {"compression": COMPRESSION}, 4, 2048),
)
TINY = (
    Case("tiny GPT-2", GPT2_TINY, {"rank_ratio": 0.25}, 2, 16),
    Case("tiny Llama", LLAMA_TINY, {"compression": COMPRESSION}, 2, 16, "block"),
)


@dataclass
class Figures:
    """What was measured of one contender; mfu in the FLOPs it does, mfu_dense in those the dense model would do.

    `peak_bytes` are those of tensors, None where the device doesn't tell; `cold` seconds of the first step.
    """

    parameters: int
    seconds: list[float] = field(default_factory=list)
    tokens_per_s: float = 0.0
    mfu: float | None = None
    mfu_dense: float | None = None
    peak_bytes: int | None = None
    cold: float = 0.0
    loss: float = float("nan")


@dataclass
class Compared:
    """A case's figures. `linear` and `whole` tell how many times fewer numbers there are, in linear weights and in all."""

    name: str
    rows: int
    length: int
    recompute: str
    linear: float = 0.0
    whole: float = 0.0
    speed: float = 0.0
    dense: Figures | None = None
    ours: Figures | None = None
    error: str = ""


def compare(device: torch.device, *, quick: bool = False, minutes: float = 1.5) -> Iterator[Compared]:
    """Measure case after case, and print a table of each.

    Args:
        quick: tiny models, not compiled by Inductor: that the measurement runs.
        minutes: of steps, for each case.
    """
    for case in TINY if quick else CASES:
        result = Compared(case.name, case.rows, case.length, case.recompute)
        try:
            _measure(case, result, device, quick, 60 * minutes)
        except Exception as error:  # told, and the next case has its turn
            result.error = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        show(result)
        yield result
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _Trained:
    """A contender: a model on the device, compiled, and its optimizer."""

    def __init__(self, case: Case, recipe: Recipe | None, device: torch.device, quick: bool) -> None:
        made = built(case.config, recipe, torch.bfloat16)
        self.plan, self.device = made.plan, device
        self.flops = flops_per_token(made.model, case.length)
        self.model = filled(made.model, device).train()
        backend = "inductor" if recipe is None else "lrcompile"
        options = None if recipe is None else {"inner": "eager"} if quick else {"kernels": "auto"}
        parallelise(
            self.model,
            made.blocks,
            over=None,
            recompute=case.recompute,
            backend="eager" if quick and recipe is None else backend,
            options=options,
        )
        self.optimizers = optimizers(self.model, "adamw", lr=1e-4)
        self.figures = Figures(sum(p.numel() for p in self.model.parameters()))

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        loss = summed_loss(self.model(input_ids=ids, use_cache=False).logits, ids) / ids.numel()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def timed(self, ids: torch.Tensor) -> float:
        synchronise(self.device)
        start = time.perf_counter()
        self.figures.loss = float(self.step(ids))
        synchronise(self.device)
        return time.perf_counter() - start


def _measure(case: Case, result: Compared, device: torch.device, quick: bool, seconds: float) -> None:
    torch.manual_seed(0)
    dense = _Trained(case, None, device, quick)
    ours = _Trained(case, Recipe.pretrain(**case.recipe), device, quick)
    assert ours.plan is not None
    result.linear, result.whole = ours.plan.asked_compression, dense.figures.parameters / ours.figures.parameters
    result.dense, result.ours = dense.figures, ours.figures
    ids = _warmed(case, result, (dense, ours), device)
    until = time.monotonic() + seconds
    turns = 3 if quick else MOST
    for turn in range(turns):
        order = (dense, ours) if turn % 2 else (ours, dense)
        for one in order:
            one.figures.seconds.append(one.timed(ids))
        if turn >= 4 and time.monotonic() > until:
            break
    peak = peak_flops(device, "bfloat16")
    for one in (dense, ours):
        figures = one.figures
        figures.tokens_per_s = ids.numel() / statistics.median(figures.seconds)
        if peak is not None:
            figures.mfu, figures.mfu_dense = (figures.tokens_per_s * flops / peak for flops in one.flops)
    result.speed = statistics.median(a / b for a, b in zip(dense.figures.seconds, ours.figures.seconds, strict=True))


def _warmed(case: Case, result: Compared, pair: tuple[_Trained, _Trained], device: torch.device) -> torch.Tensor:
    """Compile, fill the optimizers' states, and take the peaks; with fewer rows where memory runs out. The tokens."""
    while True:
        ids = torch.randint(0, case.config["vocab_size"], (result.rows, case.length), device=device)
        try:
            for one in pair:
                one.figures.cold = one.timed(ids)
                for _ in range(WARM - 1):
                    one.step(ids)
            for one, other in (pair, pair[::-1]):
                peak = peak_of(partial(one.step, ids), device)
                one.figures.peak_bytes = peak - _held(other) if peak else None
            return ids
        except torch.OutOfMemoryError:
            if result.rows == 1:
                raise
            result.rows //= 2
        for one in pair:
            one.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()  # else the blocks are compiled for any number of rows


def _held(one: _Trained) -> int:
    """Bytes that a contender holds between its steps."""
    tensors: list[Any] = [*one.model.parameters(), *one.model.buffers()]
    tensors += [t for o in one.optimizers for state in o.state.values() for t in state.values()]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)
    }
    return sum(storages.values())


def show(result: Compared) -> None:
    """Print a case's table."""
    console = Console()
    if result.error or result.dense is None or result.ours is None:
        console.print(f"{result.name} was not measured: {result.error}", highlight=False, markup=False)
        return
    table = Table(
        "figure",
        "dense",
        "lrcompile",
        "ratio",
        title=f"step: {result.name}, {result.rows}x{result.length} tokens, bf16",
    )
    dense, ours = result.dense, result.ours
    table.add_row("tokens/s", f"{dense.tokens_per_s:,.0f}", f"{ours.tokens_per_s:,.0f}", f"{result.speed:.2f}x")
    for label, one, other in (("MFU", dense.mfu, ours.mfu), ("MFU, dense-equivalent", dense.mfu_dense, ours.mfu_dense)):
        if one is not None and other is not None:
            table.add_row(label, f"{one:.1%}", f"{other:.1%}", f"{other / one:.2f}")
    if dense.peak_bytes and ours.peak_bytes:
        ratio = f"{ours.peak_bytes / dense.peak_bytes:.2f}"
        table.add_row("peak memory", size(dense.peak_bytes), size(ours.peak_bytes), ratio)
    table.add_row("parameters", f"{dense.parameters:,}", f"{ours.parameters:,}", f"{result.whole:.2f}x fewer")
    table.add_row("numbers in the linear weights", "", "", f"{result.linear:.2f}x fewer")
    table.add_row("first step, seconds", f"{dense.cold:.1f}", f"{ours.cold:.1f}", "")
    table.add_row("steps, activations recomputed", f"{len(dense.seconds)}, {result.recompute}", "", "")
    console.print(table)
