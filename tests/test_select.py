"""Which weights get a pair: embeddings, heads, ties, globs, stored types, and where none saves anything."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompile import PlanError, Recipe
from lrcompile.passes import Weight, canonicalize, select

from .helpers import BLOCKS, LanguageModel, ids, run


def selected(model: nn.Module, inputs, **options) -> tuple[set[str], dict[str, Weight]]:
    _, ctx, _ = run(model, inputs, [canonicalize, select], Recipe(rank=1, **options), verify=False)
    return {key for key, w in ctx.weights.items() if w.selected}, ctx.weights


def test_embeddings_and_heads_stay_dense_unless_named():
    got, weights = selected(LanguageModel(), (ids(),))
    assert got == BLOCKS
    assert weights["embed.weight"].reason == "an embedding" and weights["head.weight"].reason == "an output head"
    for name in ("head", "head.weight", "*head"):
        expected = BLOCKS | {"head.weight"} if name != "*head" else BLOCKS
        assert selected(LanguageModel(), (ids(),), include=("*", name))[0] == expected
    assert selected(LanguageModel(), (ids(),), include=("embed",))[0] == {"embed.weight"}
    assert selected(LanguageModel(), (ids(),), include=("head",))[0] == {"head.weight"}


def test_tied_heads_stay_dense_unless_named_by_either_name():
    got, weights = selected(LanguageModel(tied=True), (ids(),))
    assert got == BLOCKS and weights["embed.weight"].reason == "tied to an embedding"
    for name in ("head", "embed.weight"):
        assert selected(LanguageModel(tied=True), (ids(),), include=("*", name))[0] == BLOCKS | {"embed.weight"}


def test_globs_name_modules_and_parameters():
    up = {"body.blocks.0.up.weight", "body.blocks.1.up.weight"}
    assert selected(LanguageModel(), (ids(),), include=("*.up",))[0] == up
    assert selected(LanguageModel(), (ids(),), include=("*.up.weight",))[0] == up
    assert selected(LanguageModel(), (ids(),), include=("body.blocks.0.*",))[0] == {k for k in BLOCKS if ".0." in k}
    got, weights = selected(LanguageModel(), (ids(),), exclude=("*.down", "body.blocks.0.up.weight"))
    assert got == {"body.blocks.1.up.weight"}
    assert weights["body.blocks.0.down.weight"].reason == "excluded by '*.down'"
    assert selected(LanguageModel(), (ids(),), include=("*.up",))[1]["head.weight"].reason == "not included"


def test_globs_name_whole_blocks():
    first, second = ({k for k in BLOCKS if f".{i}." in k} for i in (0, 1))
    for option in ("body.blocks.0", "body.*.0", "*.blocks.0"):
        assert selected(LanguageModel(), (ids(),), include=(option,))[0] == first
        got, weights = selected(LanguageModel(), (ids(),), exclude=(option,))
        assert got == second and weights["body.blocks.0.up.weight"].reason == f"excluded by {option!r}"
    assert selected(LanguageModel(), (ids(),), exclude=("body",))[0] == set()


def test_a_module_around_an_embedding_or_a_head_does_not_name_it():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LanguageModel()

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids)

    inside = {f"model.{key}" for key in BLOCKS}
    got, weights = selected(Model(), (ids(),), include=("model",))
    assert got == inside and weights["model.head.weight"].reason == "an output head"
    assert weights["model.embed.weight"].reason == "an embedding"
    assert selected(Model(), (ids(),), include=("model", "*.head"))[0] == inside | {"model.head.weight"}


def test_a_weight_that_is_not_floating_is_an_error_unless_excluded():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 8, dtype=torch.int8), requires_grad=False)
            self.fc = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(torch.float32)) + self.fc(x)

    with pytest.raises(PlanError, match=r"weight is stored as torch\.int8.*exclude=\['weight'\]"):
        selected(Packed(), (torch.randn(5, 8),))
    assert selected(Packed(), (torch.randn(5, 8),), exclude=("weight",))[0] == {"fc.weight"}


def test_where_no_pair_saves_the_weight_stays_dense():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 8), nn.Tanh())
    got, weights = selected(model, (torch.randn(5, 8),), include=("*", "4"))
    assert got == {"0.weight"}
    assert weights["2.weight"].reason == "a pair of rank 1 would hold 9 numbers, not fewer than 8"
    assert "2.weight" in selected(model, (torch.randn(5, 8),), require_saving=False)[0]
