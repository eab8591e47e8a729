"""Making an optimizer that was built earlier follow the adoption.

Old parameters in `param_groups` are replaced, in place, by their pairs, so that hyper-parameters and schedulers go on
working: at once in every live optimizer, and before each step in one built later from an older list of parameters.
An optimizer that is out of reach (it works on copies, or is no torch.optim.Optimizer) would train everything but
the new leaves: that is noticed when they have had gradients for three steps and never moved.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lrcompile.errors import AdoptError
from lrcompile.live import Live

_pairs: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter, nn.Parameter]] = {}
_steps = 0
_hooked = False


def refuse_started(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter], names: Sequence[str]
) -> None:
    """Raise AdoptError where an optimizer has stepped (has momenta) for a parameter that is about to go."""
    for optimizer in optimizers:
        for p, name in zip(parameters, names, strict=True):
            state = optimizer.state.get(p)
            if state and _initial(state) is None:
                raise AdoptError(
                    f"{type(optimizer).__name__} holds state for {name} already, which has no meaning for the pair that "
                    "replaces it; call lrcompile.adopt(model, recipe, example_inputs) before the first optimizer step"
                )


def _initial(state: dict[str, Any]) -> dict[str, Any] | None:
    """State made before any step (Adagrad fills its sums when built): every tensor's one value. None: it has stepped."""
    if "step" not in state or float(state["step"]) != 0:
        return None
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.numel()}
    if any(bool((v != v.flatten()[0]).any()) for v in tensors.values()):
        return None
    return {k: v.flatten()[0] if k in tensors else v for k, v in state.items()}


def _start(optimizer: torch.optim.Optimizer, old: nn.Parameter, leaves: Sequence[nn.Parameter]) -> None:
    """Give the leaves the initial state that the old parameter had, in their shapes."""
    old_state = optimizer.state.pop(old, None)
    values = _initial(old_state) if old_state else None
    for leaf in leaves if values and old_state else ():
        assert values is not None and old_state is not None
        optimizer.state[leaf] = {
            k: torch.full_like(leaf, float(values[k]), dtype=v.dtype, requires_grad=False)
            if isinstance(v, torch.Tensor) and v.shape == old.shape
            else (v.clone() if isinstance(v, torch.Tensor) else v)
            for k, v in old_state.items()
        }


def follow(
    optimizers: Sequence[torch.optim.Optimizer],
    replaced: Sequence[tuple[nn.Parameter, nn.Parameter, nn.Parameter]],
    others: Sequence[nn.Parameter],
) -> None:
    """Hand the new leaves to the optimizers that held the old parameters, now and before later steps.

    Args:
        optimizers: those alive.
        replaced: (old, weight_a, weight_b) each.
        others: parameters of the same graph that stay, to tell an optimizer at work from none.
    """
    global _hooked
    for old, a, b in replaced:
        _pairs[id(old)] = (weakref.ref(old, functools.partial(_forget, id(old))), a, b)
    for optimizer in optimizers:
        _replace(optimizer)
    if not _hooked:
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: _replace(optimizer))
        register_optimizer_step_post_hook(_count)
        _hooked = True
    trained = [(old, leaf) for old, *leaves in replaced for leaf in leaves if leaf.requires_grad]
    if trained:
        _Watch([leaf for _, leaf in trained], [*others, *{id(old): old for old, _ in trained}.values()])


def _forget(key: int, _: Any) -> None:
    entry = _pairs.get(key)
    if entry is not None and entry[0]() is None:  # the id may belong to a newer parameter by now
        del _pairs[key]


def _count(optimizer: Any, args: Any, kwargs: Any) -> None:
    global _steps
    _steps += 1


def _replace(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        parameters = group["params"]
        hits = [p for p in parameters if _pair(p) is not None]
        if not hits:
            continue
        refuse_started([optimizer], hits, [f"a replaced weight of shape {tuple(p.shape)}" for p in hits])
        for p in hits:
            _start(optimizer, p, _pair(p) or ())
        held = {id(p) for p in parameters}
        new: list[nn.Parameter] = []
        for p in parameters:
            pair = _pair(p)
            new += [p] if pair is None else [leaf for leaf in pair if id(leaf) not in held]
        if "param_names" in group:  # built from named_parameters()
            names = zip(parameters, group["param_names"], strict=True)
            group["param_names"] = [
                n for p, name in names for n in ([name] if _pair(p) is None else _pair_names(p, name, held))
            ]
        parameters[:] = new


def _pair_names(parameter: nn.Parameter, name: str, held: set[int]) -> list[str]:
    sides = zip(_pair(parameter) or (), ("_a", "_b"), strict=True)
    return [name + side for leaf, side in sides if id(leaf) not in held]


def _pair(parameter: nn.Parameter) -> tuple[nn.Parameter, nn.Parameter] | None:
    entry = _pairs.get(id(parameter))
    return entry[1:] if entry is not None and entry[0]() is parameter else None


class _Watch:
    """Counts the new leaves' fresh gradients; after three rounds some leaf must have moved."""

    def __init__(self, leaves: list[nn.Parameter], others: list[nn.Parameter]) -> None:
        self.leaves = [(weakref.ref(p), _state(p)) for p in leaves]
        self.others = [(weakref.ref(p), _state(p)) for p in others]
        self.steps = _steps
        self.rounds: dict[int, int] = {}
        self.last: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        watched = {id(leaves[i]): leaves[i] for i in (0, len(leaves) // 2, -1)}
        self.handles = [p.register_post_accumulate_grad_hook(self) for p in watched.values()]

    def __call__(self, leaf: torch.Tensor) -> None:
        gradient = leaf.grad
        if gradient is None:
            return
        previous = self.last.get(id(leaf))
        # The same tensor, written once since: accumulated. A new one, or zeroed in between: a step has passed.
        fresh = previous is None or previous[0]() is not gradient or gradient._version != previous[1] + 1
        self.last[id(leaf)] = (weakref.ref(gradient), gradient._version)
        self.rounds[id(leaf)] = self.rounds.get(id(leaf), 0) + fresh
        if self.rounds[id(leaf)] <= 3:
            return
        if _moved(self.leaves):
            self._end()
        elif _moved(self.others) or _steps - self.steps >= 3:
            self._end()
            if self._held():  # its optimizer has just not had its turn: the other half of a GAN, say
                return
            raise AdoptError(
                "three optimizer steps have passed and none of the low-rank weights moved: the optimizer works on "
                "the parameters that they replaced. Call lrcompile.adopt(model, recipe, example_inputs) before building the "
                "optimizer, or model.requires_grad_(False) on what is not to be trained"
            )

    def _held(self) -> bool:
        leaves = {id(p) for ref, _ in self.leaves if (p := ref()) is not None}
        groups = (g for optimizer in Live.sweep().optimizers for g in optimizer.param_groups)
        return any(id(p) in leaves for g in groups for p in g["params"])

    def _end(self) -> None:
        for handle in self.handles:
            handle.remove()


def _state(p: torch.Tensor) -> tuple[int, list[float]]:
    # The version misses writes through `.data`; a few values catch those.
    return p._version, p.detach().flatten()[:8].float().tolist()


def _moved(watched: list[tuple[weakref.ref[nn.Parameter], tuple[int, list[float]]]]) -> bool:
    alive = ((ref(), state) for ref, state in watched)
    return any(p is not None and _state(p) != state for p, state in alive)
