"""A tiny Llama of pairs that has learnt to count in steps, so that what it says is sure and no word is said twice running."""

from __future__ import annotations

from typing import Any

import torch

import lrcompile
from lrcompile.cli import _parser

VOCABULARY = 128
IDS = {"input_ids": torch.arange(1, 9)[None], "use_cache": False}


def run(*argv: Any) -> int:
    """`lrcompile ARGV`; what main would print as an error is raised."""
    args = _parser().parse_args([str(arg) for arg in argv])
    return args.run(args)


def tiny(adopted: bool = True, *, tied: bool = True, layers: int = 1, **more: Any) -> Any:
    """Random, vocabulary 128, width 64, tied embedding; ranks of 16 where adopted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128} | more
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied, eos_token_id=0, bos_token_id=None)).eval()
    if adopted:
        lrcompile.adopt(model, lrcompile.Recipe(rank=16), IDS)
    return model


def after(token: int) -> int:
    return (5 * token + 3) % VOCABULARY


def learnt() -> Any:
    """tiny(), trained on t -> 5 t + 3, which goes round all of the vocabulary."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(200):
        rows = [torch.randint(VOCABULARY, (16,))]
        for _ in range(12):
            rows.append(after(rows[-1]))  # type: ignore[arg-type]
        ids = torch.stack(rows, 1)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)
