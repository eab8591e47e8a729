"""Every spelling of a product with a matrix becomes F.linear; what is none is left alone, with a reason."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrcompile import Recipe
from lrcompile.graph.capture import capture
from lrcompile.graph.pipeline import compare, copy_graph
from lrcompile.passes import PassContext, canonicalize, factorize, reassociate
from lrcompile.passes.spellings import SPELLINGS as SPELLED

from .helpers import ALL, DECIDE, Spelled, check_clean, no_dense_product, pair_values, run, targets

# Toy models end in what looks like an output head: a name spelled out takes it.
FULL = Recipe(rank_ratio=1, require_saving=False, include=("weight",))
X = (2, 5, 8)  # the input of every spelling: batch, tokens, features

SPELLINGS = {
    "linear": (lambda x, w: F.linear(x, w), (6, 8), "linear"),
    "linear with keywords": (lambda x, w: F.linear(input=x, weight=w, bias=None), (6, 8), "linear"),
    "matmul": (lambda x, w: torch.matmul(x, w), (8, 6), "matmul"),
    "matmul method": (lambda x, w: x.matmul(w), (8, 6), "matmul"),
    "@": (lambda x, w: x @ w, (8, 6), "matmul"),
    "@ transposed": (lambda x, w: x @ w.T, (6, 8), "matmul"),
    "@ mT": (lambda x, w: x @ w.mT, (6, 8), "matmul"),
    "@ transpose": (lambda x, w: x @ w.transpose(0, 1), (6, 8), "matmul"),
    "@ permute": (lambda x, w: x @ torch.permute(w, (1, 0)), (6, 8), "matmul"),
    "@ H": (lambda x, w: x @ w.H, (6, 8), "matmul"),
    "@ square transposed": (lambda x, w: x @ w.t(), (8, 8), "matmul"),
    "left @": (lambda x, w: w @ x.mT, (6, 8), "matmul"),
    "left @ transposed": (lambda x, w: w.t() @ x.transpose(1, 2), (8, 6), "matmul"),
    "mm": (lambda x, w: torch.mm(x[0], w), (8, 6), "matmul"),
    "mm method, left": (lambda x, w: w.mm(x[0].t()), (6, 8), "matmul"),
    "matmul with keywords": (lambda x, w: torch.matmul(input=x, other=w), (8, 6), "matmul"),
    "mm with keywords": (lambda x, w: torch.mm(x[0], mat2=w), (8, 6), "matmul"),
    "linalg.matmul": (lambda x, w: torch.linalg.matmul(x, w), (8, 6), "matmul"),
    "vector @": (lambda x, w: x[0, 0] @ w, (8, 6), "mv"),
    "@ vector": (lambda x, w: w @ x[0, 0], (6, 8), "mv"),
    "mv": (lambda x, w: torch.mv(w, x[0, 0]), (6, 8), "mv"),
    "mv transposed": (lambda x, w: w.t().mv(x[0, 1]), (8, 6), "mv"),
    "bmm": (lambda x, w: torch.bmm(x, w.expand(2, -1, -1)), (8, 6), "bmm"),
    "bmm, left": (lambda x, w: torch.bmm(w.unsqueeze(0).expand(2, 6, 8), x.mT), (6, 8), "bmm"),
    "@ repeated": (lambda x, w: x @ w.t()[None].broadcast_to(2, 8, 6), (6, 8), "matmul"),
    "inner": (lambda x, w: torch.inner(x, w), (6, 8), "inner"),
    "inner, weight first": (lambda x, w: w.inner(x), (6, 8), "inner"),
    "inner of a vector": (lambda x, w: torch.inner(w, x[0, 0]), (6, 8), "mv"),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=1), (8, 6), "tensordot"),
    "tensordot of named axes": (lambda x, w: torch.tensordot(x, w, dims=([2], [1])), (6, 8), "tensordot"),
    "tensordot, first axis": (lambda x, w: torch.tensordot(x, w, ([0], [-1])), (6, 2), "tensordot"),
    "tensordot, weight first": (lambda x, w: torch.tensordot(w, x, ((0,), (1,))), (5, 6), "tensordot"),
    "addmm": (lambda x, w: torch.addmm(x.new_ones(6), x.reshape(-1, 8), w).view(2, 5, 6), (8, 6), "addmm"),
    "addmm method": (lambda x, w: x.new_ones(6).addmm(x[1], w), (8, 6), "addmm"),
    "addmm of a matrix": (lambda x, w: torch.addmm(x[:, :, 0].mT.new_ones(5, 6), x[0], w), (8, 6), "addmm"),
    "addmm of a column": (lambda x, w: torch.addmm(x[0, :, :1], x[1], w), (8, 6), "addmm"),
    "addmm of one number": (lambda x, w: torch.addmm(x[0, 0, :1], x[1], w), (8, 6), "addmm"),
    "addmm with factors": (lambda x, w: torch.addmm(x[0, 0, :6], x[1], w, beta=0.5, alpha=-2), (8, 6), "addmm"),
    "addmm, left": (lambda x, w: torch.addmm(x[0, :, 0], w, x[1].t()), (6, 8), "addmm"),
    "addmv": (lambda x, w: torch.addmv(x[0, 0, :6], w, x[1, 1], alpha=3), (6, 8), "mv"),
    "baddbmm": (lambda x, w: torch.baddbmm(x[:, :, :6], x, w.expand(2, 8, 6), beta=2), (8, 6), "baddbmm"),
    "einsum": (lambda x, w: torch.einsum("bti,io->bto", x, w), (8, 6), "einsum"),
    "einsum, weight first": (lambda x, w: torch.einsum("oi,bti->bto", w, x), (6, 8), "einsum"),
    "einsum, permuted out": (lambda x, w: torch.einsum("bti,oi->otb", x, w), (6, 8), "einsum"),
    "einsum, middle axis": (lambda x, w: torch.einsum("bti, ts -> bis", x, w), (5, 4), "einsum"),
    "einsum, first axis": (lambda x, w: torch.einsum("bti,bo->oti", x, w), (2, 6), "einsum"),
    "einsum, ellipsis": (lambda x, w: torch.einsum("...i,oi->...o", x, w), (6, 8), "einsum"),
    "einsum, ellipsis first": (lambda x, w: torch.einsum("io,...i->o...", w, x), (8, 6), "einsum"),
    "einsum, implicit": (lambda x, w: torch.einsum("bti,oi", x, w), (6, 8), "einsum"),
    "einsum, implicit, reordered": (lambda x, w: torch.einsum("zti,oi", x, w), (6, 8), "einsum"),
    "einsum, implicit, ellipsis": (lambda x, w: torch.einsum("...i,io", x, w), (8, 6), "einsum"),
    "einsum by lists": (lambda x, w: torch.einsum(x, [0, 1, 2], w, [9, 2], [1, 9, 0]), (6, 8), "einsum"),
    "einsum by lists, implicit": (lambda x, w: torch.einsum(x, [..., 30], w, [30, 1]), (8, 6), "einsum"),
    "detached": (lambda x, w: x @ w.detach().t() + x.sum(), (6, 8), "matmul"),
    "data": (lambda x, w: F.linear(x, w.data), (6, 8), "linear"),
    "detached, once": (lambda x, w: F.linear(x, w.detach()) + F.linear(x, w), (6, 8), "linear"),
    "same shape": (lambda x, w: F.linear(x, w.view(6, -1).reshape(w.shape)), (6, 8), "linear"),
    "cast": (lambda x, w: F.linear(x, w.to(torch.float32)), (6, 8), "linear"),
    "cast twice, transposed": (lambda x, w: x @ w.double().float().t().contiguous(), (6, 8), "matmul"),
    "type_as": (lambda x, w: F.linear(x, w.type_as(x)), (6, 8), "linear"),
    "chunk": (lambda x, w: torch.cat([F.linear(x, p) for p in w.chunk(3)], -1), (6, 8), "linear"),
    "split, one part": (lambda x, w: F.linear(x, w.split([2, 4])[1]), (6, 8), "linear"),
    "rows": (lambda x, w: F.linear(x, w[1:4]) + F.linear(x, w[:3]), (6, 8), "linear"),
    "twice": (lambda x, w: F.linear(F.linear(x, w), w), (8, 8), "linear"),
    "both ways": (lambda x, w: torch.tanh(x @ w) @ w.t(), (8, 6), "matmul"),
    "one dimension": (lambda x, w: F.linear(x[0, 0], w), (6, 8), "linear"),
    "with a penalty": (lambda x, w: F.linear(x, w).sum() + w.square().sum(), (6, 8), "linear"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_a_linear(name):
    function, shape, kind = SPELLINGS[name]
    model = Spelled(function, shape)
    before = copy.deepcopy(model.state_dict())
    captured, ctx, stages = run(model, (torch.randn(X),), [canonicalize])
    gm = captured.graphs[0].gm
    weight = ctx.weights["weight"]
    assert weight.kinds and set(weight.kinds) == {kind} and not weight.reason
    assert not set(SPELLED) & {getattr(target, "__name__", target) for target in targets(gm)}
    assert stages[-1].verified is not None and stages[-1].verified <= 1
    assert {weight.in_features, weight.out_features} == set(shape)
    check_clean(gm)
    assert torch.equal(model.weight, before["weight"]) and model.weight.grad is None


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_two_thin_products(name):
    """At full rank the whole way changes nothing but rounding, whatever the spelling."""
    function, shape, _ = SPELLINGS[name]
    model = Spelled(function, shape)
    captured, ctx, _ = run(model, (torch.randn(X),), [*DECIDE, factorize], FULL)
    graph, whole = captured.graphs[0], capture(model, (torch.randn(X),)).graphs[0].gm
    values = pair_values(captured, ctx)(graph, graph.gm)
    ctx_thin = PassContext(FULL)
    product = copy_graph(graph.gm)
    done = reassociate(graph.gm, ctx_thin)
    assert compare(product, graph.gm, values) <= 1
    expected, got = (gm(*v)[0] for gm, v in ((whole, graph.inputs), (graph.gm, values)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert done.changed or done.notes
    check_clean(graph.gm)


LAYOUTS = {
    "reversed": lambda: torch.randn(X[::-1]).permute(2, 1, 0),
    "with gaps": lambda: torch.randn(4, 5, 16)[::2, :, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_layouts_are_kept(name, layout):
    """What follows a product was traced for its strides: here it reads the memory by them."""
    function, shape, _ = SPELLINGS[name]

    def by_strides(x: Tensor, w: Tensor) -> Tensor:
        y = function(x, w)
        return y.as_strided(y.shape, y.stride()) * 2

    _, ctx, stages = run(Spelled(by_strides, shape), (LAYOUTS[layout](),), [canonicalize])
    assert ctx.weights["weight"].kinds and stages[-1].verified is not None and stages[-1].verified <= 1


AROUND = ("linear", "matmul", "mv", "addmv", "addmm of a matrix", "baddbmm", "inner", "tensordot", "einsum", "cast")


@pytest.mark.parametrize(
    ("name", "inside"), [*((name, True) for name in SPELLINGS), *((name, False) for name in AROUND)]
)
def test_autocast_casts_the_same(name, inside):
    """Entered in the graph or around it; a product that it leaves in float32 stays so."""
    function, shape, _ = SPELLINGS[name]

    def mixed(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(x, w)

    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        model = Spelled(mixed if inside else function, shape)
        captured, ctx, stages = run(model, (torch.randn(X),), [canonicalize])
        graph, expected = captured.graphs[0], stages[0].graphs[0](*captured.graphs[0].inputs)[0]
        assert graph.gm(*graph.inputs)[0].dtype == expected.dtype
    assert stages[-1].verified is not None and stages[-1].verified <= 1
    assert bool(ctx.weights["weight"].kinds) != (name in ("mv", "mv transposed", "addmv"))


def test_tokens_are_the_rows_of_all_uses():
    model = Spelled(SPELLINGS["both ways"][0], (8, 6))
    _, ctx, _ = run(model, (torch.randn(X),), [canonicalize])
    assert ctx.weights["weight"].tokens == 20 and len(ctx.weights["weight"].kinds) == 2


@pytest.mark.parametrize("bias", [True, False])
def test_conv1d_of_transformers(bias):
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 8), nn.GELU(), Conv1D(8, 6))
    _, ctx, stages = run(model, (torch.randn(X),), ALL)
    weight = ctx.weights["0.weight"]
    assert weight.kinds == ["addmm"] and weight.stored_in_out and weight.rank == 2
    assert (weight.in_features, weight.out_features) == (8, 6)
    assert all(s.verified is None or s.verified <= 1 for s in stages)


LEFT_ALONE = {
    "three dimensions": (lambda x, w: torch.einsum("bti,hio->bhto", x, w), (3, 8, 6), "einsum"),
    "batched": (lambda x, w: torch.bmm(x, w), (2, 8, 6), "bmm"),
    "one expert": (lambda x, w: x @ w[0], (3, 8, 6), "getitem"),
    "convolution": (lambda x, w: F.conv1d(x, w), (4, 5, 3), "conv1d"),
    "two indices contracted": (lambda x, w: torch.einsum("bti,ti->b", x, w), (5, 8), "einsum"),
    "diagonal": (lambda x, w: torch.einsum("bti,ii->bti", x, w), (8, 8), "einsum"),
    "shared index kept": (lambda x, w: torch.einsum("bti,ti->bt", x, w), (5, 8), "einsum"),
    "addmm without its input": (lambda x, w: torch.addmm(x.new_ones(6), x[0], w, beta=0), (8, 6), "addmm"),
    "one axis repeated": (lambda x, w: torch.einsum("bti,io->bto", x[..., :1], w), (8, 6), "einsum"),
    "more rows than x": (lambda x, w: x[0] @ w.expand(3, 8, 6), (8, 6), "expand"),
    "two axes": (lambda x, w: torch.tensordot(x, w, 2), (5, 8), "tensordot"),
    "three matrices": (lambda x, w: torch.linalg.multi_dot([x[0], w, x[1].t()[:6]]), (8, 6), "linalg_multi_dot"),
    "viewed": (lambda x, w: x @ w.view(8, 6), (6, 8), "view"),
    "flattened": (lambda x, w: x.reshape(2, -1)[:, :24] @ w.flatten()[:24], (6, 8), "flatten"),
    "transposed and scaled": (lambda x, w: x @ (w.t() * 2), (6, 8), "mul"),
    "several": (lambda x, w: x * w[0] + (w * 2).sum(), (6, 8), "getitem, mul"),
    "in a checkpoint": (lambda x, w: checkpoint(lambda h, v: h @ (v * 2), x, w, use_reentrant=False), (8, 6), "mul"),
    "rows by a mask": (lambda x, w: torch.where(x[0, 0, :6, None] > 0, w, 0).sum() + x, (6, 8), "where"),
    "in a vmap": (lambda x, w: torch.vmap(lambda h: w @ h)(x[0]), (6, 8), "matmul inside a transform"),
    "linear in a vmap": (lambda x, w: torch.vmap(lambda h: F.linear(h, w))(x), (6, 8), "linear inside a transform"),
    "with itself": (lambda x, w: x[:, :, :6] @ F.linear(w, w.sin()), (6, 8), "linear as its input, sin"),
    "computed": (lambda x, w: F.linear(x, w * 2), (6, 8), "mul"),
    "columns": (lambda x, w: F.linear(x, w[:, :8]), (6, 9), "getitem"),
    "written in place": (lambda x, w: F.linear(x, w.clone().mul_(2)), (6, 8), "clone"),
    "masked in place": (None, (6, 8), "clone"),
    "written through a view": (lambda x, w: F.linear(x, _written_through_a_view(w)), (6, 8), "clone"),
}


def masked(x: Tensor, w: Tensor) -> Tensor:
    copied = w.clone()
    copied[0] = 0
    return F.linear(x, copied)


def _written_through_a_view(w: Tensor) -> Tensor:
    copied = w.clone()
    copied.t().view(-1, 2, 6)[0].mul_(3)
    return copied


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_no_product_with_a_matrix_stays_with_a_reason(name):
    function, shape, reader = LEFT_ALONE[name]
    captured, ctx, stages = run(Spelled(function or masked, shape), (torch.randn(X),), ALL)
    weight = ctx.weights["weight"]
    assert weight.rank is None and not weight.kinds
    assert weight.reason.startswith("not read by a matrix product") and reader in weight.reason
    assert any("not read by a matrix product" in note for note in stages[1].result.notes)
    check_clean(captured.graphs[0].gm)


def test_what_else_reads_a_weight_is_noted():
    def both(x: Tensor, w: Tensor) -> Tensor:
        return (
            F.linear(x, w)
            + (w * 2).sum()
            + checkpoint(lambda h, v: v.t().sin().sum() * h, x, w, use_reentrant=False)[..., :6]
            + w.shape[0]
        )

    _, ctx, stages = run(Spelled(both, (6, 8)), (torch.randn(X),), ALL, Recipe(rank=2, include=("weight",)))
    assert ctx.weights["weight"].rank == 2 and stages[1].result.notes == ["weight: also read by mul, sin"]
    assert all(s.verified is None or s.verified <= 1 for s in stages)


LOOKUPS = {
    "index": lambda i, w: w[i],
    "index and all columns": lambda i, w: w[i, :] + w[i, ...],
    "index_select": lambda i, w: w.index_select(0, i[0]) + torch.index_select(w, dim=0, index=i[1]),
    "from behind": lambda i, w: w[-i],
    "cast": lambda i, w: w.double()[i],
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_rows_taken_by_integers_are_an_embedding(name):
    """The table stays dense unless it is named; then rows of weight_b are taken."""
    index = torch.tensor([[1, 0, 3], [2, 2, 5]])
    _, ctx, stages = run(Spelled(LOOKUPS[name], (6, 8)), (index,), ALL)
    assert set(ctx.weights["weight"].kinds) == {"embedding"} and ctx.weights["weight"].reason == "an embedding"
    captured, ctx, stages = run(Spelled(LOOKUPS[name], (6, 8)), (index,), ALL, Recipe(rank=2, include=("weight",)))
    assert ctx.weights["weight"].rank == 2 and no_dense_product(captured.graphs[0].gm)
    assert all(s.verified is None or s.verified <= 1 for s in stages)


def test_rows_taken_by_a_mask_or_columns_are_no_embedding():
    mask = torch.tensor([1, 0, 0, 1, 0, 1], dtype=torch.uint8)
    for function in (
        lambda m, w: w[:, m.long()],
        lambda m, w: w[m.long(), m.long()],
        lambda m, w: w.index_select(1, m.long()),
    ):
        _, ctx, _ = run(Spelled(function, (6, 8)), (mask,), ALL)
        assert not ctx.weights["weight"].kinds and "by " in ctx.weights["weight"].reason


class Effects(nn.Module):
    """Writes to buffers and to what it computed; nothing reads what those calls return."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.cache[1:3] = x[:2]
        self.cache.copy_(self.cache + 1)
        y = self.norm(self.fc(x)) @ self.weight
        y.mul_(3)
        return y


def test_writing_in_place_is_not_dead():
    captured, ctx, stages = run(Effects().train(), (torch.randn(5, 8),), ALL)
    for stage in stages:
        assert {"add_", "copy_", "mul_"} <= set(targets(stage.graphs[0])), stage.name
    assert all(s.verified is None or s.verified <= 1 for s in stages)
