"""Spectron: momentum of each side of a pair orthogonalised, and the step bounded by what it does to the product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from lrcompile.errors import TrainError
from lrcompile.train.optimizers.divided import Divided, Job, Rows, alike, local
from lrcompile.train.optimizers.orthogonal import fixed_vector, largest_singular_value, orthogonalise

WARM, COLD = 3, 30  # steps of power iteration from the last vector, and from the fixed one


class Spectron(Divided):
    """Spectral renormalisation with orthogonalisation for W = Q + s·B·A, after arXiv 2602.12429.

    With G the gradient of a side, and for both sides alike::

        M <- β M + (1 - β) G                    momentum, a mean
        O  = orthogonalise(M)                   five Newton-Schulz steps, ‖O‖₂ about 1 (at most 1.21)
        σ  = ‖A‖₂ + ‖B‖₂                        power iteration, warm-started
        ρ  = min(1, η / (|s| (σ + 1)))
        A <- A - ρ O_A,   B <- B - ρ O_B

    Then ΔW = s(-ρ(B O_A + O_B A) + ρ² O_B O_A), so ‖ΔW‖₂ <= |s| ρ (σ + ρ) <= η, up to the band of Newton-Schulz
    and what power iteration lacks of σ (at most 5% in what was tried, at a first step): one learning rate bounds the change
    of every product, whatever the sizes of its sides. It is a spectral norm, hundreds of times AdamW's.

    What is the paper's by its abstract: orthogonalised steps whose effect on the product is bounded by the sides' current
    spectral norms. The formulas follow an unmerged draft (NVIDIA-NeMo/Emerging-Optimizers, pull request 104), and were
    not compared with the paper's own. Ours are the scale s, the limit ρ <= 1, where the power iteration starts and how many
    steps it takes, Nesterov's momentum, and that no side decays.

    There is no weight decay of a side, which would penalise the nuclear norm: see product_decay.py. On parameters that
    `fully_shard` has cut the work is divided among the ranks (divided.py). State of each side, float32: `momentum`, its
    shape; `vector` (rows,), the left singular vector's estimate. Non-finite gradients go in as they are.

    Args:
        params: weight_a (rank, in_features), weight_b (out_features, rank), weight_a, weight_b, … of the pairs; or groups
            of these, where `scales` lists the s of each pair (left out: ones).
        lr: η.
        momentum: β.
        nesterov: orthogonalise β M + (1 - β) G instead.
        dtype: of the Newton-Schulz products; None: bfloat16 on GPUs, float32 elsewhere.

    Raises:
        TrainError: the parameters aren't pairs, or aren't sharded by rows.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "scales": None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        shapes = [tuple(p.shape) for p in group["params"]]
        sides = list(zip(shapes[::2], shapes[1::2], strict=False))
        if len(shapes) % 2 or any(len(a) != 2 or len(b) != 2 or a[0] != b[1] for a, b in sides):
            raise TrainError(
                f"Spectron takes weight_a (rank, in), weight_b (out, rank) of each pair in turn, and got {shapes}; "
                "optimizers(model, 'spectron') finds them in an adopted model"
            )
        if group["scales"] is None:
            group["scales"] = [1.0] * len(sides)
        if len(group["scales"]) != len(sides):
            raise TrainError(f"{len(group['scales'])} scales for {len(sides)} pairs; give one each")

    def jobs(self) -> Iterator[Job]:
        for group in self.param_groups:
            params = group["params"]
            for a, b, scale in zip(params[::2], params[1::2], group["scales"], strict=True):
                if a.grad is not None or b.grad is not None:
                    yield _Step(self, group, (a, b), scale)


class _Step(Job):
    """One step of a pair. A side without a gradient (frozen since) stays, and counts in the bound."""

    def __init__(
        self, optimizer: Spectron, group: dict[str, Any], sides: tuple[torch.Tensor, ...], scale: float
    ) -> None:
        self.matrices = sides
        self.widths = tuple(p.shape[1] + 1 for p in sides)
        self.group, self.scale = group, scale
        device = sides[0].device.type
        self.dtype = optimizer.dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        self.states = [optimizer.state[p] for p in sides]
        self.power = WARM if all(self.states) else COLD

    def load(self) -> list[torch.Tensor]:
        return [self._load(p, state) for p, state in zip(self.matrices, self.states, strict=True)]

    def _load(self, p: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        if not state:
            first, last = Rows.of(p).here
            state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
            state["vector"] = alike(fixed_vector(first, last, p.shape[0], local(p).device), p)
        momentum, beta = local(state["momentum"]), self.group["momentum"]
        direction = momentum
        if p.grad is not None:
            grad = local(p.grad).float()
            momentum.lerp_(grad, 1 - beta)
            direction = grad.lerp(momentum, beta) if self.group["nesterov"] else momentum
        return torch.cat([direction, local(p).float(), local(state["vector"])[:, None]], dim=1)

    def work(self, whole: list[torch.Tensor]) -> list[torch.Tensor]:
        directions, vectors, sigmas = [], [], []
        for block, p in zip(whole, self.matrices, strict=True):
            direction, value, vector = block.split([p.shape[1], p.shape[1], 1], dim=1)
            sigma, found = largest_singular_value(value.contiguous(), vector[:, 0], self.power)
            directions.append(orthogonalise(direction.contiguous(), self.dtype))
            vectors.append(found[:, None])
            sigmas.append(sigma)
        rho: torch.Tensor = float(self.group["lr"]) / (max(abs(self.scale), 1e-30) * (torch.stack(sigmas).sum() + 1))
        return [torch.cat([-rho.clamp(max=1) * d, v], dim=1) for d, v in zip(directions, vectors, strict=True)]

    def store(self, rows: list[torch.Tensor]) -> None:
        for p, state, block in zip(self.matrices, self.states, rows, strict=True):
            if p.grad is not None:
                local(p).add_(block[:, :-1])
            local(state["vector"]).copy_(block[:, -1])
