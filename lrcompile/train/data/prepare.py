"""Tokenise documents once, in many processes, to shards that a killed call goes on with to the same bytes.

Documents are read in order by one process and tokenised in batches by the others; a shard is written where enough tokens
wait, and after it the number of documents that are done (progress.json). What a batch holds depends on the documents
alone, so neither the number of workers nor where a call was killed shows in the result.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.errors import TrainError
from lrcompile.files import sha256
from lrcompile.train.data.documents import PROMPTS, Piece, Reading
from lrcompile.train.data.questions import task_sources
from lrcompile.train.data.shards import INDEX, PROGRESS, Shards, open_shard, read_index
from lrcompile.train.data.sources import DATASET, LINES, PARQUET, TEXT, Source, find_sources, read
from lrcompile.train.data.tokens import FILE, SETTINGS, Tokenizer, load_tokenizer, saved_tokenizer, train_bpe
from lrcompile.train.data.write import Part, commit_json, disk_errors_told

_BATCH = 1 << 20  # characters that a worker gets at once
_WORTH_A_PROCESS = 1 << 22  # bytes of sources below which starting one takes longer than it saves


@dataclass(frozen=True)
class Progress:
    """How far it has come: documents and tokens so far, bytes of the sources read and in all."""

    documents: int
    tokens: int
    bytes: int
    bytes_total: int


def prepare(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    tokenizer: str,
    *,
    kind: str = "text",
    fields: Mapping[str, str] | None = None,
    template: str | None = None,
    separator: str | None = None,
    validation: float = 0.0,
    end_token: str | None = None,
    workers: int | None = None,
    shard_tokens: int = 2**24,
    progress: Callable[[Progress], None] | None = None,
    tasks: Sequence[str] = (),
    data: str | os.PathLike[str] | None = None,
) -> None:
    """Tokenise files to OUT/train, and OUT/validation where a share is held out. Each document gets an end token.

    A call that was killed goes on where it stopped when it is repeated; one that is done does nothing. Call it under
    `if __name__ == "__main__":`, as everything that starts processes.

    Args:
        sources: files, directories or patterns of .txt (a document each), .jsonl and .parquet (a document a row),
            directories of datasets.save_to_disk, and what packages.py reads.
        out: a new or empty directory, or the one of the same call.
        tokenizer: see `load_tokenizer`; or "bpe:SIZE", trained on what is not held out.
        kind: "text", or "prompts": loss on the completion and the end token alone.
        fields: role -> name of the field: {"text": …}, or {"prompt": …, "completion": …}; the roles' names by default.
        template: the prompt as the model sees it, made of a row's fields: "Q: {question}\\nA:". Nothing is put between
            prompt and completion; the completions of a byte-level BPE usually begin with a space.
        separator: cuts .txt files into documents.
        validation: the share held out: the end of every document, or whole rows of prompts.
        end_token: where the tokenizer doesn't say which token ends a document.
        workers: processes; None: one a core, fewer where there is little to do.
        shard_tokens: tokens a shard, about.
        progress: called after every batch.
        tasks: instead of `sources`, names of lrcompile.tasks.TASKS: their training rows, asked as `lrcompile eval` asks them;
            held out is their validation side. "NAME:N": of each side the first N rows, a fair sample.
        data: the folder of the tasks' files.

    Raises:
        EvalError: a task that isn't there or has nothing to train on, a missing file or malformed row of one.
        TrainError: a malformed row (file and line are told), a source, tokenizer or option that makes no sense, other data
            in `out`, sources that changed since the call that is gone on with, a full disk, or a worker that died.
        MissingLibraryError: a library for this kind of file or tokenizer is missing.
    """
    if shard_tokens < 1 or (workers is not None and workers < 1):
        raise TrainError(f"workers and shard_tokens must be at least 1, got {workers} and {shard_tokens}")
    if tasks:
        _check_tasks(sources, data, fields, template, separator, validation)
        kind = PROMPTS
    elif data is not None:
        raise TrainError(f"{data} is where tasks are read from: name some, or leave it out")
    reading = Reading(kind, fields or {}, template, validation)
    found = task_sources(tasks, Path(data or ".")) if tasks else find_sources(sources)
    if kind == PROMPTS and (plain := [s for s in found if s.kind == "text"]):
        raise TrainError(f"{plain[0].path} is plain text: it has no prompts and completions; give .jsonl or .parquet")
    _check_used(found, fields, separator)
    names = ["train", "validation"] if validation or tasks else ["train"]
    target = Path(out)
    known = None if tokenizer.startswith("bpe:") else load_tokenizer(tokenizer, end_token)
    if known is None and (end_token is not None or not tokenizer[4:].isdigit()):
        raise TrainError(f"{tokenizer!r} with end_token={end_token!r}: a new BPE is bpe:SIZE, and makes its own end")
    request = {
        "sources": [{"name": s.path.name, "bytes": s.bytes, "sha256": sha256(*s.files)} for s in found],
        "tokenizer": known.fingerprint if known else tokenizer,
        "kind": kind,
        "fields": dict(reading.fields),
        "template": template,
        "separator": separator,
        "validation": validation,
        "shard_tokens": shard_tokens,
    } | ({"tasks": list(tasks)} if tasks else {})
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, min(cores, sum(s.bytes for s in found) // _WORTH_A_PROCESS))
    with disk_errors_told(target):
        if _finished(target, names, request):
            return
        job = _Job(target, names, request, found, reading, separator)
        job.start(known)
        job.run(workers, progress)
        job.finish()


def _check_used(found: Sequence[Source], fields: Mapping[str, str] | None, separator: str | None) -> None:
    """Raise TrainError for an option that none of the sources would be read by."""
    kinds = {source.kind for source in found}
    if separator == "":
        raise TrainError("separator is empty, and cuts nothing: leave it out, or say what stands between two documents")
    if separator is not None and TEXT not in kinds:
        raise TrainError("separator cuts .txt files into documents, and there is none among the sources: leave it out")
    if fields and not kinds & {LINES, PARQUET, DATASET}:
        raise TrainError("fields (--field) are of rows, and there is no .jsonl, .parquet or dataset: leave them out")


def _check_tasks(
    sources: Sequence[Any], data: Any, fields: Any, template: str | None, separator: str | None, validation: float
) -> None:
    """Raise TrainError for what tasks have of their own, and for tasks without data."""
    if sources:
        raise TrainError(f"give sources or tasks, not both: {sources[0]} and tasks can be prepared one after the other")
    if data is None:
        raise TrainError("tasks are read from files: say with data (--data DIR) where these are")
    own = {"fields": fields, "template": template, "separator": separator, "validation": validation}
    if given := [name for name, value in own.items() if value]:
        raise TrainError(f"tasks have prompts and sides of their own; leave {', '.join(given)} out")


def _finished(target: Path, names: list[str], request: dict[str, Any]) -> bool:
    """Whether this very call was done before. Other data under the name is refused."""
    if (target / PROGRESS).exists():
        return False
    done = [(target / name / INDEX).exists() for name in ("train", "validation")]
    if not any(done):
        ours = ("shard-", FILE, SETTINGS)
        held = [p for name in names for p in (target / name).glob("*") if not p.name.startswith(ours)]
        if held:
            raise TrainError(
                f"{held[0].parent} holds {held[0].name}, which is not prepared data; choose another directory"
            )
        return False
    _compare(read_index(target / "train")["request"], request, target)
    for name in names:
        Shards.open(target / name)
    return True


def _read_progress(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if {"request", "tokenizer", "documents", "train"} <= told.keys():
            return dict(told)
        raise ValueError("something is missing in it")
    except (ValueError, AttributeError) as error:
        raise TrainError(f"{file} can't be read ({error}); remove {file.parent} and prepare the data again") from error


def _compare(before: dict[str, Any], now: dict[str, Any], target: Path) -> None:
    """Raise TrainError, saying what differs, unless two calls asked for the same."""
    fix = f"give another directory than {target}, or remove it"
    old, new = ({s["name"]: s["sha256"] for s in r["sources"]} for r in (before, now))
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            what = "has changed" if name in old and name in new else "is new" if name in new else "is gone"
            raise TrainError(f"the source {name} {what} since {target} was prepared; {fix}")
    for key, value in now.items():
        if before.get(key) != value:
            raise TrainError(
                f"{target} was prepared with {_words(key, before.get(key))}, not {_words(key, value)}; {fix}"
            )


def _words(key: str, value: Any) -> str:
    return f"{key} {value[:12] if key == 'tokenizer' else value!r}" if key != "sources" else "sources in another order"


class _Job:
    """One call's work."""

    def __init__(
        self,
        target: Path,
        names: list[str],
        request: dict[str, Any],
        sources: list[Source],
        reading: Reading,
        separator: str | None,
    ) -> None:
        self.target, self.names, self.request = target, names, request
        self.sources, self.reading, self.separator = sources, reading, separator
        self.documents = 0  # rows whose shards are on disk
        self.tokenizer: Tokenizer
        self.parts: list[Part]

    def start(self, known: Tokenizer | None) -> None:
        """Begin, or find what an earlier call has done; train the tokenizer if one was asked for."""
        saved: dict[str, Any] = {}
        if (self.target / PROGRESS).exists():
            saved = _read_progress(self.target / PROGRESS)
            _compare(saved["request"], self.request, self.target)
            self.tokenizer = saved_tokenizer(self.target / "train", saved["tokenizer"])
            self.documents = saved["documents"]
        else:
            self.tokenizer = known or train_bpe(self._training_texts(), int(self.request["tokenizer"][4:]))
        dtype = np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.parts = [Part(self.target / name, dtype, saved.get(name, [])) for name in self.names]
        for part in self.parts:
            for shard in part.shards:
                open_shard(part.folder, shard, dtype)  # refuses one that was lost or cut since
        if not saved:
            for part in self.parts:
                part.folder.mkdir(parents=True, exist_ok=True)
                self.tokenizer.save(part.folder)
            self._record()

    def run(self, workers: int, progress: Callable[[Progress], None] | None) -> None:
        """Tokenise what is left, and write it."""
        total = sum(s.bytes for s in self.sources)
        seen = sum(s["tokens"] for part in self.parts for s in part.shards)
        special = self.reading.kind == PROMPTS
        for rows, done, pieces, (tokens, bounds) in _tokenised(self._batches(), self, workers, special):
            held = np.array([piece.held_out for piece in pieces], bool)
            sides = np.repeat(held, bounds[:, 0])
            for part, take, take_tokens in zip(self.parts, (~held, held), (~sides, sides), strict=False):
                part.add(tokens[take_tokens], bounds[take])
            self.documents += rows
            seen += len(tokens)
            if self.parts[0].waiting >= self.request["shard_tokens"]:
                self._write()
            if progress is not None:
                progress(Progress(self.documents, seen, done, total))
        self._write()

    def finish(self) -> None:
        """Write the indices, train's last."""
        for part, name in zip(self.parts, self.names, strict=True):
            if not part.shards:
                fix = "give more data, or hold out more" if name == "validation" else "hold out less, or give more data"
                raise TrainError(f"no document is left for {part.folder}; {fix}")
        for part in reversed(self.parts):
            part.finish(self.reading.kind, self.tokenizer, self.request)
        (self.target / PROGRESS).unlink()

    def _write(self) -> None:
        for part in self.parts:
            part.write()
        self._record()

    def _record(self) -> None:
        shards = {name: part.shards for name, part in zip(self.names, self.parts, strict=True)}
        told = {"request": self.request, "tokenizer": self.tokenizer.describe(), "documents": self.documents, **shards}
        commit_json(self.target / PROGRESS, told)

    def _rows(self) -> Iterator[tuple[list[Piece], int]]:
        """Every row's pieces, and the bytes of all sources that lie behind it."""
        before = 0
        for source in self.sources:
            for row in read(source, self.reading.needed, self.separator):
                yield self.reading.pieces(row), before + row.done
            before += source.bytes

    def _training_texts(self) -> Iterator[str]:
        for pieces, _ in self._rows():
            for piece in pieces:
                if not piece.held_out:
                    yield (piece.prompt or "") + piece.text

    def _batches(self) -> Iterator[tuple[int, int, list[Piece]]]:
        """(rows, bytes behind them, their pieces) of about as many characters, after the rows that are done."""
        limit = min(_BATCH, self.request["shard_tokens"])
        rows, size, pieces, done = 0, 0, list[Piece](), 0
        for number, (own, done) in enumerate(self._rows()):
            if number < self.documents:
                continue
            rows, size = rows + 1, size + sum(map(len, own))
            pieces += own
            if size >= limit:
                yield rows, done, pieces
                rows, size, pieces = 0, 0, []
        if rows:
            yield rows, done, pieces


# --- the workers ------------------------------------------------------------------------------------------------------

_Encoded = tuple[np.ndarray, np.ndarray]
_worker: Tokenizer


def _tokenised(
    batches: Iterator[tuple[int, int, list[Piece]]], job: _Job, workers: int, special: bool
) -> Iterator[tuple[int, int, list[Piece], _Encoded]]:
    """The batches in order with their tokens; no more of them under way than keep the workers busy."""
    if workers == 1:
        for rows, done, pieces in batches:
            yield rows, done, pieces, _encode(job.tokenizer, pieces, special)
        return
    context = multiprocessing.get_context("spawn")
    args = (str(job.parts[0].folder), job.tokenizer.describe())
    with ProcessPoolExecutor(workers, context, _start_worker, args) as pool:
        under_way: deque[tuple[int, int, list[Piece], Future[_Encoded]]] = deque()
        try:
            for rows, done, pieces in batches:
                under_way.append((rows, done, pieces, pool.submit(_encode_there, pieces, special)))
                if len(under_way) > 2 * workers:
                    rows, done, pieces, future = under_way.popleft()
                    yield rows, done, pieces, future.result()
            for rows, done, pieces, future in under_way:
                yield rows, done, pieces, future.result()
        except BrokenProcessPool as error:
            raise TrainError(
                "a process that tokenises died (out of memory? or a script without `if __name__ == '__main__':`); "
                "call again, perhaps with fewer workers: it goes on from its last shard"
            ) from error
        finally:
            for *_, future in under_way:
                future.cancel()


def _start_worker(folder: str, told: dict[str, Any]) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        wait([parent.sentinel])
        os._exit(1)

    # The queue's own pipe keeps a worker waiting for ever where its parent was killed.
    threading.Thread(target=leave, daemon=True).start()
    _worker = saved_tokenizer(Path(folder), told)


def _encode_there(pieces: list[Piece], special: bool) -> _Encoded:
    return _encode(_worker, pieces, special)


def _encode(tokenizer: Tokenizer, pieces: list[Piece], special: bool) -> _Encoded:
    """All tokens one after the other, and (tokens, of these prompt) of each piece, int64 (pieces, 2)."""
    texts = tokenizer.encode([piece.text for piece in pieces], special)
    prompts = tokenizer.encode([piece.prompt or "" for piece in pieces], special) if special else None
    end = np.array([tokenizer.end])
    parts: list[np.ndarray] = []
    bounds = np.zeros((len(pieces), 2), np.int64)
    for i, text in enumerate(texts):
        prompt = prompts[i] if prompts else text[:0]
        parts += [prompt, text, end]
        bounds[i] = len(prompt) + len(text) + 1, len(prompt)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype, casting="unsafe"), bounds
