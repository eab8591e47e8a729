"""Weight decay of a pair's product, which is what decay of a dense weight becomes."""

from __future__ import annotations

from typing import Any

import torch

from lrcompile.train.optimizers.divided import Job, divide, local


def decay_products(optimizer: torch.optim.Optimizer, _args: Any = None, _kwargs: Any = None) -> None:
    """A step pre-hook: decay, decoupled, the products of the pairs in every group with a `product_decay` λ above zero.

    ``A <- A - ηλs² BᵀB A,  B <- B - ηλs² B AAᵀ``: a step of gradient descent on λ/2 ‖s·B·A‖²_F with the group's learning
    rate η, through matrices of (rank, rank). Decay of A and B themselves would penalise the nuclear norm of the product
    instead, and so lower its rank. A pair without any gradient stays, as in AdamW.

    The groups are as Spectron's: weight_a, weight_b, weight_a, … and `scales`, the s of each pair.
    """
    jobs: list[Job] = []
    for group in optimizer.param_groups:
        if group.get("product_decay"):
            params, rate = group["params"], float(group["lr"]) * group["product_decay"]
            for a, b, scale in zip(params[::2], params[1::2], group["scales"], strict=True):
                if a.grad is not None or b.grad is not None:
                    jobs.append(_Decay((a, b), rate * scale**2))
    with torch.no_grad():
        divide(jobs)


class _Decay(Job):
    def __init__(self, sides: tuple[torch.Tensor, torch.Tensor], rate: float) -> None:
        self.matrices, self.rate = sides, rate
        self.widths = tuple(p.shape[1] for p in sides)

    def load(self) -> list[torch.Tensor]:
        return [local(p).float() for p in self.matrices]

    def work(self, whole: list[torch.Tensor]) -> list[torch.Tensor]:
        a, b = whole
        return [self.rate * (b.mT @ b @ a), self.rate * (b @ (a @ a.mT))]

    def store(self, rows: list[torch.Tensor]) -> None:
        for p, part in zip(self.matrices, rows, strict=True):
            if p.requires_grad:
                local(p).sub_(part)
