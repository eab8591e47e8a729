"""One dial becomes a rank for each weight: compression, rank, rank_ratio or bytes, in whole tiles."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import PlanError, Recipe
from lrcompile.graph.capture import capture
from lrcompile.graph.pipeline import run_passes
from lrcompile.passes import Weight, factorize
from lrcompile.passes.allocate_ranks import round_to_tile
from lrcompile.weights.planner import context_for

from .helpers import BLOCKS, DECIDE, LanguageModel, Stack, ids, run


def planned(recipe: Recipe, width: int = 256, depth: int = 2) -> dict[str, Weight]:
    """The weights of a stack of blocks (width x 2 width), on the meta device."""
    with torch.device("meta"):
        model = Stack(depth, width)
    _, ctx, _ = run(model, (torch.randn(3, width),), DECIDE, recipe, verify=False)
    return ctx.weights


def kept(weights: dict[str, Weight]) -> int:
    return sum(w.numel if w.rank is None else w.pair_numel(w.rank) for w in weights.values())


@pytest.mark.parametrize("compression", [1.0, 1.3, 2.0, 2.64, 4, 10, 50])
@pytest.mark.parametrize("require_saving", [True, False])
def test_compression_is_reached_and_not_overshot_by_more_than_a_tile(compression, require_saving):
    weights = planned(Recipe(compression=compression, require_saving=require_saving), width=512)
    dense = sum(w.numel for w in weights.values())
    assert kept(weights) <= dense / compression
    for w in weights.values():
        if w.rank is not None and w.rank < min(w.shape):
            more = w.rank + (64 if w.rank >= 1024 else 16 if w.rank >= 128 else 8 if w.rank >= 24 else 1)
            assert w.rank == round_to_tile(w.rank, min(w.shape))
            every_one = sum(v.pair_numel(more) for v in weights.values())
            assert every_one > dense / compression or every_one >= dense


def test_uneven_shapes_share_one_compression():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 300), nn.ReLU(), nn.Linear(300, 40), nn.Tanh())
    _, ctx, _ = run(model, (torch.randn(5, 64),), DECIDE, Recipe(compression=3, include=("*", "4")), verify=False)
    dense = sum(w.numel for w in ctx.weights.values())
    assert dense / kept(ctx.weights) >= 3
    shares = [w.pair_numel(w.rank) / w.numel for w in ctx.weights.values()]
    assert max(shares) - min(shares) < 0.25


def test_shares_move_ranks_between_weights_inside_the_same_total():
    even, uneven = planned(Recipe(compression=3)), planned(Recipe(compression=3, shares={"blocks.0": 0.5, "*": 2}))
    dense = sum(w.numel for w in even.values())
    assert 0.97 * dense / 3 <= kept(uneven) <= dense / 3
    for key, w in uneven.items():
        assert w.rank is not None and even[key].rank is not None
        told = 0.4 if key.startswith("blocks.0") else 1.6  # a quarter of the other block's, half of it each in all
        assert w.rank / even[key].rank == pytest.approx(told, abs=8 / even[key].rank)
    assert {w.rank for w in planned(Recipe(compression=3, shares={"*": 7})).values()} == {w.rank for w in even.values()}


def test_a_share_of_nothing_is_told():
    with torch.device("meta"):
        model = Stack(1, 64)
    _, _, stages = run(
        model, (torch.randn(3, 64),), DECIDE, Recipe(compression=2, shares={"*.attn": 0.5}), verify=False
    )
    assert any("shares['*.attn']: no selected weight matches it" in note for s in stages for note in s.result.notes)


def test_rank_and_rank_ratio():
    assert {w.rank for w in planned(Recipe(rank=5)).values()} == {5}
    assert {w.rank for w in planned(Recipe(rank_ratio=0.25)).values()} == {64}
    assert {w.rank for w in planned(Recipe(rank_ratio=1, require_saving=False)).values()} == {256}
    dense = planned(Recipe(rank_ratio=1))
    assert all(w.rank is None and "not fewer than" in w.reason for w in dense.values())
    with pytest.raises(PlanError, match=r"rank=300 is above min\(in, out\) = 256 of blocks\.0\.up\.weight \(512x256\)"):
        planned(Recipe(rank=300))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget_bytes_of_the_whole_model(share, dtype):
    model = LanguageModel().to(dtype)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    fixed = total - sum(model.get_parameter(k).numel() for k in BLOCKS) * dtype.itemsize
    budget = int(fixed + (total - fixed) * share)
    captured, ctx, stages = run(model, (ids(),), [*DECIDE, factorize], Recipe(budget_bytes=budget), verify=False)
    gone = sum((w.numel - w.pair_numel(w.rank)) * dtype.itemsize for w in ctx.weights.values() if w.rank is not None)
    assert total - gone <= budget and total - gone > 0.8 * budget
    with pytest.raises(PlanError, match=r"can't be met: the least is \d+ bytes, with rank 1") as error:
        run(model, (ids(),), DECIDE, Recipe(budget_bytes=fixed), verify=False)
    least = int(str(error.value).split("the least is ")[1].split()[0])
    with pytest.raises(PlanError, match="can't be met"):
        run(model, (ids(),), DECIDE, Recipe(budget_bytes=least - 1), verify=False)
    _, ctx, _ = run(model, (ids(),), DECIDE, Recipe(budget_bytes=least), verify=False)  # what is named can be had
    assert {ctx.weights[key].rank for key in BLOCKS} == {1}


@pytest.mark.parametrize("factors", ["nf4", "int8", "int8-bnb"])
@pytest.mark.parametrize("allocation", ["uniform", "importance"])
@pytest.mark.parametrize("share", [0.12, 0.3, 0.8])
def test_budget_bytes_of_quantised_pairs(factors, allocation, share):
    model = LanguageModel()
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    fixed = total - sum(model.get_parameter(k).numel() for k in BLOCKS) * 4
    budget = int(fixed + (total - fixed) * share)
    recipe = Recipe(budget_bytes=budget, factors=factors, allocation=allocation, trainable=[])
    lrcompile.adopt(model, recipe, (ids(),))
    real = sum(p.numel() * p.element_size() for p in model.parameters())
    assert real <= budget and all("weight_a" in n or n not in BLOCKS for n, _ in model.named_parameters())


def test_what_cannot_be_reached_is_an_error():
    with pytest.raises(PlanError, match=r"compression=500 can't be reached: the most is 170\.66, with rank 1"):
        planned(Recipe(compression=500))
    assert {w.rank for w in planned(Recipe(compression=170.66)).values()} == {1}
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 50), nn.Tanh())
    with pytest.raises(PlanError, match=r"= 20 of 2\.weight \(20x30\), the smallest.*at most 20, or exclude it"):
        run(model, (torch.randn(5, 40),), DECIDE, Recipe(rank=31), verify=False)
    model = Stack()
    captured = capture(model, (torch.randn(3, 32),))
    ctx = context_for(model, captured, Recipe(budget_bytes=100_000))
    ctx.other_bytes = None  # as the backend, which doesn't see the whole model
    with pytest.raises(PlanError, match=r"call lrcompile\.adopt\(model"):
        run_passes(captured, DECIDE, ctx)


def test_ranks_are_tiles():
    assert [round_to_tile(r, 4096) for r in (0.2, 7.4, 15.2, 17, 30, 100, 150, 511, 530, 1000)] == [
        1, 7, 15, 17, 32, 104, 144, 512, 528, 1008,
    ]  # fmt: skip
    assert round_to_tile(1100, 4096) == 1088
    assert round_to_tile(1000, 700) == 700
    ranks = [round_to_tile(r / 8, 10_000) for r in range(1, 20_000)]
    assert ranks == sorted(ranks)
