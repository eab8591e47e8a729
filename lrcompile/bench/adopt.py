"""Seconds to adopt a GPT-2 124M-shaped model at 2.64x."""

from __future__ import annotations

import time

import torch
from rich.console import Console
from rich.table import Table

import lrcompile
from lrcompile.bench.models import GPT, Shape


def run(*, quick: bool = False) -> None:
    """Adopt once and print seconds, split into planning and computing, and what became of the model."""
    torch.manual_seed(0)
    shape = Shape(layers=2, width=128, heads=2, vocabulary=500) if quick else Shape()
    model = GPT(shape)
    ids = torch.randint(0, shape.vocabulary, (1, 64))
    start = time.perf_counter()
    plan = lrcompile.plan(model, (ids, ids))
    planned = time.perf_counter()
    lrcompile.adopt(model, plan)
    done = time.perf_counter()
    before, after = plan.parameters
    table = Table(
        "figure", "value", title=f"adopt: GPT of {before / 1e6:.0f}M parameters, {torch.get_num_threads()} threads"
    )
    table.add_row("plan, seconds", f"{planned - start:.1f}")
    table.add_row("factorize and install, seconds", f"{done - planned:.1f}")
    table.add_row("in all, seconds", f"{done - start:.1f}")
    table.add_row("linear weights compressed", f"{plan.asked_compression:.2f}x")
    table.add_row("parameters", f"{before:,} -> {after:,}")
    Console().print(table)
