"""What a run looks at besides its training loss: the loss of held-out text, and how the model goes on from prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from lrcompile.train.build import IGNORED, logits_of
from lrcompile.train.data import Sampler
from lrcompile.train.world import World


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the targets, in nats, summed, in float32.

    Args:
        logits: (rows, length, vocabulary).
        targets: int64 (rows, length), -100 where nothing is predicted.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def held_out_loss(model: nn.Module, sampler: Sampler, batches: int, micro_batch: int, world: World) -> float:
    """Nats a token over the first `batches` micro-batches a rank of held-out data: the same ones every time. Collective."""
    loss, count = 0.0, 0
    with _evaluating(model):
        rows = micro_batch * world.size
        for batch in sampler.sequential(batches, rows, first=world.rank * micro_batch, count=micro_batch):
            batch = batch.to(world.device)
            loss += float(summed_loss(logits_of(model, batch.tokens, batch.positions), batch.targets))
            count += int((batch.targets != IGNORED).sum())
    loss, count = world.total(loss, count)  # type: ignore[assignment]
    return loss / max(count, 1)


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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)
