"""The training loop: glue over the parts beside it, each of which a script of one's own can use alone."""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lrcompile.errors import TrainError
from lrcompile.train.agree import Ranks, alike
from lrcompile.train.build import build
from lrcompile.train.checkpoint import Checkpoints
from lrcompile.train.committed import committed, read_manifest
from lrcompile.train.config import differences, load_resolved, save_resolved
from lrcompile.train.data import Batch, Prefetch, Sampler, Shards
from lrcompile.train.data.tokens import saved_tokenizer
from lrcompile.train.evaluate import continued, held_out_loss, sees, summed_loss
from lrcompile.train.finish import export
from lrcompile.train.language import IGNORED, logits_of
from lrcompile.train.log import RunLog
from lrcompile.train.materialise import allocate, materialise
from lrcompile.train.measure import flops_per_token
from lrcompile.train.meter import Meter, peak_flops
from lrcompile.train.optimizers import optimizers, schedule
from lrcompile.train.parallel import mesh, parallelise
from lrcompile.train.settings import Run
from lrcompile.train.state import prime, tensors_of
from lrcompile.train.world import Signals, World, joined

CONFIG, CHECKPOINTS = "config.json", "checkpoints"


def train(run: Run, *, resume: bool = False) -> None:
    """Train a model as a run says, and leave it in `run.out`. Started by torchrun, every rank calls it; else one process does.

    Args:
        run: settings (`lrcompile.train.config.read`).
        resume: go on from the last checkpoint in `run.out`, bit for bit; from the start where there is none yet.

    Raises:
        TrainError: `out` holds a run and `resume` isn't set; what `resume` finds is another run's; data, checkpoint or
            model don't fit; a loss or gradient that isn't finite.
    """
    plain = run.parallel.precision == run.model.dtype  # nothing to cast
    with joined(alone=plain) as world, ExitStack() as stack:
        _Run(run, world, stack, resume).go()


@dataclass
class _Step:
    """What one step came to, over all ranks."""

    loss: float
    norm: float
    tokens: int


class _Run:
    """A run from its start, or from its last checkpoint, to its end."""

    def __init__(self, run: Run, world: World, stack: ExitStack, resume: bool) -> None:
        self.run, self.world, self.out = run, world, Path(run.out)
        ranks = Ranks()
        stack.callback(ranks.close)
        self.ranks = ranks
        ranks.agreed("the run can't start", lambda: self._claim(resume))
        *_, self.rows, self.micro_batches = run.layout(world.size)
        ranks.agreed("the data can't be read", self._read)
        ranks.agreed("the model can't be built", self._build)
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, keep=run.save.keep, asynchronous=run.save.asynchronous)
        stack.enter_context(_closing(self.checkpoints))
        self.done, self.tokens, self.stop = 0, 0, False
        # Rank 0 looks, for all: another machine may see the directory later.
        latest = ranks.gather(self.checkpoints.latest() if resume else None)[0]
        self._start(latest)
        self.log = stack.enter_context(
            RunLog(
                self.out,
                live=run.log.live,
                tensorboard=run.log.tensorboard,
                rank=world.rank,
                steps=run.steps,
                resume_step=self.done,
                every=run.log.every,
            )
        )
        self.signals = stack.enter_context(Signals())
        if resume and latest is None:
            self.log.event(f"nothing to resume in {self.out}: this is the start")

    # --- the start ----------------------------------------------------------------------------------------------------

    def _claim(self, resume: bool) -> None:
        """Make the run's directory its own, or see that it holds this run."""
        self.run.layout(self.world.size)
        config, kept = self.out / CONFIG, committed(self.out / CHECKPOINTS)
        if not resume and (config.exists() or kept):
            raise TrainError(f"{self.out} holds a run: --resume goes on with it, another --out starts a new one")
        if resume and config.exists():
            changed = differences(load_resolved(config), self.run)
            if changed:
                raise TrainError(
                    f"{config} is of another run: {'; '.join(changed)}. Set it back, or start a new run with another --out"
                )
        elif kept:
            raise TrainError(f"{self.out} has checkpoints, and {CONFIG} is gone, which tells of what run: put it back")
        if self.world.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)

    def _read(self) -> None:
        run = self.run
        # One rank reads every token, the others look at sizes.
        verify = "checksums" if self.world.rank == 0 else "sizes"
        shape: dict[str, int] = {"length": run.data.length, "batch": run.batch, "seed": run.seed}
        self.shards = Shards.open(run.data.train, verify=verify)
        self.sampler = Sampler(self.shards, **shape)  # type: ignore[arg-type]
        self.held_out: Sampler | None = None
        if run.data.validation is not None:
            held_out = Shards.open(run.data.validation, verify=verify)
            if held_out.tokenizer["fingerprint"] != self.shards.tokenizer["fingerprint"]:
                raise TrainError(f"{run.data.validation} was prepared with another tokenizer than {run.data.train}")
            self.held_out = Sampler(held_out, **shape)  # type: ignore[arg-type]

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
        _check_vocabulary(self.model, self.shards)
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
            materialise(self.built, world.device)
        else:
            allocate(self.model, world.device)
        del self.built.values  # a whole dense model, where the source has one
        chosen = run.optimizer
        self.optimizers = optimizers(
            self.model,
            chosen.name,
            lr=chosen.lr,
            factor_lr=chosen.factor_lr,
            matrix_lr=chosen.matrix_lr,
            betas=chosen.betas,
            eps=chosen.eps,
            weight_decay=chosen.weight_decay,
            product_decay=chosen.product_decay,
            momentum=chosen.momentum,
        )
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

    def _load(self, checkpoint: Path) -> None:
        with torch.no_grad():  # so that the steps of zero length meet numbers
            for p in self.model.parameters():
                p.zero_()
        prime(self.optimizers)
        try:
            self.ranks.agreed("the run can't go on", lambda: self._check(checkpoint))
            told = self.checkpoints.load(checkpoint, self._tensors())
        except TrainError as error:
            raise alike(f"{error}{_older(checkpoint)}") from error
        self.done, self.tokens = told["step"], told["tokens"]

    def _check(self, checkpoint: Path) -> None:
        """See that a checkpoint is of this data, this model, and as many ranks where that matters."""
        told = read_manifest(checkpoint)["told"]
        self.sampler.check(told["data"])
        if told["states"] not in (None, self._states()):
            copies, ranks = told["states"]
            raise TrainError(
                f"{checkpoint} has states of {self.run.optimizer.name}, quantised a shard at a time, of parallel.replicate="
                f"{copies} and parallel.shard={ranks}: go on with these, on {copies * ranks} rank{'s'[: copies * ranks > 1]}"
            )
        plan = None if self.built.plan is None else self.built.plan.to_json()
        if told["plan"] != plan:
            raise TrainError(f"{checkpoint} is of a model with another Plan than {self.run.model.source} has now")

    def _states(self) -> list[int] | None:
        """How the optimizer's states are bound to the ranks, if they are: those in 8 bits."""
        return list(self.run.layout(self.world.size)[:2]) if self.run.optimizer.name == "adamw8bit" else None

    def _tensors(self) -> dict[str, torch.Tensor]:
        return tensors_of(self.model, self.optimizers, self.world.rank, self.world.size)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Train to the last step, evaluate, save and export."""
        run = self.run
        if self.world.rank == 0:
            save_resolved(run, self.out / CONFIG)
        self._tell_start()
        meter = Meter(
            tokens=self.tokens,
            flops_per_token=self.flops[0],
            dense_flops_per_token=self.flops[1],
            peak=peak_flops(self.world.device, run.parallel.precision, self.world.size),
            device=self.world.device,
        )
        with Prefetch(self._batches(), ahead=2 * self.micro_batches) as batches:
            meter.start()
            while self.done < run.steps:
                waited = batches.waited
                step = self._step([next(batches) for _ in range(self.micro_batches)])
                if step is not None:
                    told = {
                        "loss": step.loss,
                        "grad_norm": step.norm,
                        "lr": run.optimizer.lr * self.rate(self.done - 1),
                    }
                    told |= meter.step(step.tokens) | {"waited": batches.waited - waited}
                    self.log.step(self.done, **told)
                with meter.aside():
                    if self._after():
                        return
            self._finish()

    def _batches(self) -> Iterator[Batch]:
        """This rank's micro-batches from the next step on."""
        rows = self.rows
        for step in range(self.done, self.run.steps):
            for i in range(self.micro_batches):
                yield self.sampler.rows(step, (self.world.rank * self.micro_batches + i) * rows, rows)

    def _step(self, batches: list[Batch]) -> _Step | None:
        """One update; None where it was skipped."""
        run, world = self.run, self.world
        # Dropout and the like depend on the step alone, so that there is no state to keep.
        torch.manual_seed(_seed(run.seed, self.done, world.rank))
        counted = sum(int((b.targets != IGNORED).sum()) for b in batches)
        targets = world.total(counted)[0]
        summed = torch.zeros((), device=world.device)
        for i, batch in enumerate(batches):
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(i == len(batches) - 1)
            there = batch.to(world.device)
            loss = summed_loss(logits_of(self.model, there.tokens, there.positions), there.targets)
            # FSDP takes the mean over the ranks, and the loss is one over the targets of all of them.
            (loss * (world.size / max(targets, 1))).backward()
            summed += loss.detach()
        for p in self.trained:  # what this step had no use for is moved as if it had, on any number of ranks
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = nn.utils.clip_grad_norm_(self.trained, run.clip or float("inf"), foreach=True)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        total, asked = world.total(float(summed), self.signals.asked is not None)
        self.stop = asked > 0
        found = _Step(total / max(targets, 1), float(whole), run.batch * run.data.length)
        updated = math.isfinite(found.loss) and math.isfinite(found.norm)
        if updated:
            self._update()
        else:
            self._refuse(found, batches)
        for p in self.trained:
            p.grad = None
        self.done += 1
        self.tokens += found.tokens
        return found if updated else None

    def _update(self) -> None:
        multiplier = self.rate(self.done)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * multiplier
            optimizer.step()

    def _refuse(self, step: _Step, batches: list[Batch]) -> None:
        """Stop at a step that would ruin the model, or tell that it is skipped."""
        rows = sorted(
            {d for part in self.ranks.gather([d for b in batches for r in b.documents for d in r]) for d in part}
        )
        which = ", ".join(map(str, rows[:20])) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
        what = f"step {self.done + 1}: loss {step.loss}, gradient norm {step.norm}; documents {which} of {self.run.data.train}"
        if self.run.bad_loss == "skip":
            self.log.event(f"skipped {what}")
            return
        self.checkpoints.wait()
        good = self.checkpoints.latest()
        last = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        self.log.event(f"stopped at {what}")
        raise alike(
            f"{what}. The model was not updated, and {last}: --resume goes on from it, with bad_loss=skip past this step; or "
            "start anew with a lower learning rate"
        )

    def _after(self) -> bool:
        """What comes between two steps; whether the run is to end here."""
        run = self.run
        last = self.done == run.steps
        if self.done % run.evaluate.every == 0 or last:
            self._evaluate()
        if self.done % run.save.every == 0 or last or self.stop:
            self._save()
        if self.stop and not last:
            self.checkpoints.wait()
            self.log.event(f"stopped by a signal after step {self.done}, which is saved; --resume goes on")
            return True
        return False

    def _save(self) -> None:
        self.checkpoints.save(
            self.done,
            self._tensors(),
            {
                "step": self.done,
                "tokens": self.tokens,
                "data": self.sampler.state(),
                "states": self._states(),
                "plan": None if self.built.plan is None else self.built.plan.to_json(),
            },
        )

    def _evaluate(self) -> None:
        run = self.run
        if self.held_out is not None:
            loss = held_out_loss(
                self.model,
                self.held_out,
                run.evaluate.batches,
                rows=run.batch,
                micro_batch=self.rows,
                world=self.world,
            )
            self.log.evaluation(self.done, loss=loss)
        if not run.evaluate.prompts:
            return
        tokenizer = saved_tokenizer(self.shards.path, self.shards.tokenizer)
        for prompt in run.evaluate.prompts:
            tokens = tokenizer.encode([prompt])[0].tolist()
            new = continued(
                self.model,
                tokens or [tokenizer.end],
                run.evaluate.new_tokens,
                length=run.data.length,
                end=tokenizer.end,
                device=self.world.device,
            )
            self.log.sample(self.done, prompt, tokenizer.decode(new))

    def _finish(self) -> None:
        self.checkpoints.wait()

        def write() -> list[str]:
            return export(
                self.model,
                self.twin,
                self.built.plan,
                self.out,
                merged=self.run.save.merged,
                data=Path(self.run.data.train),
            )

        doing = (
            f"all {self.done} steps are done and saved, and the finished model can't be written (--resume tries again)"
        )
        written = self.ranks.agreed(doing, write)[0]
        self.log.event("finished: " + ", ".join(str(self.out / name) for name in written))

    def _tell_start(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        self.log.event(
            "start",
            parameters=parameters,
            trained=sum(p.numel() for p in self.trained),
            ranks=self.world.size,
            device=torch.cuda.get_device_name() if self.world.device.type == "cuda" else "cpu",
            flops_per_token=self.flops[0],
            dense_flops_per_token=self.flops[1],
        )
        if self.unmeasured:
            self.log.event(self.unmeasured)
        if self.mixes and self.shards.documents > 1:
            self.log.event(
                f"{type(self.twin).__name__} doesn't go by position_ids: documents that share a row see one another's tokens"
            )


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


def _check_vocabulary(model: nn.Module, shards: Shards) -> None:
    """Raise TrainError where the data has tokens that the model has no embedding for."""
    find = getattr(model, "get_input_embeddings", None)
    tables: list[Any] = [find()] if find else [m for m in model.modules() if isinstance(m, nn.Embedding)]
    rows = max((t.num_embeddings for t in tables if hasattr(t, "num_embeddings")), default=None)
    if rows is not None and shards.vocab_size > rows:
        raise TrainError(
            f"{shards.path} has a vocabulary of {shards.vocab_size} tokens, and the model {rows}: set vocab_size in its config, "
            "or prepare the data with the model's tokenizer"
        )


def _seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:7], "big")
