"""Checkpoints of a training run: torch.distributed.checkpoint's files, written in the background and committed at once.

Tensors are stored by DCP in its safetensors layout, each rank its own shards, and everything else is JSON: nothing that a
checkpoint brings is ever unpickled. `committed` has the protocol of the directory.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from lrcompile.errors import TrainError
from lrcompile.files import sha256
from lrcompile.train.agree import LOST, Ranks, alike, described, joined
from lrcompile.train.committed import (
    check_step,
    commit,
    committed,
    prune,
    read_manifest,
    recover,
    work_folder,
    wrong_files,
)
from lrcompile.train.stored import CopiesPlanner, Entry, local_part, mismatches, spread, unfit
from lrcompile.weights.folder import absolute, lock


class Checkpoints:
    """The checkpoints of one run. Every rank makes one, and calls `save`, `load` and `close` as all the others do.

    Args:
        dir: shared by all ranks; made where it is missing. One run at a time saves to it.
        keep: how many of the latest are kept, at least 1.
        asynchronous: write in the background, from a copy in host memory (page-locked for CUDA tensors, and kept for the
            next save: the bytes of a rank's shards).
        group: a gloo group of the ranks that take part, which nothing else uses meanwhile; None: one of all is made.

    Raises:
        TrainError: the directory can't be made.
    """

    def __init__(
        self,
        dir: str | os.PathLike[str],
        *,
        keep: int = 2,
        asynchronous: bool = True,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        if keep < 1:
            raise TrainError(f"keep={keep} would keep no checkpoint; keep at least 1")
        self.dir, self.keep, self.asynchronous = absolute(dir), keep, asynchronous
        self._ranks = Ranks(group)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._staged: dict[str, Tensor] = {}
        self._ours = False
        self._handles: list[int] = []
        self._unlock = weakref.finalize(self, _close, self._handles)
        if self._ranks.group is None:
            # DCP warns at each save that it works in one process. That is what was asked for.
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        self._ranks.gather(None)  # all are here: what lies about in the directory was left by ranks that are gone
        self._ranks.agreed(f"{self.dir} can't hold checkpoints", self._open)

    def save(self, step: int, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
        """Write a checkpoint. Returns once the tensors are copied to host memory; without `asynchronous`, once it is committed.

        A save that still runs is waited for. A committed checkpoint of the same step is replaced.

        Args:
            step: steps done, not below the latest committed one.
            tensors: any dtype of safetensors and any shape, on any device. DTensors are stored once, whatever their mesh.
                A plain tensor is one that all ranks have the same, or that this rank alone has, under a name of its own.
            told: what JSON holds; rank 0's is kept.

        Raises:
            TrainError: on every rank: this save can't begin, or the one before failed. What was committed is untouched.
        """
        self.wait()

        def prepare() -> tuple[int, dict[str, Entry], dict[str, Any]]:
            problems = [problem for name, tensor in tensors.items() if (problem := unfit(name, tensor))]
            if problems:
                raise TrainError(_some(problems))
            if self._ranks.rank == 0:
                self._claim()
                check_step(self.dir, step)
                shutil.rmtree(work_folder(self.dir, step), ignore_errors=True)  # of a save that failed
            if self.asynchronous:
                self._stage(tensors)
            entries = {name: (tuple(t.shape), str(t.dtype), local_part(t).nbytes) for name, t in tensors.items()}
            return step, entries, json.loads(json.dumps(told))  # a copy: the caller's may change before it is written

        doing = f"step {step} can't be saved to {self.dir}"
        parts = self._ranks.agreed(doing, prepare)
        steps = [step for step, _, _ in parts]
        if len(set(steps)) > 1:
            raise TrainError(f"{self.dir}: ranks save different steps: {steps}")
        files = spread([entries for _, entries, _ in parts], doing)
        self._running = self._thread.submit(self._write, doing, dict(tensors), files, step, parts[0][2])
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            TrainError: on every rank: the save that was running failed. What was committed is untouched.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def latest(self) -> Path | None:
        """The committed checkpoint of the highest step."""
        return next(reversed(committed(self.dir).values()), None)

    def load(self, path: str | os.PathLike[str], tensors: dict[str, Tensor], *, strict: bool = True) -> dict[str, Any]:
        """Fill tensors in place from a checkpoint, which any number of ranks may have saved; what was told to `save`.

        All is checked before the first tensor is touched.

        Args:
            tensors: as `save` takes them, shapes and dtypes as saved; meshes may differ.
            strict: refuse a checkpoint that holds tensors which no rank asks for.

        Raises:
            TrainError: on every rank, naming what is wrong: missing, truncated, altered, not this model's.
        """
        self.wait()
        folder, doing = absolute(path), f"{os.fspath(path)} can't be loaded"
        manifests = self._ranks.agreed(doing, lambda: read_manifest(folder))
        manifest = manifests[0]
        if any(other["checksum"] != manifest["checksum"] for other in manifests):
            raise TrainError(f"{doing}: ranks find different checkpoints there; load the same on all")
        self._refuse(doing, lambda: wrong_files(folder, manifest["files"]))
        self._refuse(doing, lambda: self._altered(folder, manifest["files"]))
        held: set[str] = set()
        self._refuse(doing, lambda: mismatches(folder, tensors, held))
        if strict:
            names = set().union(*self._ranks.gather(set(tensors)))
            self._refuse(doing, lambda: [f"it holds {n!r}, which nothing asks for" for n in sorted(held - names)])
        try:
            with torch.no_grad():
                dcp.load(
                    dict(tensors),
                    storage_reader=HuggingFaceStorageReader(str(folder)),
                    planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=self._ranks.group,
                    no_dist=self._ranks.group is None,
                )
        except (CheckpointException, RuntimeError) as error:
            raise self._failure(doing, error) from error
        return manifest["told"]

    def close(self) -> None:
        """Wait as `wait` does, and let go of the directory and of the ranks' group."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._staged = {}
            self._unlock()
            self._ranks.close()

    def _open(self) -> None:
        if self._ranks.rank == 0:
            self.dir.mkdir(parents=True, exist_ok=True)
            with suppress(BlockingIOError):  # another run saves here, which is no harm to one that only reads
                self._claim()

    def _claim(self) -> None:
        """Take the directory for this run, unless it has it, and clear what killed saves left in it."""
        if not self._ours:
            try:
                self._handles += lock(self.dir, wait=False)
            except BlockingIOError as error:
                raise BlockingIOError(f"another run saves to {self.dir}; end it, or save elsewhere") from error
            self._ours = True
            recover(self.dir)

    @torch.no_grad()
    def _stage(self, tensors: dict[str, Tensor]) -> None:
        """Copy this rank's shards to host memory, into what the save before used where that fits."""
        staged = {}
        for name, tensor in tensors.items():
            local, copy = local_part(tensor), self._staged.get(name)
            if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
                copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            staged[name] = copy.copy_(local, non_blocking=True)
        self._staged = staged
        for device in {t.device for t in map(local_part, tensors.values()) if t.is_cuda}:
            torch.cuda.synchronize(device)

    def _write(
        self,
        doing: str,
        tensors: dict[str, Tensor],
        files: dict[str, int],
        step: int,
        told: dict[str, Any],
    ) -> None:
        """What a save does in the background, on all ranks."""
        ranks, work = self._ranks, work_folder(self.dir, step)

        def hashed() -> dict[str, tuple[int, str]]:
            mine = work.glob(f"shard-{ranks.rank + 1:05d}-*")  # DCP's names
            return {path.name: (path.stat().st_size, sha256(path)) for path in mine}

        def committed_by_first() -> None:
            if ranks.rank == 0:
                written = {name: kept for part in parts for name, kept in part.items()}
                commit(work, {"step": step, "world": ranks.world, "told": told}, written)
                prune(self.dir, self.keep)

        try:
            dcp.save(
                tensors,
                # The files are flushed to the disk as they are closed.
                storage_writer=HuggingFaceStorageWriter(str(work), files, save_distributed=True),
                planner=CopiesPlanner(self._staged),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
            parts = ranks.agreed(doing, hashed)
            ranks.agreed(doing, committed_by_first)
        except BaseException as error:  # CheckpointException is no Exception
            if ranks.rank == 0:
                shutil.rmtree(work, ignore_errors=True)
            raise self._failure(doing, error) from error

    def _refuse(self, doing: str, part: Callable[[], list[str]]) -> None:
        """Raise what any rank finds wrong, on all."""
        parts = self._ranks.agreed(doing, part)
        problems = list(dict.fromkeys(problem for found in parts for problem in found))
        if problems:
            raise alike(f"{doing}: {_some(problems)}")

    def _failure(self, doing: str, error: BaseException) -> TrainError:
        """What DCP's errors come to: what fails on a rank it tells to all, and only talking about it can fail on one."""
        if isinstance(error, CheckpointException):
            problems = {rank: described(cause) for rank, (cause, _) in error.failures.items()}
            failure = TrainError if LOST in problems.values() else alike
            return failure(f"{doing}: {joined(problems, self._ranks.world)}")
        if isinstance(error, TrainError):
            return error
        return TrainError(f"{doing}: {described(error)}")

    def _altered(self, folder: Path, files: dict[str, list[Any]]) -> list[str]:
        """This rank's share of the files whose content isn't what was saved."""
        shares: list[list[str]] = [[] for _ in range(self._ranks.world)]
        for name in sorted(files, key=lambda name: -files[name][0]):
            min(shares, key=lambda share: sum(files[n][0] for n in share)).append(name)
        return [
            f"{folder / name} was altered since it was saved: its checksum doesn't match; copy it again"
            for name in shares[self._ranks.rank]
            if sha256(folder / name) != files[name][1]
        ]


def _some(problems: list[str]) -> str:
    return "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)
