"""The list of passes: their order, a user's own among them."""

from __future__ import annotations

import pytest

from lrcompile import PassError, Recipe, RecipeError
from lrcompile.passes import PassResult, graph_pass, pass_list


@graph_pass(exact=True, after="canonicalize")
def own(gm, ctx):
    return PassResult()


def test_the_order_of_passes():
    names = lambda **kw: [p.__name__ for p in pass_list(Recipe(passes=[own]), **kw)]  # noqa: E731
    assert names(weights=True) == [
        "canonicalize", "own", "select", "allocate_ranks", "factorize", "quantize", "reassociate",
        "fuse_epilogue", "share_input", "lower",
    ]  # fmt: skip
    assert names(weights=False) == ["canonicalize", "own", "reassociate", "fuse_epilogue", "share_input", "lower"]
    assert names(weights=True, program=False) == ["canonicalize", "select", "allocate_ranks", "factorize", "quantize"]
    assert names(weights=True, program=False, rewrites=False) == ["canonicalize", "select", "allocate_ranks"]


def test_a_pass_after_an_unknown_one_is_an_error():
    @graph_pass(exact=True, after="share_inputs")
    def lost(gm, ctx):
        return PassResult()

    with pytest.raises(RecipeError, match="lost wants to run after 'share_inputs'; known are canonicalize, select"):
        pass_list(Recipe(passes=[lost]), weights=False)


def test_an_error_in_a_pass_is_a_pass_error():
    assert issubclass(PassError, RuntimeError)
