"""The inspection: its numbers against hand-computed ones, its words, its page; a planted wrong pass is named."""

import re

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import PassError, Recipe
from lrcompile.passes import PassResult, graph_pass
from lrcompile.passes.graphs import linear_fn
from lrcompile.show import as_text, asked_note, plan_table, report_table
from lrcompile.weights.initialise import initialise
from lrcompile.words import change, count, fold, fold_lines, size

from .helpers import Stack

TOKENS, IN, MIDDLE, OUT, RANK = 6, 16, 32, 24, 4
DENSE = IN * MIDDLE + MIDDLE * OUT
PAIRS = RANK * (IN + MIDDLE) + RANK * (MIDDLE + OUT)
FLOAT = 4  # bytes


class Mlp(nn.Module):
    """Two linears, (TOKENS, IN) -> (TOKENS, OUT); and a table that no graph reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(IN, MIDDLE), nn.Linear(MIDDLE, OUT)])
        self.unread = nn.Parameter(torch.zeros(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Added to, so that the second isn't taken for an output head.
        y = self.layers[1](torch.relu(self.layers[0](x)))
        return y + y


RECIPE = Recipe(rank=RANK, include=["layers.0", "layers.1"])


@pytest.fixture
def inputs() -> tuple[torch.Tensor]:
    return (torch.randn(TOKENS, IN),)


@pytest.fixture(params=["real", "meta"])
def model(request) -> nn.Module:
    with torch.device("meta" if request.param == "meta" else "cpu"):
        return Mlp()


def test_numbers_by_hand(model, inputs):
    before = {name: (p.data_ptr() if not p.is_meta else 0, p._version) for name, p in model.named_parameters()}
    report = lrcompile.inspect(model, inputs, RECIPE)
    first, factorize, last = report["capture"], report["factorize"], report["lower"]

    biases = MIDDLE + OUT
    assert first.parameters == DENSE + biases and first.bytes == FLOAT * first.parameters
    assert factorize.parameters == last.parameters == PAIRS + biases
    assert first.model_parameters == DENSE + biases + 7 == sum(p.numel() for p in model.parameters())
    assert last.model_parameters == PAIRS + biases + 7 and last.model_bytes == FLOAT * last.model_parameters

    products = 2 * RANK * DENSE  # forming weight_b @ weight_a
    assert first.flops == 2 * TOKENS * DENSE
    assert factorize.flops == 2 * TOKENS * DENSE + products
    assert last.flops == 2 * TOKENS * PAIRS
    assert report["select"].flops == report["allocate_ranks"].flops == first.flops

    # relu saves its result, which the second linear multiplies: one storage. x is an input.
    assert first.saved == FLOAT * TOKENS * MIDDLE
    # The first product need not be kept: x asks for no gradient. The second must.
    assert factorize.saved == first.saved + FLOAT * MIDDLE * OUT
    assert last.saved == first.saved + FLOAT * TOKENS * 2 * RANK
    assert last.saved < factorize.saved
    after = {name: (p.data_ptr() if not p.is_meta else 0, p._version) for name, p in model.named_parameters()}
    assert before == after, "the model is as it was"


def test_shared_and_checkpointed_weights_count_once():
    model = Stack(checkpointed=True)
    report = lrcompile.inspect(model, (torch.randn(2, 3, 32),), Recipe(rank=4))
    assert report["capture"].parameters == sum(p.numel() for p in model.parameters())
    wide = 2 * (32 * 64 + 32 * 64)
    assert report["lower"].parameters == report["capture"].parameters - wide + 2 * 2 * 4 * (32 + 64)
    assert "def wrap_body_0(" in report["lower"].code and "blocks.0.up.weight_a" in report["lower"].code


def test_attention_on_the_cpu_counts():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24, bias=False)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v).sum(-1)

    # All-dense: rank 1 everywhere would do, but only the captured graph is looked at.
    report = lrcompile.inspect(Attend(), (torch.randn(3, 5, 8),), Recipe(rank=1, include=["qkv"]))
    scores = 2 * 3 * 2 * 5 * 5 * 4  # q kᵀ for 3 sequences and 2 heads of width 4; as much for the values
    assert report["capture"].flops == 2 * 15 * 8 * 24 + 2 * scores


def test_errors_are_those_of_the_svd_and_of_the_adopted_model(inputs):
    model = Mlp()
    report = lrcompile.inspect(model, inputs, RECIPE)
    with torch.no_grad():
        dense = model(*inputs)
    for key, error in report.errors.items():
        weight = model.get_parameter(key)
        sigma = torch.linalg.svdvals(weight.detach().double())
        assert error == pytest.approx(float(sigma[RANK:].norm() / sigma.norm()), rel=1e-4)
        assert torch.allclose(report.spectrum(key), sigma, atol=1e-5)
    assert set(report.errors) == {"layers.0.weight", "layers.1.weight"}
    lrcompile.adopt(model, report.plan)
    with torch.no_grad():
        low = model(*inputs)
    assert report["factorize"].error == pytest.approx(float((low - dense).norm() / dense.norm()), rel=1e-3)
    assert report["reassociate"].error == 0.0 and report["capture"].error is None


def test_an_adopted_model_is_shown_without_the_weight_passes(inputs):
    model = lrcompile.adopt(Mlp(), RECIPE, inputs)
    report = lrcompile.inspect(model, inputs, RECIPE, verify=True)
    assert [s.name for s in report.stages] == [
        "capture",
        "canonicalize",
        "reassociate",
        "fuse_epilogue",
        "share_input",
        "lower",
    ]
    assert report["lower"].flops == 2 * TOKENS * PAIRS
    assert set(report.errors) == {"layers.0.weight", "layers.1.weight"}
    str(report)


def test_diff_speaks_the_models_language(inputs):
    report = lrcompile.inspect(Mlp(), inputs, RECIPE)
    diff = report["factorize"].diff()
    assert diff.startswith("--- allocate_ranks\n+++ factorize")
    assert re.search(r"^-    \w+ = F.linear\(x, layers.0.weight, layers.0.bias\)  # f32\[6, 32\]$", diff, re.MULTILINE)
    product = "torch.matmul(layers.0.weight_b, layers.0.weight_a)  # f32[32, 16]"
    assert re.search(rf"^\+    \w+ = {re.escape(product)}$", diff, re.MULTILINE)
    assert "    # layers.0" in report["factorize"].code
    assert "l_self" not in diff and "L_" not in diff and "_parameters_" not in diff

    # Only what is computed anew differs: the readers of a rewritten site stay as they are.
    changed = [line for line in report["reassociate"].diff().splitlines()[2:] if line[0] in "+-"]
    assert len(changed) == 8 and all("layers." in line or "linear" in line for line in changed)
    assert report["select"].diff() == "" and report["capture"].diff() == ""
    assert report["reassociate"].graph is report["reassociate"].graphs[0]


def test_unknown_stages_are_listed(inputs):
    report = lrcompile.inspect(Mlp(), inputs, RECIPE)
    with pytest.raises(KeyError, match=r"no stage 'quantise'.*capture.*factorize.*lower"):
        report["quantise"]


def test_printed(model, inputs):
    text = str(lrcompile.inspect(model, inputs, RECIPE))
    for word in ("canonicalize", "factorize", "approx.", "layers.0-1", "rank 4", "parameters", "FLOPs", "saved"):
        assert word in text, word
    assert ("not measured" in text) == next(model.parameters()).is_meta
    assert ("Relative error of the weights" in text) == (not next(model.parameters()).is_meta)
    for width in (80, 120, 160):
        lines = as_text(report_table(lrcompile.inspect(model, inputs, RECIPE)), width).splitlines()
        assert max(map(len, lines)) <= width
        rows = {line.split()[0]: line.split() for line in lines if line[:1].isalpha()}
        assert rows["pass"] == ["pass", "parameters", "bytes", "FLOPs", "saved", "numerics", "time"]
        assert rows["select"][:6] == ["select", "=", "=", "=", "=", "exact"]
        assert rows["factorize"][1] == count(PAIRS + MIDDLE + OUT)
        assert rows["before"][:3] == ["before", "/", "after"] and rows["before"][3].endswith("x")
        assert "  2 × selected: layers.0-1" in lines


def test_many_kinds_of_change_and_note_are_cut_short(inputs):
    @graph_pass(exact=True, after="lower")
    def talks(gm, ctx):
        return PassResult([f"a.{c}: change {c}" for c in "abcdefgh"], [f"b: note {c}" for c in "abcdef"])

    text = str(lrcompile.inspect(Mlp(), inputs, Recipe(rank=RANK, passes=[talks])))
    assert "change f: a.f" in text and "change g" not in text and "and 2 more kinds of change" in text
    assert "note d: b" in text and "note e" not in text and "and 2 more kinds of note" in text


def test_what_was_asked_is_told_where_it_is_not_what_was_got():
    def said(**recipe):
        model = nn.Sequential(Stack(2, 128), nn.LayerNorm(128))
        return asked_note(lrcompile.plan(model, (torch.randn(3, 128),), Recipe(**recipe)))

    assert re.fullmatch(r"asked compression 2.64, got 2\.\d\d: ranks are rounded to multiples of 8", said())
    assert said(rank_ratio=0.3) == "asked rank_ratio 0.3, got 0.312: ranks are rounded to multiples of 8"
    assert said(rank_ratio=0.25) == said(rank=7) == said(rank=8) == ""
    assert re.fullmatch(r"asked budget_bytes 200,000, got 1\d\d,\d{3}: ranks are .*", said(budget_bytes=200_000))
    assert "whole numbers" in said(compression=20.0)
    assert said(compression=1.0) == "", "nothing is factored: nothing is rounded"
    plan = lrcompile.plan(nn.Sequential(Stack(2, 128), nn.LayerNorm(128)), (torch.randn(3, 128),))
    assert asked_note(plan) in as_text(plan_table(plan), 80)


def test_what_was_got_counts_the_weights_that_stay_dense():
    """As what was asked does: by importance, weights that need most of their ranks keep them all."""
    model, decay = nn.Sequential(Stack(2, 128), nn.LayerNorm(128)), torch.exp(-torch.arange(128) / 8)
    for weight in [p.data for p in model.parameters() if p.dim() == 2][1:]:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(u @ torch.diag(s * decay[: len(s)]) @ v)
    plan = lrcompile.plan(model, (torch.randn(3, 128),), Recipe(compression=1.5, allocation="importance"))
    left = [e for e in plan.entries if e.rank is None]
    kept = sum(e.dense_numel for e in left)
    total = (kept + sum(e.dense_numel for e in plan.adopted)) / (kept + sum(e.numel for e in plan.adopted))
    assert left and total >= 1.5 and plan.compression - total > 0.1
    note = asked_note(plan)
    assert f"asked compression 1.50, got {total:.2f}" in note
    assert note.endswith(
        f"{len(left)} weights that a pair would not make smaller stay dense, {plan.compression:.2f} over the others"
    )


def test_breaks_are_noted(inputs):
    class Broken(Mlp):
        def forward(self, x):
            y = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.layers[1](torch.relu(y)) + 1

    report = lrcompile.inspect(Broken(), inputs, RECIPE, verify=True)
    assert report.breaks and "the trace broke" in str(report)
    assert len(report["lower"].graphs) == 2 and "def graph_1(" in report["lower"].code
    with pytest.raises(PassError, match="2 graphs"):
        _ = report["lower"].graph
    assert report["lower"].flops == 2 * TOKENS * PAIRS
    assert report["factorize"].error > 0


def test_the_page_stands_alone(model, inputs, tmp_path):
    path = tmp_path / "page.html"
    lrcompile.inspect(model, inputs, RECIPE).to_html(path)
    page = path.read_text(encoding="utf-8")
    assert "http" not in page and "<script" not in page and "<link" not in page and "url(" not in page
    assert "layers.0.weight_b" in page and "prefers-color-scheme: dark" in page
    real = not next(model.parameters()).is_meta
    assert ("<svg" in page) == real and ("not measured (meta)" in page) == (not real)


@graph_pass(exact=True, after="reassociate")
def scales_an_output(gm, ctx):
    node = gm.graph.find_nodes(op="call_function", target=linear_fn)[-1]
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(torch.mul, (node, 1.01))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return PassResult()  # it doesn't even say that it changed something


@graph_pass(exact=True, after="canonicalize")
def drops_a_bias(gm, ctx):
    node = gm.graph.find_nodes(op="call_function", target=linear_fn)[0]
    node.args = node.args[:2]
    return PassResult(["layers.0: faster"])


@pytest.mark.parametrize("wrong", [scales_an_output, drops_a_bias])
def test_verify_names_the_wrong_pass(wrong, inputs):
    recipe = Recipe(rank=RANK, include=["layers.0", "layers.1"], passes=[wrong])
    with pytest.raises(PassError, match=wrong.__name__):
        lrcompile.inspect(Mlp(), inputs, recipe, verify=True)
    assert (
        lrcompile.inspect(Mlp(), inputs, recipe)[wrong.__name__].changed
        == wrong(lrcompile.inspect(Mlp(), inputs, RECIPE)["lower"].graph, None).changed
    ), "unverified, it runs"


@graph_pass(exact=False, after="lower")
def scales_and_says_so(gm, ctx):
    return scales_an_output(gm, ctx)


def test_verify_lets_right_and_honest_passes_through(inputs):
    recipe = Recipe(rank=RANK, include=["layers.0", "layers.1"], passes=[scales_and_says_so])
    report = lrcompile.inspect(Mlp(), inputs, recipe, verify=True)
    assert report["reassociate"].verified <= 1.0 and report["factorize"].verified is None
    # Before the doubling, so the output is off by exactly one percent.
    assert report["scales_and_says_so"].error == pytest.approx(0.01, rel=1e-3)
    assert "verified" in str(report)


def test_verify_needs_numbers(inputs):
    with torch.device("meta"):
        model = Mlp()
    with pytest.raises(PassError, match="meta"):
        lrcompile.inspect(model, inputs, RECIPE, verify=True)
    with pytest.raises(PassError, match="no numbers"):
        lrcompile.inspect(model, inputs, RECIPE).spectrum("layers.0.weight")


def test_pairs_are_computed_once(inputs, monkeypatch):
    import lrcompile.weights.make as make

    calls = []
    monkeypatch.setattr(make, "initialise", lambda w, **kw: calls.append(kw["name"]) or initialise(w, **kw))
    report = lrcompile.inspect(Mlp(), inputs, RECIPE)
    assert calls == [], "inspect() itself computes nothing"
    str(report), str(report)
    assert sorted(calls) == ["layers.0.weight", "layers.1.weight"]


def test_words():
    assert [count(n) for n in (0, 999, 1234, 999_600, 6_738_415_616)] == ["0", "999", "1.23k", "1000k", "6.74G"]
    assert [size(n) for n in (12, 1_500_000)] == ["12 B", "1.5 MB"]
    assert change(12e6, 4e6) == "12M → 4M (3.00x)" and change(5, 5) == "5"
    assert fold(["h.0.a", "h.1.a", "h.3.a", "out"]) == ["h.0-1,3.a", "out"]
    assert fold(f"h.{i}.e.{j}" for i in range(2) for j in range(3)) == ["h.0-1.e.0-2"]
    assert fold(["h.0.e.0", "h.0.e.1", "h.1.e.0"]) == ["h.0.e.0-1", "h.1.e.0"]
    assert fold_lines(["h.0.a.weight: rank 4", "h.1.a.weight: rank 4", "b: rank 8"]) == [
        "2 × rank 4: h.0-1.a",
        "rank 8: b",
    ]
