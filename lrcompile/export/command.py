"""`lrcompile export MODEL --to executorch|hf OUT` and `lrcompile generate FILE`."""

from __future__ import annotations

import argparse
import re
import sys
import time
from typing import Any

from lrcompile.errors import EvalError, ExportError

_EXPORT = "write a model for a phone (ExecuTorch), or merged and dense (transformers)"
_GENERATE = "answer in the terminal with an exported file, on ExecuTorch's CPU runtime"
_EXPORT_EXAMPLES = """\
examples:
  lrcompile export ./my-model --to executorch phone.pte                      4-bit weights, 8-bit activations
  lrcompile export ./adopted --base ./my-model --to executorch phone.pte     what lrcompile.save wrote; its pairs stay pairs
  lrcompile export ./my-model --adapter ./lora --to hf merged/               what peft saved, merged
  lrcompile export ./adopted --base ./my-model --to hf pairs/ --factored     its pairs, to be loaded through lrcompile
  lrcompile export ./tuned --to hf milder/ --untuned ./my-model              half of what finetuning changed
  lrcompile export model.gguf --to executorch phone.pte --quantise int8 --max-bytes 150MB"""
_GENERATE_EXAMPLES = """\
examples:
  lrcompile generate phone.pte --tokenizer ./my-model                        a conversation; an empty line ends it
  lrcompile generate phone.pte --tokenizer model.gguf --prompt "The budget"  one answer"""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def add_parser(commands: Any) -> None:
    """Add both subcommands to what argparse's add_subparsers returned."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "export", help=_EXPORT, description=_EXPORT, epilog=_EXPORT_EXAMPLES, formatter_class=raw
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face model directory, a GGUF file, or what lrcompile.save wrote"
    )
    parser.add_argument("out", metavar="OUT", help="the file (.pte) or, with --to hf, the directory to write")
    parser.add_argument("--to", required=True, choices=("executorch", "hf"), help="what to write")
    parser.add_argument("--base", metavar="MODEL", help="the dense model (or config.json) of what lrcompile.save wrote")
    parser.add_argument("--adapter", metavar="DIR", help="an adapter of peft's, or what lrcompile.save_adapter wrote")
    parser.add_argument("--tokenizer", metavar="DIR", help="where the tokenizer is, if not beside the model (--to hf)")
    parser.add_argument(
        "--factored", action="store_true", help="--to hf: keep the pairs; the directory tells how lrcompile loads it"
    )
    parser.add_argument("--untuned", metavar="MODEL", help="what MODEL was finetuned from: keep a share of the change")
    parser.add_argument("--strength", type=float, metavar="S", help="with --untuned: that share (default 0.5)")
    phone = parser.add_argument_group("--to executorch")
    phone.add_argument("--quantise", choices=("8da4w", "int8", "none"), help="number format (default 8da4w)")
    phone.add_argument("--max-length", type=int, metavar="N", help="tokens of prompt and answer together (default 512)")
    phone.add_argument("--max-bytes", type=_bytes, metavar="N", help="refuse a larger file: 150000000, 150MB, 0.35GB")
    parser.set_defaults(run=_export)

    parser = commands.add_parser(
        "generate", help=_GENERATE, description=_GENERATE, epilog=_GENERATE_EXAMPLES, formatter_class=raw
    )
    parser.add_argument("file", metavar="FILE", help="what lrcompile export --to executorch wrote")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="the model's directory or GGUF file")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this alone; without it, lines from the terminal")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of an answer (default 128)")
    parser.add_argument("--raw", action="store_true", help="go on with the text as it is: no chat template")
    parser.set_defaults(run=_generate)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes: 150000000, 150MB, 0.35GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _export(args: argparse.Namespace) -> int:
    if args.to == "executorch":
        from lrcompile.export.lower import check_path, require

        require()  # what is missing is told before a model is loaded
        check_path(args.out)
        if args.factored:
            raise ExportError("--factored goes with --to hf; in a .pte file pairs stay pairs anyway")
    elif args.quantise or args.max_length is not None or args.max_bytes:
        raise ExportError("--quantise, --max-length and --max-bytes go with --to executorch")
    if args.strength is not None and args.untuned is None:
        raise ExportError("--strength goes with --untuned MODEL, the model that this one was finetuned from")
    if args.untuned is not None and args.factored:
        raise ExportError("--untuned merges the pairs, and --factored keeps them; leave one of them out")
    if args.untuned is not None:
        from lrcompile.export.blend import check_strength

        check_strength(0.5 if args.strength is None else args.strength)  # before two models are loaded
    from lrcompile.tasks.harness import offline
    from lrcompile.words import size

    with offline():
        from lrcompile.tasks.model import is_adopted, load_weights

        if args.untuned is not None and is_adopted(args.untuned):
            raise ExportError(f"{args.untuned} holds adopted weights: --untuned takes the dense model, as it was")
        model = load_weights(args.model, base=args.base, adapter=args.adapter)
        if args.untuned is not None:
            from lrcompile.export.blend import blend

            model = blend(model, load_weights(args.untuned), 0.5 if args.strength is None else args.strength)
        tokenizer = _tokenizer(args) if args.to == "hf" else None
    if args.to == "hf":
        from lrcompile.export.dense import export_factored, export_hf

        written = size((export_factored if args.factored else export_hf)(model, tokenizer, args.out))
        kind = "factored; load.py in it loads it" if args.factored else "dense"
        print(f"wrote {args.out}: {written}, {kind}" + ("" if tokenizer else "; no tokenizer was beside the model"))
        return 0
    from lrcompile.export.lower import export_executorch

    print("exporting; a layer takes some seconds", file=sys.stderr)
    made = export_executorch(
        model,
        args.out,
        form=args.quantise or "8da4w",
        max_length=512 if args.max_length is None else args.max_length,
        max_bytes=args.max_bytes,
    )
    print(f"wrote {made.path}: {size(made.nbytes)}, {args.quantise or '8da4w'}, {made.pairs} low-rank pairs")
    return 0


def _tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer of the model; None where it was not asked for and there is none."""
    from lrcompile.tasks.model import load_tokenizer

    try:
        return load_tokenizer(args.tokenizer or args.base or args.model)
    except EvalError:
        if args.tokenizer:
            raise
        return None


def _generate(args: argparse.Namespace) -> int:
    from lrcompile.export.runtime import Program
    from lrcompile.tasks.harness import offline

    if args.max_tokens < 1:
        raise ExportError(f"--max-tokens {args.max_tokens}: at least one")
    program = Program(args.file)
    with offline():
        from lrcompile.tasks.model import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer)
    fits(tokenizer, program.vocabulary)
    chat = not args.raw and bool(getattr(tokenizer, "chat_template", None))
    told: list[dict[str, str]] = []
    for text in [args.prompt] if args.prompt is not None else _lines():
        told = [*told, {"role": "user", "content": text}] if chat else []
        if chat:
            tokens: Any = tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=False)
        else:
            tokens = tokenizer(text).input_ids
        answer = _answer(program, tokenizer, tokens, args.max_tokens)
        told.append({"role": "assistant", "content": answer})
    return 0


def _lines() -> Any:
    """Lines of the terminal until an empty one or the end."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _answer(program: Any, tokenizer: Any, tokens: list[int], limit: int) -> str:
    """Print an answer as it comes, and how fast it came."""
    made: list[int] = []
    start, shown = time.perf_counter(), ""
    first = start
    for token in program.generate(tokens, limit):
        first = time.perf_counter() if not made else first
        made.append(token)
        text = tokenizer.decode(made, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half a character waits for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    rate = f"{(len(made) - 1) / (time.perf_counter() - first):.1f} tokens/s" if len(made) > 1 else "one token"
    print(f"({len(tokens)} tokens read in {first - start:.2f} s, then {rate})", file=sys.stderr)
    return shown


def fits(tokenizer: Any, vocabulary: int) -> None:
    """Refuse a tokenizer that makes tokens the model has none of.

    Raises:
        ExportError: it is another model's.
    """
    if len(tokenizer) > vocabulary:
        raise ExportError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {vocabulary}: it is the tokenizer of another model"
        )
