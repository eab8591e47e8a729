"""The language models that training is measured on: shapes, built on `meta`, filled with random numbers on the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from lrcompile import Recipe
from lrcompile.train.build import Built, build
from lrcompile.train.materialise import allocate
from lrcompile.weights.layers import AdoptedModule

STD = 0.02


def gpt2(layers: int, width: int, heads: int, vocabulary: int = 50257) -> dict[str, Any]:
    """A config.json of GPT-2's kind."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_positions": 1024,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": vocabulary - 1,
        "eos_token_id": vocabulary - 1,
    }


def llama(
    layers: int, width: int, inner: int, heads: int, groups: int, vocabulary: int = 128256, tied: bool = False
) -> dict[str, Any]:
    """A config.json of Llama 3's kind; `groups` heads of keys and values."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


GPT2_1_5B, GPT2_TINY = gpt2(48, 1600, 25), gpt2(2, 64, 2, 512)
LLAMA_1B, LLAMA_TINY = llama(16, 2048, 8192, 32, 8, tied=True), llama(2, 64, 192, 4, 2, 512, tied=True)
LLAMA_8B = llama(32, 4096, 14336, 32, 8)


def built(config: dict[str, Any], recipe: Recipe | None, dtype: torch.dtype) -> Built:
    """`lrcompile.train.build` of a config that is no file."""
    with TemporaryDirectory(prefix="lrcompile-bench-") as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(config), encoding="utf-8")
        return build(str(path), recipe, dtype=dtype, attention="sdpa")


def filled(model: nn.Module, device: torch.device) -> nn.Module:
    """Give a model of dense weights and plain pairs memory on a device and random numbers; products have the dense std."""
    allocate(model, device)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=STD)
            else:
                p.zero_()
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                module.get_parameter("weight").fill_(1.0)
            if isinstance(module, AdoptedModule):
                for name, form in module.lr_forms:
                    for side in module.lr_parts(name).values():
                        side.normal_(std=(STD / (form.rank or 1) ** 0.5) ** 0.5)
    return model


class Random:
    """Values (`lrcompile.train.values`) drawn on the device a unit at a time: normal with std 0.02, and 1 for norms.

    Faster than drawing on the CPU what only has to have a shape.

    Args:
        model: dense, on `meta`, its buffers real.
        blocks: names of its layers.
        device: to draw on.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], device: torch.device) -> None:
        self.model, self.blocks, self.device = model, blocks, device
        inside = {id(p) for block in blocks for p in model.get_submodule(block).parameters()}
        self._outside = {key: p for key, p in model.named_parameters() if id(p) not in inside}

    def names(self, unit: str | None) -> list[str]:
        return list(self._of(unit))

    def unit(self, name: str | None) -> dict[str, nn.Parameter]:
        return {key: nn.Parameter(self.draw(p), p.requires_grad) for key, p in self._of(name).items()}

    def buffers(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_buffers())

    def draw(self, like: torch.Tensor) -> torch.Tensor:
        """Numbers for one parameter."""
        made = torch.empty_like(like, device=self.device, requires_grad=False)
        return made.normal_(std=STD) if like.dim() > 1 else made.fill_(1.0)

    def _of(self, unit: str | None) -> dict[str, nn.Parameter]:
        if unit is None:
            return self._outside
        return {f"{unit}.{key}": p for key, p in self.model.get_submodule(unit).named_parameters()}


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards tells of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors on a CUDA device during a call; 0 on others."""
    if device.type != "cuda":
        call()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device))
