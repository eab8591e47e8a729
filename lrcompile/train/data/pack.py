"""Which documents, and which parts of them, share a row: windows over a stream, or whole examples side by side.

A row is a list of pieces (document, begin, count): the tokens [begin, begin + count) of the document are fed in, and those
one further on are to be predicted. Pieces stand one after the other; what is left of a row is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from lrcompile.train.data.permute import key, place, shuffled

Pieces = tuple[np.ndarray, np.ndarray, np.ndarray]  # document, begin, count: int64, one element a piece

_OPEN = 32  # rows that the next example may still go into
_ORDER, _WINDOWS = 0, 1  # two permutations of one epoch must not be alike


class Layout(Protocol):
    """The rows of every epoch."""

    def rows(self, epoch: int) -> int:
        """How many there are."""

    def take(self, start: int, count: int) -> list[Pieces]:
        """Rows start … start + count, counted from the first epoch's first."""


class Windows:
    """Plain text: all documents, shuffled, form one stream, cut every `length` tokens; the windows are shuffled too, so
    that neighbours of one long document don't meet in a batch. The tail that fills no window is left out of the epoch.
    """

    def __init__(self, lengths: np.ndarray, length: int, seed: int) -> None:
        self._lengths, self._length, self._seed = lengths, length, seed
        self.count = int(lengths.sum()) // length
        self._stream = _Recent(self._make_stream)

    def rows(self, epoch: int) -> int:
        return self.count

    def take(self, start: int, count: int) -> list[Pieces]:
        found: list[Pieces] = []
        while len(found) < count:
            epoch, first = divmod(start + len(found), self.count)
            rows = np.arange(first, min(self.count, first + count - len(found)))
            order, starts, shuffle = self._stream(epoch)
            begins = place(rows, self.count, shuffle) * self._length
            ends = begins + self._length
            firsts = np.searchsorted(starts, begins, side="right") - 1
            lasts = np.searchsorted(starts, ends, side="left")
            for begin, end, i, j in zip(*(x.tolist() for x in (begins, ends, firsts, lasts)), strict=True):
                bounds = starts[i : j + 1].clip(begin, end)
                found.append((order[i:j], bounds[:-1] - starts[i:j], np.diff(bounds)))
        return found

    def _make_stream(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        order = shuffled(len(self._lengths), key(self._seed, epoch, _ORDER))
        starts = np.concatenate([[0], np.cumsum(self._lengths[order])])
        return order, starts, key(self._seed, epoch, _WINDOWS)


class Whole:
    """Prompts: every example whole, packed into rows anew in each epoch.

    How many rows an epoch has is known once it is packed: a run that goes on in epoch e packs those before it again.
    """

    def __init__(self, begins: np.ndarray, counts: np.ndarray, length: int, seed: int) -> None:
        self._begins, self._counts, self._length, self._seed = begins, counts, length, seed
        self._packed = _Recent(self._pack)
        self._ends = [0]  # rows up to each epoch's beginning

    def rows(self, epoch: int) -> int:
        while len(self._ends) < epoch + 2:
            self._ends.append(self._ends[-1] + len(self._packed(len(self._ends) - 1)[1]) - 1)
        return self._ends[epoch + 1] - self._ends[epoch]

    def take(self, start: int, count: int) -> list[Pieces]:
        found: list[Pieces] = []
        epoch = 0
        while len(found) < count:
            row = start + len(found)
            while row - self._ends[epoch] >= self.rows(epoch):
                epoch += 1
            row -= self._ends[epoch]
            members, starts = self._packed(epoch)
            documents = members[starts[row] : starts[row + 1]]
            found.append((documents, self._begins[documents], self._counts[documents]))
        return found

    def _pack(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = shuffled(len(self._counts), key(self._seed, epoch, _ORDER))
        members, starts = first_fit(self._counts[order], self._length)
        return order[members], starts


def chunks(begins: np.ndarray, counts: np.ndarray, length: int) -> Pieces:
    """Every document from its start, cut where a row is full; in order."""
    each = -(-counts // length)
    documents = np.repeat(np.arange(len(counts)), each)
    nth = np.arange(len(documents)) - np.repeat(np.cumsum(each) - each, each)
    return documents, begins[documents] + nth * length, np.minimum(length, counts[documents] - nth * length)


def first_fit(counts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Put each item into the first of the last 32 open rows that has room; about 2 s for a million items.

    Args:
        counts: places that each item takes, at most `length`.
        length: places of a row.

    Returns:
        members (items,): the items, row by row; starts (rows + 1,): where each row begins among them.
    """
    free: list[int] = []
    names: list[int] = []
    row_of: list[int] = []
    rows = 0
    for count in counts.tolist():
        for i, room in enumerate(free):
            if room >= count:
                free[i] = room - count
                row_of.append(names[i])
                if room == count:
                    del free[i], names[i]
                break
        else:
            if len(free) == _OPEN:
                del free[0], names[0]
            free.append(length - count)
            names.append(rows)
            row_of.append(rows)
            rows += 1
    found = np.array(row_of, np.int64)
    starts = np.concatenate([[0], np.cumsum(np.bincount(found, minlength=rows))])
    return np.argsort(found, kind="stable"), starts


class _Recent:
    """A function's results for the last two epochs asked for: a batch may span two."""

    def __init__(self, make: Callable[[int], tuple]) -> None:
        self._make = make
        self._held: dict[int, tuple] = {}

    def __call__(self, epoch: int) -> tuple:
        if epoch not in self._held:
            if len(self._held) == 2:
                del self._held[next(iter(self._held))]
            self._held[epoch] = self._make(epoch)
        return self._held[epoch]
