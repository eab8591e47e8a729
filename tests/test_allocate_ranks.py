"""One dial becomes a rank for each weight: compression, rank, rank_ratio or bytes, in whole tiles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import PlanError, Recipe
from lrcompile.graph.capture import capture
from lrcompile.graph.pipeline import run_passes
from lrcompile.passes import PassContext, Weight, factorize
from lrcompile.passes.allocate_ranks import _allocate, round_to_tile, tile
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


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (
            {"*.attn": 0.5},
            r"shares\['\*.attn'\] matches no module.*; the model has blocks.0.norm, blocks.0.up, blocks.0.down",
        ),
        ({"norm": 0.5}, r"shares\['norm'\] matches no module.*write '\*.norm' to match it at any depth"),
        ({"*.norm": 0.5}, r"shares\['\*.norm'\] matches biases and norms only"),
        ({"*.UP": 0.5}, r"shares\['\*.UP'\] matches no module"),
        ({"*": 0.5, "*.up": 2}, r"shares\['\*.up'\]: no selected weight matches it that a glob before it hasn't"),
    ],
)
def test_a_share_of_nothing_is_refused(shares, message):
    with pytest.raises(PlanError, match=message):
        planned(Recipe(compression=2, shares=shares), depth=1)
    with pytest.raises(
        PlanError, match=r"shares\['\*.down'\]: no selected weight matches it; the model has blocks.0.up to"
    ):
        planned(Recipe(compression=2, shares={"*.down": 0.5}, exclude=["*.down"]), depth=1)


def test_the_presets_share_may_be_of_nothing():
    with torch.device("meta"):
        model = Stack(1, 64)
    _, ctx, stages = run(model, (torch.randn(3, 64),), DECIDE, Recipe.pretrain(compression=2), verify=False)
    notes = [note for s in stages for note in s.result.notes]
    assert "shares['*[Aa]tt[ne]*']: no selected weight matches it" in notes
    assert {k: w.rank for k, w in ctx.weights.items()} == {
        k: w.rank for k, w in planned(Recipe(compression=2), 64, 1).items()
    }


def by_hand(shapes: list[tuple[int, int]], recipe: Recipe) -> dict[str, Weight]:
    """Weights l0, l1, … of these shapes, with their ranks."""
    weights = {f"l{i}.w": Weight((f"l{i}.w",), s, torch.float32, selected=True) for i, s in enumerate(shapes)}
    _allocate(list(weights.values()), PassContext(recipe, weights, other_bytes=0))
    return weights


@pytest.mark.parametrize("size", [2, 9, 100, 5_000, 200_000])
@pytest.mark.parametrize("compression", [1.0, 1.5, 2.64, 20])
@pytest.mark.parametrize("require_saving", [True, False])
@pytest.mark.parametrize("ends", [(1, 1), (0.01, 100), (1e-200, 1e200), (1e-300, 1.7e308)])
def test_the_search_ends_at_the_dial_whatever_sizes_and_shares(size, compression, require_saving, ends):
    """What is left fits the dial, and not one more tile of the weights that share what is left does."""
    shapes = [(size, size), (size + 1, 2 * size), (3 * size, size), (size, size)]
    shares = {"l0": ends[0], "l1": ends[1]}
    recipe = Recipe(compression=compression, shares=shares, require_saving=require_saving)
    dense = sum(out * in_ for out, in_ in shapes)
    least = sum(sum(s) if sum(s) < s[0] * s[1] or not require_saving else s[0] * s[1] for s in shapes)
    if least > dense / compression:
        most = math.floor(100 * dense / least) / 100
        with pytest.raises(PlanError, match=f"can't be reached: the most is {most}, with rank 1 everywhere"):
            by_hand(shapes, recipe)
        return
    weights = by_hand(shapes, recipe)
    assert kept(weights) <= dense / compression
    together = ["l1", "l2", "l3", "l0"], ["l1"], ["l2", "l3"], ["l0"]
    # Far apart, one is filled before the next begins.
    for names in together[1:] if ends[1] > 1e9 else together[:1]:
        growing = [w for n in names if (w := weights[f"{n}.w"]).rank is not None and w.rank < min(w.shape)]
        step = sum(w.pair_numel(tile(w.rank)) for w in growing)
        assert not growing or kept(weights) + step > dense / compression
        if growing:
            break


def test_a_total_that_no_weight_can_give_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    told = {
        "compression": r"2\.64 can't be reached with no weight to replace: 0\.weight, a pair of rank 1 would hold 4"
    }
    told |= {"budget_bytes": r"30 can't be met: no weight is replaced, and the model has \d+ bytes"}
    for dial, message in told.items():
        with pytest.raises(PlanError, match=f"{dial}={message}"):
            lrcompile.plan(
                model, (torch.randn(3, 2),), Recipe(**{dial: 30 if dial == "budget_bytes" else 2.64, "include": ["0"]})
            )
    assert lrcompile.plan(model, (torch.randn(3, 2),), Recipe(compression=1, include=["0"])).compression == 1


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
