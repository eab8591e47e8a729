"""Files for a phone: their bytes, and the rate of ExecuTorch's runtime on two cores against the dense model's, in one run.

Weights are random, since bytes and rates don't ask for their values. The sizes are of a GPT-2 of 1.5B parameters with ranks of
a quarter of its width; the rates of SmolLM2-135M's shape, dense and compressed, generating in turns. Each line is printed when
it is known: exporting takes minutes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lrcompile
from lrcompile import Recipe
from lrcompile.bench.results import load
from lrcompile.train.materialise import allocate
from lrcompile.train.values import parameters_on_meta
from lrcompile.words import size

COMPRESSION = 2.64
TARGETS = {"int8": 0.59e9, "8da4w": 0.35e9}


def run(*, quick: bool = False) -> None:
    """Print both tables, line by line."""
    from transformers import GPT2Config, LlamaConfig

    large: dict[str, Any] = {"n_embd": 1600, "n_layer": 48, "n_head": 25}
    small: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
    }
    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3}
    if quick:
        large, heads = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 512}, {"num_attention_heads": 2}
        small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 512}
    with tempfile.TemporaryDirectory() as folder:
        _sizes(GPT2Config(**large), Path(folder), quick)
        shape = LlamaConfig(**small, **heads, max_position_embeddings=2048, tie_word_embeddings=True)
        _rates(shape, Path(folder), 8 if quick else 64, 2 if quick else 7)


def _line(*cells: str) -> None:
    print("".join(f"{cell:<20}" for cell in cells).rstrip(), flush=True)


def random_model(config: Any, recipe: Recipe | None) -> Any:
    """A model of this config with random weights, adopted without computing anything, in fp32."""
    from transformers import AutoModelForCausalLM

    def build() -> Any:
        return AutoModelForCausalLM.from_config(config).requires_grad_(False)

    with parameters_on_meta():
        model = build()
    if recipe is not None:
        with torch.device("meta"):
            twin, ids = build(), torch.zeros(1, 32, dtype=torch.int64)
        lrcompile.adopt(model, lrcompile.plan(twin, {"input_ids": ids, "use_cache": False}, recipe))
    allocate(model, torch.device("cpu"))
    for p in model.parameters():
        nn.init.normal_(p, std=0.02) if p.dim() == 2 else nn.init.ones_(p)
    return model.eval()


def _sizes(config: Any, folder: Path, quick: bool) -> None:
    from lrcompile.export.lower import export_executorch

    recipe, length = Recipe(rank_ratio=0.25), 32 if quick else 256
    print(f"GPT-2 of {config.n_layer} layers x {config.n_embd}, ranks of a quarter")
    _line("format", "linear pairs", "parameters", "bytes of the file", "target", "minutes to export")
    for form in TARGETS:
        model = random_model(config, recipe)
        numbers = sum(p.numel() for p in model.parameters())
        start = time.perf_counter()
        made = export_executorch(model, folder / "large.pte", form=form, max_length=length)
        minutes = (time.perf_counter() - start) / 60
        target = "-" if quick else f"{size(TARGETS[form])}: {'met' if made.nbytes < TARGETS[form] else 'MISSED'}"
        _line(form, str(made.pairs), f"{numbers:,}", f"{made.nbytes:,}", target, f"{minutes:.1f}")
        del model, made


def _rates(config: Any, folder: Path, tokens: int, turns: int) -> None:
    from lrcompile.export.lower import export_executorch
    from lrcompile.export.runtime import Program

    print(
        f"\nLlama of {config.num_hidden_layers} layers x {config.hidden_size}, {os.cpu_count()} cores; linears compressed"
    )
    prompt = [t % config.vocab_size for t in range(2 * tokens)]
    _line("format", "model", "file", "tokens/s", "rate", f"ms to read {len(prompt)}", "load")
    for form in TARGETS:
        programs, files = {}, {}
        for name, recipe in {"dense": None, f"{COMPRESSION}x": Recipe(compression=COMPRESSION)}.items():
            model = random_model(config, recipe)
            files[name] = export_executorch(model, folder / f"{name}.pte", form=form, max_length=4 * tokens).nbytes
            programs[name] = Program(folder / f"{name}.pte")
            programs[name].ends = []
        rates: dict[str, list[float]] = {name: [] for name in programs}
        reads: dict[str, list[float]] = {name: [] for name in programs}
        for turn in range(turns + 1):
            for name in list(programs) if turn % 2 else list(programs)[::-1]:
                start = time.perf_counter()
                programs[name].logits(prompt, 0)
                read = time.perf_counter()
                said = sum(1 for _ in programs[name].generate([1], tokens, position=len(prompt)))
                if turn:  # the first one warms up
                    reads[name].append(read - start)
                    rates[name].append(said / (time.perf_counter() - read))
        dense = statistics.median(rates["dense"])
        for name in programs:
            rate, read = statistics.median(rates[name]), statistics.median(reads[name])
            _line(
                form, name, size(files[name]), f"{rate:.1f}", f"{rate / dense:.2f}x", f"{read * 1e3:.0f}", f"{load()}"
            )
