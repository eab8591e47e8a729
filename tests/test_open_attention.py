"""Attention that Dynamo keeps as one node is opened into its products, whatever options it was called with."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lrcompile import Recipe
from lrcompile.graph.capture import Capture, CapturedGraph, capture
from lrcompile.graph.names import parameter_names
from lrcompile.graph.pipeline import bind_weights, copy_graph, run_passes
from lrcompile.passes import PassContext, canonicalize
from lrcompile.weights.planner import context_for

from .helpers import ALL, Attention, check_clean, no_dense_product, run, targets

ATTENTIONS = {
    "plain": ({}, {}),
    "weights": ({}, {"need_weights": True}),
    "weights per head": ({}, {"need_weights": True, "average_attn_weights": False}),
    "padding": ({}, {"key_padding_mask": "padding"}),
    "mask": ({}, {"attn_mask": "causal"}),
    "mask and weights": ({}, {"attn_mask": "causal", "need_weights": True}),
    "causal": ({}, {"attn_mask": "causal", "is_causal": True}),
    "both masks": ({}, {"attn_mask": "boolean", "key_padding_mask": "padding"}),
    "separate dims": ({"kdim": 12, "vdim": 20}, {"key": 12, "value": 20}),
    "cross": ({}, {"key": 16}),
    "cross, own value": ({}, {"key": 16, "value": 16}),
    "no bias": ({"bias": False}, {}),
    "bias_kv": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "dropout": ({"dropout": 0.2}, {}),
}


def attention(name: str) -> tuple[Attention, dict]:
    options, call = ATTENTIONS[name]
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    masks = {
        "padding": padding,
        "boolean": future,
        "causal": torch.zeros(6, 6).masked_fill(future, -math.inf),
    }
    inputs = {"x": torch.randn(2, 6, 16), "need_weights": False}
    for key, what in call.items():
        inputs[key] = masks[what] if isinstance(what, str) else what
        if key in ("key", "value"):
            inputs[key] = torch.randn(2, 7, what)
    return Attention(**options), inputs


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_opened(name):
    model, inputs = attention(name)
    captured, ctx, stages = run(model, inputs, ALL, Recipe(rank=2, include=("*", "attn.out_proj")))
    gm = captured.graphs[0].gm
    assert F.multi_head_attention_forward not in targets(gm)
    assert all(s.verified is None or s.verified <= 1 for s in stages)
    taken = {key for key, w in ctx.weights.items() if w.rank is not None}
    packed = {"attn.in_proj_weight"} if name != "separate dims" else {f"attn.{p}_proj_weight" for p in "qkv"}
    assert taken == packed | {"attn.out_proj.weight"}
    assert no_dense_product(gm)
    check_clean(gm)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_with_dynamic_shapes_inside_a_backend(name):
    """While a backend runs, other fake tensors are about than the graph's; and sizes are symbols."""
    model, inputs = attention(name)
    results = []

    def backend(gm, given):
        graph, names = CapturedGraph(gm, list(given)), parameter_names(model)
        ctx = PassContext(Recipe(rank=2))
        bind_weights([graph], names, ctx)
        results.append((gm, run_passes(Capture([graph], names), [canonicalize], ctx, verify=True)[-1]))
        return gm.forward

    compiled = torch.compile(model, backend=backend, dynamic=True)
    torch.manual_seed(0)
    got = compiled(**inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(got, model(**inputs))
    gm, stage = results[0]
    if F.multi_head_attention_forward in targets(gm):  # torch can't fake every op of it with symbolic sizes
        assert name == "mask and weights" and any("attention left closed" in note for note in stage.result.notes)
    else:
        assert stage.verified <= 1 and "attn: attention opened into its products" in stage.result.changed
    gm.graph.lint()
    longer = torch.randn(3, 9, 16)
    if name in ("plain", "weights", "no bias"):
        torch.testing.assert_close(compiled(longer, need_weights=False), model(longer, need_weights=False))


def test_an_attention_that_cannot_be_opened_is_left_as_it_was(monkeypatch):
    from lrcompile.passes import open_attention as module

    def refuse(self, leaf):
        raise LookupError("a tensor that no recorded call made")

    model, inputs = attention("plain")
    captured = capture(model, inputs)
    before = copy_graph(captured.graphs[0].gm)
    monkeypatch.setattr(module._Recorder, "_to_node", refuse)
    ctx = context_for(model, captured, Recipe(rank=2))
    done = canonicalize(captured.graphs[0].gm, ctx)
    assert "attention left closed (LookupError: a tensor that no recorded call made)" in done.notes[0]
    assert captured.graphs[0].gm.code == before.code
    assert "not read by a matrix product" in ctx.weights["attn.in_proj_weight"].reason
