"""select: which weights are adopted, with a base or without. Decides only; the graph stays as it is (exact)."""

from __future__ import annotations

import torch
from torch import fx

from lrcompile.errors import PlanError
from lrcompile.kernels.compose import DENSE
from lrcompile.passes.contract import PassContext, PassResult, Weight, graph_pass
from lrcompile.weights.formats import format_of

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@graph_pass(exact=True, weight_pass=True)
def select(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Mark the weights of this graph that are to be adopted; every other one says why it stays dense.

    Raises:
        PlanError: a selected weight is not stored in a floating type.
    """
    result = PassResult()
    for node in gm.graph.find_nodes(op="placeholder"):
        weight = ctx.weights.get(node.meta.get("lr_weight", ""))
        if weight is None or not (weight.kinds or weight.writers):
            continue
        weight.reason = _why_dense(weight, ctx)
        weight.selected = not weight.reason
        weight.base = (weight.held or ctx.recipe.weights) if weight.selected else None
        _check_held(weight, ctx)
        if weight.selected and weight.dtype not in _FLOATS:
            raise PlanError(
                f"{weight.key} is stored as {weight.dtype}: adopting needs a floating weight. "
                f"Leave it out with exclude=[{weight.key!r}], or convert it to bfloat16 or float32 first."
            )
        _check_format(weight, ctx)
        line = f"{weight.key}: {'selected' if weight.selected else 'dense, ' + weight.reason}"
        (result.changed if weight.selected else result.notes).append(line)
    return result


def _check_held(weight: Weight, ctx: PassContext) -> None:
    """Refuse what can't be had from a weight that is quantised already."""
    recipe = ctx.recipe
    if not weight.selected or not weight.held:
        return
    if recipe.weights not in (weight.held, weight.held.split("-")[0]):
        asked = "a pair in its place" if recipe.weights is None else recipe.weights
        raise PlanError(
            f"{weight.key} is quantised to {weight.held} already, and {asked} would lose more: say weights={weight.held!r} to "
            f"keep it as it is, or leave it out with exclude=[{weight.key!r}]"
        )
    if recipe.has_pairs and recipe.init not in ("auto", "zero"):
        raise PlanError(
            f"{weight.key} is quantised already, and init={recipe.init!r} starts from the dense weight: choose init='zero'"
        )


def _check_format(weight: Weight, ctx: PassContext) -> None:
    """Refuse a base that can't hold the weight, naming it."""
    if weight.base in (None, DENSE):
        return
    try:
        format_of(str(weight.base)).specs((weight.out_features, weight.in_features), weight.dtype)
    except PlanError as error:
        raise PlanError(f"{weight.key}: {error}, or leave it dense with exclude=[{weight.key!r}]") from error


def _why_dense(weight: Weight, ctx: PassContext) -> str:
    recipe = ctx.recipe
    if not any(weight.matches(glob) for glob in recipe.include):
        return "not included"
    excluded = [glob for glob in recipe.exclude if weight.matches(glob)]
    if excluded:
        return f"excluded by {excluded[0]!r}"
    if weight.writers:  # an adopted module's weight is computed at each read: the write would be lost
        return f"written in the graph (by {', '.join(weight.writers)})"
    if weight.stored_in_out and "view" in weight.readers:
        return "also read by view, which needs the layout it is stored in"
    if weight.readers and set(weight.kinds) == {"mv"}:  # spectral_norm: w / sigma, where sigma is found by iteration
        return f"multiplied with vectors only, and read by {', '.join(weight.readers)}"
    named = any(weight.matches(g, around=False) and not set("*?[") & set(g.rpartition(".")[2]) for g in recipe.include)
    if "embedding" in weight.kinds and not named:
        return "an embedding" if set(weight.kinds) == {"embedding"} else "tied to an embedding"
    if weight.head and not named:
        return "an output head"
    if len(weight.shape) != 2:
        return f"{len(weight.shape)}-dimensional"
    if recipe.weights is None and recipe.require_saving and weight.pair_numel(1) >= weight.numel:
        return f"a pair of rank 1 would hold {weight.pair_numel(1)} numbers, not fewer than {weight.numel}"
    return ""
