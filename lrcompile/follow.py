"""Making an optimizer that was built earlier follow an adoption, or a merge.

Old parameters in `param_groups` are replaced, in place, by their pairs, so that hyper-parameters and schedulers go on
working: at once in every live optimizer, and before each step in one built later from an older list of parameters.
An optimizer that is out of reach (it works on copies, or is no torch.optim.Optimizer) would train everything but
the new leaves: that is noticed when they have had gradients for three steps and never moved.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from lrcompile.errors import AdoptError
from lrcompile.live import Live

log = logging.getLogger("lrcompile")


@dataclass
class _Heirs:
    """What stands in a parameter's place: its trainable leaves, or the dense weight that they were merged into.

    Attributes:
        leaves: in the order that they take its place.
        rename: its name -> theirs.
        merged: the state that an optimizer had for it goes with it, instead of being a reason to refuse.
    """

    leaves: tuple[nn.Parameter, ...]
    rename: Callable[[str], list[str]]
    merged: bool


_heirs: MutableMapping[nn.Parameter, _Heirs] = WeakTensorKeyDictionary()  # the parameter that went -> its heirs
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
    if "step" not in state:  # LBFGS counts before its first evaluation
        return state if all(type(v) is int and v == 0 for v in state.values()) else None
    if float(state["step"]) != 0:
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


def follow_leaves(
    optimizers: Sequence[torch.optim.Optimizer], old: nn.Parameter, leaves: Mapping[str, nn.Parameter]
) -> None:
    """Hand the trainable leaves, by suffix, to the optimizers that held the weight they replace, now and before later steps."""
    _inherit(old, tuple(leaves.values()), lambda name: [name + suffix for suffix in leaves], merged=False)
    for optimizer in optimizers:
        _replace(optimizer)


def follow_merged(
    optimizers: Sequence[torch.optim.Optimizer], leaves: Mapping[str, nn.Parameter], dense: nn.Parameter
) -> None:
    """Hand a merged weight to the optimizers that held its trainable leaves; what state they had for those is dropped."""
    for suffix, leaf in leaves.items():
        _inherit(leaf, (dense,), lambda name, suffix=suffix: [name.removesuffix(suffix)], merged=True)  # type: ignore[misc]
    for optimizer in optimizers:
        _replace(optimizer)


def _inherit(
    old: nn.Parameter, leaves: tuple[nn.Parameter, ...], rename: Callable[[str], list[str]], merged: bool
) -> None:
    global _hooked
    _heirs[old] = _Heirs(leaves, rename, merged)
    if not _hooked:
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: _replace(optimizer))
        register_optimizer_step_post_hook(_count)
        _hooked = True


def watch(replaced: Sequence[tuple[nn.Parameter, ...]], others: Sequence[nn.Parameter]) -> None:
    """Raise AdoptError, from a backward, where three optimizer steps have passed and no new leaf moved.

    Args:
        replaced: (old, its trainable leaves) each.
        others: parameters of the same graph that stay, to tell an optimizer at work from none.
    """
    trained = [(old, leaf) for old, *leaves in replaced for leaf in leaves if leaf.requires_grad]
    if trained:
        _Watch([leaf for _, leaf in trained], [*others, *{id(old): old for old, _ in trained}.values()])


def is_watch(hook: object) -> bool:
    """Whether a gradient hook is this module's own."""
    return isinstance(hook, _Watch)


def pair_of_old(parameter: nn.Parameter) -> tuple[nn.Parameter, nn.Parameter] | None:
    """The pair that stands in a replaced parameter's place; None where it wasn't replaced."""
    heirs = _heirs.get(parameter)
    return (heirs.leaves[0], heirs.leaves[1]) if heirs is not None and len(heirs.leaves) == 2 else None


def _count(optimizer: Any, args: Any, kwargs: Any) -> None:
    global _steps
    _steps += 1


def _replace(optimizer: torch.optim.Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        while any(p in _heirs for p in group["params"]):  # again: what was merged may be adopted anew
            _replace_in(group, optimizer, held)


def _replace_in(group: dict[str, Any], optimizer: torch.optim.Optimizer, held: set[int]) -> None:
    parameters: list[nn.Parameter] = group["params"]
    hits = [(p, heirs) for p in parameters if (heirs := _heirs.get(p)) is not None]
    kept = [p for p, heirs in hits if not heirs.merged]
    refuse_started([optimizer], kept, [f"a replaced weight of shape {tuple(p.shape)}" for p in kept])
    for p, heirs in hits:
        _start(optimizer, p, heirs.leaves)
    names = group.get("param_names") or [""] * len(parameters)  # there where it was built from named_parameters()
    new: list[nn.Parameter] = []
    new_names: list[str] = []
    for p, name in zip(parameters, names, strict=True):
        replaced = _heirs.get(p)
        pairs = [(p, name)] if replaced is None else zip(replaced.leaves, replaced.rename(name), strict=True)
        for leaf, leaf_name in pairs:
            if leaf is p or id(leaf) not in held:
                held.add(id(leaf))
                new.append(leaf)
                new_names.append(leaf_name)
    if "param_names" in group:
        group["param_names"] = new_names
    parameters[:] = new


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
            held = {id(p) for o in Live.sweep().optimizers for g in o.param_groups for p in g["params"]}
            if held & _alive(self.leaves):  # its optimizer has just not had its turn: the other half of a GAN, say
                return
            if held & _alive(self.others):  # it works on the model itself, and was not given these: a head is trained
                log.warning(
                    "the low-rank weights get gradients, and no optimizer holds them: requires_grad_(False) on what is "
                    "not to be trained saves time and memory"
                )
                return
            raise AdoptError(
                "three optimizer steps have passed and none of the low-rank weights moved: the optimizer works on "
                "the parameters that they replaced. Call lrcompile.adopt(model, recipe, example_inputs) before building the "
                "optimizer, or model.requires_grad_(False) on what is not to be trained"
            )

    def _end(self) -> None:
        for handle in self.handles:
            handle.remove()


def _alive(watched: list[tuple[weakref.ref[nn.Parameter], tuple[int, list[float]]]]) -> set[int]:
    return {id(p) for ref, _ in watched if (p := ref()) is not None}


def _state(p: torch.Tensor) -> tuple[int, list[float]]:
    # The version misses writes through `.data`; a few values catch those.
    return p._version, p.detach().flatten()[:8].float().tolist()


def _moved(watched: list[tuple[weakref.ref[nn.Parameter], tuple[int, list[float]]]]) -> bool:
    alive = ((ref(), state) for ref, state in watched)
    return any(p is not None and _state(p) != state for p, state in alive)
