"""Batches made ahead, in a thread."""

import threading
import time
from collections.abc import Iterator

import pytest

from lrcompile.train.data import Batch, Prefetch, Sampler
from tests.train.helpers_data import shards_of


def batches(n: int, pause: float = 0.0) -> Iterator[Batch]:
    sampler = Sampler(shards_of([50] * 4), length=8, batch=2, seed=0)
    for step in range(n):
        time.sleep(pause)
        yield sampler.rows(step, 0, 2)


def test_all_batches_come_in_order_and_then_the_end() -> None:
    with Prefetch(batches(7)) as fetched:
        found = list(fetched)
        assert [b.documents for b in found] == [b.documents for b in batches(7)]
        with pytest.raises(StopIteration):
            next(fetched)


def test_what_the_thread_raises_reaches_the_consumer_after_the_batches_before_it() -> None:
    def broken() -> Iterator[Batch]:
        yield from batches(3)
        raise ValueError("a shard went away")

    with Prefetch(broken()) as fetched:
        for _ in range(3):
            next(fetched)
        for _ in range(2):
            with pytest.raises(ValueError, match="a shard went away"):
                next(fetched)


def test_only_time_spent_waiting_is_counted() -> None:
    with Prefetch(batches(4, pause=0.1), ahead=1) as slow:
        list(slow)
    assert slow.waited > 0.3
    with Prefetch(batches(4), ahead=4) as ready:
        time.sleep(0.5)
        list(ready)
    assert ready.waited < 0.3


def test_close_ends_a_thread_that_nobody_reads_from() -> None:
    before = threading.active_count()
    fetched = Prefetch(batches(100), ahead=1)
    next(fetched)
    assert threading.active_count() == before + 1
    fetched.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(fetched)
