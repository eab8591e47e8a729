"""What is inside the ranks of the tests' runs: small models, faults that are put in, and the start of a rank.

Not imported as part of the tests: a rank has this directory as its working directory, and runs this file.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH = 258, 32  # of the tokenizer of bytes, rounded up


class Block(nn.Module):
    """Causal mean over the row, then an MLP: enough for tokens to depend on those before them."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        x = x + self.mix(h).cumsum(1) * 0.1
        return x + self.drop(self.down(F.gelu(self.up(h))))


class Tiny(nn.Module):
    """Token ids (rows, length) -> logits (rows, length, VOCAB)."""

    def __init__(self, dropout: float = 0.0, vocab: int = VOCAB) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, vocab)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _made(model: nn.Module) -> tuple[nn.Module, tuple[torch.Tensor]]:
    return model, (torch.zeros(1, 8, dtype=torch.int64),)


def tiny() -> Any:
    return _made(Tiny())


def dropping() -> Any:
    """Its steps are random."""
    return _made(Tiny(dropout=0.1))


def small_vocabulary() -> Any:
    return _made(Tiny(vocab=100))


def wider() -> Any:
    """Its blocks have other shapes."""
    model = Tiny()
    for block in model.blocks:
        block.up, block.down = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(5 * WIDTH, WIDTH)
    return _made(model)


class _Sparse(nn.Module):
    """Of three experts, the first row's first token chooses the first or the second."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.experts[int(x[0, 0, 0] > 0)](x)


def experts() -> Any:
    """Ranks use different parameters, and one nobody does."""
    model = Tiny()
    model.blocks.append(_Sparse())
    return _made(model)


class _Lists(Tiny):
    """Its layers are lists of two modules, as in many a single-file model."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([Block(0.0), nn.Linear(WIDTH, WIDTH)]) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block, more in self.blocks:  # type: ignore[misc]
            x = x + 0.1 * more(block(x))
        return self.head(x)


def lists() -> Any:
    return _made(_Lists())


def shared() -> Any:
    """Two of its blocks share a module, and one a weight with what is around."""
    model = Tiny()
    model.blocks.append(Block(0.0))
    model.blocks[1].mix = model.blocks[0].mix
    model.blocks[2].mix.weight = model.around = nn.Parameter(model.blocks[2].mix.weight.detach())
    return _made(model)


class _Unmasked(Tiny):
    """A token sees those after it."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids.flip(1)).flip(1)


def unmasked() -> Any:
    return _made(_Unmasked())


def empty() -> Any:
    """A model without values."""
    return _made(Tiny().to("meta"))


BAD = ord("~")  # a token that breaks the models below


class _Broken(Tiny):
    """At one token its output isn't finite."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).masked_fill((ids == BAD)[..., None], float("nan"))


class _Steep(Tiny):
    """At one token its gradient overflows, while the loss is as good as any."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = super().forward(ids)
        return logits + (logits - logits.detach()) * ((ids == BAD)[..., None] * 3e38)


def broken() -> Any:
    return _made(_Broken())


def steep() -> Any:
    return _made(_Steep())


# --- what is put into a run before it starts --------------------------------------------------------------------------


def telling() -> None:
    """Tell in a file when a step, a save or an evaluation begins and ends, and which documents each step had."""
    from lrcompile.train import checkpoint, driver

    file = os.open(f"{os.environ['TOLD']}.{os.environ.get('RANK', 0)}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def wrap(owner: Any, name: str, phase: str) -> None:
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def told(self: Any, *args: Any) -> Any:
            os.write(file, f"begin {phase}\n".encode())
            if phase == "step":
                rows = [row for batch in args[0] for row in batch.documents]
                os.write(file, f"documents {json.dumps([self.done, rows])}\n".encode())
            try:
                return plain(self, *args)
            finally:
                os.write(file, f"end {phase}\n".encode())

        setattr(owner, name, told)

    os.write(file, b"begin start\n")
    wrap(driver._Run, "_step", "step")
    wrap(driver._Run, "_evaluate", "evaluation")
    wrap(checkpoint.Checkpoints, "_write", "save")


def signalled() -> None:
    """Send this process a signal in the middle of a step, once for each micro-batch; and tell, as above.

    SIGNAL="15 in 3 of 0,1": SIGTERM, in the third step, to ranks 0 and 1.
    """
    from lrcompile.train import driver

    telling()
    number, _, step, _, ranks = os.environ["SIGNAL"].split()
    plain = driver.summed_loss

    def sending(*args: Any) -> Any:
        if signalled.run.done + 1 == int(step) and os.environ.get("RANK", "0") in ranks.split(","):  # type: ignore[attr-defined]
            os.kill(os.getpid(), int(number))
        return plain(*args)

    def go(self: Any) -> None:
        signalled.run = self  # type: ignore[attr-defined]
        plain_go(self)

    plain_go = driver._Run.go
    driver.summed_loss, driver._Run.go = sending, go  # type: ignore[assignment, method-assign]


class _Full:
    """A file on a disk that is full after some lines."""

    def __init__(self, file: Any, lines: int) -> None:
        self.file, self.left, self.close = file, lines, file.close

    @property
    def closed(self) -> bool:
        return bool(self.file.closed)

    def write(self, line: bytes) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(line))


def full_log() -> None:
    """The disk of metrics.jsonl fills up after a few steps."""
    from lrcompile.train.log import RunLog

    plain = RunLog.__init__

    def opened(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self._file is not None:
            self._file = _Full(self._file, 5)

    RunLog.__init__ = opened  # type: ignore[method-assign]


def full_at_the_end() -> None:
    """The disk fills up while the finished model is written."""
    from lrcompile.train import finish

    def save(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    finish.save = save


# --- the start of a rank ----------------------------------------------------------------------------------------------


def _start(argv: list[str], said: str, env: dict[str, str], before: str | None) -> None:
    """Be a rank: say everything into a file, and run the command."""
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    sys.path.insert(0, os.getcwd())
    os.environ.update(env)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if before is not None:
        getattr(importlib.import_module("inside"), before)()
    from lrcompile.cli import main

    sys.exit(main(argv))


if __name__ == "rank":
    _start(ARGV, SAID, ENV, BEFORE)  # type: ignore[name-defined]  # noqa: F821
