"""The next batches, made in a thread while the model computes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType

from lrcompile.train.data.sample import Batch

_POLL = 0.1  # seconds between looks at whether close() was called


class Prefetch:
    """An iterator over `batches`, a few of them ahead.

    Args:
        batches: a generator over `Sampler.rows`, say; advanced in a thread, and by nobody else.
        ahead: batches held ready.
        pin: put them in page-locked memory; None: where CUDA is there.

    Attributes:
        waited: seconds that the consumer has spent waiting for a batch.

    Whatever `batches` raises, the consumer's next call raises after the batches that came before.
    """

    def __init__(self, batches: Iterable[Batch], *, ahead: int = 2, pin: bool | None = None) -> None:
        import torch

        self.waited = 0.0
        self._pin = torch.cuda.is_available() if pin is None else pin
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._last: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(batches,), name="lrcompile-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._last is not None:
            raise self._last
        if self._closed.is_set():
            raise StopIteration
        before = time.perf_counter()
        found = self._ready.get()
        self.waited += time.perf_counter() - before
        if isinstance(found, BaseException):
            self._last = found
            raise found
        return found

    def close(self) -> None:
        """End the thread; batches that were ready are dropped."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, batches: Iterable[Batch]) -> None:
        try:
            for batch in batches:
                if not self._put(batch.pin() if self._pin else batch):
                    return
            self._put(StopIteration())
        except BaseException as error:  # the consumer's to handle
            self._put(error)

    def _put(self, item: Batch | BaseException) -> bool:
        """Whether it was taken before close()."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False
