"""What passes need of a graph: the bodies of higher-order ops, the sites in them, names, and what is left at the end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrcompile import Recipe, adopt, backend
from lrcompile.graph.capture import Capture, CapturedGraph
from lrcompile.graph.names import parameter_names
from lrcompile.graph.pipeline import bind_weights, copy_graph, run_passes
from lrcompile.passes import PassContext, canonicalize
from lrcompile.passes.chains import target_name, trace_matrix
from lrcompile.passes.graphs import is_parameter, module_name, pair_of, scopes, sites
from lrcompile.passes.open_attention import OPENED

from .helpers import ALL, Attention, Stack, check_clean, ids, no_dense_product, pair_values, run, targets, tiny_llama

# --- sub-graphs -------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """A checkpoint inside a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        def deep(h: Tensor) -> Tensor:
            return self.inner(torch.tanh(h))

        def body(h: Tensor) -> Tensor:
            return checkpoint(deep, self.outer(h), use_reentrant=False)

        return checkpoint(body, x, use_reentrant=False)


class Layer(nn.Module):
    """A region that Dynamo traces once for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


class Region(nn.Module):
    """One layer called twice, or two of the same kind."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.first = Layer()
        self.second = self.first if same else Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + x


class Raw(nn.Module):
    """Other spellings inside a checkpoint body."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        def body(h: Tensor) -> Tensor:
            return torch.einsum("bo,oi->bi", torch.tanh(h @ self.weight), self.other)

        return checkpoint(body, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda: Stack(2, 8, checkpointed=True), {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down")}),
        (Nested, {"outer.weight", "inner.weight"}),
        (Raw, {"weight", "other"}),
    ],
    ids=["checkpoints", "nested", "raw"],
)
def test_weights_inside_bodies(make, keys):
    model = make().train()
    captured, ctx, stages = run(model, (torch.randn(5, 8),), ALL)
    gm = captured.graphs[0].gm
    assert sum(scope.parent is not None for scope in scopes(gm)) > 0
    assert {key for key, w in ctx.weights.items() if w.rank == 2} == keys
    assert all(s.verified is None or s.verified <= 1 for s in stages)
    assert no_dense_product(gm)
    ranks = [pair_of(site) for site in sites(gm) if pair_of(site) is not None]
    assert ranks and set(ranks) == {2}
    check_clean(gm)


def test_a_region_called_with_several_weights_is_captured_call_by_call():
    captured, ctx, stages = run(Region(False).train(), (torch.randn(5, 8),), ALL)
    assert {key for key, w in ctx.weights.items() if w.rank == 2} == {"first.fc.weight", "second.fc.weight"}
    assert all(s.verified is None or s.verified <= 1 for s in stages)


@pytest.mark.parametrize("same", [True, False])
def test_a_region_in_a_backend(same):
    """There the region is a sub-graph: of one weight it is factored, of two weights left alone with a reason."""
    # Dynamo makes one body of the two calls only where both inputs require a gradient.
    model, x = Region(same).train(), torch.randn(5, 8, requires_grad=True)
    done = []

    def backend(gm, given):
        graph, names = CapturedGraph(copy_graph(gm), list(given)), parameter_names(model)
        captured, ctx = Capture([graph], names), PassContext(Recipe(rank=2))
        bind_weights([graph], names, ctx)
        stages = run_passes(captured, ALL, ctx, verify=True, values=pair_values(captured, ctx))
        done.append((graph.gm, ctx.weights, stages))
        return gm.forward

    with torch._dynamo.config.patch(inline_single_use_invoke_subgraph=False):
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    [(gm, weights, stages)] = done
    assert [len(scope.calls) for scope in scopes(gm)] == [0, 2]
    assert all(s.verified is None or s.verified <= 1 for s in stages)
    if same:
        assert weights["first.fc.weight"].rank == 2 and no_dense_product(gm)
    else:
        assert {w.rank for w in weights.values()} == {None}
        assert all("invoke_subgraph" in w.reason for w in weights.values())
    check_clean(gm)


def test_a_body_that_is_not_understood_is_noted():
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.yes, self.no = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda h: self.yes(h), lambda h: self.no(h), (x,))

    _, ctx, stages = run(Choice(), (torch.randn(5, 8),), ALL, verify=False)
    assert any("left as it is" in note for note in stages[1].result.notes)
    assert all(w.rank is None and "cond" in w.reason for w in ctx.weights.values())


def test_gradient_checkpointing_of_transformers():
    model = tiny_llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    captured, ctx, stages = run(model, {"input_ids": ids(), "use_cache": False}, ALL)
    taken = {key for key, w in ctx.weights.items() if w.rank is not None}
    assert taken == {n for n, p in model.named_parameters() if "layers" in n and p.dim() == 2}
    assert all(s.verified is None or s.verified <= 1 for s in stages)
    assert no_dense_product(captured.graphs[0].gm)


# --- sites and several graphs -----------------------------------------------------------------------------------------


def test_module_names():
    captured, _, _ = run(Stack(1), (torch.randn(3, 32),), [canonicalize])
    assert [module_name(s.node) for s in sites(captured.graphs[0].gm)] == ["blocks.0.up", "blocks.0.down"]


def test_several_graphs_are_decided_together():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            torch._dynamo.graph_break()
            return self.head(torch.tanh(self.second(h)))

    captured, ctx, stages = run(Broken(), (torch.randn(5, 16),), ALL)
    assert len(captured.graphs) == 2
    assert {key for key, w in ctx.weights.items() if w.rank} == {"first.weight", "second.weight"}
    assert ctx.weights["head.weight"].reason == "an output head"


# --- what reaches the inner compiler ----------------------------------------------------------------------------------


def products_of_parameters(gm) -> set:
    """The operands of products of two parameters, behind whatever casts, transposes and slices."""
    return {
        node.args[:2]
        for scope in scopes(gm)
        for node in scope.gm.graph.nodes
        if target_name(node) in ("matmul", "mm", "linear")
        and all(is_parameter(scope, trace_matrix(operand).source) for operand in node.args[:2])
    }


class Encoder(nn.Module):
    """Two layers of torch's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


# Either of them, as nn.MultiheadAttention decides while Dynamo traces it.
ATTENTION = {F.multi_head_attention_forward, torch._native_multi_head_attention}


@pytest.mark.parametrize(
    ("make", "call", "fused", "count"),
    [
        (Encoder, {}, {torch._transformer_encoder_layer_fwd}, 8),
        (lambda: Attention(32), {"need_weights": True}, ATTENTION, 2),
        (lambda: Attention(32), {"need_weights": False}, ATTENTION, 2),
    ],
    ids=["encoder", "attention with weights", "attention"],
)
def test_fused_attention_reaches_the_inner_compiler_as_thin_products(make, call, fused, count, monkeypatch):
    """In evaluation torch hands the weights themselves to one op, which would have to be given their products."""
    came, left = [], []
    compile_program = backend.compile_program

    def before(graph, settings, recipe, mode):
        came.append((targets(graph.gm), products_of_parameters(graph.gm)))
        return compile_program(graph, settings, recipe, mode)

    def inner(gm, inputs, settings, mode):
        left.append(gm)
        return gm.forward

    monkeypatch.setattr(backend, "compile_program", before)
    monkeypatch.setattr(backend, "_inner", inner)
    model, inputs = make().eval(), {"x": torch.randn(2, 6, 32), **call}
    adopt(model, Recipe(rank=4, include=("*", "attn.out_proj")) if count == 2 else Recipe(rank=4), inputs)
    with torch.no_grad():
        got, expected = torch.compile(model, backend="lrcompile")(**inputs), model(**inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    [(calls, dense)], [gm] = came, left
    assert fused & set(calls) and len(dense) == count
    assert not set(OPENED) & set(targets(gm)) and not products_of_parameters(gm)
    every = list(sites(gm))
    pairs = [site for site in every if pair_of(site) == 4]
    assert len(pairs) == count
    assert {site.node for site in every} == {node for site in pairs for node in (site.node, site.x)}
    check_clean(gm)
