"""What a run looks at besides its training loss: the loss of held-out text, and how the model goes on from prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from lrcompile.train.data import Sampler
from lrcompile.train.data.sample import IGNORED
from lrcompile.train.language import logits_of
from lrcompile.train.world import World

PART = 2**24  # logits whose loss is taken at once: 64 MiB in float32


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the targets, in nats, summed, in float32.

    Many logits are taken a part at a time, and again in backward, so that float32 copies of all never stand side by side.

    Args:
        logits: (rows, length, vocabulary).
        targets: int64 (rows, length), -100 where nothing is predicted.
    """
    flat, wanted = logits.flatten(0, 1), targets.flatten()
    rows = max(1, PART // flat.shape[1])
    if len(flat) <= rows or logits.dtype == torch.float32:
        return _summed(flat, wanted)
    parts = zip(flat.split(rows), wanted.split(rows), strict=True)
    losses = [checkpoint(_summed, part, some, use_reentrant=False) for part, some in parts]
    return torch.stack(losses).sum()


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def held_out_loss(
    model: nn.Module, sampler: Sampler, batches: int, *, rows: int, micro_batch: int, world: World
) -> float:
    """Nats a token over held-out batches, the same ones every time and for any number of ranks. Collective.

    Args:
        batches: how many, spread over what there is.
        rows: rows a batch, over all ranks; a multiple of micro_batch times the ranks.
        micro_batch: rows that a rank takes at once.
    """
    loss, count = 0.0, 0
    share = rows // world.size
    with _evaluating(model):
        for batch in sampler.sequential(batches, rows, first=world.rank * share, count=share):
            there = batch.to(world.device)
            parts = (x.split(micro_batch) for x in (there.tokens, there.targets, there.positions))
            for tokens, targets, positions in zip(*parts, strict=True):
                loss += float(summed_loss(logits_of(model, tokens, positions), targets))
                count += int((targets != IGNORED).sum())
    loss, counted = world.total(loss, count)
    return loss / max(counted, 1)


def continued(
    model: nn.Module, tokens: list[int], new: int, *, length: int, end: int, device: torch.device
) -> list[int]:
    """The tokens that follow, the likeliest one each time. Collective where the model is sharded: all ranks call it alike.

    Args:
        tokens: of the prompt, at least one.
        new: how many at most.
        length: of the window that the model sees.
        end: token that ends a document.
    """
    seen = list(tokens)
    with _evaluating(model), torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
        for _ in range(new):
            window = torch.tensor([seen[-length:]], device=device)
            positions = torch.arange(window.shape[1], device=device)[None]
            seen.append(int(logits_of(model, window, positions)[0, -1].argmax()))
            if seen[-1] == end:
                break
    return seen[len(tokens) :]


def sees(model: nn.Module, device: torch.device) -> tuple[bool, bool]:
    """Whether predictions of a model depend on later tokens of the row, and on earlier documents in it. Collective.

    Six tokens, two documents of three: the last token is changed, then the first, and what changes elsewhere is looked at.
    """
    tokens = torch.tensor([0, 1, 0, 1, 0, 1], device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    with _evaluating(model), torch.compiler.set_stance("force_eager"):

        def logits(changed: int | None) -> torch.Tensor:
            row = tokens.clone()
            if changed is not None:
                row[changed] ^= 1
            return logits_of(model, row[None], positions)[0]

        plain, last, first = logits(None), logits(5), logits(0)
    # Where tokens are sorted by expert, those of other tokens change what kernels round.
    rounding = min(16 * torch.finfo(plain.dtype).eps, 0.01) * plain.abs().max()
    future = (last - plain)[:5].abs().max()
    others = (first - plain)[3:].abs().max()
    return bool(future > rounding), bool(others > rounding)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the outermost stays gathered after a forward pass, for a backward pass that never comes
