"""Steps that all ranks take together: what fails on one of them fails on all, with the same words, and none waits for ever."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lrcompile.errors import LrcompileError, TrainError

T = TypeVar("T")

LOST = "another rank is gone, or too slow to answer; what it said last tells why"


class Ranks:
    """Ranks that talk over a gloo group of their own; one rank where torch.distributed isn't initialised.

    The group is their own, so that a background thread talks on it while the training step talks on others: collectives
    of one group must come in the same order on every rank. Two threads must not talk on it at once.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Make a group of all ranks, or take one that is made for this, of some."""
        self.group, self.made = group, False
        if group is not None and dist.get_backend(group) != "gloo":
            raise TrainError(
                f'the ranks agree over gloo: give dist.new_group(..., backend="gloo"), no {dist.get_backend(group)}'
            )
        if group is None and dist.is_available() and dist.is_initialized():
            self.group, self.made = dist.new_group(backend="gloo"), True
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.world = 1 if self.group is None else dist.get_world_size(self.group)

    def gather(self, value: T) -> list[T]:
        """A value of each rank, on all ranks.

        Raises:
            TrainError: a rank is gone.
        """
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise TrainError(LOST) from error
        return values

    def agreed(self, doing: str, part: Callable[[], T]) -> list[T]:
        """Do a rank's part of something; what each rank's part gave, by rank.

        Args:
            doing: opens the message of an error.

        Raises:
            TrainError: a part failed, here or on another rank, or a rank is gone.
        """
        cause, result, problem = None, None, None
        try:
            result = part()
        except Exception as error:
            cause, problem = error, described(error)
        try:
            answers = self.gather((result, problem))
        except TrainError as error:
            raise TrainError(f"{doing}: {error}") from error
        problems = {rank: told for rank, (_, told) in enumerate(answers) if told is not None}
        if problems:
            raise alike(f"{doing}: {joined(problems, self.world)}") from cause
        return [result for result, _ in answers]  # type: ignore[misc]

    def close(self) -> None:
        if self.made and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group, self.made = None, False


def alike(message: str) -> TrainError:
    """An error that every rank raises with the same words."""
    error = TrainError(message)
    error.everywhere = True
    return error


def lost(error: BaseException) -> bool:
    """Whether an error says that the other ranks can't be reached any more."""
    if isinstance(error, TrainError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def joined(problems: dict[int, str], world: int) -> str:
    """What went wrong on which of the ranks; what all of them say is said once."""
    by_text: dict[str, list[int]] = {}
    for rank, problem in sorted(problems.items()):
        by_text.setdefault(problem, []).append(rank)
    told = {
        text: "" if len(ranks) == world else f" (rank {', '.join(map(str, ranks))})" for text, ranks in by_text.items()
    }
    return "; ".join(text + where for text, where in told.items())


def described(error: BaseException) -> str:
    """An error in one line, with the fix where there is one."""
    if isinstance(error, LrcompileError):
        return str(error)
    if lost(error):
        return LOST
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror or error}: make room, keep fewer checkpoints, or save to another disk"
    return f"{type(error).__name__}: {error}"
