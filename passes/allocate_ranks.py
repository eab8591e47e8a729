"""allocate_ranks: one dial -> a rank for every selected weight. Decides only (exact).

Uniform: every weight gets the same share of the rank at which a pair would be as large as the weight, which is the
reference point for training from scratch (2402.13533). Ranks are rounded to whole tiles, so the share is searched until
the total, roundings included, fits the dial.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import fx

from lrcompile.errors import PlanError
from lrcompile.passes.contract import PassContext, PassResult, Weight, graph_pass

NO_SAVING = "a pair of rank"  # how the reason begins of a weight that stays dense because its pair would be no smaller


@graph_pass(exact=True, weight_pass=True)
def allocate_ranks(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Set `weight.rank` over all graphs at once.

    Raises:
        PlanError: a rank above min(in_features, out_features), a compression or byte budget out of reach.
    """
    chosen = [w for w in ctx.weights.values() if w.selected]
    if chosen and all(w.rank is None for w in chosen):
        _allocate(chosen, ctx)
    result = PassResult()
    for node in gm.graph.find_nodes(op="placeholder"):
        weight = ctx.weights.get(node.meta.get("lr_weight", ""))
        if weight is not None and weight.rank is not None:
            kept = weight.pair_numel(weight.rank) / weight.numel
            result.changed.append(f"{weight.key}: rank {weight.rank}, {kept:.0%} of the numbers")
        elif weight is not None and weight in chosen:
            result.notes.append(f"{weight.key}: dense, {weight.reason}")
    return result


def round_to_tile(rank: float, limit: int) -> int:
    """The nearest rank the hardware likes: whole multiples of 64 from 1024, 16 from 64, 8 from 24, else any; at most `limit`.

    Tensor cores eat 16 at a time; below 64 a step of 16 would miss the dial by more than it gains.
    """
    step = tile(rank)
    return max(1, min(limit, int(rank / step + 0.5) * step))


def tile(rank: float) -> int:
    """What a rank of this size is a multiple of."""
    return 64 if rank >= 1024 else 16 if rank >= 64 else 8 if rank >= 24 else 1


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
        _assign(chosen, ctx, lambda w: _limit(w) if ratio == 1 else round_to_tile(ratio * _limit(w), _limit(w)))
    else:
        _search(chosen, ctx, *_target(chosen, ctx))


def _target(chosen: list[Weight], ctx: PassContext) -> tuple[float, Callable[[Weight], int]]:
    """What may remain, and the unit it is counted in: numbers, or bytes."""
    recipe = ctx.recipe
    if recipe.compression is not None:
        return sum(w.numel for w in chosen) / recipe.compression, lambda w: 1
    if ctx.other_bytes is None:
        raise PlanError(
            "budget_bytes is about the whole model, and the backend sees a part of it; "
            "call lrcompile.adopt(model, Recipe(budget_bytes=...), example_inputs) before torch.compile"
        )
    rest = sum(w.numel * w.dtype.itemsize for w in ctx.weights.values() if not w.selected)
    assert recipe.budget_bytes is not None
    return recipe.budget_bytes - rest - ctx.other_bytes, lambda w: w.dtype.itemsize


def _search(chosen: list[Weight], ctx: PassContext, target: float, unit: Callable[[Weight], int]) -> None:
    def rank(w: Weight, share: float) -> int:
        return round_to_tile(share * w.numel / w.pair_numel(1), _limit(w))

    def size(w: Weight, share: float) -> int:
        pair = w.pair_numel(rank(w, share))
        return (min(pair, w.numel) if ctx.recipe.require_saving else pair) * unit(w)

    def total(share: float) -> int:
        return sum(size(w, share) for w in chosen)

    if total(0.0) > target:
        least = total(0.0)
        if ctx.recipe.compression is not None:
            most = math.floor(100 * sum(w.numel for w in chosen) / least) / 100  # down: what is named can be had
            raise PlanError(
                f"compression={ctx.recipe.compression} can't be reached: the most is {most}, with rank 1 everywhere"
            )
        assert ctx.recipe.budget_bytes is not None
        need = ctx.recipe.budget_bytes - target + least
        raise PlanError(
            f"budget_bytes={ctx.recipe.budget_bytes} can't be met: the least is {math.ceil(need)} bytes, with rank 1 "
            "everywhere; include more weights, or raise the budget"
        )
    low, high = (
        0.0,
        2.0 if ctx.recipe.require_saving else max(_limit(w) * w.pair_numel(1) / w.numel for w in chosen),
    )
    if total(high) <= target:
        low = high
    for _ in range(50):  # the total only grows with the share
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= target else (low, middle)
    _assign(chosen, ctx, lambda w: rank(w, low))


def _assign(chosen: list[Weight], ctx: PassContext, rank: Callable[[Weight], int | None]) -> None:
    for w in chosen:
        r = rank(w)
        assert r is not None
        if ctx.recipe.require_saving and w.pair_numel(r) >= w.numel:
            w.reason = f"{NO_SAVING} {r} would hold {w.pair_numel(r)} numbers, not fewer than {w.numel}"
            w.selected = False
        else:
            w.rank = r
