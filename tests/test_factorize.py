"""The new leaves that stand for a weight: their shapes, dtypes and gradients; no number of the model is touched."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lrcompile import Recipe
from lrcompile.passes import factorize
from lrcompile.passes.graphs import value

from .helpers import BLOCKS, DECIDE, LanguageModel, Stack, ids, run


def test_factorize_makes_leaves_of_the_right_shape_and_touches_no_number():
    model = LanguageModel()
    before = copy.deepcopy(model.state_dict())
    captured, ctx, _ = run(model, (ids(),), [*DECIDE, factorize], Recipe(rank=3))
    leaves = {n.meta["lr_leaf"]: value(n) for n in captured.graphs[0].placeholders if "lr_leaf" in n.meta}
    assert {key for key, _ in leaves} == BLOCKS
    for (key, suffix), leaf in leaves.items():
        out, into = model.get_parameter(key).shape
        assert tuple(leaf.shape) == ((3, into) if suffix == "_a" else (out, 3))
        assert isinstance(leaf, nn.Parameter) and leaf.requires_grad and leaf.dtype == torch.float32
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    # Nothing computes with a factored weight any more.
    for node in captured.graphs[0].placeholders:
        if node.meta.get("lr_weight") in BLOCKS and "lr_leaf" not in node.meta:
            assert not node.users


def test_frozen_weights_give_frozen_leaves():
    model = Stack().requires_grad_(False)
    captured, _, _ = run(model, (torch.randn(3, 32),), [*DECIDE, factorize])
    assert not any(value(n).requires_grad for n in captured.graphs[0].placeholders if "lr_leaf" in n.meta)
