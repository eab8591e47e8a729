"""What a glob matches: one meaning, whoever asks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import Recipe
from lrcompile.graph.names import among, dense_names, matches
from lrcompile.passes import Weight

from .helpers_train import Model, batch


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("*attn*", "h.0.attn.c_attn.weight", True),
        ("*attn*", "layers.1.mlp.up.weight", False),
        ("*.attn.*", "h.0.attn.c_attn.weight", True),
        ("*.attn.*", "attn.c_attn.weight", False),
        ("*.linear1", "layers.0.linear1.weight", True),
        ("*.linear1", "layers.0.linear1.bias", True),
        ("*.linear1", "layers.0.linear10.weight", False),
        ("linear1", "layers.0.linear1.weight", False),  # a name is matched from its beginning
        ("1", "1.weight", True),
        ("1", "layers.1.weight", False),
        ("*.1", "layers.1.up.weight", True),
        ("*.norm2", "layers.0.norm2.weight", True),
        ("layers.0", "layers.0.linear1.weight", True),
        ("layers.?.up", "layers.0.up.weight", True),
        ("layers", "layers.0.linear1.weight", True),
        ("head.weight", "head.weight", True),
        ("weight", "weight", True),
        ("*.weight", "layers.0.up.weight", True),
        ("*.weight", "layers.0.up.bias", False),
        ("*.Attn", "layers.0.attn.weight", False),
        ("*.[Aa]ttn", "layers.0.Attn.weight", True),
    ],
)
def test_what_matches(glob: str, name: str, expected: bool) -> None:
    assert matches(name, glob) is expected and matches(name, ["absent", glob]) is expected
    assert Weight((name,), (1, 1), torch.float32).matches(glob) is expected


def test_only_its_own_module() -> None:
    assert matches("body.embed.weight", "*.embed", around=False) and matches("embed.weight", "embed", around=False)
    assert not matches("body.embed.weight", "body", around=False) and not matches("a.b.weight", [], around=False)


def test_a_pair_is_called_as_its_weight() -> None:
    """So that a glob says the same of a model before and after adoption, and of a run and its dense twin."""
    dense, model = Model(), lrcompile.adopt(Model(), Recipe(rank=4), (batch(),))
    names = dense_names(model)
    assert {name for ones in names.values() for name in ones} == {name for name, _ in dense.named_parameters()}
    up = model.blocks[0].up
    assert names[id(up.weight_a)] == names[id(up.weight_b)] == ("blocks.0.up.weight",)


def test_tied_and_compiled_parameters_have_all_their_plain_names() -> None:
    model = Model()
    model.head.weight = nn.Parameter(model.embed.weight)
    model.embed.weight = model.head.weight
    assert dense_names(torch.compile(model))[id(model.head.weight)] == ("embed.weight", "head.weight")


def test_one_meaning_everywhere() -> None:
    """The same glob, as every option that takes one."""
    glob = "*.up"
    made = lrcompile.plan(Model(), (batch(),), Recipe(rank=4, include=[glob]))
    assert {e.names[0] for e in made.entries if e.rank} == {f"blocks.{i}.up.weight" for i in range(3)}
    kept = lrcompile.plan(Model(), (batch(),), Recipe(rank=4, exclude=[glob]))
    assert {e.names[0] for e in kept.entries if e.rank} == {f"blocks.{i}.down.weight" for i in range(3)}
    model = lrcompile.adopt(Model(), Recipe(rank=4, weights="dense", include=["*.down"], trainable=[glob]), (batch(),))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "down" not in n}
    assert trained == {f"blocks.{i}.up.{leaf}" for i in range(3) for leaf in ("weight", "bias")}


def test_what_is_there_is_told() -> None:
    names = ["embed.weight", *(f"layers.{i}.{part}.weight" for i in range(12) for part in ("up", "down"))]
    assert (
        among(names, "up")
        == "; write '*.up' to match it at any depth; the model has embed, layers.0-11.up, layers.0-11.down"
    )
