"""The command line: lrcompile inspect | plan | data | pretrain | finetune | report | eval | export | bench, and more. Thin."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile import __version__
from lrcompile.errors import LrcompileError

if TYPE_CHECKING:
    from lrcompile.recipe import Recipe

_SOURCE = """\
SOURCE is one of
  DIR              a Hugging Face model directory (real weights)
  model.gguf       a GGUF file (real weights)
  config.json      a transformers config: the model is built on the meta device, no weights are needed
  module:factory   a callable that returns (model, example_inputs); imported from the current directory too
Nothing is ever downloaded."""

_EXAMPLES = """\
examples:
  lrcompile plan llama-7b/config.json                      what would become of a 7B model, in seconds, without weights
  lrcompile plan ./my-model --rank-ratio 0.25              ranks at a quarter of min(in, out), and the spectra
  lrcompile plan my_script:build --exclude 'blocks.0.*'    a model of your own, its first block left dense
  lrcompile plan ./my-model --json plan.json               for lrcompile.adopt(model, Plan.from_json(text))
  lrcompile inspect ./my-model --show factorize            pass by pass, and the diff of one
  lrcompile inspect my_script:build --verify --html p.html checks every exact pass; one page to keep
  lrcompile data books/ --out data --tokenizer bpe:4096 --validation 0.05
  lrcompile pretrain examples/configs/cpu-tiny.toml        a training run; torchrun starts several ranks
  lrcompile report out/first out/second                    their curves, side by side
  lrcompile bench --help                                   measurements on this machine"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 where an error was printed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["bench"]:
            from lrcompile.bench import main as bench

            bench(argv[1:])
            return 0
        if argv[:1] in (["pretrain"], ["finetune"]):
            return _train(argv[0], argv[1:])
        args = _parser().parse_args(argv)
        return int(args.run(args))
    except LrcompileError as error:
        if not (getattr(error, "everywhere", False) and int(os.environ.get("RANK", 0)) > 0):  # one speaks for all
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "lrcompile",
        description="Replace a transformer's linear layers by low-rank pairs. Look before you do it.",
        epilog=f"{_SOURCE}\n\n{_EXAMPLES}",
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"lrcompile {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    about = "what every pass does to the model's graph: parameters, bytes, FLOPs, saved activations, error"
    inspect = commands.add_parser("inspect", help=about, description=about, epilog=_SOURCE, formatter_class=raw)
    _add_recipe(inspect)
    inspect.add_argument(
        "--show", metavar="PASS", action="append", help="print the diff of a pass too (repeat for several)"
    )
    inspect.add_argument("--html", metavar="FILE", type=Path, help="write a page with everything")
    inspect.add_argument(
        "--verify", action="store_true", help="run the graph before and after each exact pass and compare"
    )
    inspect.add_argument(
        "--target",
        metavar="GPU",
        help='show what computes each pair on this GPU of the cost table ("H100"), predicted for the example inputs (32 tokens '
        "unless SOURCE gives its own)",
    )
    inspect.add_argument("--kernels", choices=("auto", "triton", "inductor"), default="auto", help="force either")
    inspect.set_defaults(run=_inspect)

    about = "which weights become pairs, of what rank, and what is saved"
    plan = commands.add_parser("plan", help=about, description=about, epilog=_SOURCE, formatter_class=raw)
    _add_recipe(plan)
    plan.add_argument("--json", metavar="FILE", type=Path, help="write the Plan, for lrcompile.adopt")
    plan.set_defaults(run=_plan)

    # Their options are a run's settings, which tyro reads.
    commands.add_parser("pretrain", help="train a model from scratch; `lrcompile pretrain --help` teaches")
    commands.add_parser("finetune", help="train a model that has weights; likewise")
    for module in (
        "lrcompile.train.data.command",
        "lrcompile.train.report",
        "lrcompile.tasks.command",
        "lrcompile.export.command",
    ):
        importlib.import_module(module).add_parser(commands)
    commands.add_parser("bench", help="measurements on this machine; `lrcompile bench --help` lists them")
    return parser


def _train(command: str, argv: Sequence[str]) -> int:
    from lrcompile.train.config import read

    # What is wrong with the settings is the same for every process that torchrun started here: the first one tells.
    quiet = int(os.environ.get("LOCAL_RANK", 0)) > 0
    try:
        with open(os.devnull, "w") as nowhere, ExitStack() as stack:
            if quiet:
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            run, flags = read(command, argv)  # type: ignore[arg-type]
    except LrcompileError:
        if quiet:
            return 2
        raise
    if flags.dry_run:
        from lrcompile.show import show
        from lrcompile.train.dry_run import dry_run

        show(
            dry_run(run, flags.ranks or int(os.environ.get("WORLD_SIZE", 1)), target=flags.target, resume=flags.resume)
        )
        return 0
    from lrcompile.train.driver import train

    train(run, resume=flags.resume)
    return 0


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a model directory, GGUF file, config.json or module:factory")
    dials = parser.add_argument_group("the dial (one of; the default is --compression 2.64)")
    dials.add_argument("--compression", type=float, metavar="X", help="numbers in the linear weights over those left")
    dials.add_argument("--rank", type=int, metavar="R", help="the same rank everywhere")
    dials.add_argument("--rank-ratio", type=float, metavar="F", help="rank = F * min(in, out)")
    dials.add_argument("--budget-bytes", type=int, metavar="N", help="bytes of all parameters together")
    form = parser.add_argument_group("what a weight becomes")
    form.add_argument(
        "--weights", metavar="FORMAT", help='a frozen base beside the pair, or alone: nf4, int8, int4-32, …, "dense"'
    )
    form.add_argument("--factors", metavar="FORMAT", help="number format of the pair, for inference")
    form.add_argument("--init", metavar="START", help="how the pair starts: svd; beside a base pissa, loftq or zero")
    which = parser.add_argument_group("which weights")
    glob = {"metavar": "GLOB", "action": "append"}
    which.add_argument("--include", help="take only weights whose name or module matches (repeat for several)", **glob)  # type: ignore[arg-type]
    which.add_argument("--exclude", help="leave these dense (repeat for several)", **glob)  # type: ignore[arg-type]


def _recipe(args: argparse.Namespace) -> Recipe:
    from lrcompile.recipe import Recipe

    names = ("compression", "rank", "rank_ratio", "budget_bytes", "weights", "factors", "init", "include", "exclude")
    return Recipe(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})


def _load(args: argparse.Namespace) -> tuple[Any, Any, Recipe]:
    recipe = _recipe(args)  # a wrong option is told before a model is loaded
    from lrcompile.sources import load_source

    return (*load_source(args.source), recipe)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LrcompileError(f"can't write {path}: {error.strerror}") from error


def _inspect(args: argparse.Namespace) -> int:
    from lrcompile.graph.html import page
    from lrcompile.graph.inspect import inspect
    from lrcompile.show import show

    model, inputs, recipe = _load(args)
    report = inspect(model, inputs, recipe, verify=args.verify, target=args.target, kernels=args.kernels)
    known = [stage.name for stage in report.stages]
    for name in args.show or []:
        if name not in known:
            raise LrcompileError(f"no pass {name!r}; there are {', '.join(known)}")
    show(report)
    for name in args.show or []:
        stage = report[name]
        # The first stage has nothing to differ from: the graph as it came.
        print("\n" + (stage.code if stage.before is None else stage.diff() or f"{name}: the graph stays as it is"))
    if args.html:
        _write(args.html, page(report))
        print(f"wrote {args.html}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from lrcompile.show import middle_spectra, plan_table, show
    from lrcompile.sources import token_count
    from lrcompile.weights.planner import plan

    model, inputs, recipe = _load(args)
    made = plan(model, inputs, recipe)
    show(plan_table(made, middle_spectra(model, made), token_count(inputs)))
    if args.json:
        _write(args.json, made.to_json() + "\n")
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
