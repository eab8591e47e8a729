"""Low-rank linears over one input: the kernel in the interpreter, and the operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from lrcompile import cost
from lrcompile.errors import KernelError
from lrcompile.kernels import launch
from lrcompile.kernels import lowrank_group as family
from lrcompile.kernels.launch import Tile
from lrcompile.kernels.lowrank_group import lowrank_group, lowrank_group_backward
from lrcompile.kernels.lowrank_linear import Shape

from .lowrank_cases import Case
from .numbers import assert_as_good, assert_same

H100 = cost.find_device("NVIDIA H100 80GB HBM3", "sm_90")
assert H100 is not None
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Tile(16, 16, 16)
Operands = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Group:
    """Pairs over the input of `case`: (out_features, rank) of each; the case's own are not used."""

    case: Case
    pairs: tuple[tuple[int, int], ...]

    def operands(self) -> tuple[Operands, list[Tensor]]:
        """x, every weight_a, weight_b and bias; and the gradients of the results."""
        a, b, bias, dy, x = [], [], [], [], None
        for i, (n, rank) in enumerate(self.pairs):
            c = self.case
            sizes = (c.tokens, c.in_features, n, rank, c.dtype, c.bias, c.layout, c.scale)
            found, left, right, offset, seed = Case(*sizes, seed=c.seed + i).operands()
            x = found if x is None else x
            a.append(left), b.append(right), dy.append(seed)
            bias += [] if offset is None else [offset]
        assert x is not None
        return (x, a, b, bias), dy


def gradients(op, operands: Operands, dy: list[Tensor]) -> dict[str, Tensor]:
    """The results and the gradients of all operands, by name."""
    x, *lists = operands
    x = x.detach().requires_grad_()
    given = [[t.detach().requires_grad_() for t in tensors] for tensors in lists]
    y = op(x, *given)
    names = ["x", *(f"{name} {i}" for name, ts in zip(("a", "b", "bias"), given, strict=True) for i in range(len(ts)))]
    seeds = [seed.reshape(t.shape).to(t.dtype) for seed, t in zip(dy, y, strict=True)]
    found = torch.autograd.grad(y, [x, *(t for ts in given for t in ts)], seeds)
    named = {f"gradient of {name}": g for name, g in zip(names, found, strict=True)}
    return {f"y {i}": t.detach() for i, t in enumerate(y)} | named


def check(group: Group) -> None:
    """Results and gradients of the operator against fp64, measured by those of each pair for itself."""
    (x, a, b, bias), dy = group.operands()
    wide = (x.double(), *([t.double() for t in ts] for ts in (a, b, bias)))
    exact = gradients(family.reference, wide, dy)
    theirs, ours = (gradients(op, (x, a, b, bias), dy) for op in (family.reference, lowrank_group))
    for name in exact:
        assert_as_good(ours[name], theirs[name], exact[name], f"{name} of {group}", independent=True)


sizes = st.sampled_from([1, 16, 23, 40])
groups = st.builds(
    Group,
    st.builds(
        Case,
        tokens=st.sampled_from([1, 15, 16, 17]),
        in_features=sizes,
        out_features=st.just(0),
        rank=st.just(0),
        dtype=st.sampled_from(DTYPES),
        bias=st.booleans(),
        layout=st.sampled_from(["plain", "columns", "transposed", "batched"]),
        scale=st.sampled_from([1.0, 2.0**12]),
        seed=st.integers(0, 1000),
    ),
    st.lists(st.tuples(sizes, st.sampled_from([1, 3, 16, 20])), min_size=1, max_size=3).map(tuple),
)


@pytest.fixture(scope="module")
def kernels(interpreter: None):
    from lrcompile.kernels import lowrank_group_triton

    return lowrank_group_triton


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch, interpreter: None) -> Iterator[None]:
    """Operators take the CPU, where the interpreter runs the kernels, for an H100."""
    monkeypatch.setattr(launch, "describe", lambda device: H100)
    torch.set_float32_matmul_precision("high")  # the table has tiles for tf32; the interpreter computes fp32
    yield
    torch.set_float32_matmul_precision("highest")


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(groups, st.sampled_from([1, 2, 3]))
def test_forward_kernel(kernels, group: Group, splits: int):
    (x, a, b, bias), _ = group.operands()
    x = launch.rows(x)
    exact = family.reference(x.double(), *([t.double() for t in ts] for ts in (a, b, bias)))
    theirs = family.reference(x, a, b, bias)
    found = kernels.fused(x, a, b, bias, SMALL, splits)
    assert len(found) == len(group.pairs)
    for got, unfused, right in zip(found, theirs, exact, strict=True):
        assert_as_good(got, unfused, right, f"{group}")


@pytest.mark.parametrize("variant", ["fused", "joined", "gemms"])
@pytest.mark.parametrize("backward", ["shared", "gemms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_with_shipped_tiles(on_h100: None, variant: str, backward: str, dtype: torch.dtype):
    with launch.force(lowrank_group=variant, lowrank_linear_backward=backward):
        check(Group(Case(13, 70, 0, 0, dtype), ((99, 20), (33, 16), (48, 5))))
        check(Group(Case(3, 33, 0, 0, dtype, bias=False, layout="transposed"), ((65, 64), (40, 3))))
        check(Group(Case(10, 48, 0, 0, dtype, layout="batched"), ((17, 16),)))


def test_only_what_a_gradient_needs_is_computed_and_saved():
    operands, dy = Group(Case(9, 24, 0, 0), ((40, 5), (16, 3))).operands()
    everything = gradients(family.reference, operands, dy)
    x, *lists = operands
    named = {
        "x": x,
        **{f"{n} {i}": t for n, ts in zip(("a", "b", "bias"), lists, strict=True) for i, t in enumerate(ts)},
    }
    for wanted in (["x"], ["a 0"], ["b 1"], ["bias 0"], ["a 1", "b 0"], ["x", "bias 1"]):
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in named.items()}
        shapes: list[tuple[int, ...]] = []

        def note(t: Tensor, shapes: list[tuple[int, ...]] = shapes) -> Tensor:
            shapes.append(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = lowrank_group(leaves["x"], *([leaves[f"{n} {i}"] for i in range(2)] for n in ("a", "b", "bias")))
        assert ((9, 24) in shapes) == any(name[0] in "ab" and "bias" not in name for name in wanted)
        assert (9, 40) not in shapes and (9, 5) not in shapes
        torch.autograd.backward(y, dy)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in wanted)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, everything[f"gradient of {name}"])
    # A result that nothing reads gives no gradient, as apart: an optimizer's decay leaves what has none alone.
    a = [t.detach().requires_grad_() for t in lists[0]]
    lowrank_group(x, a, *lists[1:])[1].sum().backward()
    assert a[0].grad is None and a[1].grad.any()


SHAPES = [(4, 8), (0, 8), (1, 8), (2, 3, 8), (8,)]


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), ((2, 3, 8), torch.bfloat16)], ids=str
)
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype):
    draw = lambda *size: torch.randn(*size, dtype=dtype)  # noqa: E731
    x, a, b, bias = draw(*shape), [draw(3, 8), draw(2, 8)], [draw(6, 3), draw(5, 2)], [draw(6), draw(5)]
    dy = [draw(*shape[:-1], 6), draw(*shape[:-1], 5)]
    opcheck(lowrank_group, (x, a, b, []))
    wanted = [[t.clone().requires_grad_() for t in ts] for ts in (a, b, bias)]
    opcheck(lowrank_group, (x.clone().requires_grad_(), *wanted))
    opcheck(lowrank_group_backward, (dy, x, a, b, True, [True] * 6))
    opcheck(lowrank_group_backward, (dy, None, a, b, True, [False] * 6))
    opcheck(lowrank_group_backward, (dy, x, a, b, False, [True, False, False, True, True, False]))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_linear_does(compiled: bool):
    operands, dy = Group(Case(9, 24, 0, 0), ((40, 5), (16, 3))).operands()
    op = torch.compile(lowrank_group, backend="aot_eager", fullgraph=True) if compiled else lowrank_group
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (gradients(f, operands, dy) for f in (family.reference, op))
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert_same(found[name], expected[name], torch.bfloat16)


def test_compiles_whole_with_dynamic_shapes():
    (_, a, b, bias), _ = Group(Case(4, 8, 0, 0), ((6, 3), (6, 2))).operands()
    leaves = [t.requires_grad_() for t in (*a, *b, *bias)]
    graphs = []

    def counting(gm: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    def model(x: Tensor) -> Tensor:
        left, right = lowrank_group(x, a, b, bias)
        return left * right

    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    for tokens in (5, 7, 11):
        x = torch.randn(tokens, 8, requires_grad=True)
        found = torch.autograd.grad(compiled(x).square().sum(), (x, *leaves))
        torch.testing.assert_close(found, torch.autograd.grad(model(x).square().sum(), (x, *leaves)))
    assert len(graphs) == 1


def test_what_does_not_fit_is_told(on_h100: None):
    (x, a, b, bias), dy = Group(Case(9, 24, 0, 0), ((40, 5), (16, 3), (8, 2), (8, 2))).operands()
    for operands, message in (
        ((x, a, b[:3], bias), "4 weight_a, 3 weight_b, 4 bias; as many of each"),
        ((x, a, b, bias[:2]), "2 bias"),
        ((x, [], [], []), "a pair at least"),
        ((x, a[::-1], b, bias), "don't fit"),
        ((x.half(), a, b, bias), "cast to one of"),
    ):
        with pytest.raises(KernelError, match=message):
            lowrank_group(*operands)
    with launch.force(lowrank_group="fused"), pytest.raises(KernelError, match="'fused'"):
        lowrank_group(x, a, b, bias)
    with pytest.raises(KernelError, match="needs x"):
        lowrank_group_backward(dy, None, a, b, True, [True] * 12)


def test_the_model_follows_the_sizes():
    """What is known for certain: x is read once for many tokens; ranks that don't fit the chip go to the library."""

    def predict(tokens: int, *ranks: int) -> tuple[cost.Choice, cost.Choice]:
        shapes = tuple(Shape(tokens, 4096, 4096, rank) for rank in ranks)
        return tuple(f(shapes, torch.bfloat16, H100) for f in (family.predict_forward, family.predict_backward))

    forward, backward = predict(16384, 64, 64, 64)
    assert forward.variant == "fused" and backward.variant == "joined"
    once = 16384 * 4096 * 2 / H100.bandwidth
    assert forward.gemms - forward.seconds > 2 * once  # x is read once instead of three times
    assert backward.gemms - backward.seconds > 2 * once
    assert predict(16384, 256, 256)[0].variant != "fused"
    assert family.tile_of(tuple(Shape(8, 64, 64, 16) for _ in range(4)), "half", H100) is None
