"""allocate_ranks: one dial -> a rank for every selected weight. Decides only (exact).

Uniform: every weight gets the same share of the rank at which a pair would be as large as the weight, which is the
reference point for training from scratch (2402.13533); `Recipe.shares` gives some weights a larger or smaller one. Ranks are
rounded to whole tiles, so the share is searched until the total, roundings included, fits the dial. By importance (for
weights that are trained already, 2604.01609): half of that for everyone, and the rest tile by tile where it keeps most of
a weight's energy for its cost.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Callable

from torch import fx

from lrcompile.errors import PlanError
from lrcompile.graph.names import among
from lrcompile.passes.contract import PassContext, PassResult, Weight, graph_pass
from lrcompile.recipe import Recipe
from lrcompile.weights.formats import format_of
from lrcompile.weights.plan import NO_SAVING


@graph_pass(exact=True, weight_pass=True)
def allocate_ranks(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Set `weight.rank` over all graphs at once.

    Raises:
        PlanError: a rank above min(in_features, out_features), a compression or byte budget out of reach, shares of nothing.
    """
    chosen = [w for w in ctx.weights.values() if w.selected]
    result = PassResult()
    if chosen and ctx.recipe.has_pairs and all(w.rank is None for w in chosen):
        result.notes += _check_shares(chosen, ctx)
        _allocate(chosen, ctx)
        _check_formats(chosen, ctx)
    elif not chosen and ctx.recipe.has_pairs and ctx.other_bytes is not None:
        _refuse_nothing(ctx)
    for node in gm.graph.find_nodes(op="placeholder"):
        weight = ctx.weights.get(node.meta.get("lr_weight", ""))
        if weight is not None and weight.rank is not None:
            kept = weight.pair_numel(weight.rank) / weight.numel
            what = "beside the base" if weight.base else "of the numbers"
            result.changed.append(f"{weight.key}: rank {weight.rank}, {kept:.0%} {what}")
        elif weight is not None and weight in chosen and ctx.recipe.has_pairs:
            result.notes.append(f"{weight.key}: dense, {weight.reason}")
    return result


def round_to_tile(rank: float, limit: int, multiple: int = 1) -> int:
    """The nearest rank the hardware likes: whole multiples of 64 from 1024, 16 from 128, 8 from 24, else any; at most `limit`.

    Tensor cores eat 16 at a time; below 128 a step of 16 would miss the dial by more than it gains. `multiple` is what the
    number format of the pair asks for.
    """
    step = math.lcm(tile(rank), multiple)
    return max(multiple, min(limit // multiple * multiple, int(rank / step + 0.5) * step))


def tile(rank: float) -> int:
    """What a rank of this size is a multiple of."""
    return 64 if rank >= 1024 else 16 if rank >= 128 else 8 if rank >= 24 else 1


def _multiple(recipe: Recipe) -> int:
    """What ranks are a multiple of for the pair's number format: rows of weight_b (out_features, rank) are whole groups.

    Of formats that scale whole rows 2: int8 holds no single column.
    """
    if recipe.factors is None:
        return 1
    form = format_of(recipe.factors)
    return 2 if form.layout in ("nf4", "fp4") else form.group or 2


def _refuse_nothing(ctx: PassContext) -> None:
    """Raise PlanError where a total is asked for that the model hasn't, and no weight could be replaced to get there."""
    recipe = ctx.recipe
    small = next((w for w in ctx.weights.values() if w.reason.startswith(f"{NO_SAVING} 1 ")), None)
    if recipe.compression is not None and recipe.compression > 1 and small is not None:
        raise PlanError(
            f"compression={recipe.compression} can't be reached with no weight to replace: {small.key}, {small.reason}"
        )
    if recipe.budget_bytes is not None and _target([], ctx) < 0:
        need = recipe.budget_bytes - _target([], ctx)
        raise PlanError(
            f"budget_bytes={recipe.budget_bytes} can't be met: no weight is replaced, and the model has {need} bytes; "
            "include more weights, or raise the budget"
        )


def _check_shares(chosen: list[Weight], ctx: PassContext) -> list[str]:
    """The globs of `shares` that decide about no weight: an error where they are the user's and all the model is seen."""
    globs = list(dict(ctx.recipe.shares))
    firsts = {next((glob for glob in globs if w.matches(glob)), None) for w in chosen}
    notes = [f"shares[{glob!r}]: no selected weight matches it" for glob in globs if glob not in firsts]
    if notes and not ctx.recipe.has_preset_shares and ctx.other_bytes is not None:
        unused = next(glob for glob in globs if glob not in firsts)
        taken = " that a glob before it hasn't" if any(w.matches(unused) for w in chosen) else ""
        raise PlanError(f"{notes[0]}{taken}{among([w.key for w in chosen], unused)} to be replaced")
    return notes


def _check_formats(chosen: list[Weight], ctx: PassContext) -> None:
    for w in chosen:
        try:
            form = w.form(ctx.recipe)
            if form is not None:
                form.leaves  # noqa: B018  reads the formats, which refuse what they can't hold
        except PlanError as error:
            raise PlanError(f"{w.key}: {error}, or leave it dense with exclude=[{w.key!r}]") from error


def _limit(weight: Weight) -> int:
    return min(weight.in_features, weight.out_features)


def _allocate(chosen: list[Weight], ctx: PassContext) -> None:
    recipe = ctx.recipe
    if recipe.rank is not None:
        smallest = min(chosen, key=_limit)
        if recipe.rank > _limit(smallest):
            raise PlanError(
                f"rank={recipe.rank} is above min(in, out) = {_limit(smallest)} of {smallest.key} "
                f"({smallest.out_features}x{smallest.in_features}), the smallest selected weight; "
                f"ask for at most {_limit(smallest)}, or exclude it"
            )
        _assign(chosen, ctx, lambda w: recipe.rank)
    elif recipe.rank_ratio is not None:
        ratio = recipe.rank_ratio
        multiple = _multiple(recipe)
        _assign(
            chosen, ctx, lambda w: _limit(w) if ratio == 1 else round_to_tile(ratio * _limit(w), _limit(w), multiple)
        )
    else:
        _search(chosen, ctx)


def _dense_cost(w: Weight, recipe: Recipe) -> int:
    return w.numel * (1 if recipe.compression is not None else w.dtype.itemsize)


def _cost(w: Weight, recipe: Recipe, rank: int) -> int:
    """What the dial counts of a weight at this rank: numbers for compression, bytes for a budget."""
    if _must_save(recipe) and w.pair_numel(rank) >= w.numel:
        return _dense_cost(w, recipe)  # as `_assign` has it
    pair = w.pair_numel(rank) if recipe.compression is not None else w.form_at(recipe, rank).nbytes
    return min(pair, _dense_cost(w, recipe)) if _must_save(recipe) else pair


def _must_save(recipe: Recipe) -> bool:
    return recipe.require_saving and recipe.weights is None


def _most(w: Weight, recipe: Recipe) -> int:
    """The largest rank to search: of a pair in a number format, that which still holds fewer numbers than the weight.

    Above it the weight would stay dense, at many times the bytes, and no total would grow with the share.
    """
    fewer = (w.numel - 1) // w.pair_numel(1)
    return min(_limit(w), fewer) if _must_save(recipe) and recipe.factors else _limit(w)


def _target(chosen: list[Weight], ctx: PassContext) -> float:
    """What may remain of the chosen weights, as `_cost` counts."""
    recipe = ctx.recipe
    if recipe.compression is not None:
        return sum(w.numel for w in chosen) / recipe.compression
    if ctx.other_bytes is None:
        raise PlanError(
            "budget_bytes is about the whole model, and the backend sees a part of it; "
            "call lrcompile.adopt(model, Recipe(budget_bytes=...), example_inputs) before torch.compile"
        )
    rest = sum(w.numel * w.dtype.itemsize for w in ctx.weights.values() if not w.selected)
    assert recipe.budget_bytes is not None
    return recipe.budget_bytes - rest - ctx.other_bytes


def _search(chosen: list[Weight], ctx: PassContext) -> None:
    recipe, target, multiple = ctx.recipe, _target(chosen, ctx), _multiple(ctx.recipe)
    times = _shares(chosen, ctx)

    def rank(w: Weight, share: float) -> int:
        exact = share * times[w.key] * w.numel / w.pair_numel(1)
        # Cut before it is rounded: a share may be too large for that.
        return round_to_tile(min(exact, 2 * _limit(w)), _most(w, recipe), multiple)

    def total(share: float) -> int:
        return sum(_cost(w, recipe, rank(w, share)) for w in chosen)

    if total(0.0) > target:
        least = total(0.0)
        if recipe.compression is not None:
            most = math.floor(100 * sum(w.numel for w in chosen) / least) / 100  # down: what is named can be had
            raise PlanError(
                f"compression={recipe.compression} can't be reached: the most is {most}, with rank {multiple} everywhere"
            )
        assert recipe.budget_bytes is not None
        need = recipe.budget_bytes - target + least
        raise PlanError(
            f"budget_bytes={recipe.budget_bytes} can't be met: the least is {math.ceil(need)} bytes, with rank {multiple} "
            "everywhere; include more weights, or raise the budget"
        )
    # Twice the share at which the smallest one's ranks are full: a full rank is rounded down to its tile, and up from here.
    whole = 2 * max(_limit(w) * w.pair_numel(1) / w.numel for w in chosen)
    low, high = 0.0, min(whole / min(times.values()), sys.float_info.max / 2)
    if total(high) <= target:
        low = high
    # The total only grows with the share. To the last bit: shares may be as far apart as numbers get.
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if total(middle) <= target else (low, middle)
    if recipe.allocation == "importance":
        ranks = _by_importance(chosen, ctx, {w.key: rank(w, low) for w in chosen}, target)
        _assign(chosen, ctx, lambda w: ranks[w.key])
    else:
        _assign(chosen, ctx, lambda w: rank(w, low))


def _shares(chosen: list[Weight], ctx: PassContext) -> dict[str, float]:
    """How many times the common share each weight gets."""
    shares = dict(ctx.recipe.shares)
    return {w.key: next((share for glob, share in shares.items() if w.matches(glob)), 1.0) for w in chosen}


def _by_importance(chosen: list[Weight], ctx: PassContext, uniform: dict[str, int], target: float) -> dict[str, int]:
    """Half of the uniform ranks for everyone; the rest, tile by tile, where it keeps most energy for its cost."""
    if ctx.energies is None:
        raise PlanError(
            'allocation="importance" looks at the numbers of all weights: call lrcompile.adopt(model, recipe, example_inputs) '
            "before torch.compile, on a model that is not on the meta device"
        )
    recipe, multiple = ctx.recipe, _multiple(ctx.recipe)
    ranks = {w.key: round_to_tile(uniform[w.key] / 2, _most(w, recipe), multiple) for w in chosen}
    left = target - sum(_cost(w, recipe, ranks[w.key]) for w in chosen)
    energies = {w.key: ctx.energies(w.key).tolist() for w in chosen}
    queue: list[tuple[float, int, int]] = []  # (-energy for its cost, position, next rank)

    def offer(i: int) -> None:
        w = chosen[i]
        now = ranks[w.key]
        then = min(now + math.lcm(tile(now), multiple), _most(w, recipe) // multiple * multiple)
        cost = _cost(w, recipe, then) - _cost(w, recipe, now)
        if then > now and cost > 0:
            heapq.heappush(queue, (-sum(energies[w.key][now:then]) / cost, i, then))

    for i in range(len(chosen)):
        offer(i)
    while queue:
        _, i, then = heapq.heappop(queue)
        cost = _cost(chosen[i], recipe, then) - _cost(chosen[i], recipe, ranks[chosen[i].key])
        if cost <= left:  # else it may be that a smaller one still fits
            left, ranks[chosen[i].key] = left - cost, then
            offer(i)
    return ranks


def _assign(chosen: list[Weight], ctx: PassContext, rank: Callable[[Weight], int | None]) -> None:
    for w in chosen:
        r = rank(w)
        assert r is not None
        if _must_save(ctx.recipe) and w.pair_numel(r) >= w.numel:
            w.reason = f"{NO_SAVING} {r} would hold {w.pair_numel(r)} numbers, not fewer than {w.numel}"
            w.selected = False
        else:
            w.rank = r
