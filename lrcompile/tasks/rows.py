"""What every loader gives, which side a row is on, and how files are found, read and refused with their line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lrcompile.errors import EvalError

V = TypeVar("V")
SIDES = ("train", "validation", "test")


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        text: what it is about; its hash decides the side and the order.
        prompt: what the model is given.
        choices: what may follow (a space comes between); where a text is to be written, that text alone.
        answer: index of the right choice.
        ending: where the choices are what comes before, the text that follows each of them; then `prompt` is "".
    """

    text: str
    prompt: str
    choices: tuple[str, ...]
    answer: int
    ending: str = ""

    @property
    def trained(self) -> tuple[str, str]:
        """(prompt, completion) that the row comes to where it is trained on: what is scored as the right answer."""
        right = self.choices[self.answer]
        return (right, f" {self.ending}") if self.ending else (self.prompt, f" {right}")


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def in_order(rows: Iterable[tuple[str, V]]) -> list[tuple[str, V]]:
    """By the hash of the text, so that the first rows are a fair sample. The first byte decides the side: it isn't used."""
    return sorted(rows, key=lambda row: digest(row[0])[1:])


def split(pool: Iterable[tuple[str, V]], test: Iterable[tuple[str, V]] | None) -> dict[str, list[tuple[str, V]]]:
    """(text, anything) of each of SIDES, in order: a text is always on the same side, and never on two.

    Args:
        pool: to train and validate on; without `test`, a fifth of it is the test side.
        test: the set's own test side.
    """
    rows = list(pool)
    held = [row for row in rows if digest(row[0])[0] < 51] if test is None else list(test)
    texts = {text for text, _ in held}
    rest = [row for row in rows if row[0] not in texts]
    validation = [row for row in rest if digest(row[0])[0] >= 230]
    train = [row for row in rest if digest(row[0])[0] < 230]
    return {"train": in_order(train), "validation": in_order(validation), "test": in_order(held)}


# --- files ------------------------------------------------------------------------------------------------------------


def refuse(path: Path, line: int, why: str) -> NoReturn:
    raise EvalError(f"{path}, line {line}: {why}")


def find(folder: Path, names: tuple[str, ...]) -> list[Path] | None:
    """The files of these names ("x.json" or "folder/x.json"), in `folder` or at most two folders below; None if one lacks.

    Raises:
        EvalError: there are several of a name.
    """
    found = []
    for name in names:
        places = sorted(path for depth in ("", "*/", "*/*/") for path in folder.glob(depth + name) if path.is_file())
        if not places:
            return None
        if len(places) > 1:
            raise EvalError(f"{places[0]} and {places[1]}: which one is meant? Give --data the folder of one of them")
        found.append(places[0])
    return found


def read_text(path: Path, encoding: str = "utf-8-sig") -> str:
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is no text in {encoding}: {error}") from error
    except OSError as error:
        raise EvalError(f"can't read {path}: {error.strerror}") from error


def json_elements(path: Path) -> Iterator[tuple[int, Any]]:
    """(line that it begins in, value) of every element of a JSON array, or every value of a JSON object."""
    text = read_text(path)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        refuse(path, error.lineno, f"this is no JSON: {error.msg}")
    if not isinstance(whole, list | dict):
        refuse(path, 1, "a JSON array or object of rows is expected")
    # Once more, an element at a time: json tells positions of errors alone.
    decoder, at, line, counted = json.JSONDecoder(), _skip(text, 0) + 1, 1, 0
    while text[at := _skip(text, at)] not in "]}":
        if isinstance(whole, dict):
            _, at = decoder.raw_decode(text, at)
            at = _skip(text, at)
        value, end = decoder.raw_decode(text, at)
        line, counted = line + text.count("\n", counted, at), at
        yield line, value
        at = end


def _skip(text: str, at: int) -> int:
    """The next position that holds no space, comma or colon."""
    while text[at] in " \t\r\n,:":
        at += 1
    return at


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line that isn't blank."""
    # Not splitlines: a JSON string may hold U+2028 and the like as they are.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                refuse(path, number, f"this is no JSON: {error.msg}")


def text_of(path: Path, line: int, row: Any, key: str) -> str:
    """The text under a key of a row; anything else there is refused."""
    if not isinstance(row, dict):
        refuse(path, line, f"an object is expected, this is {type(row).__name__}")
    if key not in row:
        refuse(path, line, f"the row has no {key!r}; it has {', '.join(map(repr, row)) or 'nothing'}")
    if not isinstance(row[key], str) or not row[key].strip():
        refuse(path, line, f"{key!r} must be a text, this is {row[key]!r}")
    return str(row[key])
