"""Loaders of the financial sets, and their prompts in the words of FinGPT's instruction sets (2310.04793).

A prompt is "Instruction: …\\nInput: …\\nAnswer:", what is to follow " negative". FinLoRA's files (2505.19819) hold such prompts
ready made.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from lrcompile.tasks.rows import Row, json_elements, json_lines, read_text, refuse, text_of

SENTIMENTS = ("negative", "neutral", "positive")
INTENSITIES = (
    "strong negative",
    "moderately negative",
    "mildly negative",
    "neutral",
    "mildly positive",
    "moderately positive",
    "strong positive",
)
ENTITIES = ("person", "location", "organization")
ANSWERS = ("Yes", "No")


def sentiment_row(text: str, label: int, kind: str) -> Row:
    """kind: "news" or "tweet"."""
    asked = f"What is the sentiment of this {kind}? Please choose an answer from {{{'/'.join(SENTIMENTS)}}}."
    return Row(text, f"Instruction: {asked}\nInput: {text}\nAnswer:", SENTIMENTS, label)


# --- Financial PhraseBank ---------------------------------------------------------------------------------------------


def fpb_labels(path: Path) -> dict[str, int]:
    """Sentence -> its index in SENTIMENTS, of a file of `sentence@label` in latin-1, any agreement level.

    Raises:
        EvalError: a line is malformed; it is named.
    """
    labels: dict[str, int] = {}
    for number, line in enumerate(read_text(path, "latin-1").split("\n"), 1):
        if not line.strip():
            continue
        sentence, at, label = line.rpartition("@")
        if not at or not sentence.strip():
            refuse(path, number, f"sentence@label is expected, this is {line[:80]!r}")
        if label.strip() not in SENTIMENTS:
            refuse(path, number, f"the label {label.strip()!r} is none of {', '.join(SENTIMENTS)}")
        labels[sentence.strip()] = SENTIMENTS.index(label.strip())
    return labels


def read_fpb(paths: Sequence[Path]) -> list[Row]:
    return [sentiment_row(text, label, "news") for path in paths for text, label in fpb_labels(path).items()]


# --- Twitter Financial News Sentiment ---------------------------------------------------------------------------------

_TFNS = {"0": "negative", "1": "positive", "2": "neutral"}  # bearish, bullish, neutral


def tfns_labels(path: Path) -> dict[str, int]:
    """Tweet, links cut out -> its index in SENTIMENTS, of a CSV file with the columns text and label.

    Raises:
        EvalError: a row is malformed; its line is named.
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    labels: dict[str, int] = {}
    line = 1  # a tweet may run over several; told is the one that its row begins in
    try:
        if (header := next(rows, [])) != ["text", "label"]:
            refuse(path, 1, f"the columns text,label are expected, these are {','.join(header)!r}")
        line = rows.line_num + 1
        for row in rows:
            if row:
                if len(row) != 2:
                    refuse(path, line, f"two columns are expected, there are {len(row)}")
                if row[1] not in _TFNS:
                    refuse(path, line, f"the label {row[1]!r} is none of 0 (bearish), 1 (bullish), 2 (neutral)")
                text = re.sub(r"https?://\S+", "", row[0]).strip()
                labels[text] = SENTIMENTS.index(_TFNS[row[1]])
            line = rows.line_num + 1
    except csv.Error as error:
        refuse(path, line, f"this is no CSV: {error}")
    return labels


def read_tfns(paths: Sequence[Path]) -> list[Row]:
    return [sentiment_row(text, label, "tweet") for path in paths for text, label in tfns_labels(path).items()]


# --- FiQA -------------------------------------------------------------------------------------------------------------


def read_fiqa(paths: Sequence[Path]) -> list[Row]:
    """FiQA 2018 task 1: JSON objects of {"sentence", "info": [{"target", "sentiment_score", …}, …]}, headlines and posts.

    A row for every target, as FinGPT has it: from 0.1 on positive, below -0.1 negative, else neutral, and the prompt doesn't
    name the target. So the few sentences whose targets differ are asked more than once, with different answers.

    Raises:
        EvalError: an entry is malformed; its line is named.
    """
    rows = []
    for path in paths:
        kind = "tweet" if "post" in path.name else "news"
        for line, entry in json_elements(path):
            sentence = text_of(path, line, entry, "sentence").strip()
            targets = entry.get("info")
            if not isinstance(targets, list) or not targets:
                refuse(path, line, "'info' must be a list with the targets of the sentence")
            for target in targets:
                written = text_of(path, line, target, "sentiment_score")
                try:
                    score = float(written)
                except ValueError:
                    score = float("nan")
                if not -1 <= score <= 1:
                    refuse(path, line, f"sentiment_score must be a number from -1 to 1, this is {written!r}")
                label = 0 if score < -0.1 else 1 if score < 0.1 else 2
                rows.append(sentiment_row(sentence, label, kind))
    return rows


# --- FinLoRA's jsonl --------------------------------------------------------------------------------------------------


def _read_jsonl(paths: Sequence[Path], sets: Sequence[tuple[str, ...]]) -> list[Row]:
    """{"context", "target"} a line; the target must be of the one of `sets` that the prompt lists, else of the first."""
    rows = []
    for path in paths:
        for line, row in json_lines(path):
            prompt, target = text_of(path, line, row, "context").rstrip(), text_of(path, line, row, "target").strip()
            listed = re.search(r"\{([^{}]*/[^{}]*)\}", prompt)
            names = {name.strip().lower() for name in listed[1].split("/")} if listed else set()
            labels = next((labels for labels in sets if {x.lower() for x in labels} == names), sets[0])
            number = next((n for n, label in enumerate(labels) if label.lower() == target.lower()), None)
            if number is None:
                refuse(path, line, f"the target {target[:80]!r} is none of {', '.join(labels)}")
            rows.append(Row(prompt, prompt, labels, number))
    return rows


def read_nwgi(paths: Sequence[Path]) -> list[Row]:
    """News with GPT instructions: seven labels, or the three that the prompt lists instead."""
    return _read_jsonl(paths, (INTENSITIES, SENTIMENTS))


def read_headline(paths: Sequence[Path]) -> list[Row]:
    """Questions about headlines of gold prices, Yes or No (2009.04202)."""
    return _read_jsonl(paths, (ANSWERS,))


def read_ner(paths: Sequence[Path]) -> list[Row]:
    """The type of a named entity in a sentence of an agreement, as FinLoRA asks it: person, location or organization."""
    return _read_jsonl(paths, (ENTITIES,))


def read_xbrl_term(paths: Sequence[Path]) -> list[Row]:
    """An XBRL term, to be explained in a sentence."""
    rows = []
    for path in paths:
        for line, row in json_lines(path):
            prompt = text_of(path, line, row, "context").rstrip()
            rows.append(Row(prompt, prompt, (text_of(path, line, row, "target").strip(),), 0))
    return rows
