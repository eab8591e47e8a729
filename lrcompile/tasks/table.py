"""The tasks: their files, loaders and how each is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrcompile.errors import EvalError
from lrcompile.tasks import financial, general
from lrcompile.tasks.rows import SIDES, Row, find, in_order, split


@dataclass(frozen=True)
class Task:
    """A set and how it is asked.

    Attributes:
        group: "financial" or "general".
        how: what decides. "labels" and "texts": the log-likelihood of each choice after the prompt; "contexts": of the ending
            after each choice; "named": which label the written answer names first; "written": the words of the answer.
        read: files -> rows.
        files: side -> the names that its files may have, the best first. Side "all": the set has no sides of its own.
        about: what it is, under which licence, and where to get it.
        length: tokens of a written answer.
    """

    group: str
    how: str
    read: Callable[[Sequence[Path]], list[Row]]
    files: dict[str, tuple[tuple[str, ...], ...]]
    about: str
    length: int = 0


def _finlora(name: str, old: str | None = None) -> dict[str, tuple[tuple[str, ...], ...]]:
    test = (f"{name}_test.jsonl",), (f"{old or name}-test.jsonl",)
    return {"train": ((f"{name}_train.jsonl",),), "test": test}


def _adapters(name: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    return {side: ((f"{name}_{side}.json",), (f"{name}/{side}.json",)) for side in ("train", "test")}


def _by_agreement() -> tuple[tuple[str, ...], ...]:
    levels = ("50Agree", "66Agree", "75Agree", "AllAgree")
    return tuple((f"{start}_{level}.txt",) for level in levels for start in ("fpb", "Sentences"))


_FINLORA = "in FinLoRA's jsonl of context and target (github.com/Open-Finance-Lab/FinLoRA, data/)"
_ADAPTERS = "in LLM-Adapters' JSON (github.com/AGI-Edgerunners/LLM-Adapters, dataset/)"

TASKS = {
    "fpb": Task(
        "financial",
        "labels",
        financial.read_fpb,
        {"all": _by_agreement()},
        "Financial PhraseBank 1.0 (1307.5336): sentences of news as sentence@label. CC BY-NC-SA 3.0, no commercial use; "
        "huggingface.co/datasets/takala/financial_phrasebank",
    ),
    "fiqa": Task(
        "financial",
        "labels",
        financial.read_fiqa,
        {side: ((f"task1_headline_ABSA_{side}.json", f"task1_post_ABSA_{side}.json"),) for side in ("train", "test")},
        "FiQA 2018 task 1, headlines and posts, as JSON. Given for research; sites.google.com/view/fiqa",
    ),
    "tfns": Task(
        "financial",
        "labels",
        financial.read_tfns,
        {
            "train": (("tfns_train.csv",), ("sent_train.csv",)),
            "test": (("tfns_valid.csv",), ("sent_valid.csv",)),
        },
        "Twitter Financial News Sentiment, CSV of text,label. MIT, as its card says; "
        "huggingface.co/datasets/zeroshot/twitter-financial-news-sentiment",
    ),
    "nwgi": Task(
        "financial",
        "labels",
        financial.read_nwgi,
        _finlora("nwgi"),
        f"News with GPT instructions, {_FINLORA}. Its licence: see huggingface.co/datasets/TheFinAI/NWGI_test",
    ),
    "headline": Task(
        "financial",
        "labels",
        financial.read_headline,
        _finlora("headline"),
        f"Headlines of gold news (2009.04202), {_FINLORA}. Its licence: see huggingface.co/datasets/FinGPT/fingpt-headline",
    ),
    "ner": Task(
        "financial",
        "named",
        financial.read_ner,
        _finlora("ner"),
        f"Named entities in agreements, {_FINLORA}. Its licence: see huggingface.co/datasets/FinGPT/fingpt-ner-cls",
        length=10,
    ),
    "xbrl_term": Task(
        "financial",
        "written",
        financial.read_xbrl_term,
        _finlora("xbrl_term"),
        f"XBRL terms, {_FINLORA}. MIT, as FinLoRA says (of github.com/KirkHan0920/XBRL-Agent)",
        length=64,
    ),
    "boolq": Task(
        "general",
        "labels",
        general.read_boolq,
        _adapters("boolq"),
        f"BoolQ (1905.10044) without its passages, {_ADAPTERS}. CC BY-SA 3.0",
    ),
    "piqa": Task("general", "texts", general.read_piqa, _adapters("piqa"), f"PIQA (1911.11641), {_ADAPTERS}. AFL 3.0"),
    "winogrande": Task(
        "general",
        "contexts",
        general.read_winogrande,
        _adapters("winogrande"),
        f"WinoGrande (1907.10641), {_ADAPTERS}. CC BY, as its authors say; its code Apache-2.0",
    ),
    "arc_easy": Task(
        "general",
        "texts",
        general.read_arc_easy,
        _adapters("ARC-Easy"),
        f"ARC-Easy (1803.05457), {_ADAPTERS}. CC BY-SA 4.0",
    ),
    "openbookqa": Task(
        "general",
        "texts",
        general.read_openbookqa,
        _adapters("openbookqa"),
        f"OpenBookQA (1809.02789), {_ADAPTERS}. Apache-2.0, as its repository",
    ),
}


def check_names(names: Sequence[str]) -> None:
    """Raise EvalError for a name that is no task, or is told twice."""
    if not names:
        raise EvalError(f"no task is named; there are {', '.join(TASKS)}")
    for name in names:
        if name not in TASKS:
            raise EvalError(f"no task {name!r}; there are {', '.join(TASKS)}")
        if names.count(name) > 1:
            raise EvalError(f"the task {name} is named twice")


def counted(tasks: Sequence[str]) -> dict[str, int | None]:
    """Name -> how many rows are asked for (None: all) of "NAME" and "NAME:N"; raises EvalError for what is neither."""
    limits: dict[str, int | None] = {}
    for task in tasks:
        name, colon, number = task.partition(":")
        if colon and (not number.isdecimal() or int(number) == 0):
            raise EvalError(f"the task {task!r}: after the colon stands how many rows of it, as {name}:1000")
        limits[name] = int(number) if colon else None
    check_names([task.partition(":")[0] for task in tasks])
    return limits


def read_rows(name: str, data: Path, side: str = "test") -> tuple[list[Row], list[Path]]:
    """Rows of a side of a task, in the order of a hash of their text, and the files that they come from.

    The test side is the set's own where it has one (of TFNS the validation file, as FinGPT has it); else, for FPB, a fifth by a
    hash of the sentence. The validation side is a tenth of the training rows by that hash. No text is on two sides.

    Args:
        name: one of TASKS.
        data: a folder; the files lie in it, or in folders up to two below.
        side: one of SIDES.

    Raises:
        EvalError: a file is missing or a row malformed.
    """
    check_names([name])
    if side not in SIDES:
        raise EvalError(f"no side {side!r}; there are {', '.join(SIDES)}")
    if not data.is_dir():
        raise EvalError(f"there is no folder {data}")
    task = TASKS[name]
    paths = _files(name, data, "all" if "all" in task.files else "test")
    rows = _keyed(task.read(paths))
    if "all" in task.files:
        chosen = split(rows, None)[side]
    elif side == "test":
        chosen = in_order(rows)
    else:
        paths = _files(name, data, "train")
        chosen = split(_keyed(task.read(paths)), rows)[side]
    if not chosen:
        raise EvalError(f"{name}: {', '.join(map(str, paths))} has no row on the {side} side")
    return [row for _, row in chosen], paths


def _keyed(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    return [(row.text, row) for row in rows]


def _files(name: str, data: Path, side: str) -> list[Path]:
    task = TASKS[name]
    for names in task.files[side]:
        if paths := find(data, names):
            return paths
    choices = " or ".join(" and ".join(names) for names in task.files[side])
    raise EvalError(f"{name}: no {choices} in {data} or two folders below. It is {task.about}. Nothing is downloaded")
