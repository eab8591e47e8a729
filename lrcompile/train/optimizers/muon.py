"""Muon for plain and for sharded matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from lrcompile.errors import TrainError
from lrcompile.train.optimizers.divided import Divided, Job, local
from lrcompile.train.optimizers.orthogonal import orthogonalise


class Muon(Divided):
    """Momentum orthogonalised, each matrix for itself (https://kellerjordan.github.io/posts/muon/), with AdamW's step size.

    ``M <- β M + (1 - β) G;  W <- (1 - ηλ) W - η · 0.2 √max(rows, columns) · orthogonalise(β M + (1 - β) G)``

    The factor gives the step the root mean square of AdamW's, so that one learning rate serves both (arXiv 2502.16982): the
    same as torch.optim.Muon with adjust_lr_fn="match_rms_adamw". That one (torch 2.13) computes in bfloat16 always, can't
    step a DTensor with fewer rows than ranks, and on others rounds otherwise than one process; hence this.

    State, float32: `momentum`, of the parameter's shape.

    Args:
        params: matrices, or groups of them.
        lr: η.
        weight_decay: λ, decoupled.
        momentum: β.
        dtype: of the Newton-Schulz products; None: bfloat16 on GPUs, float32 elsewhere.

    Raises:
        TrainError: a parameter isn't a matrix, or isn't sharded by rows.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dim() != 2:
                raise TrainError(
                    f"Muon takes matrices, and got a parameter of shape {tuple(p.shape)}; give that to AdamW"
                )

    def jobs(self) -> Iterator[Job]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    yield _Step(self, group, p)


class _Step(Job):
    def __init__(self, optimizer: Muon, group: dict[str, Any], p: torch.Tensor) -> None:
        self.matrices, self.widths = (p,), (p.shape[1],)
        self.p, self.group, self.state = p, group, optimizer.state[p]
        self.dtype = optimizer.dtype or (torch.float32 if p.device.type == "cpu" else torch.bfloat16)

    def load(self) -> list[torch.Tensor]:
        if not self.state:
            self.state["momentum"] = torch.zeros_like(self.p, dtype=torch.float32)
        assert self.p.grad is not None
        grad, momentum = local(self.p.grad).float(), local(self.state["momentum"])
        momentum.lerp_(grad, 1 - self.group["momentum"])
        return [grad.lerp(momentum, self.group["momentum"])]

    def work(self, whole: list[torch.Tensor]) -> list[torch.Tensor]:
        return [orthogonalise(whole[0], self.dtype)]

    def store(self, rows: list[torch.Tensor]) -> None:
        lr, here = float(self.group["lr"]), local(self.p)
        here.mul_(1 - lr * self.group["weight_decay"])
        here.add_(rows[0], alpha=-lr * 0.2 * max(self.p.shape) ** 0.5)
