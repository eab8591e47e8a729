"""The pipeline: snapshots, and translation validation that names the pass at fault."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lrcompile import PassError, PlanError, Recipe
from lrcompile.graph.capture import capture
from lrcompile.graph.pipeline import compare, copy_graph, run_on_fakes, run_passes
from lrcompile.passes import PassContext, PassResult, canonicalize, graph_pass, lower, pass_list, reassociate
from lrcompile.passes.graphs import Scope, emit, linear_fn, scopes

from .helpers import Attention, LanguageModel, Stack, ids, run

X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


def linears(gm: fx.GraphModule) -> list[tuple[Scope, fx.Node]]:
    return [(scope, n) for scope in scopes(gm) for n in scope.gm.graph.nodes if n.target is linear_fn]


def replace(scope: Scope, node: fx.Node, write) -> None:
    """Let `write(node)` make another node out of this one's value, for all its users."""
    users = list(node.users)
    new = write(node)
    for user in users:
        user.replace_input_with(node, new)
    scope.gm.recompile()


def after(node: fx.Node) -> fx.Node:
    return node.next


# --- planted passes ---------------------------------------------------------------------------------------------------


@graph_pass(exact=True)
def drops_a_bias(gm, ctx):
    scope, node = linears(gm)[-1]
    node.args = (*node.args[:2], None)
    return PassResult(["dropped"])


@graph_pass(exact=True)
def scales_a_little(gm, ctx):
    scope, node = linears(gm)[0]
    replace(scope, node, lambda n: emit(scope, after(n), torch.mul, n, 1.001))
    return PassResult(["scaled"])


@graph_pass(exact=True)
def breaks_a_gradient(gm, ctx):
    scope, node = linears(gm)[0]
    replace(scope, node, lambda n: emit(scope, after(n), "detach", n))
    return PassResult(["detached"])


@graph_pass(exact=True)
def halves_a_gradient(gm, ctx):
    """The same value; half of its gradient."""
    scope, node = linears(gm)[0]

    def write(n: fx.Node) -> fx.Node:
        half = emit(scope, after(n), torch.mul, n, 0.5)
        return emit(scope, half.next, torch.add, half, emit(scope, half.next, "detach", half))

    replace(scope, node, write)
    return PassResult(["halved"])


@graph_pass(exact=True)
def breaks_a_dtype(gm, ctx):
    output = gm.graph.output_node()
    old = output.args[0][0]
    new = emit(Scope(gm), output, "to", old, torch.float64)
    output.args = ((new, *output.args[0][1:]),)
    return PassResult(["cast"])


@graph_pass(exact=True)
def says_nothing(gm, ctx):
    drops_a_bias(gm, ctx)
    return PassResult()


@graph_pass(exact=True)
def loses_an_output(gm, ctx):
    gm.graph.output_node().args = ((),)
    return PassResult(["lost"])


@graph_pass(exact=True)
def transposes_wrongly(gm, ctx):
    scope, node = linears(gm)[0]
    node.args = (node.args[0], emit(scope, node, "t", node.args[1]), *node.args[2:])
    return PassResult(["transposed"])


@graph_pass(exact=True)
def raises(gm, ctx):
    raise KeyError("no such site")


@graph_pass(exact=True)
def returns_a_list(gm, ctx):
    return ["done"]


@graph_pass(exact=True)
def leaves_a_malformed_graph(gm, ctx):
    scope, node = linears(gm)[0]
    users = list(node.users)
    users[0].prepend(gm.graph.output_node())
    node.append(node.args[0]) if node.args[0].op != "placeholder" else node.prepend(users[0])
    return PassResult(["moved"])


@graph_pass(exact=True)
def writes_it_otherwise(gm, ctx):
    """Right: x Wᵀ + b in two nodes."""
    for scope, node in linears(gm):
        if len(node.args) < 3 or node.args[2] is None:
            continue
        product = emit(scope, node, linear_fn, *node.args[:2], None)
        node.replace_all_uses_with(emit(scope, node, torch.add, product, node.args[2]))
        scope.gm.graph.erase_node(node)
    return PassResult(["split"])


@graph_pass(exact=False)
def approximates(gm, ctx):
    return scales_a_little(gm, ctx)


WRONG = [
    drops_a_bias,
    scales_a_little,
    breaks_a_gradient,
    halves_a_gradient,
    breaks_a_dtype,
    says_nothing,
    loses_an_output,
]


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda p: p.__name__)
def test_a_wrong_pass_is_named(wrong, checkpointed):
    model = Stack(checkpointed=checkpointed).train()
    with pytest.raises(PassError, match=f"pass '{wrong.__name__}' says it is exact, but outputs or gradients differ"):
        run(model, (X,), [canonicalize, wrong, lower])


@pytest.mark.parametrize("wrong", [drops_a_bias, scales_a_little, halves_a_gradient], ids=lambda p: p.__name__)
@pytest.mark.parametrize("mask", [float("-inf"), torch.finfo(torch.float32).min, -1e9])
def test_masks_do_not_hide_a_wrong_pass(wrong, mask):
    class Masked(nn.Module):
        """Returns its masked scores beside what it makes of them; and the mask, as graph breaks do."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = torch.ones(5, 5, device=x.device).tril() == 0
            added = torch.zeros(5, 5, device=x.device).masked_fill(hidden, mask)
            scores = self.q(x) @ self.k(x).T + added
            return scores, scores.softmax(-1), added

    captured, _, stages = run(Masked(), (X,), [canonicalize, writes_it_otherwise])
    assert 0 <= stages[-1].verified <= 1
    with pytest.raises(PassError, match=wrong.__name__):
        run(Masked(), (X,), [canonicalize, wrong])


def test_a_mask_in_another_place_is_a_difference():
    def masked(column: int) -> fx.GraphModule:
        class Model(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.masked_fill(torch.arange(32) == column, float("-inf"))

        return capture(Model(), (X,)).graphs[0].gm

    assert compare(masked(3), masked(3), [X]) == 0
    assert compare(masked(3), masked(4), [X]) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_right_pass_is_verified(dtype):
    captured, _, stages = run(Stack().to(dtype), (X.to(dtype),), [canonicalize, writes_it_otherwise, lower])
    assert stages[2].verified is not None and 0 < stages[2].verified <= 1 or dtype is not torch.bfloat16
    assert all(s.verified is None or s.verified <= 1 for s in stages)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_that_are_zero_but_for_rounding(training):
    """A key's bias shifts all scores of a row alike: under softmax its gradient is zero, and rounding in practice."""
    model = Attention(32, 4).train(training)
    for seed in range(5):
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(seed))
        _, _, stages = run(model, {"x": x}, [canonicalize, writes_it_otherwise])
        assert stages[-1].verified <= 1


def test_random_numbers_are_drawn_alike():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.fc(x), 0.5, self.training) + torch.randn_like(x)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    _, _, stages = run(Noisy().train(), (X,), [canonicalize, writes_it_otherwise])
    assert stages[-1].verified <= 1
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_validation_touches_no_number_of_the_model():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(32, 32), nn.BatchNorm1d(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x))

    model = Counting().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = X.clone()
    torch.manual_seed(2)
    stream = torch.get_rng_state()
    _, _, stages = run(model, (x,), [canonicalize, writes_it_otherwise, lower])
    assert stages[2].verified <= 1
    assert torch.equal(torch.get_rng_state(), stream) and torch.equal(x, X)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_buffer_that_is_no_longer_written_is_a_difference():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.register_buffer("mean", torch.zeros(32))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(x.mean(0))
            return self.fc(x)

    @graph_pass(exact=True)
    def forgets_the_mean(gm, ctx):
        gm.graph.eliminate_dead_code()
        return PassResult()

    with pytest.raises(PassError, match="forgets_the_mean"):
        run(Counting(), (X,), [canonicalize, forgets_the_mean])


def test_what_is_not_exact_or_not_verified_is_not_compared():
    _, _, stages = run(Stack(), (X,), [canonicalize, approximates])
    assert stages[-1].verified is None and not stages[-1].exact
    _, _, stages = run(Stack(), (X,), [canonicalize, drops_a_bias], verify=False)
    assert all(s.verified is None for s in stages)


def test_a_meta_model_cannot_be_verified():
    with pytest.raises(PassError, match="pass 'writes_it_otherwise' can't be verified on the meta device"):
        run(Stack().to("meta"), (X,), [canonicalize, writes_it_otherwise])


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (raises, "pass 'raises' failed: KeyError: 'no such site'"),
        (returns_a_list, "pass 'returns_a_list' returned list; a pass returns a PassResult"),
        (leaves_a_malformed_graph, "pass 'leaves_a_malformed_graph' failed: "),
        (transposes_wrongly, "pass 'transposes_wrongly' (failed|left a graph that can't be run): "),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_a_pass_that_fails_is_named(broken, message, verify):
    if broken is transposes_wrongly and not verify:
        return  # only running it tells
    with pytest.raises(PassError, match=message):
        run(Stack(), (X,), [canonicalize, broken], verify=verify)


def test_our_own_errors_come_through_as_they_are():
    @graph_pass(exact=True)
    def refuses(gm, ctx):
        raise PlanError("not this one")

    with pytest.raises(PlanError, match="^not this one$"):
        run(Stack(), (X,), [refuses])


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_snapshots_are_independent_copies():
    model = LanguageModel()
    captured, ctx, stages = run(model, (ids(),), pass_list(Recipe(rank=2), weights=True))
    assert [s.name for s in stages] == [
        "capture", "canonicalize", "select", "allocate_ranks", "factorize", "quantize", "reassociate",
        "fuse_epilogue", "share_input", "lower",
    ]  # fmt: skip
    codes = [s.graphs[0].code for s in stages]
    assert codes[0] == codes[3] != codes[4] == codes[5] != codes[6]
    live = captured.graphs[0].gm
    drops_a_bias(live, ctx)
    live.recompile()
    assert [s.graphs[0].code for s in stages] == codes
    drops_a_bias(stages[0].graphs[0], ctx)
    stages[0].graphs[0].recompile()
    assert stages[1].graphs[0].code == codes[1]
    assert all(s.seconds >= 0 for s in stages)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_copy_computes_the_same_and_shares_no_node(checkpointed):
    captured = capture(Stack(checkpointed=checkpointed).train(), (X,))
    graph = captured.graphs[0]
    copied = copy_graph(graph.gm)
    assert compare(graph.gm, copied, graph.inputs) == 0
    ours, theirs = ({n for s in scopes(g) for n in s.gm.graph.nodes} for g in (graph.gm, copied))
    assert not ours & theirs and len(ours) == len(theirs)
    # What passes know of nodes is copied, not shared.
    for a, b in zip(graph.gm.graph.nodes, copied.graph.nodes, strict=True):
        assert a.meta is not b.meta and a.meta.keys() <= {*b.meta, "grapharg"}
    copied.graph.find_nodes(op="placeholder")[0].meta["mark"] = 1
    assert "mark" not in graph.placeholders[0].meta
    # Sub-graphs too.
    scope, node = linears(copied)[0]
    node.args = (*node.args[:2], None)
    scope.gm.recompile()
    assert compare(graph.gm, copied, graph.inputs) > 1


def test_a_graph_runs_on_its_own_fake_inputs():
    captured = capture(Stack(), (X,))
    gm = captured.graphs[0].gm
    out = run_on_fakes(gm, lambda inputs: gm(*inputs))
    assert out[0].shape == (5, 32)


def test_without_snapshots_no_copy_is_kept():
    captured = capture(Stack(), (X,))
    stages = run_passes(captured, [canonicalize, reassociate, lower], PassContext(Recipe()))
    assert [s.graphs for s in stages] == [[], [], [], []]
    assert [s.exact for s in stages] == [True] * 4


# --- a user's own pass ------------------------------------------------------------------------------------------------


def test_a_users_pass_stands_where_it_says_and_sees_the_context():
    seen = []

    @graph_pass(exact=True, after="reassociate")
    def swap_gelu(gm, ctx):
        seen.append((ctx.recipe.rank, len(linears(gm))))
        return writes_it_otherwise(gm, ctx)

    recipe = Recipe(rank=2, passes=[swap_gelu])
    _, _, stages = run(Stack(), (X,), pass_list(recipe, weights=True), recipe)
    names = [s.name for s in stages]
    assert names[names.index("reassociate") + 1] == "swap_gelu" and names[-1] == "lower"
    assert seen == [(2, 8)] and stages[names.index("swap_gelu")].verified <= 1
