"""Memory of finetuning: Llama-2-7B's weights, gradients and optimizer from the plan; activations of one block, measured.

Full finetuning and the pairs are counted with the same AdamW, whose two moments have the dtype of what they belong to. QLoRA
has the form of `Recipe.finetune()` and starts its pairs at zero, so that its bytes are the same by definition. The
activations are what autograd holds for backward, parameters aside, each storage once, of one Llama-shaped decoder block.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lrcompile
from lrcompile import Recipe
from lrcompile.graph.measure import saved_bytes
from lrcompile.words import size

RANK = 16


def run(*, quick: bool = False) -> None:
    """Print both tables."""
    console = Console()
    console.print(_states(2 if quick else 32))
    console.print(_activations(quick))


def training_bytes(model: nn.Module) -> tuple[int, int, int]:
    """(weights, gradients, AdamW's two moments) in bytes, from the parameters of a model; on `meta` too."""
    every = list(model.parameters())
    trained = sum(p.numel() * p.element_size() for p in every if p.requires_grad)
    return sum(p.numel() * p.element_size() for p in every), trained, 2 * trained


def _llama(layers: int) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig  # the extra "hf"

    with torch.device("meta"):  # LlamaConfig's other defaults are Llama-2-7B's
        return AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=layers)).to(torch.bfloat16)


def _states(layers: int) -> Table:
    inputs = {"input_ids": torch.zeros(1, 128, dtype=torch.int64, device="meta"), "use_cache": False}
    recipes = {
        "full finetuning, bf16": None,
        "LoRA, bf16 base": Recipe.finetune(weights="dense", init="zero", rank=RANK),
        "Recipe.finetune()": Recipe.finetune(rank=RANK),
        "the same, nested scales": Recipe.finetune(weights="nf4-nested", rank=RANK),
    }
    title = "Llama-2-7B" if layers == 32 else f"Llama-2-7B cut to {layers} layers"
    table = Table(
        "regime",
        "weights",
        "gradients",
        "AdamW",
        "together",
        "less",
        title=f"{title}: bytes to train with rank {RANK}, by the plan",
    )
    whole = 0
    for name, recipe in recipes.items():
        model = _llama(layers)
        if recipe is not None:
            lrcompile.adopt(model, recipe, inputs)
        parts = training_bytes(model)
        whole = whole or sum(parts)
        table.add_row(name, *map(size, parts), size(sum(parts)), f"{whole / sum(parts):.2f}x")
    return table


def _activations(quick: bool) -> Table:
    width, tokens = (256, 64) if quick else (1024, 256)
    torch.manual_seed(0)
    title = f"one Llama block of width {width}, bf16, rank {RANK}: bytes saved for backward, a token"
    table = Table("model", "bytes a token", "against peft's QLoRA", title=title)
    theirs = _measure(_peft(_block(width)), width, tokens)
    ours = _measure(_ours(_block(width), width, tokens), width, tokens)
    table.add_row("peft's QLoRA (bitsandbytes NF4)", f"{theirs / tokens:,.0f}", "1.00x")
    table.add_row("Recipe.finetune()", f"{ours / tokens:,.0f}", f"{ours / theirs:.2f}x")
    return table


def _block(width: int) -> nn.Module:
    from transformers import AutoModel, LlamaConfig

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        attn_implementation="sdpa",
    )
    return AutoModel.from_config(config).to(torch.bfloat16)


def _inputs(width: int, tokens: int) -> dict[str, Any]:
    # Trained layers before this one: its input wants a gradient.
    x = torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    return {"inputs_embeds": x, "use_cache": False}


def _measure(model: nn.Module, width: int, tokens: int) -> int:
    inputs = _inputs(width, tokens)
    model.train()
    return saved_bytes(lambda: model(**inputs)[0], (*model.parameters(), *model.buffers()))


def _ours(model: nn.Module, width: int, tokens: int) -> nn.Module:
    return lrcompile.adopt(model, Recipe.finetune(rank=RANK), _inputs(width, tokens))


def _peft(model: nn.Module) -> nn.Module:
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model  # the extra "examples"

    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name in names:
        dense, (owner, _, last) = model.get_submodule(name), name.rpartition(".")
        made = bnb.nn.Linear4bit(dense.in_features, dense.out_features, False, torch.bfloat16, quant_type="nf4")
        made.load_state_dict(dense.state_dict())
        setattr(model.get_submodule(owner), last, made.to("cpu"))
    targets = sorted({name.rpartition(".")[2] for name in names})
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, use_rslora=True, target_modules=targets))
