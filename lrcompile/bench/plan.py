"""Seconds and memory to plan Llama-2-7B from its config, on the meta device: no weights anywhere."""

from __future__ import annotations

import resource
import time

import torch
from rich.console import Console
from rich.table import Table

import lrcompile


def run(*, quick: bool = False) -> None:
    """Build the model on meta, plan it, and print seconds and the peak memory of this process."""
    from transformers import AutoModelForCausalLM, LlamaConfig  # the extra "hf"

    config = LlamaConfig(num_hidden_layers=2 if quick else 32)  # the other defaults are Llama-2-7B's
    start = time.perf_counter()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    built = time.perf_counter()
    ids = torch.zeros(1, 128, dtype=torch.int64, device="meta")
    plan = lrcompile.plan(model, {"input_ids": ids, "use_cache": False})
    done = time.perf_counter()
    before, after = plan.parameters
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    table = Table("figure", "value", title=f"plan: Llama-2 of {before / 1e9:.2f}B parameters on meta")
    table.add_row("build the model, seconds", f"{built - start:.1f}")
    table.add_row("plan, seconds", f"{done - built:.1f}")
    table.add_row("peak memory of the process, MiB", f"{peak:.0f}")
    table.add_row("linear weights", f"{len(plan.adopted)} of {sum(bool(e.tokens) for e in plan.entries)} become pairs")
    table.add_row("parameters", f"{before:,} -> {after:,}")
    Console().print(table)
