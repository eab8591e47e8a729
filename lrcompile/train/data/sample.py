"""Batches that are a function of (seed, step): the same for any number of ranks, and resumed from the step's number alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lrcompile.errors import TrainError
from lrcompile.train.data.pack import Layout, Pieces, Whole, Windows, chunks, first_fit
from lrcompile.train.data.shards import Shards

if TYPE_CHECKING:
    import torch

IGNORED = -100  # a target that is not predicted: torch's cross_entropy leaves it out


@dataclass(frozen=True)
class Batch:
    """Rows to train on; int64 tensors of shape (rows, length).

    Attributes:
        tokens: what the model is given; padding is the end token.
        targets: tokens one further on; -100 where nothing is to be predicted: at a document's end, in a prompt, in padding.
        positions: from 0 in each document, or at its first token in the row; padding counts as a document.
        documents: their numbers in the shards, row by row.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    documents: list[list[int]]

    def to(self, device: torch.device | str) -> Batch:
        """On a device; the copy is asynchronous where the batch is pinned."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """In page-locked memory, for a CUDA device."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(change(self.tokens), change(self.targets), change(self.positions), self.documents)


class Sampler:
    """Rows of `length` tokens from shards, `batch` of them a step.

    Args:
        shards: what to read.
        length: tokens a row.
        batch: rows a step, over all ranks and micro-batches.
        seed: which order.
        epochs: how often every document is seen; None: no end.
        too_long: of prompts, whether examples that don't fit in a row are an error ("refuse") or lose the beginning of
            their prompt ("cut").

    Raises:
        TrainError: there are such examples, or their completion alone is too long; or an argument makes no sense.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        length: int,
        batch: int,
        seed: int,
        epochs: int | None = None,
        too_long: str = "refuse",
    ) -> None:
        if min(length, batch) < 1 or (epochs is not None and epochs < 1):
            raise TrainError(f"length, batch and epochs must be at least 1, got {length}, {batch} and {epochs}")
        if too_long not in ("refuse", "cut"):
            raise TrainError(f'too_long is "refuse" or "cut", not {too_long!r}')
        self.shards, self.length, self.batch, self.seed, self.epochs = shards, length, batch, seed, epochs
        # The end token is predicted but never fed in, where a document stands whole in its row.
        self._begins = np.zeros(shards.documents, np.int64)
        self._counts = shards.lengths - 1
        self._layout: Layout
        if shards.kind == "prompts":
            self._fit(too_long == "cut")
            self._layout = Whole(self._begins, self._counts, length, seed)
        else:
            self._layout = Windows(shards.lengths, length, seed)
        self._ramp = np.arange(length)

    @cached_property
    def steps(self) -> int | None:
        """Whole steps in `epochs`; None where they have no end."""
        if self.epochs is None:
            return None
        return sum(map(self._layout.rows, range(self.epochs))) // self.batch

    def rows(self, step: int, first: int, count: int) -> Batch:
        """Rows first … first + count of a step's batch.

        Args:
            step: from 0.
            first, count: which of the step's `batch` rows; how they are divided over ranks and calls changes nothing.

        Raises:
            TrainError: the epochs are over, the shards hold less than a row, or there are no such rows or step.
        """
        if step < 0 or first < 0 or count < 0 or first + count > self.batch:
            raise TrainError(f"step {step} has rows 0 to {self.batch}; {first} to {first + count} are not among them")
        if self._layout.rows(0) == 0:
            raise TrainError(
                f"{self.shards.path} holds {self.shards.tokens} tokens, less than one row of {self.length}; give more data "
                "or a smaller length"
            )
        if self.steps is not None and step >= self.steps:
            raise TrainError(
                f"step {step} is past the end: {self.epochs} epochs are {self.steps} steps; allow more epochs"
            )
        return self._fill(self._layout.take(step * self.batch + first, count))

    def sequential(
        self, batches: int | None, rows: int, *, first: int = 0, count: int | None = None
    ) -> Iterator[Batch]:
        """The same rows every time, for a held-out loss: each document from its start, cut only where a row is full.

        Args:
            batches: how many, evenly spread over all there are; None, or more than there are: all.
            rows: rows a batch; the last is filled up with padding.
            first, count: yield these rows of each batch alone (a rank's share); all by default.
        """
        pieces = chunks(self._begins, self._counts, self.length)
        members, starts = first_fit(pieces[2], self.length)
        there = len(starts) - 1
        wanted = there if batches is None else min(there, batches * rows)
        chosen = np.arange(wanted) * there // max(wanted, 1)
        stop = rows if count is None else first + count
        for begin in range(0, wanted, rows):
            own = chosen[begin : begin + rows][first:stop]
            found = [tuple(p[members[starts[r] : starts[r + 1]]] for p in pieces) for r in own]
            nothing = np.zeros(0, np.int64)
            yield self._fill(found + [(nothing,) * 3] * (stop - first - len(found)))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, beside the step's number, to notice that these are no longer the same batches."""
        told = {"data": self.shards.fingerprint, "tokenizer": self.shards.tokenizer["fingerprint"]}
        return {**told, "length": self.length, "batch": self.batch, "seed": self.seed}

    def check(self, state: dict[str, Any]) -> None:
        """Raise TrainError, saying what differs, unless a checkpoint's state is this sampler's."""
        now = self.state()
        where = self.shards.path
        if state["tokenizer"] != now["tokenizer"]:
            raise TrainError(
                f"the tokenizer of {where} has changed since the checkpoint ({state['tokenizer'][:12]}, now "
                f"{now['tokenizer'][:12]}); prepare the data with the old one, or start a new run"
            )
        if state["data"] != now["data"]:
            raise TrainError(
                f"the data in {where} has changed since the checkpoint (checksum {state['data'][:12]}, now "
                f"{now['data'][:12]}); put it back, or start a new run"
            )
        for name in ("length", "batch", "seed"):
            if state[name] != now[name]:
                raise TrainError(
                    f"the checkpoint's run has {name} {state[name]}, this one {now[name]}; keep it, or start anew"
                )

    def _fit(self, cut: bool) -> None:
        over = self._counts - self.length  # tokens too many
        long = np.flatnonzero(over > 0)
        hopeless = long[over[long] >= self.shards.prompts[long]]
        refused = hopeless if cut else long
        if len(refused):
            what = "have a completion that is" if cut else "are"
            raise TrainError(
                f"{len(refused)} of {self.shards.documents} examples in {self.shards.path} {what} longer than {self.length} "
                f"tokens (the longest: number {refused[np.argmax(over[refused])]}, {int(over.max()) + self.length}); take a "
                "larger length" + ("" if cut else ', or too_long="cut", which drops the beginning of their prompts')
            )
        self._begins[long] = over[long]
        self._counts = self._counts - self._begins

    def _fill(self, rows: Iterable[Pieces]) -> Batch:
        import torch  # a process that tokenises imports this package too, and has no use for it

        rows = list(rows)
        shape = (len(rows), self.length)
        tokens = np.full(shape, self.shards.tokenizer["end"], np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        positions = np.empty(shape, np.int64)
        named = []
        for r, pieces in enumerate(rows):
            documents, begins, counts = (p.tolist() for p in pieces)
            at = 0
            for document, begin, count in zip(documents, begins, counts, strict=True):
                data = self.shards.slice(document, begin, min(begin + count + 1, int(self.shards.lengths[document])))
                tokens[r, at : at + count] = data[:count]
                # The first tokens, where they belong to the prompt, are no targets. Nor is what follows the last one.
                skip = max(0, int(self.shards.prompts[document]) - begin - 1)
                targets[r, at + skip : at + len(data) - 1] = data[1 + skip :]
                positions[r, at : at + count] = self._ramp[:count]
                at += count
            positions[r, at:] = self._ramp[: self.length - at]
            named.append(documents)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(positions), named)
