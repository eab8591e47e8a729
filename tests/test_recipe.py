"""What a Recipe refuses, and how it is written down."""

from __future__ import annotations

import dataclasses
import fnmatch
import json

import pytest

from lrcompile import Recipe, RecipeError
from lrcompile.passes import PassResult, graph_pass
from lrcompile.recipe import ATTENTION_SHARES


@graph_pass(exact=True)
def a_pass(gm, ctx):
    return PassResult()


def test_the_default_is_one_dial():
    assert Recipe().compression == 2.64 and Recipe().dial == "compression=2.64"
    assert Recipe(rank=4).compression is None and Recipe(rank=4).dial == "rank=4"
    assert Recipe.pretrain(shares={}) == Recipe() and Recipe.pretrain(rank=4) == Recipe(rank=4)
    assert Recipe.compress(rank_ratio=0.5) == Recipe(rank_ratio=0.5, svd="full")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().rank = 3


def test_the_presets():
    recipe = Recipe.finetune()
    assert (recipe.weights, recipe.rank, recipe.pair_dtype, recipe.trainable) == ("nf4", 16, "float32", ())
    assert Recipe.pretrain(compression=3) == Recipe(compression=3, shares=ATTENTION_SHARES)
    assert recipe.start == "pissa" and Recipe().start == "svd" and Recipe.finetune(init="zero").start == "zero"
    assert Recipe.finetune(budget_bytes=10).rank is None
    alone = Recipe(weights="int8")
    assert not alone.has_pairs and alone.dial == "weights=int8" and Recipe.finetune().has_pairs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": 2, "rank": 3}, "set one of .*compression and rank"),
        ({"rank_ratio": 0.5, "budget_bytes": 3}, "set one of .*rank_ratio and budget_bytes"),
        ({"compression": 0.9}, "compression must be 1 or more"),
        ({"compression": -1}, "compression must be 1 or more"),
        ({"compression": float("inf")}, "compression must be 1 or more"),
        ({"compression": float("nan")}, "compression must be a number"),
        ({"compression": True}, "compression must be a number"),
        ({"weights": "nf5"}, "no number format 'nf5'; known: nf4"),
        ({"weights": "nf4", "compression": 2}, "a base keeps every number.*set rank, or budget_bytes"),
        ({"weights": "dense"}, "weights=.dense. keeps every weight and adds a pair: say of what rank"),
        ({"weights": "nf4", "rank": 4, "factors": "int8"}, "pair beside a base.*can't be quantised"),
        ({"weights": "nf4", "rank": 4, "init": "svd"}, "nothing left for it to do; choose from zero, pissa"),
        ({"weights": "dense", "rank": 4, "init": "qera"}, "weights=.dense. loses nothing"),
        ({"init": "loftq"}, "starts a pair beside a base: name the base with weights="),
        ({"init": "lora"}, "init='lora' is not known; choose from auto, svd, data, zero"),
        ({"alternations": 0}, "alternations must be a whole number of 1 or more"),
        ({"alpha": 0}, "alpha must be a number above 0"),
        ({"pair_dtype": "float32"}, "pair_dtype is of a pair beside a base"),
        ({"weights": "nf4", "rank": 4, "pair_dtype": "int8"}, "pair_dtype='int8' is not known"),
        ({"allocation": "best"}, "allocation='best' is not known; choose from uniform, importance"),
        ({"rank": 4, "shares": {"*": 2}}, "shares are of a total: set compression or budget_bytes"),
        ({"shares": {"*attn*": 0}}, r"shares\['\*attn\*'\] must be a number above 0.*exclude= keeps a weight dense"),
        ({"shares": {"*": True}}, "must be a number above 0"),
        ({"shares": {3: 1.0}}, "must be a number above 0"),
        ({"shares": "*attn*"}, "shares takes a mapping of globs to numbers"),
        ({"shares": 0.5}, "shares takes a mapping of globs to numbers"),
        ({"rank": 4, "allocation": "importance"}, "allocation shares a total: set compression or budget_bytes"),
        ({"trainable": "*.norm"}, "trainable takes a list"),
        ({"rank": 0}, "rank must be 1 or more"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a number"),
        ({"rank_ratio": 0}, "rank_ratio must be above 0"),
        ({"rank_ratio": 1.01}, "at most 1"),
        ({"budget_bytes": 0}, "budget_bytes must be 1 or more"),
        ({"budget_bytes": 1e6}, "budget_bytes must be a whole number"),
        ({"svd": "exact"}, "'exact' is not known; choose from auto, full, randomized"),
        ({"include": ()}, "selects nothing"),
        ({"include": "blocks.*"}, r"include takes a list.*write include=\['blocks\.\*'\]"),
        ({"exclude": "head"}, "exclude takes a list"),
        ({"exclude": None}, "exclude takes a list"),
        ({"passes": a_pass}, "passes takes a list"),
        ({"passes": (print,)}, "is not a pass; decorate it"),
        ({"passes": (3,)}, "is not a pass"),
        ({"ranks": 3}, "unknown option 'ranks'; known are compression, rank"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_options(options)


@pytest.mark.parametrize("dial", ["compression", "rank", "rank_ratio", "budget_bytes"])
def test_a_dial_that_is_no_number_is_refused(dial):
    with pytest.raises(RecipeError, match=f"{dial} must be a number"):
        Recipe.from_options({dial: "much"})


def test_errors_are_the_usual_kinds_too():
    with pytest.raises(ValueError):
        Recipe(rank=0)


def test_lists_become_tuples_and_it_hashes():
    recipe = Recipe(rank=3, include=["a.*"], exclude=["b"], passes=[a_pass])
    assert recipe.include == ("a.*",) and recipe.exclude == ("b",) and recipe.passes == (a_pass,)
    assert hash(recipe) == hash(Recipe(rank=3, include=("a.*",), exclude=("b",), passes=(a_pass,)))


@pytest.mark.parametrize(
    "name", ["h.0.attn.c_attn", "layers.1.self_attn.q_proj", "encoder.layer.2.attention.self.query", "SelfAttention.q"]
)
def test_attention_by_its_usual_names(name):
    assert all(fnmatch.fnmatchcase(name, glob) for glob in ATTENTION_SHARES)
    assert not any(fnmatch.fnmatchcase("layers.1.mlp.gate_proj", glob) for glob in ATTENTION_SHARES)


def test_as_a_dict_it_is_json():
    told = json.loads(json.dumps(Recipe(rank=3, exclude=["b"], passes=[a_pass]).to_dict()))
    assert told["rank"] == 3 and "compression" not in told and told["exclude"] == ["b"]
    assert told["passes"] == [f"{__name__}:a_pass"]
    assert Recipe.from_options({k: v for k, v in told.items() if k != "passes"}) == Recipe(rank=3, exclude=["b"])
