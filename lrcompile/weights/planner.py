"""plan(): capture a model, let the weight passes decide, write it down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from lrcompile.errors import AdoptError, PlanError
from lrcompile.graph.capture import Capture, Inputs, capture
from lrcompile.graph.names import among, dense_names, matches, plain_name
from lrcompile.graph.pipeline import bind_weights, run_passes
from lrcompile.passes import PassContext, Weight, pass_list
from lrcompile.recipe import Recipe, as_recipe
from lrcompile.weights.initialise import spectrum
from lrcompile.weights.layers import AdoptedModule
from lrcompile.weights.library import as_dense
from lrcompile.weights.plan import Entry, Plan, describe


def plan(
    model: nn.Module,
    example_inputs: Inputs,
    recipe: Recipe | None = None,
    *,
    covariances: Mapping[str, torch.Tensor] | None = None,
) -> Plan:
    """What would become of the model's weights. Touches nothing; works on the `meta` device.

    Args:
        model: not adopted yet.
        example_inputs: a tuple of positional arguments or a dict of keyword arguments, as the model is called.
        recipe: what is asked for; `Recipe()` where left out.
        covariances: from `lrcompile.graph.calibrate`, for sharing ranks by what matters for those inputs.

    Raises:
        RecipeError: no Recipe where one belongs.
        CaptureError: the inputs don't fit.
        PlanError: no linear weight, a glob that matches nothing, a rank or budget out of reach.
        AdoptError: the model is adopted already.
    """
    recipe = as_recipe(recipe, example_inputs)
    refuse_adopted(model)
    with as_dense(model, numbers=False):
        captured = capture(model, example_inputs)
        ctx = context_for(model, captured, recipe, covariances)
        run_passes(captured, pass_list(recipe, weights=True, program=False, rewrites=False), ctx)
        return plan_from(model, ctx, captured)


def context_for(
    model: nn.Module, captured: Capture, recipe: Recipe, covariances: Mapping[str, torch.Tensor] | None = None
) -> PassContext:
    """The context of the weight passes over a whole model.

    Raises:
        PlanError: a glob that matches no parameter or module of the model.
    """
    check_globs(model, recipe)
    device = next((p.device.type for p in model.parameters()), "cpu")
    ctx = PassContext(recipe, device=device)
    bind_weights(captured.graphs, captured.names, ctx)
    seen = {id(p) for g in captured.graphs for p in g.parameters().values() if p.dim() >= 2}
    if not any(p.is_meta for p in model.parameters()):
        ctx.energies = partial(_energies, model, ctx.weights, covariances or {})
    ctx.other_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in seen)
    return ctx


def _energies(
    model: nn.Module, weights: Mapping[str, Weight], covariances: Mapping[str, torch.Tensor], key: str
) -> torch.Tensor:
    named = {plain_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    matrix = named[key].detach()
    return spectrum(matrix.T if weights[key].stored_in_out else matrix, covariances.get(key))


def plan_from(model: nn.Module, ctx: PassContext, captured: Capture) -> Plan:
    """Write down what the passes decided.

    Raises:
        PlanError: the graphs hold no product with a weight.
    """
    if not any(set(w.kinds) - {"embedding"} for w in ctx.weights.values()):
        raise PlanError(
            f"{type(model).__name__} has no linear weight that its graph multiplies with; there is nothing to factor"
        )
    shapes, tied = describe(model)
    size = {plain_name(n): p.element_size() for n, p in model.named_parameters(remove_duplicate=False)}
    entries = [entry_of(w, ctx.recipe) for w in ctx.weights.values()]
    return Plan(entries, shapes, tied, size, ctx.recipe.to_dict(), captured.breaks)


def refuse_adopted(model: nn.Module) -> None:
    """Raise AdoptError where a part of the model is adopted already."""
    for name, module in model.named_modules():
        if isinstance(module, AdoptedModule):
            raise AdoptError(
                f"{name or type(module).__name__} is adopted already; lrcompile.merge(model) gives the dense model back"
            )


def check_globs(model: nn.Module | list[nn.Module], recipe: Recipe) -> None:
    """Raise PlanError for a glob that matches no parameter and no module of the model (or models), include and shares no weight.

    Shares that are the preset's are nobody's mistake: there are models that call attention otherwise.
    """
    models = model if isinstance(model, list) else [model]
    held = [(n, p.dim()) for m in models for names, p in _named(m) for n in names]
    shares = () if recipe.has_preset_shares else [(f"shares[{glob!r}]", glob) for glob in dict(recipe.shares)]
    asked = [(f"{name}={glob!r}", glob) for name in ("include", "exclude") for glob in getattr(recipe, name)]
    for told, glob in (*asked, *shares) if held else ():
        found = [dim for name, dim in held if matches(name, glob)]
        if not found:
            raise PlanError(
                f"{told} matches no module that holds a parameter, and no parameter{among([n for n, _ in held], glob)}"
            )
        if not told.startswith("exclude") and max(found) < 2:
            raise PlanError(f"{told} matches biases and norms only, no weight that could be adopted")


def _named(model: nn.Module) -> Iterator[tuple[tuple[str, ...], nn.Parameter]]:
    """Each parameter and its dense names."""
    names = dense_names(model)
    return ((names[id(p)], p) for p in model.parameters())


def entry_of(w: Weight, recipe: Recipe) -> Entry:
    """What the Plan says of a weight."""
    form = w.form(recipe)
    reason = "" if form is not None else w.reason or "not read by a matrix product"
    entry = Entry(w.names, w.shape, str(w.dtype).removeprefix("torch."), w.stored_in_out, w.rank, reason, w.tokens)
    if form is None:
        return entry
    return replace(
        entry,
        base=form.base,
        factors=form.factors,
        init="zero" if w.held else recipe.start,
        scale=form.scale,
        pair_dtype=form.pair_dtype,
    )
