"""One run: a method, a task and a learning rate, and what is recorded of it."""

from __future__ import annotations

import math
import os
import platform
import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lrcompile.graph.measure import saved_bytes

from .memory import step_bytes, weights_of
from .methods import Subject
from .scoring import training_loss
from .tasks import Row, Sizes, Task


@dataclass(frozen=True)
class Settings:
    """What all runs of a table share. Batches depend on these and the task alone: every method sees the same ones."""

    sizes: Sizes
    batch_size: int = 8
    eval_batch_size: int = 16
    epochs: int = 1
    warmup: float = 0.1
    clip: float = 1.0
    optimizer: str = "adamw"
    seed: int = 0
    tiny: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_batches(rows: list[Row], settings: Settings) -> list[list[Row]]:
    """Shuffled batches of rows that are alike in length: within eight batches the rows are sorted, so little is padding."""
    order = random.Random(settings.seed)
    batches: list[list[Row]] = []
    size = settings.batch_size
    for _ in range(settings.epochs):
        shuffled = order.sample(rows, len(rows))
        for start in range(0, len(rows), 8 * size):
            chunk = sorted(shuffled[start : start + 8 * size], key=lambda row: len(row.prompt))
            parts = [chunk[i : i + size] for i in range(0, len(chunk), size)]
            batches += order.sample(parts, len(parts))
    return batches


def make_optimizer(subject: Subject, lr: float, settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(subject.trained, lr=lr, weight_decay=0.0, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise SystemExit(f'adamw8bit is bitsandbytes\': pip install "lrcompile[quant]" ({error})') from None
    made: torch.optim.Optimizer = AdamW8bit(subject.trained, lr=lr, weight_decay=0.0)
    return made


def clock() -> float:
    """Seconds. With one thread those of the processor, which a busy machine's other programs don't stretch."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def train(subject: Subject, task: Task, lr: float, settings: Settings) -> dict[str, Any]:
    """Train in place: warm-up, then linear decay to nothing. Returns losses, bytes and speed; stops where the loss diverges."""
    subject.model.train()
    batches = make_batches(task.train, settings)
    optimizer = make_optimizer(subject, lr, settings)
    warm = max(1, round(settings.warmup * len(batches)))

    def factor(step: int) -> float:
        return min((step + 1) / warm, (len(batches) - step) / max(1, len(batches) - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses, memory, started = [], {}, clock()
    for batch in batches:
        loss, _ = training_loss(subject, batch, task.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(subject.trained, settings.clip)
        optimizer.step()
        schedule.step()
        memory = memory or step_bytes(subject.model, optimizer)
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break  # a learning rate too large; its record is the last to be chosen
    rows = sum(map(len, batches[: len(losses)]))
    return {
        "steps": len(losses),
        "losses": [round(x, 4) for x in losses],
        "bytes": memory,
        "examples_per_second": rows / (clock() - started),
    }


def saved_bytes_per_token(subject: Subject, task: Task) -> float:
    """What three copies of a row save more than one, over their tokens: what doesn't grow with the batch cancels out."""
    subject.model.train()
    row = max(task.train[:64], key=lambda r: len(r.prompt))
    tokens, saved = [], []
    for copies in (1, 3):
        loss, count = training_loss(subject, [row] * copies, task.labels)
        del loss
        tokens.append(count)
        saved.append(
            saved_bytes(lambda n=copies: training_loss(subject, [row] * n, task.labels), weights_of(subject.model))
        )
    return (saved[1] - saved[0]) / (tokens[1] - tokens[0])


def machine() -> str:
    """The processor, threads and versions that figures belong to."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, torch {torch.__version__}"
