"""`lrcompile eval MODEL --tasks … --data DIR`: parses, evaluates, prints a table, writes JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import EvalError
from lrcompile.tasks.table import TASKS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lrcompile.tasks.harness import Score

_DTYPES = ("float32", "bfloat16")
_PHONE_LENGTH = 2048  # tokens of a prompt and its answer, where a model is evaluated as it would be exported
_ABOUT = "accuracy and macro-F1 of a language model on financial and general tasks, through lm-eval"
_EXAMPLES = """\
examples:
  lrcompile eval ./my-model --tasks fpb,fiqa,tfns --data ./data
  lrcompile eval model.gguf --tasks arc_easy,piqa --data ./data --limit 200 --json before.json
  lrcompile eval model.gguf --tasks fpb:300,piqa:100 --data ./data --dtype bfloat16
  lrcompile eval ./adopted --base ./my-model --tasks fpb --data ./data      what lrcompile.save wrote
  lrcompile eval ./my-model --adapter ./lora --tasks fpb --data ./data      what peft saved
  lrcompile eval phone.pte --tokenizer ./my-model --tasks fpb --data ./data a file that lrcompile export wrote

Nothing is downloaded: --data is a folder with the sets' own files, in it or up to two folders below."""


def add_parser(commands: Any) -> None:
    """Add the subcommand to what argparse's add_subparsers returned."""
    tasks = "tasks:\n" + "\n".join(f"  {name:<12} {_files(name)}" for name in TASKS)
    parser = commands.add_parser(
        "eval",
        help=_ABOUT,
        description=_ABOUT,
        epilog=f"{tasks}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a Hugging Face model directory, a GGUF file, what lrcompile.save wrote, or a .pte of lrcompile export",
    )
    parser.add_argument(
        "--tasks", required=True, metavar="NAME,…", help="which tasks, see below; NAME:N for N of its rows"
    )
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="where their files are")
    parser.add_argument("--base", metavar="MODEL", help="the dense model (or config.json) of what lrcompile.save wrote")
    parser.add_argument("--adapter", metavar="DIR", help="an adapter of peft's, or what lrcompile.save_adapter wrote")
    parser.add_argument("--tokenizer", metavar="DIR", help="where the tokenizer is, if not beside the model")
    parser.add_argument(
        "--quantise",
        choices=("8da4w", "int8"),
        help="evaluate the model as lrcompile export would write it, in eager mode: a .pte file differs by rounding",
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="rows of each task at most (a fair sample)")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="sequences at once (default 16)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=_DTYPES, help="to compute in (default: what the model is stored in)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.set_defaults(run=_run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _files(name: str) -> str:
    files = TASKS[name].files
    return " + ".join(files.get("all", files.get("test", ()))[0])


def _run(args: argparse.Namespace) -> int:
    from lrcompile.show import show
    from lrcompile.tasks.harness import evaluate, offline, read_tasks

    # What can be wrong is told before a model is loaded and an hour is spent.
    if args.json and not args.json.parent.is_dir():
        raise EvalError(f"can't write {args.json}: there is no folder {args.json.parent}")
    if args.json and args.json.is_dir():
        raise EvalError(f"can't write {args.json}: it is a folder; name a file in it")
    tasks = read_tasks([name.strip() for name in args.tasks.split(",") if name.strip()], args.data)
    file = args.model.endswith(".pte")
    device = _device("cpu" if (args.quantise or file) and not args.device else args.device)
    if args.quantise and not file:
        _refuse_beside_quantise(device, args.dtype)
    with offline():
        from lrcompile.tasks.model import load_model

        # What is run, and not what was asked for, stands in the JSON.
        if file:
            model, tokenizer = _phone(args)
            ran = {"runtime": "executorch", "quantise": model.form, "device": "cpu", "dtype": "float32"}
        else:
            dtype = _dtype(args.dtype)
            model, tokenizer = load_model(
                args.model, base=args.base, adapter=args.adapter, tokenizer=args.tokenizer, device=device, dtype=dtype
            )
            kept = next(p.dtype for p in model.parameters() if p.is_floating_point())  # codes and their scales are none
            ran = {
                "runtime": "torch",
                "quantise": None,
                "device": str(device),
                "dtype": str(kept).removeprefix("torch."),
            }
        if args.quantise:
            from lrcompile.export.lower import as_exported
            from lrcompile.export.runtime import Eager

            limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _PHONE_LENGTH
            model = Eager(as_exported(model, args.quantise, min(limit, _PHONE_LENGTH)))
            ran |= {"quantise": args.quantise, "dtype": "float32"}
        scores = evaluate(model, tokenizer, tasks, limit=args.limit, batch_size=args.batch_size)
    show(score_table(scores))
    if args.json:
        told = {name: getattr(args, name) for name in ("model", "base", "adapter", "tokenizer", "limit")}
        text = json.dumps(told | ran | to_json(scores), indent=1)
        try:
            args.json.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise EvalError(f"can't write {args.json}: {error.strerror}") from error
        print(f"wrote {args.json}")
    return 0


def _refuse_beside_quantise(device: Any, dtype: str | None) -> None:
    if device.type != "cpu":
        raise EvalError(
            f"--quantise evaluates on the CPU, where such a file runs, and not on {device}: leave out --device"
        )
    if dtype not in (None, "float32"):
        raise EvalError(
            f"--quantise computes in float32 around its integers, as a .pte file does, and not in {dtype}, which would only "
            "round the weights before: leave out --dtype"
        )


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _phone(args: argparse.Namespace) -> tuple[Any, Any]:
    """The program of a .pte file, and the tokenizer that has to be named beside it."""
    from lrcompile.export.runtime import Program
    from lrcompile.tasks.model import load_tokenizer

    given = [name for name in ("base", "adapter", "quantise", "device", "dtype") if getattr(args, name)]
    if given:
        raise EvalError(f"--{given[0]} doesn't go with {args.model}: a .pte file is the whole model, for the CPU")
    if not args.tokenizer:
        raise EvalError(f"{args.model} has no tokenizer in it: name the model's with --tokenizer")
    return Program(args.model), load_tokenizer(args.tokenizer)


def _device(name: str | None) -> Any:
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:
        lines = str(error).splitlines()
        raise EvalError(f"--device {name}: {lines[0] if lines else type(error).__name__}") from error
    return device


def to_json(scores: Sequence[Score]) -> dict[str, Any]:
    """Figures of every task, the means of the two groups, and the versions that made them."""
    import lm_eval
    import torch
    import transformers

    from lrcompile import __version__
    from lrcompile.tasks.harness import mean_of

    means = {group: mean for group in ("financial", "general") if (mean := mean_of(scores, group)) is not None}
    versions = {"lrcompile": __version__, "lm-eval": lm_eval.__version__}
    versions |= {"transformers": transformers.__version__, "torch": torch.__version__}
    return {"tasks": {score.task: score.to_dict() for score in scores}, "means": means, "versions": versions}


def score_table(scores: Sequence[Score]) -> RenderableType:
    """A line for every task, in per cent with standard errors, then the means of the two groups."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from lrcompile.show import PLAIN
    from lrcompile.tasks.harness import mean_of

    table = Table(title="Evaluation, in %", **PLAIN)
    table.add_column("task", no_wrap=True)
    for name in ("rows", "accuracy", "macro-F1", "commonest"):
        table.add_column(name, justify="right", no_wrap=True)
    written = [score for score in scores if score.macro_f1 is None]
    for score in scores:
        f1 = with_error(score.macro_f1, score.macro_f1_stderr)
        if score.macro_f1 is None:
            f1 = with_error(score.more["token_f1"], score.more["token_f1_stderr"]) + " *"
        table.add_row(
            score.task,
            str(score.rows),
            with_error(score.accuracy, score.accuracy_stderr),
            f1,
            with_error(score.commonest),
        )
    for group in ("financial", "general"):
        if mean := mean_of(scores, group):
            label = Text(f"mean of the {group} ({len(mean['tasks'])})", style="bold")
            accuracy = with_error(mean["accuracy"], mean["accuracy_stderr"])
            f1 = with_error(mean["macro_f1"], mean["macro_f1_stderr"])
            table.add_row(label, "", accuracy, f1, with_error(mean["commonest"]))
    notes = ["commonest: the accuracy of always giving the class that is right most often"]
    if written:
        names = ", ".join(score.task for score in written)
        notes.append(
            f"* {names}: exact matches, and the F1 of the words (1606.05250); in no mean, since a text has no classes"
        )
    return Group(table, *(Text(note, style="dim") for note in notes))


def with_error(value: float | None, error: float | None = None) -> str:
    """A share in per cent, and its standard error where there is one; "–" for none."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
