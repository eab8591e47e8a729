"""Step and compile time of an adopted model compiled by lrcompile, against the same model written by hand under Inductor.

Both hold the same numbers and compute the same loss; steps are taken in turns, so that a machine's moods hit both. On a
GPU, where there is one, in bf16 and of GPT-2 124M's size; and before that GPT-2 1.5B and Llama 1B against the dense model
(training.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from rich.console import Console
from rich.table import Table
from torch import nn

import lrcompile
from lrcompile.bench.models import GPT, HandPair, Shape
from lrcompile.bench.results import write
from lrcompile.bench.training import compare
from lrcompile.errors import LrcompileError


def run(*, quick: bool = False, out: Path | None = None, minutes: float = 1.5) -> None:
    """Print both times of both, and the ratios ours / by hand; on a GPU first those against the dense model.

    Args:
        quick: small parts, on the CPU too; nothing that says how fast.
        out: folder for step-MACHINE.json; None: print only.
        minutes: of steps, for each model on a GPU; building and compiling come on top.

    Raises:
        LrcompileError: a model could not be measured; the others are, and stand in the file.
    """
    gpu = torch.cuda.is_available()
    figures: dict[str, Any] = {"dense": [], "by_hand": None}
    # The file is written after each part: a command that is stopped leaves what it has.
    if gpu or quick:
        for found in compare(torch.device("cuda" if gpu else "cpu"), quick=quick, minutes=minutes):
            figures["dense"].append(asdict(found))
            write(out, "step", figures)
    else:
        print("GPT-2 1.5B and Llama 1B against the dense models: on a GPU")
    figures["by_hand"] = _against_hand(quick)
    write(out, "step", figures)
    failed = [f"{case['name']}: {case['error']}" for case in figures["dense"] if case["error"]]
    if failed:
        raise LrcompileError("; ".join(failed))


def _against_hand(quick: bool) -> dict[str, Any]:
    """Against the low-rank model written by hand: the medians that were printed, in seconds."""
    torch.manual_seed(0)
    shape = Shape(4, 384, 6, 2048, 256) if not quick else Shape(1, 64, 2, 128, 32)
    rows, steps, compiles = (4, 15, 3) if not quick else (2, 3, 1)
    gpu = torch.cuda.is_available()
    if gpu and not quick:
        shape, rows = Shape(), 8
    place: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {}
    ids = torch.randint(0, shape.vocabulary, (rows, shape.context), device="cuda" if gpu else "cpu")
    ours = GPT(shape).to(**place)
    plan = lrcompile.plan(ours, (ids, ids))
    lrcompile.adopt(ours, plan)
    ranks = {e.key.removesuffix(".weight"): e.rank for e in plan.adopted}
    hand = GPT(shape, lambda name, i, o: HandPair(i, o, ranks[name] or 1)).to(**place)
    _copy(ours, hand)
    backends = {"lrcompile": (ours, "lrcompile"), "by hand": (hand, "inductor")}
    compile_times: dict[str, list[float]] = {name: [] for name in backends}
    step_times: dict[str, list[float]] = {name: [] for name in backends}
    losses = {}
    with torch._inductor.config.patch(force_disable_caches=True):
        for turn in range(compiles + 1):
            torch.compiler.reset()
            steppers = {}
            order = list(backends.items())
            for name, (model, backend) in order if turn % 2 else order[::-1]:
                steppers[name] = _stepper(model, backend, ids)
                start = time.perf_counter()
                losses[name] = steppers[name]()
                compile_times[name].append(time.perf_counter() - start)
            if turn == 0:  # the first compilation of a process pays for Inductor's own start
                for cold in compile_times.values():
                    cold.clear()
                continue
            for _ in range(steps):
                for name, step in steppers.items():
                    start = time.perf_counter()
                    step()
                    step_times[name].append(time.perf_counter() - start)
    where = torch.cuda.get_device_name() if gpu else "CPU"
    table = Table(
        "figure", "lrcompile", "by hand", "ratio", title=f"step: low-rank GPT, {rows}x{shape.context} tokens, {where}"
    )

    figures: dict[str, Any] = {"tokens": ids.numel(), "losses": losses}
    for label, times in (("step, ms", step_times), ("compile and first step, ms", compile_times)):
        a, b = (statistics.median(times[name]) for name in backends)
        figures[label.removesuffix(", ms")] = {"lrcompile": a, "by hand": b}
        table.add_row(label, f"{a * 1e3:.1f}", f"{b * 1e3:.1f}", f"{a / b:.3f}")
    table.add_row("loss of the first step", *(f"{losses[name]:.6f}" for name in backends), "")
    Console().print(table)
    torch.compiler.reset()
    return figures


def _copy(ours: nn.Module, hand: nn.Module) -> None:
    renamed = {}
    for name, p in ours.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        if leaf in ("weight_a", "weight_b"):
            renamed[f"{module}.{'down' if leaf == 'weight_a' else 'up'}.weight"] = p
        elif leaf == "bias" and f"{module}.weight_a" in renamed | dict(ours.named_parameters()):
            renamed[f"{module}.up.bias"] = p
        else:
            renamed[name] = p
    hand.load_state_dict({k: v.detach() for k, v in renamed.items()})


def _stepper(model: nn.Module, backend: str, ids: torch.Tensor) -> Callable[[], float]:
    compiled = torch.compile(model, backend=backend)

    def step() -> float:
        loss = compiled(ids, ids)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step
