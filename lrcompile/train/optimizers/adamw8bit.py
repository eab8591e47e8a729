"""torchao's AdamW with 8-bit state, on the shards themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lrcompile.errors import MissingLibraryError
from lrcompile.train.optimizers.divided import evaluated, local


def adamw8bit(groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """torchao's AdamW8bit, with its compiled update given the rows that are here instead of DTensors.

    Given DTensors (torchao 0.18, torch 2.13), code compiled for one rank's rows is taken from the cache on disk by a rank
    that holds a different number of them: wrong numbers or a crash, wherever the ranks don't divide the rows. And a
    learning rate may be a number, as in every other optimizer.

    A matrix whose rows here are fewer than 4,096 numbers, or no multiple of 256, keeps float state there; so the state of a
    sharded matrix is that of one process up to its quantisation only.

    Raises:
        MissingLibraryError: torchao isn't installed.
    """
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.adam import single_param_adam
    except ImportError as error:
        raise MissingLibraryError("optimizer adamw8bit needs torchao: pip install 'lrcompile[quant]'") from error

    class OnShards(AdamW8bit):
        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = evaluated(closure)
            update = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
            with torch._dynamo.utils.disable_cache_limit():  # one variant a shape, a number that doesn't grow
                for group in self.param_groups:
                    rate = torch.as_tensor(group["lr"], dtype=torch.float32)
                    for p in group["params"]:
                        if p.grad is not None:
                            self._move(p, group, rate, update)
            return loss

        def _move(
            self, p: torch.Tensor, group: dict[str, Any], rate: torch.Tensor, update: Callable[..., None]
        ) -> None:
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = self._new_buffer(p, True)
                state["exp_avg_sq"] = self._new_buffer(p, False)
            state["step"] += 1
            assert p.grad is not None
            here = local(p.detach())
            if here.numel():
                held = (local(p.grad), state["step"], local(state["exp_avg"]), local(state["exp_avg_sq"]), None)
                settings = (rate, *group["betas"], group["weight_decay"], group["eps"], self.is_adamw)
                update(here, *held, *settings, self.bf16_stochastic_round and p.dtype is torch.bfloat16)

    return OnShards(groups, betas=betas, eps=eps)
