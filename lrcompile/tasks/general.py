"""Loaders of the general sets from LLM-Adapters' instruction files (2304.01933), asked as lm-eval asks them.

The files ask for "answer2", which a small model can't do better than by chance, so that nothing could be seen to be lost.
Here the texts of the answers are scored instead, with the prompts of lm-eval's own tasks of these names. The files have BoolQ
without its passages, so its figures are lower than those that are published with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lrcompile.tasks.rows import Row, json_elements, refuse, text_of

_BOOLQ = r"Please answer the following question with true or false, question: (.+)\n\nAnswer format: true/false"
_PIQA = (
    r"Please choose the correct solution to the question: (.+)\n\nSolution1: (.+)\n\nSolution2: (.+)\n\n"
    r"Answer format: solution1/solution2"
)
_WINOGRANDE = (
    r"Please choose the correct answer to fill in the blank to complete the given sentence: (.+)\n\n"
    r"Option1: (.+) Option2: (.+) Answer format: option1/option2"
)
_SCIENCE = r"Please choose the correct answer to the question: (.+?)\n\n(Answer1: .+)\n\nAnswer format: (answer1(?:/answer\d)+)"


def _matches(paths: Sequence[Path], pattern: str) -> Iterator[tuple[Path, int, Any, str]]:
    """(file, line, what the pattern finds in the instruction, answer) of every row."""
    for path in paths:
        for line, row in json_elements(path):
            asked, answer = text_of(path, line, row, "instruction"), text_of(path, line, row, "answer")
            found = re.fullmatch(pattern, asked.strip(), re.DOTALL)
            if found is None:
                refuse(path, line, f"the instruction isn't in the form of this set: {asked[:100]!r}")
            yield path, line, found, answer.strip()


def _index(path: Path, line: int, answer: str, names: Sequence[str]) -> int:
    if answer not in names:
        refuse(path, line, f"the answer {answer!r} is none of {', '.join(names)}")
    return names.index(answer)


def read_boolq(paths: Sequence[Path]) -> list[Row]:
    rows = []
    for path, line, found, answer in _matches(paths, _BOOLQ):
        question = found[1].strip().rstrip("?")
        right = _index(path, line, answer, ("false", "true"))
        rows.append(Row(question, f"Question: {question}?\nAnswer:", ("no", "yes"), right))
    return rows


def read_piqa(paths: Sequence[Path]) -> list[Row]:
    rows = []
    for path, line, found, answer in _matches(paths, _PIQA):
        goal, *solutions = (part.strip() for part in found.groups())
        right = _index(path, line, answer, ("solution1", "solution2"))
        rows.append(Row("\n".join([goal, *solutions]), f"Question: {goal}\nAnswer:", tuple(solutions), right))
    return rows


def read_winogrande(paths: Sequence[Path]) -> list[Row]:
    """The sentence up to the blank with either option in it; scored is what follows (1806.02847)."""
    rows = []
    for path, line, found, answer in _matches(paths, _WINOGRANDE):
        sentence, *options = (part.strip() for part in found.groups())
        before, blank, after = sentence.partition("_")
        if not blank or "_" in after or not after.strip():
            refuse(path, line, f"one blank (_) with something after it is expected: {sentence[:100]!r}")
        right = _index(path, line, answer, ("option1", "option2"))
        contexts = tuple(before + option for option in options)
        rows.append(Row("\n".join([sentence, *options]), "", contexts, right, after.strip()))
    return rows


def _read_science(paths: Sequence[Path], prompt: str) -> list[Row]:
    rows = []
    for path, line, found, answer in _matches(paths, _SCIENCE):
        question, names = found[1].strip(), found[3].split("/")
        texts = tuple(part.strip() for part in re.split(r"(?:^|\s)Answer\d: ", found[2])[1:])
        if names != [f"answer{n}" for n in range(1, len(texts) + 1)] or not all(texts):
            refuse(path, line, f"{len(names)} answers are told, {len(texts)} are there")
        right = _index(path, line, answer, names)
        rows.append(Row("\n".join([question, *texts]), prompt.format(question), texts, right))
    return rows


def read_arc_easy(paths: Sequence[Path]) -> list[Row]:
    return _read_science(paths, "Question: {}\nAnswer:")


def read_openbookqa(paths: Sequence[Path]) -> list[Row]:
    return _read_science(paths, "{}")
