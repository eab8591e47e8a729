"""x (B A)ᵀ becomes two thin products wherever they are fewer FLOPs: linears, embeddings, ties, casts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrcompile
from lrcompile import Recipe
from lrcompile.passes.graphs import value

from .helpers import ALL, LanguageModel, Spelled, ids, no_dense_product, run


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_the_order_with_fewer_flops_is_kept(rows):
    """N r (in + out) against (r + N) in out: at a rank above half the width only few rows pay for thin products."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh())
    recipe = Recipe(rank=14, require_saving=False, include=("*", "0"))
    captured, _, stages = run(model, (torch.randn(rows, 16),), ALL, recipe)
    thin = rows * 14 * 32 <= (14 + rows) * 256
    assert no_dense_product(captured.graphs[0].gm) == thin
    assert bool(stages[5].result.notes) == (not thin) and bool(stages[5].result.changed) == thin


def test_a_factored_embedding_looks_up_rows_of_b():
    model = LanguageModel()
    captured, ctx, stages = run(model, (ids(),), ALL, Recipe(rank=3, include=("*", "embed", "head")))
    gm = captured.graphs[0].gm
    assert ctx.weights["embed.weight"].rank == 3 and no_dense_product(gm)
    [lookup] = [n for n in gm.graph.nodes if n.target is F.embedding]
    assert value(lookup).shape == (2, 7, 3)
    assert all(s.verified is None or s.verified <= 1 for s in stages)


def test_an_embedding_with_options_keeps_its_product():
    model = LanguageModel()
    model.embed = nn.Embedding(50, 32, padding_idx=0)
    captured, _, stages = run(model, (ids(),), ALL, Recipe(rank=3, include=("*", "embed")))
    assert any("embedding options" in note for note in stages[5].result.notes)
    assert not no_dense_product(captured.graphs[0].gm)


def test_a_tied_weight_is_one_pair():
    captured, ctx, stages = run(LanguageModel(tied=True), (ids(),), ALL, Recipe(rank=3, include=("*", "head")))
    leaves = [n.meta["lr_leaf"] for n in captured.graphs[0].placeholders if "lr_leaf" in n.meta]
    assert leaves.count(("embed.weight", "_a")) == 1 and no_dense_product(captured.graphs[0].gm)
    assert all(s.verified is None or s.verified <= 1 for s in stages)


def test_half_precision_weights_cast_where_they_are_used():
    model = Spelled(lambda x, w: F.linear(x, w.to(x.dtype)), (24, 16), torch.bfloat16)
    captured, ctx, stages = run(model, (torch.randn(5, 16),), ALL, Recipe(rank=4, include=("weight",)))
    assert no_dense_product(captured.graphs[0].gm)
    assert stages[5].verified <= 1
    leaves = [value(n) for n in captured.graphs[0].placeholders if "lr_leaf" in n.meta]
    assert {t.dtype for t in leaves} == {torch.bfloat16}


def test_autocast_inside_the_model_is_verified_by_its_own_rounding() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.b(F.gelu(self.a(x)))
            return x + y

    report = lrcompile.inspect(Cast(), (torch.randn(8, 64),), Recipe(rank=8), verify=True)
    thin = [n for n in report["reassociate"].graph.graph.nodes if n.target is torch._C._nn.linear]
    assert len(thin) == 4 and all(n.meta["example_value"].dtype == torch.bfloat16 for n in thin)
