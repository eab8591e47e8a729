"""Files for a phone: their bytes, and the rate of ExecuTorch's runtime on two cores against the dense model's, in one run.

Weights are random, since bytes and rates don't ask for their values. The sizes are of a GPT-2 of 1.5B parameters with ranks of
a quarter of its width. The rates, in the format for phones, are of SmolLM2-135M's shape, and of twelve layers of that GPT-2 (the
whole one, dense, would take more memory to export than most machines have); dense and compressed generate in turns. Each line
is printed when it is known: exporting takes minutes. With --out DIR the files stay there, and what is there is measured and not
written again, so that rates can be measured when the machine is free.
"""

from __future__ import annotations

import json
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

COMPRESSION = Recipe(compression=2.64)
QUARTER = Recipe(rank_ratio=0.25)
RATED = "8da4w"
TARGETS = {"int8": 0.59e9, "8da4w": 0.35e9}


def run(*, out: Path | None = None, quick: bool = False) -> None:
    """Print both tables, line by line; the files stay in `out` where it is given."""
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
    with tempfile.TemporaryDirectory() as passing:
        folder = Path(passing) if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
        _sizes(GPT2Config(**large), folder, quick)
        tokens, turns = (8, 2) if quick else (64, 7)
        shape = LlamaConfig(**small, **heads, max_position_embeddings=2048, tie_word_embeddings=True)
        _rates("Llama", shape, "2.64x", COMPRESSION, folder, tokens, turns)
        shallow = GPT2Config(**{**large, "n_layer": 1 if quick else 12})
        _rates("GPT-2", shallow, "quarter", QUARTER, folder, tokens, turns)


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


def _file(folder: Path, model: str, config: Any, recipe: Recipe | None, form: str, length: int) -> dict[str, Any]:
    """A file of a random model in the folder, written unless it is there: its path, bytes, pairs, parameters, minutes."""
    from lrcompile.export.lower import export_executorch

    name = f"{config.model_type}-{config.num_hidden_layers}x{config.hidden_size}-{model}-{form}-{length}"
    path, told = folder / f"{name}.pte", folder / f"{name}.json"
    if not (told.exists() and path.exists()):
        built = random_model(config, recipe)
        numbers, start = sum(p.numel() for p in built.parameters()), time.perf_counter()
        made = export_executorch(built, path, form=form, max_length=length)
        minutes = (time.perf_counter() - start) / 60
        figures = {"bytes": made.nbytes, "pairs": made.pairs, "parameters": numbers, "minutes": minutes}
        told.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    return {"path": path, **json.loads(told.read_text(encoding="utf-8"))}


def _sizes(config: Any, folder: Path, quick: bool) -> None:
    print(f"GPT-2 of {config.n_layer} layers x {config.n_embd}, ranks of a quarter")
    _line("format", "linear pairs", "parameters", "bytes of the file", "target", "minutes to export")
    for form in TARGETS:
        file = _file(folder, "quarter", config, QUARTER, form, 32 if quick else 256)
        nbytes = file["bytes"]
        target = "-" if quick else f"{size(TARGETS[form])}: {'met' if nbytes < TARGETS[form] else 'MISSED'}"
        _line(form, str(file["pairs"]), f"{file['parameters']:,}", f"{nbytes:,}", target, f"{file['minutes']:.1f}")


def _rates(family: str, config: Any, compressed: str, recipe: Recipe, folder: Path, tokens: int, turns: int) -> None:
    from lrcompile.export.runtime import Program

    layers, width = config.num_hidden_layers, config.hidden_size
    print(f"\n{family} of {layers} layers x {width} in {RATED}, {os.cpu_count()} cores; linears dense and compressed")
    prompt = [t % config.vocab_size for t in range(2 * tokens)]
    _line("model", "file", "tokens/s", "rate", f"ms to read {len(prompt)}", "rate", "load")
    programs, files = {}, {}
    for name, how in {"dense": None, compressed: recipe}.items():
        file = _file(folder, name, config, how, RATED, 4 * tokens)
        programs[name], files[name] = Program(file["path"]), file["bytes"]
        programs[name].ends = []
    saying: dict[str, list[float]] = {name: [] for name in programs}
    reading: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(turns + 1):
        for name in list(programs) if turn % 2 else list(programs)[::-1]:
            start = time.perf_counter()
            programs[name].logits(prompt, 0)
            read = time.perf_counter()
            said = sum(1 for _ in programs[name].generate([1], tokens, position=len(prompt)))
            if turn:  # the first one warms up
                reading[name].append(read - start)
                saying[name].append((time.perf_counter() - read) / said)
    for name in programs:
        say, read = statistics.median(saying[name]), statistics.median(reading[name])
        faster, sooner = statistics.median(saying["dense"]) / say, statistics.median(reading["dense"]) / read
        _line(
            name,
            size(files[name]),
            f"{1 / say:.1f}",
            f"{faster:.2f}x",
            f"{read * 1e3:.0f}",
            f"{sooner:.2f}x",
            f"{load()}",
        )
