"""The processes of a run: who they are, how they end together, and how a signal becomes a saved checkpoint."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from lrcompile.errors import TrainError
from lrcompile.train.agree import LOST, lost

# A rank that dies is noticed by its closed connections, at once. This bounds what merely hangs.
TIMEOUT = timedelta(minutes=10)
TOGETHER = 3.0  # seconds within which signals are one request


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started, or alone.

    Attributes:
        rank, size: of all ranks.
        device: what this rank computes on.
    """

    rank: int
    size: int
    device: torch.device

    def total(self, *numbers: float) -> list[float]:
        """The sums over all ranks of a few numbers, in float64."""
        if not dist.is_initialized():
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, where gloo sums: the device goes on computing
        dist.all_reduce(summed)
        return summed.tolist()


@contextmanager
def joined(*, alone: bool) -> Iterator[World]:
    """Join the ranks that torchrun started. One process on its own has a process group too, unless `alone`.

    Raises:
        TrainError: there are more ranks than GPUs; another rank is gone.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= there:
            raise TrainError(
                f"rank {local} of this machine has no GPU, of which there are {there}: start as many ranks"
            )
        torch.cuda.set_device(local)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    elif not alone:
        with tempfile.NamedTemporaryFile(prefix="lrcompile-") as store:
            dist.init_process_group(backend, init_method=f"file://{store.name}.store", rank=0, world_size=1)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        yield World(rank, size, device)
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still talks
    except RuntimeError as error:
        if not lost(error):
            raise
        raise TrainError(f"{LOST}. --resume goes on from the last checkpoint") from error
    finally:
        # After an error the others may be gone, and an orderly farewell would wait for them.
        if dist.is_initialized():
            dist.destroy_process_group()


class Signals:
    """SIGTERM and SIGINT ask a run to save and stop after the step it is in.

    The same signal once more, seconds later, ends it at once: at Ctrl-C both the terminal and torchrun send one.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._at = signal.Signals(number).name, now
        elif now - self._at > TOGETHER:
            signal.signal(number, self._before[number])  # type: ignore[arg-type]
            signal.raise_signal(number)
