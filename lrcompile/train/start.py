"""What comes before the first step of a run: whose directory it is, what it reads, what it trains, and from where."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrcompile.errors import TrainError
from lrcompile.train.agree import Ranks, alike
from lrcompile.train.build import build
from lrcompile.train.checkpoint import Checkpoints
from lrcompile.train.committed import committed, read_manifest
from lrcompile.train.config import differences, load_resolved
from lrcompile.train.data import Batch, Sampler, Shards
from lrcompile.train.evaluate import sees
from lrcompile.train.materialise import allocate, materialise
from lrcompile.train.measure import flops_per_token
from lrcompile.train.optimizers import optimizers, schedule
from lrcompile.train.parallel import mesh, parallelise
from lrcompile.train.settings import Run
from lrcompile.train.state import prime, tensors_of
from lrcompile.train.world import World

CONFIG, CHECKPOINTS = "config.json", "checkpoints"


class Started:
    """A run up to its first step: its directory, data, model, optimizers, and the values they start from or go on with.

    Attributes:
        ranks: of all processes, for what they must agree on.
        rows, micro_batches: that this rank takes at once, and how often in a step.
        shards, sampler, held_out: the data; None for no held-out data.
        built, model, twin: the model; and the same once more on `meta`, not sharded, for the export.
        flops: of training one token, the model's and the dense twin's; None where they can't be told.
        optimizers, rate, trained: what moves which parameters, and the schedule.
        checkpoints: of the run; resumed is the one that it goes on from.
        done, tokens: steps and tokens so far.
    """

    def __init__(self, run: Run, world: World, stack: ExitStack, resume: bool) -> None:
        self.run, self.world, self.out = run, world, Path(run.out)
        self.ranks = Ranks()
        stack.callback(self.ranks.close)
        self.ranks.agreed("the run can't start", lambda: self._claim(resume))
        *_, self.rows, self.micro_batches = run.layout(world.size)
        self.ranks.agreed("the data can't be read", self._read)
        self.ranks.agreed("the model can't be built", self._build)
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, keep=run.save.keep, asynchronous=run.save.asynchronous)
        stack.enter_context(_closing(self.checkpoints))
        self.done, self.tokens = 0, 0
        # Rank 0 looks, for all: another machine may see the directory later.
        self.resumed = self.ranks.gather(self.checkpoints.latest() if resume else None)[0]
        self._start(self.resumed)

    def _claim(self, resume: bool) -> None:
        """Make the run's directory its own, or see that it holds this run."""
        self.run.layout(self.world.size)
        check_out(self.run, resume)
        if self.world.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)

    def _read(self) -> None:
        # One rank reads every token, the others look at sizes.
        verify = "checksums" if self.world.rank == 0 else "sizes"
        self.shards, self.sampler, self.held_out = read_data(self.run, verify)

    def _build(self) -> None:
        run = self.run
        self.built = build(
            run.model.source,
            run.recipe.make(),
            dtype=getattr(torch, run.model.dtype),
            attention=run.model.attention,
            length=run.data.length,
            seed=run.seed,
        )
        self.model = self.built.model
        check_vocabulary(self.model, self.shards)
        self.twin = copy.deepcopy(self.model)
        try:
            self.flops: tuple[float | None, float | None] = flops_per_token(self.model, run.data.length)
            self.unmeasured = ""
        except TrainError as error:  # it goes another way with other numbers
            self.flops, self.unmeasured = (None, None), f"FLOPs and MFU are not told: {error}"

    def _start(self, checkpoint: Path | None) -> None:
        """Shard the model, and give it and the optimizers their first values, or a checkpoint's."""
        run, world = self.run, self.world
        # FSDP warns of logits that are a view; the loss writes nothing into them.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        precision = getattr(torch, run.parallel.precision)
        cast = precision != getattr(torch, run.model.dtype)
        parallelise(
            self.model,
            self.built.blocks,
            over=mesh(world.device.type, run.parallel.shard, run.parallel.replicate, always=cast),
            recompute=run.parallel.checkpoint,
            backend=None if not run.parallel.compile else "inductor" if self.built.plan is None else "lrcompile",
            options=None if self.built.plan is None else {"kernels": run.parallel.kernels},
            compute=precision if cast else None,
            reduce=getattr(torch, run.parallel.reduce),
        )
        if checkpoint is None:
            materialise(self.built, world.device, self._calibration())
        else:
            allocate(self.model, world.device)
        del self.built.values  # a whole dense model, where the source has one
        self.optimizers = optimizers(self.model, **asdict(run.optimizer))
        shape = run.schedule
        self.rate = schedule(shape.name, steps=run.steps, warmup=shape.warmup, final=shape.final, decay=shape.decay)
        self.trained = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        if checkpoint is not None:
            self._load(checkpoint)
        self.model.train()
        future, self.mixes = sees(self.model, world.device)
        if future:
            raise alike(
                f"{type(self.twin).__name__} sees the tokens that it is to predict: attention isn't causal, as in models like "
                "BERT, or a mask is missing"
            )

    def _calibration(self) -> Iterator[Batch]:
        """The rows of the first steps, the same on every rank."""
        wanted, rows, batch = self.run.data.calibration, self.run.micro_batch, self.run.batch
        return (
            self.sampler.rows(first // batch, first % batch, min(rows, wanted - first))
            for first in range(0, wanted, rows)
        )

    def _load(self, checkpoint: Path) -> None:
        with torch.no_grad():  # so that the steps of zero length meet numbers
            for p in self.model.parameters():
                p.zero_()
        prime(self.optimizers)
        try:
            self.ranks.agreed("the run can't go on", lambda: self._check(checkpoint))
            told = self.checkpoints.load(checkpoint, self.tensors())
        except TrainError as error:
            raise alike(f"{error}{_older(checkpoint)}") from error
        self.done, self.tokens = told["step"], told["tokens"]

    def _check(self, checkpoint: Path) -> None:
        """See that a checkpoint is of this data, this model, and as many ranks where that matters."""
        told = read_manifest(checkpoint)["told"]
        self.sampler.check(told["data"])
        if told["states"] not in (None, self.states()):
            copies, ranks = told["states"]
            raise TrainError(
                f"{checkpoint} has states of {self.run.optimizer.name}, quantised a shard at a time, of parallel.replicate="
                f"{copies} and parallel.shard={ranks}: go on with these, on {copies * ranks} rank{'s'[: copies * ranks > 1]}"
            )
        plan = None if self.built.plan is None else self.built.plan.to_json()
        if told["plan"] != plan:
            raise TrainError(f"{checkpoint} is of a model with another Plan than {self.run.model.source} has now")

    def states(self) -> list[int] | None:
        """How the optimizer's states are bound to the ranks, if they are: those in 8 bits."""
        return list(self.run.layout(self.world.size)[:2]) if self.run.optimizer.name == "adamw8bit" else None

    def tensors(self) -> dict[str, torch.Tensor]:
        return tensors_of(self.model, self.optimizers, self.world.rank, self.world.size)


def check_out(run: Run, resume: bool) -> None:
    """Raise TrainError where the run's directory isn't its own to begin in, or to go on in."""
    out = Path(run.out)
    config, kept = out / CONFIG, committed(out / CHECKPOINTS)
    if not resume and (config.exists() or kept):
        raise TrainError(f"{out} holds a run: --resume goes on with it, another --out starts a new one")
    if resume and config.exists():
        changed = differences(load_resolved(config), run)
        if changed:
            raise TrainError(
                f"{config} is of another run: {'; '.join(changed)}. Set it back, or start a new run with another --out"
            )
    elif kept:
        raise TrainError(f"{out} has checkpoints, and {CONFIG} is gone, which tells of what run: put it back")


def read_data(run: Run, verify: str) -> tuple[Shards, Sampler, Sampler | None]:
    """Open a run's shards: what is trained on, its batches, and those held out; raises TrainError where they don't fit."""

    def sampler(shards: Shards) -> Sampler:
        return Sampler(shards, length=run.data.length, batch=run.batch, seed=run.seed)

    shards = Shards.open(run.data.train, verify=verify)
    if run.data.validation is None:
        return shards, sampler(shards), None
    held_out = Shards.open(run.data.validation, verify=verify)
    if held_out.tokenizer["fingerprint"] != shards.tokenizer["fingerprint"]:
        raise TrainError(f"{run.data.validation} was prepared with another tokenizer than {run.data.train}")
    return shards, sampler(shards), sampler(held_out)


@contextmanager
def _closing(checkpoints: Checkpoints) -> Iterator[None]:
    """Close them in the end. After an error a save that fails as well is not what is told."""
    try:
        yield
    except BaseException:
        with suppress(TrainError):
            checkpoints.close()
        raise
    checkpoints.close()


def _older(checkpoint: Path) -> str:
    """What to do about a checkpoint that can't be loaded, where there is one before it."""
    kept = list(committed(checkpoint.parent).values())
    older = kept[: kept.index(checkpoint)] if checkpoint in kept else []
    return f". To go on from {older[-1]} instead, move {checkpoint} away" if older else ""


def check_vocabulary(model: nn.Module, shards: Shards) -> None:
    """Raise TrainError where the data has tokens that the model has no embedding for."""
    find = getattr(model, "get_input_embeddings", None)
    tables: list[Any] = [find()] if find else [m for m in model.modules() if isinstance(m, nn.Embedding)]
    rows = max((t.num_embeddings for t in tables if hasattr(t, "num_embeddings")), default=None)
    if rows is not None and shards.vocab_size > rows:
        raise TrainError(
            f"{shards.path} has a vocabulary of {shards.vocab_size} tokens, and the model {rows}: set vocab_size in its config, "
            "or prepare the data with the model's tokenizer"
        )
