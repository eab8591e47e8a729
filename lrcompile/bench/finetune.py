"""Finetuning a model of Llama 3 8B's shape in NF4 on a GPU: peak memory and tokens/s, against peft and bitsandbytes (QLoRA).

Every contender has a process of its own, the same random tokens (8 rows of 512), pairs of rank 8 in float32 beside all the
linears of the blocks, NF4 with nested scales as QLoRA has them (2305.14314), bfloat16 for the rest, fused AdamW, blocks
recomputed in backward, and the same loss: the head's, computed a few hundred tokens at a time, so that 128,256 logits a
token are never held for all of them. Where the whole logits are held, as transformers' own loss does, a row says so.

The weights are random and quantised as they are drawn, a block at a time. Without a GPU only `--quick` runs, on a tiny
shape; memory is that of the whole process then.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.checkpoint import checkpoint

from lrcompile import Recipe
from lrcompile.bench.llm import LLAMA_8B, LLAMA_TINY, Random, built, peak_of, synchronise
from lrcompile.bench.results import apart, write
from lrcompile.errors import LrcompileError
from lrcompile.train.evaluate import summed_loss
from lrcompile.train.materialise import allocate, materialise
from lrcompile.train.meter import peak_memory
from lrcompile.train.parallel import parallelise
from lrcompile.words import size

RANK, TARGET = 8, 8.65e9  # bytes aimed at
CHUNK = 256  # tokens whose logits are held at once
SECONDS = 120.0  # until a contender is given up


@dataclass(frozen=True)
class Job:
    """What a process measures.

    Attributes:
        name: as printed.
        theirs: peft and bitsandbytes, and not ours.
        compiled: each block by lrcompile.
        whole: the logits of all tokens are held at once.
        rows, length, steps: tokens of a step, and how many are timed.
    """

    name: str
    theirs: bool = False
    compiled: bool = False
    whole: bool = False
    quick: bool = False
    rows: int = 8
    length: int = 512
    steps: int = 8


@dataclass
class Row:
    """What was measured. Bytes are None where the device doesn't tell."""

    name: str
    peak_bytes: int | None = None
    held_bytes: int | None = None
    built_bytes: int | None = None
    tokens_per_s: float | None = None
    seconds: list[float] = field(default_factory=list)
    trained: int = 0
    loss: float | None = None
    error: str = ""


def jobs(quick: bool) -> list[Job]:
    """The contenders, those first that matter most."""
    sizes: dict[str, Any] = {"quick": True, "rows": 2, "length": 16, "steps": 2} if quick else {}
    return [
        Job("lrcompile, compiled", compiled=True, **sizes),
        Job("peft QLoRA", theirs=True, **sizes),
        Job("lrcompile, eager", **sizes),
        Job("peft QLoRA, whole logits", theirs=True, whole=True, **sizes),
    ]


def run(*, quick: bool = False, out: Path | None = None) -> None:
    """Print the table.

    Args:
        quick: a tiny shape, on the CPU too, and only the first two contenders.
        out: folder for finetune-MACHINE.json; None: print only.

    Raises:
        LrcompileError: no GPU; or a contender could not be measured: the others are, and stand in the file.
    """
    if not (quick or torch.cuda.is_available()):
        raise LrcompileError(
            "finetuning 8 billion weights is measured on a GPU, and torch sees none; --quick shows that it runs"
        )
    rows = []
    for job in jobs(quick)[: 2 if quick else None]:
        try:
            rows += apart(measure, [(job,)], timeout=SECONDS)
        except LrcompileError as error:
            rows.append(Row(job.name, error=str(error)))
        # After each: a command that is stopped leaves what it has.
        write(out, "finetune", {"rank": RANK, "target": TARGET, "rows": [asdict(row) for row in rows]})
    table = Table(
        "contender",
        "peak memory",
        "of that weights and states",
        "tokens/s",
        "loss",
        title=f"finetune: {'tiny' if quick else 'Llama 3 8B'}, NF4, rank {RANK}, {job.rows}x{job.length} tokens",
    )
    for row in rows:
        if not row.error:
            told = [row.peak_bytes, row.held_bytes]
            speed = "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}"
            table.add_row(row.name, *("" if n is None else size(n) for n in told), speed, f"{row.loss:.3f}")
    console = Console()
    console.print(table)
    if not quick:
        console.print(f"aimed at: {size(TARGET)}, and less than peft's", highlight=False)
    for row in rows:
        if row.error:
            console.print(f"{row.name} was not measured: {row.error}", highlight=False, markup=False)
    failed = [f"{row.name}: {row.error}" for row in rows if row.error]
    if failed:
        raise LrcompileError("; ".join(failed))


def measure(job: Job) -> Row:
    """Build, train a few steps, and tell; in a process of its own."""
    torch.manual_seed(0)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = LLAMA_TINY if job.quick else LLAMA_8B
    model, inner = _peft(config, device) if job.theirs else _ours(job, config, device)
    row = Row(job.name, built_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else None)
    trained = [p for p in model.parameters() if p.requires_grad]
    row.trained = sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, config["vocab_size"], (job.rows, job.length), device=device)

    def step() -> torch.Tensor:
        loss = _loss(inner, ids, job.whole)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    for _ in range(2):
        row.loss = float(step())  # compilation, the optimizer's state
    row.held_bytes = torch.cuda.memory_allocated() if device.type == "cuda" else None
    row.peak_bytes = peak_of(step, device) or peak_memory(device)
    for _ in range(job.steps):
        synchronise(device)
        start = time.perf_counter()
        step()
        synchronise(device)
        row.seconds.append(time.perf_counter() - start)
    row.tokens_per_s = ids.numel() / statistics.median(row.seconds)
    return row


def _ours(job: Job, config: dict[str, Any], device: torch.device) -> tuple[nn.Module, Any]:
    recipe = Recipe.finetune(weights="nf4-nested", rank=RANK, init="zero")
    made = built(config, recipe, torch.bfloat16)
    dense = built(config, None, torch.bfloat16)
    made.values = Random(dense.model, dense.blocks, device)
    materialise(made, device)
    backend = "lrcompile" if job.compiled else None
    options = {"inner": "eager"} if job.quick else {"kernels": "auto"}
    parallelise(
        made.model,
        made.blocks,
        over=None,
        recompute="block",
        backend=backend,
        options=options if backend else None,
    )
    return made.model.train(), made.model


def _peft(config: dict[str, Any], device: torch.device) -> tuple[nn.Module, Any]:
    """QLoRA at its thriftiest: nothing cast to float32 but the pairs."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model  # the extra "examples"

    dense = built(config, None, torch.bfloat16)
    model: Any = dense.model.requires_grad_(False)
    values = Random(model, dense.blocks, device)
    targets = set()
    for block in dense.blocks:
        for name, module in list(model.get_submodule(block).named_modules()):
            if isinstance(module, nn.Linear):
                owner, _, last = f"{block}.{name}".rpartition(".")
                put = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                weight = values.draw(module.weight)
                put.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)  # quantises
                setattr(model.get_submodule(owner), last, put)
                targets.add(last)
    left = {name: p for name, p in model.named_parameters() if p.is_meta}
    drawn = {name: values.draw(p) for name, p in left.items()}
    allocate(model, device)
    with torch.no_grad():
        for name, value in drawn.items():
            model.get_parameter(name).copy_(value)
    del drawn
    model.is_loaded_in_4bit = True  # how peft knows
    config_ = LoraConfig(r=RANK, lora_alpha=RANK, use_rslora=True, target_modules=sorted(targets), lora_dropout=0.0)
    made: Any = get_peft_model(model, config_)
    parallelise(model, dense.blocks, over=None, recompute="block")
    return made.train(), model


def _loss(model: Any, ids: torch.Tensor, whole: bool) -> torch.Tensor:
    """Mean cross-entropy of the tokens given; which token is to be predicted doesn't matter here.

    Args:
        model: a causal language model of transformers.
        ids: int64 (rows, length).
        whole: hold all logits; else those of CHUNK tokens, which are computed again in backward.
    """
    if whole:
        return summed_loss(model(input_ids=ids, use_cache=False).logits, ids) / ids.numel()
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    weight = model.get_output_embeddings().weight
    total = hidden.new_zeros((), dtype=torch.float32)
    for x, targets in zip(hidden.split(CHUNK), ids.flatten().split(CHUNK), strict=True):
        total = total + checkpoint(_summed, x, weight, targets, use_reentrant=False)
    return total / ids.numel()


def _summed(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")
