"""Putting leaves where a weight was: in every module that has it, with the optimizers following; and back.

Everything that can be wrong is found by `refuse` before the first weight is touched; then one weight at a time is
computed, installed and let go, so that peak memory is the model plus one weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from lrcompile.errors import AdoptError, PlanError
from lrcompile.follow import follow_leaves, follow_merged, is_watch, refuse_started
from lrcompile.live import Live
from lrcompile.weights.factor import check_finite
from lrcompile.weights.form import Form, store
from lrcompile.weights.formats import dequantise, format_of, quantise
from lrcompile.weights.layers import AdoptedModule, adopted_class, dense_weight, install, remove
from lrcompile.weights.library import held, to_plain_linear
from lrcompile.weights.make import Maker, parameters
from lrcompile.weights.plan import Entry
from lrcompile.words import fold_lines

log = logging.getLogger("lrcompile")

# --- which parameters a Plan was written over -------------------------------------------------------------------------

_settled: MutableMapping[nn.Parameter, dict[str, Any]] = WeakTensorKeyDictionary()  # by identity


def settled(parameter: nn.Parameter) -> bool:
    """Whether a Plan has already decided about this very parameter: an adopted weight's leaf, or left dense on purpose."""
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


# --- weights to leaves -------------------------------------------------------------------------------------------------


@dataclass
class Change:
    """One weight that is to be adopted."""

    entry: Entry
    weight: nn.Parameter


@dataclass
class Made:
    """What became of a Change: the leaves by suffix, and the entry with the error measured."""

    old: nn.Parameter
    leaves: dict[str, nn.Parameter]
    entry: Entry


def refuse(changes: Sequence[Change], live: Live, *, computes: bool = True, frozen: bool = False) -> None:
    """Raise AdoptError, naming weight and fix, where one of the changes can't be carried out. Touches nothing.

    Args:
        changes: all of them.
        live: a sweep made just now.
        computes: the numbers of the weights will be used, so they have to be finite.
        frozen: the recipe says what is trained, so a weight that requires gradients may be frozen.
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
            _refuse_taken(module, name, change.entry)
            _refuse_class(module, name, change.entry)
        form = change.entry.form
        if weight.requires_grad and not frozen and form and not any(leaf.pair for leaf in form.leaves.values()):
            raise AdoptError(
                f"{key} is trained, and as {form} it would be frozen: give it a pair beside the base "
                f"(Recipe.finetune(), or weights={form.base or form.factors!r} with rank=16), or for inference call "
                "model.requires_grad_(False) first, or say trainable=[] in the recipe"
            )
        hooks = [*(weight._backward_hooks or {}).values(), *_after_hooks(weight)]
        if any(not is_watch(hook) for hook in hooks):
            raise AdoptError(
                f"{key} has a gradient hook, which has no meaning for the pair that replaces it: register hooks on the "
                f"leaves after lrcompile.adopt, or leave it dense with exclude=[{key!r}]"
            )
        if computes and held(weight) is None:
            check_finite(weight, key)
    refuse_started(live.optimizers, [c.weight for c in changes], [c.entry.key for c in changes])


def _after_hooks(weight: nn.Parameter) -> list[object]:
    return list((getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values())


def _refuse_taken(module: nn.Module, name: str, entry: Entry) -> None:
    for suffix in entry.form.leaves if entry.form else ():
        if hasattr(module, name + suffix):
            kind, key = type(module).__name__, entry.key
            raise AdoptError(f"{key}: its {kind} has a {name}{suffix} of its own; leave it out with exclude=[{key!r}]")


def _refuse_class(module: nn.Module, name: str, entry: Entry) -> None:
    """The subclass that the module will be of is made now: a base with rules for its subclasses may refuse."""
    base, forms = (module.lr_base, module.lr_forms) if isinstance(module, AdoptedModule) else (type(module), ())
    assert entry.form is not None
    if held(module._parameters[name]) is not None:  # type: ignore[arg-type]
        base = nn.Linear
    try:
        adopted_class(base, (*forms, (name, entry.form)))  # type: ignore[arg-type]
    except Exception as error:
        raise AdoptError(
            f"{entry.key}: its {type(module).__name__} can't be subclassed ({type(error).__name__}: {error}); leave it "
            f"out with exclude=[{entry.key!r}]"
        ) from error


def carry_out(changes: Sequence[Change], live: Live, make: Maker, recipe: dict[str, Any]) -> list[Made]:
    """Make and install the leaves, a weight at a time, after `refuse` found nothing; optimizers that hold the weight follow."""
    done: list[Made] = []
    for change in changes:
        weight = change.weight
        leaves, error = parameters(weight, change.entry, make)
        entry = replace(change.entry, error=error)
        for module, name in live.owners[id(weight)]:
            to_plain_linear(module)
            install(module, name, leaves, asdict(entry), recipe.get("trainable"))
        settle(leaves.values(), recipe)
        follow_leaves(live.optimizers, weight, _pair(leaves, entry.form))
        done.append(Made(weight, leaves, entry))
    return done


def _pair(leaves: dict[str, nn.Parameter], form: Form | None) -> dict[str, nn.Parameter]:
    """Those that an optimizer can move."""
    assert form is not None
    return {suffix: leaf for suffix, leaf in leaves.items() if form.leaves[suffix].pair}


# --- what is told -----------------------------------------------------------------------------------------------------


def tell(seen: Sequence[Entry], made: Sequence[Entry], parameters: tuple[int, int], seconds: float) -> None:
    """Log an adoption, in one line: sites, parameters, compression, mean relative weight error, seconds, what is dense."""
    linears = [e for e in seen if e.tokens or e.form is not None]
    unit = "bytes" if any(e.base or e.factors for e in made) else "numbers"
    if unit == "bytes":
        before = sum(e.dense_numel * getattr(torch, e.dtype).itemsize for e in made)
        after = sum(e.nbytes for e in made)
    else:
        before, after = sum(e.dense_numel for e in made), sum(e.numel for e in made)
    errors = [e.error for e in made if e.error is not None]
    dense = left_dense(seen)
    mean = f"{sum(errors) / len(errors):.3f}" if errors else "not computed"
    log.info(
        f"adopted {len(made)} of {len(linears)} linear weights: {before:,} -> {after:,} {unit} "
        f"({before / after if after else 1:.2f}x), all parameters {parameters[0]:,} -> {parameters[1]:,}, "
        f"mean relative weight error {mean}, {seconds:.1f} s" + (f"; left dense: {dense}" if dense else "")
    )


def left_dense(seen: Iterable[Entry]) -> str:
    """The weights that stay dense, those of one reason together, and why; plain embeddings aside."""
    dense = (e for e in seen if e.form is None and e.reason != "an embedding")
    return "; ".join(fold_lines(f"{e.key}: {e.reason}" for e in dense))


def warn_of_lists(made: Sequence[Made], live: Live) -> None:
    """Log a warning where lists or dicts of parameters made before the adoption still hold replaced weights."""
    stale = live.collections_of([m.old for m in made])
    if stale:
        log.warning(
            f"{len(stale)} collection(s) of parameters made before the adoption still hold replaced weights (of "
            f"{', '.join(str(len(c)) for c in stale[:3])} parameters): clipping or averaging them has no effect. "
            "Make them again from model.parameters(), or call lrcompile.adopt before making them"
        )


# --- and back ---------------------------------------------------------------------------------------------------------


def refuse_format(modules: Sequence[AdoptedModule], weights: str) -> None:
    """Raise PlanError, naming the weight, where a number format can't hold one of these modules' weights. Touches nothing."""
    for module in modules:
        for name, form in module.lr_forms:
            try:
                format_of(weights).specs((form.out_features, form.in_features), module.lr_dtypes[name])
            except PlanError as error:
                raise PlanError(f"{module.lr_told[name]['names'][0]}: {error}; or merge to another format") from error


def dissolve(modules: Sequence[AdoptedModule], live: Live, weights: str | None = None) -> list[Entry]:
    """Turn every adopted weight of these modules into the dense one that it reads as, in all modules that share it.

    Args:
        modules: all of them.
        live: a sweep made just now.
        weights: number format to quantise what came out; None leaves it dense.

    Returns:
        with `weights`, what stands there now, with the error of quantising; else nothing.
    """
    found: dict[tuple[int, ...], tuple[dict[str, nn.Parameter], AdoptedModule, str, Form]] = {}
    for module in modules:
        for name, form in module.lr_forms:
            leaves = module.lr_parts(name)
            found.setdefault(tuple(map(id, leaves.values())), (leaves, module, name, form))
    for optimizer in live.optimizers:
        if any(optimizer.state.get(leaf) for leaves, *_ in found.values() for leaf in leaves.values()):
            log.warning(
                f"{type(optimizer).__name__} starts anew for the merged weights: its state for the pairs is dropped"
            )
    made = []
    for leaves, module, name, form in found.values():
        trained = any(leaf.requires_grad for leaf in leaves.values())
        dense = nn.Parameter(dense_weight(module, name), requires_grad=trained and weights is None)  # type: ignore[arg-type]
        first = next(iter(leaves.values()))
        dense.__dict__.update(first.__dict__)
        told = module.lr_told[name]
        owners = [(o, n) for o, n in live.owners[id(first)] if isinstance(o, AdoptedModule) and n in o._parameters]
        owned = [(owner, owner.lr_leaves[leaf]) for owner, leaf in owners]
        for owner, parameter in owned:
            remove(owner, {parameter: dense})
        follow_merged(live.optimizers, _pair(leaves, form), dense)
        if weights is not None:
            made.append(_requantise(dense, told, weights, owned))
    return made


def _requantise(
    dense: nn.Parameter, told: dict[str, Any], weights: str, owned: Sequence[tuple[nn.Module, str]]
) -> Entry:
    told = {**told, "dtype": str(dense.dtype).removeprefix("torch."), "rank": None, "base": weights, "factors": None}
    told |= {"scale": 1.0, "pair_dtype": None, "names": tuple(told["names"]), "shape": tuple(told["shape"])}
    form, number_format = Form.of(told), format_of(weights)
    assert form is not None
    matrix = dense.detach().T if form.stored_in_out else dense.detach()
    packed = quantise(number_format, matrix, told["names"][0])
    leaves = {
        suffix: nn.Parameter(store(packed[key]), requires_grad=False)
        for key, suffix in zip(number_format.keys, form.suffixes("base"), strict=True)
    }
    kept = dequantise(number_format, packed, (form.out_features, form.in_features), torch.float32)
    size = float(torch.linalg.vector_norm(matrix.float()))
    told["error"] = float(torch.linalg.vector_norm(kept - matrix.float())) / size if size else 0.0
    for module, name in owned:
        install(module, name, leaves, told)
    settle(leaves.values(), {})
    return Entry(**told)
