"""Putting a pair where a weight was: in every module that has it, with the optimizers following; and back.

Everything that can be wrong is found by `refuse` before the first weight is touched; then one weight at a time is
factored, installed and let go, so that peak memory is the model plus one weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from lrcompile.errors import AdoptError
from lrcompile.follow import follow_merged, follow_pair, is_watch, refuse_started
from lrcompile.live import Live
from lrcompile.weights.factor import check_finite, svd_pair
from lrcompile.weights.layers import PairedModule, dense_weight, install_pair, paired_class, plainly, remove_pairs
from lrcompile.weights.plan import Entry
from lrcompile.words import fold_lines

log = logging.getLogger("lrcompile")

# weight, entry -> weight_a, weight_b, relative error
Factor = Callable[[nn.Parameter, Entry], tuple[torch.Tensor, torch.Tensor, float | None]]

# --- which parameters a Plan was written over -------------------------------------------------------------------------

_settled: MutableMapping[nn.Parameter, dict[str, Any]] = WeakTensorKeyDictionary()  # by identity


def settled(parameter: nn.Parameter) -> bool:
    """Whether a Plan has already decided about this very parameter: a pair's leaf, or left dense on purpose."""
    return parameter in _settled


def settled_by(parameter: nn.Parameter) -> dict[str, Any] | None:
    """The recipe (`Recipe.to_dict()`) of the Plan that decided, empty where it isn't known; None: undecided."""
    return _settled.get(parameter)


def settle(parameters: Iterable[nn.Parameter], recipe: dict[str, Any]) -> None:
    """Remember that a Plan has decided about these."""
    for p in parameters:
        _settled[p] = recipe


def unsettle(parameters: Iterable[nn.Parameter]) -> None:
    """Forget it: they may be planned anew."""
    for p in parameters:
        _settled.pop(p, None)


# --- weights to pairs -------------------------------------------------------------------------------------------------


@dataclass
class Change:
    """One weight that is to become a pair."""

    entry: Entry
    weight: nn.Parameter


@dataclass
class Pair:
    """What became of a Change: the leaves, and the entry with the error measured."""

    old: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter
    entry: Entry


def refuse(changes: Sequence[Change], live: Live, *, computes: bool = True) -> None:
    """Raise AdoptError, naming weight and fix, where one of the changes can't be carried out. Touches nothing.

    Args:
        changes: all of them.
        live: a sweep made just now.
        computes: the numbers of the weights will be used, so they have to be finite.
    """
    from torch.distributed.tensor import DTensor

    fix = "call lrcompile.adopt(model, recipe, example_inputs) before"
    for change in changes:
        key, weight = change.entry.key, change.weight
        if isinstance(weight, DTensor):
            raise AdoptError(f"{key} is a DTensor (sharded): {fix} fully_shard")
        places = live.owners.get(id(weight), [])
        if not places:
            raise AdoptError(f"no live module owns {key}: {fix} torch.compile, or exclude it")
        for module, name in places:
            wrapper = live.wrapper_of(module)
            if wrapper is not None:
                raise AdoptError(f"{key} is in the hands of {wrapper} already: {fix} wrapping the model")
            _refuse_taken(module, name, key)
            _refuse_class(module, name, change.entry)
        hooks = [*(weight._backward_hooks or {}).values(), *_after_hooks(weight)]
        if any(not is_watch(hook) for hook in hooks):
            raise AdoptError(
                f"{key} has a gradient hook, which has no meaning for the pair that replaces it: register hooks on the "
                f"leaves after lrcompile.adopt, or leave it dense with exclude=[{key!r}]"
            )
        if computes:
            check_finite(weight, key)
    refuse_started(live.optimizers, [c.weight for c in changes], [c.entry.key for c in changes])


def _after_hooks(weight: nn.Parameter) -> list[object]:
    return list((getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values())


def _refuse_taken(module: nn.Module, name: str, key: str) -> None:
    for leaf in (f"{name}_a", f"{name}_b"):
        if hasattr(module, leaf):
            kind = type(module).__name__
            raise AdoptError(f"{key}: its {kind} has a {leaf} of its own; leave it out with exclude=[{key!r}]")


def _refuse_class(module: nn.Module, name: str, entry: Entry) -> None:
    """The subclass that the module will be of is made now: a base with rules for its subclasses may refuse."""
    base, names = (module.lr_base, module.lr_names) if isinstance(module, PairedModule) else (type(module), ())
    try:
        paired_class(base, (*names, (name, entry.stored_in_out)))  # type: ignore[arg-type]
    except Exception as error:
        raise AdoptError(
            f"{entry.key}: its {type(module).__name__} can't be subclassed ({type(error).__name__}: {error}); leave it "
            f"out with exclude=[{entry.key!r}]"
        ) from error


def carry_out(changes: Sequence[Change], live: Live, factor: Factor, recipe: dict[str, Any]) -> list[Pair]:
    """Make and install the pairs, one at a time, after `refuse` found nothing.

    A weight's attributes go over to both leaves, and so does a gradient that it has (by the chain rule); optimizers
    that hold it hold the leaves afterwards.
    """
    done: list[Pair] = []
    for change in changes:
        weight, entry = change.weight, change.entry
        a, b, error = make_leaves(weight, entry, factor)
        entry = replace(entry, error=error)
        for module, name in live.owners[id(weight)]:
            install_pair(module, name, a, b, entry.stored_in_out, asdict(entry))
        settle((a, b), recipe)
        follow_pair(live.optimizers, weight, (a, b))
        done.append(Pair(weight, a, b, entry))
    return done


def make_leaves(weight: nn.Parameter, entry: Entry, factor: Factor) -> tuple[nn.Parameter, nn.Parameter, float | None]:
    """The two leaves that replace a weight: ordinary tensors, whatever modes the caller is in."""
    with plainly(weight):
        a, b, error = factor(weight, entry)
        leaves = [nn.Parameter(t, requires_grad=weight.requires_grad) for t in (a, b)]
        for leaf in leaves:
            leaf.__dict__.update(weight.__dict__)
        # Not to leaves that are yet to be filled: a gradient at zero is none of the values that will be loaded.
        gradient = None if factor is empty_pair or weight.is_meta else weight.grad
        if gradient is not None:
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            gradient = gradient.T if entry.stored_in_out else gradient
            leaves[0].grad, leaves[1].grad = b.T @ gradient, gradient @ a.T
    return leaves[0], leaves[1], error


def factored(method: str) -> Factor:
    """Factors by truncated SVD (`Recipe.svd` tells how); shapes only on the `meta` device."""

    def factor(weight: nn.Parameter, entry: Entry) -> tuple[torch.Tensor, torch.Tensor, float | None]:
        if weight.is_meta:
            return empty_pair(weight, entry)
        assert entry.rank is not None
        matrix = weight.detach().T if entry.stored_in_out else weight.detach()
        pair = svd_pair(matrix, entry.rank, method, entry.key)
        return pair.weight_a, pair.weight_b, pair.error

    return factor


def empty_pair(weight: torch.Tensor, entry: Entry) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """Leaves of the right shape, to be filled by load_state_dict."""
    assert entry.rank is not None
    a = torch.zeros(entry.rank, entry.in_features, dtype=weight.dtype, device=weight.device)
    b = torch.zeros(entry.out_features, entry.rank, dtype=weight.dtype, device=weight.device)
    return a, b, entry.error


# --- what is told -----------------------------------------------------------------------------------------------------


def tell(seen: Sequence[Entry], pairs: Sequence[Entry], parameters: tuple[int, int], seconds: float) -> None:
    """Log an adoption, in one line: sites, parameters, compression, mean relative weight error, seconds, what is dense."""
    linears = [e for e in seen if e.tokens or e.rank is not None]
    before, after = sum(e.dense_numel for e in pairs), sum(e.numel for e in pairs)
    errors = [e.error for e in pairs if e.error is not None]
    dense = left_dense(seen)
    mean = f"{sum(errors) / len(errors):.3f}" if errors else "not computed"
    log.info(
        f"adopted {len(pairs)} of {len(linears)} linear weights: {before:,} -> {after:,} numbers "
        f"({before / after if after else 1:.2f}x), all parameters {parameters[0]:,} -> {parameters[1]:,}, "
        f"mean relative weight error {mean}, {seconds:.1f} s" + (f"; left dense: {dense}" if dense else "")
    )


def left_dense(seen: Iterable[Entry]) -> str:
    """The weights that stay dense, those of one reason together, and why; plain embeddings aside."""
    dense = (e for e in seen if e.rank is None and e.reason != "an embedding")
    return "; ".join(fold_lines(f"{e.key}: {e.reason}" for e in dense))


def warn_of_lists(pairs: Sequence[Pair], live: Live) -> None:
    """Log a warning where lists or dicts of parameters made before the adoption still hold replaced weights."""
    stale = live.collections_of([pair.old for pair in pairs])
    if stale:
        log.warning(
            f"{len(stale)} collection(s) of parameters made before the adoption still hold replaced weights (of "
            f"{', '.join(str(len(c)) for c in stale[:3])} parameters): clipping or averaging them has no effect. "
            "Make them again from model.parameters(), or call lrcompile.adopt before making them"
        )


# --- and back ---------------------------------------------------------------------------------------------------------


def dissolve(modules: Sequence[PairedModule], live: Live) -> None:
    """Turn every pair of these modules into the dense weight that it reads as, in all modules that share it."""
    pairs = {
        (id(a), id(b)): (a, b, module, name)
        for module in modules
        for name, _ in module.lr_names
        for a, b in [(getattr(module, f"{name}_a"), getattr(module, f"{name}_b"))]
    }
    for optimizer in live.optimizers:
        if any(leaf in optimizer.state and optimizer.state[leaf] for a, b, *_ in pairs.values() for leaf in (a, b)):
            log.warning(
                f"{type(optimizer).__name__} starts anew for the merged weights: its state for the pairs is dropped"
            )
    for a, b, module, name in pairs.values():
        trained = a.requires_grad or b.requires_grad
        dense = nn.Parameter(dense_weight(module, name), requires_grad=trained)  # type: ignore[arg-type]
        dense.__dict__.update(a.__dict__)
        for owner, leaf in list(live.owners[id(a)]):
            if isinstance(owner, PairedModule) and leaf in owner._parameters:
                remove_pairs(owner, {leaf.removesuffix("_a"): dense})
        follow_merged(live.optimizers, (a, b), dense)
