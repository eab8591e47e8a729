"""torchao's AdamW with 8-bit state, on the shards themselves. Imported when asked for: torchao is optional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.utils
from torchao.optim import AdamW8bit as Torchaos
from torchao.optim.adam import single_param_adam

from lrcompile.train.optimizers.divided import local


class AdamW8bit(Torchaos):
    """torchao's AdamW8bit, whose compiled update is given the rows that are here instead of DTensors.

    Given DTensors (torchao 0.18, torch 2.13), code compiled for one rank's rows is taken from the cache on disk by a rank
    that holds a different number of them: wrong numbers or a crash, wherever the ranks don't divide the rows. And a
    learning rate may be a number, as in every other optimizer. A matrix whose rows here are fewer than 4,096 numbers, or no
    multiple of 256, keeps float state there.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        update = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
        with torch._dynamo.utils.disable_cache_limit():  # one variant a shape, a number that doesn't grow
            for group in self.param_groups:
                rate = torch.as_tensor(group["lr"], dtype=torch.float32)
                for p in group["params"]:
                    if p.grad is not None:
                        self._step(p, group, rate, update)
        return loss

    def _step(self, p: torch.Tensor, group: dict[str, Any], rate: torch.Tensor, update: Callable[..., None]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._new_buffer(p, True)
            state["exp_avg_sq"] = self._new_buffer(p, False)
        state["step"] += 1
        here, grad = local(p.detach()), local(p.grad)  # type: ignore[arg-type]
        if not here.numel():
            return
        moments = (local(state["exp_avg"]), local(state["exp_avg_sq"]))
        settings = (rate, *group["betas"], group["weight_decay"], group["eps"], self.is_adamw)
        update(
            here,
            grad,
            state["step"],
            *moments,
            None,
            *settings,
            self.bf16_stochastic_round and p.dtype is torch.bfloat16,
        )
