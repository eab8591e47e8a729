"""The training loop: glue over the parts beside it, each of which a script of one's own can use alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lrcompile.train.agree import alike
from lrcompile.train.config import save_resolved
from lrcompile.train.data import Batch, Prefetch
from lrcompile.train.data.sample import IGNORED
from lrcompile.train.data.tokens import saved_tokenizer
from lrcompile.train.evaluate import continued, held_out_loss, summed_loss
from lrcompile.train.finish import export
from lrcompile.train.language import logits_of
from lrcompile.train.log import RunLog
from lrcompile.train.meter import Meter, peak_flops
from lrcompile.train.settings import Run
from lrcompile.train.start import CONFIG, Started
from lrcompile.train.state import held_bytes
from lrcompile.train.world import Signals, World, joined
from lrcompile.words import size


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


class _Run(Started):
    """A run from its start, or from its last checkpoint, to its end."""

    def __init__(self, run: Run, world: World, stack: ExitStack, resume: bool) -> None:
        super().__init__(run, world, stack, resume)
        self.stop, self.told_held = False, False
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
        if resume and self.resumed is None:
            self.log.event(f"nothing to resume in {self.out}: this is the start")

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
                # Shards are summed after every micro-batch, so that nobody holds whole gradients; copies of them once.
                self.model.set_requires_all_reduce(i == len(batches) - 1)
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
            self._tell_held()
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

    def _tell_held(self) -> None:
        """Once, while everything that a step needs is there."""
        if not self.told_held:
            self.told_held = True
            held = held_bytes(self.model, self.optimizers)
            told = ", ".join(f"{name} {size(count)}" for name, count in held.items())
            self.log.event(f"held by this rank: {told}", held=held)

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
            self.tensors(),
            {
                "step": self.done,
                "tokens": self.tokens,
                "data": self.sampler.state(),
                "states": self.states(),
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


def _seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:7], "big")
