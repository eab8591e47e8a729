"""The low-rank linear: its Triton kernels in the interpreter, and its operators."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from lrcompile import cost
from lrcompile.errors import KernelError
from lrcompile.kernels import launch
from lrcompile.kernels import lowrank_linear as family
from lrcompile.kernels.launch import Tile
from lrcompile.kernels.lowrank_linear import Shape, lowrank_linear, lowrank_linear_backward, lowrank_linear_keep

from .lowrank_cases import Case, check, gradients, train, unfused
from .numbers import assert_as_good, assert_same

H100 = cost.find_device("NVIDIA H100 80GB HBM3", "sm_90")
assert H100 is not None
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Tile(16, 16, 16)

OPS = {"computed again": lowrank_linear, "kept": lambda *operands: lowrank_linear_keep(*operands)[0]}

sizes = st.sampled_from([1, 7, 16, 23, 33, 48])
cases = st.builds(
    Case,
    tokens=st.sampled_from([1, 2, 15, 16, 17, 40]),
    in_features=sizes,
    out_features=sizes,
    rank=st.sampled_from([1, 3, 16, 20, 37]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    layout=st.sampled_from(["plain", "columns", "transposed", "batched"]),
    scale=st.sampled_from([1.0, 2.0**12]),
    seed=st.integers(0, 1000),
)
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def kernels(interpreter: None):
    from lrcompile.kernels import lowrank_linear_triton

    return lowrank_linear_triton


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch, interpreter: None) -> Iterator[None]:
    """Operators take the CPU, where the interpreter runs the kernels, for an H100."""
    monkeypatch.setattr(launch, "describe", lambda device: H100)
    torch.set_float32_matmul_precision(
        "high"
    )  # the table has tiles for tf32; the interpreter computes fp32 all the same
    yield
    torch.set_float32_matmul_precision("highest")


@few
@given(cases, st.sampled_from([1, 2, 3]))
def test_forward_kernels(kernels, case: Case, splits: int):
    x, a, b, bias, _ = case.operands()
    x = launch.rows(x)
    exact_h = x.double() @ a.double().t()
    exact = exact_h @ b.double().t() + (0 if bias is None else bias.double())
    ways = [kernels.fused]
    if case.tokens <= 16:
        ways.append(kernels.narrow)
    for way in ways:
        y, h = way(x, a, b, bias, SMALL, splits, keep=True)
        assert_as_good(y, unfused(x, a, b, bias), exact, f"{way.__name__} of {case}")
        assert_as_good(h, torch.nn.functional.linear(x, a), exact_h, f"intermediate of {way.__name__} of {case}")
        again, none = way(x, a, b, bias, SMALL, splits)
        assert torch.equal(again, y) and none is None


@few
@given(cases, st.booleans())
def test_backward_kernel(kernels, case: Case, keep: bool):
    x, a, b, _, dy = case.operands()
    x, dy = launch.rows(x), launch.rows(dy)
    h = x @ a.t()
    g, db, dbias = kernels.shared(dy, None if keep else x, h if keep else None, a, b, case.bias, SMALL)
    wide = dy.double()
    assert_as_good(g, dy @ b, wide @ b.double(), f"dY·B of {case}")
    assert_as_good(db, dy.t() @ h, wide.t() @ (x.double() @ a.double().t()), f"dB of {case}")
    if case.bias:
        assert_as_good(dbias, dy.sum(0), wide.sum(0), f"dbias of {case}")
    else:
        assert dbias.shape == (0,)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("variant", ["fused", "narrow", "gemms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_with_shipped_tiles(on_h100: None, op: str, variant: str, dtype: torch.dtype):
    with launch.force(lowrank_linear=variant, lowrank_linear_backward="gemms" if variant == "gemms" else "shared"):
        for case in (
            Case(13, 70, 99, 20, dtype),
            Case(1, 33, 65, 64, dtype, bias=False, layout="transposed"),
            Case(10, 64, 48, 16, dtype, layout="batched"),
        ):
            check(case, OPS[op])


def note(shapes: list[tuple[int, ...]], tensor: Tensor) -> Tensor:
    shapes.append(tuple(tensor.shape))
    return tensor


@pytest.mark.parametrize("keep", [False, True])
def test_only_what_a_gradient_needs_is_computed_and_saved(on_h100: None, keep: bool):
    x, a, b, bias, dy = Case(9, 24, 40, 5).operands()
    everything = gradients(unfused, x, a, b, bias, dy)
    names = ["x", "weight_a", "weight_b", "bias"]
    for wanted in ([0], [1], [2], [3], [0, 1], [2, 3], [0, 2], [0, 1, 2, 3]):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, a, b, bias))]
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(note, shapes), lambda t: t):
            y = lowrank_linear_keep(*leaves)[0] if keep else lowrank_linear(*leaves)
        assert ((9, 24) in shapes) == (1 in wanted or (2 in wanted and not keep)), "x"
        assert ((9, 5) in shapes) == (2 in wanted and keep), "the intermediate"
        y.backward(dy)
        for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
            assert (leaf.grad is not None) == (i in wanted)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, everything[f"gradient of {name}"])


@pytest.mark.parametrize("op", OPS)
def test_training_goes_the_same_way(on_h100: None, op: str):
    with launch.force(lowrank_linear="fused", lowrank_linear_backward="shared"):
        ours = train(OPS[op], torch.float32)
    theirs = train(unfused, torch.float32)
    assert theirs[-1] < 0.5 * theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)  # 20 steps of fp32 sums in another order: 1.4e-7 seen


SHAPES = [(4, 8), (0, 8), (1, 8), (2, 3, 8), (8,)]


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), ((2, 3, 8), torch.bfloat16)], ids=str
)
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype):
    x, dy = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 6, dtype=dtype)
    a, b, bias = (torch.randn(size, dtype=dtype) for size in ((3, 8), (6, 3), (6,)))
    opcheck(lowrank_linear_backward, (dy, x, None, a, b, [True, False, True, True]))
    opcheck(lowrank_linear_backward, (dy, None, x @ a.t(), a, b, [True, False, True, False]) if len(shape) == 2 else (
        dy, x, None, a, b, [False, True, False, False]))  # fmt: skip
    for op in (lowrank_linear, lowrank_linear_keep):
        opcheck(op, (x, a, b, None))
        opcheck(op, tuple(t.detach().requires_grad_() for t in (x, a, b, bias)))
        opcheck(op, (x, a, b.detach().requires_grad_(), bias))


def test_compiles_whole_with_dynamic_shapes_and_checkpointing():
    a, b = torch.nn.Parameter(torch.randn(3, 8)), torch.nn.Parameter(torch.randn(6, 3))
    graphs = []

    def block(x: Tensor) -> Tensor:
        return lowrank_linear(x, a, b, None).relu() + lowrank_linear_keep(x, a, b, None)[0]

    def model(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    def counting(gm: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    for tokens in (5, 7, 11):
        x = torch.randn(tokens, 8, requires_grad=True)
        found = torch.autograd.grad(compiled(x).square().sum(), (x, a, b))
        expected = torch.autograd.grad(block(x).square().sum(), (x, a, b))
        torch.testing.assert_close(found, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(dtype: torch.dtype, compiled: bool):
    x, a, b, bias, dy = Case(9, 24, 40, 5).operands()
    op = torch.compile(lowrank_linear, backend="aot_eager", fullgraph=True) if compiled else lowrank_linear
    with torch.autocast("cpu", dtype):
        expected = gradients(unfused, x, a, b, bias, dy.to(dtype))
        found = gradients(op, x, a, b, bias, dy.to(dtype))
        assert lowrank_linear_keep(x, a, b, bias)[1].dtype == dtype
    assert found["y"].dtype == dtype and found["gradient of weight_a"].dtype == torch.float32
    assert_same(found, expected, dtype)


def test_fp64_and_empty_operands_go_to_the_library(on_h100: None):
    for case in (Case(0, 24, 40, 5), dataclasses.replace(Case(9, 24, 40, 5), dtype=torch.float64)):
        x, a, b, bias, dy = case.operands()
        torch.testing.assert_close(gradients(lowrank_linear, x, a, b, bias, dy), gradients(unfused, x, a, b, bias, dy))


def test_what_does_not_fit_is_told(on_h100: None):
    x, a, b, bias, dy = Case(9, 24, 40, 5).operands()
    for wrong, message in (
        ((x[:, 1:], a, b, bias), r"\(9, 23\).* don't fit"),
        ((x, a, b.t(), bias), "don't fit"),
        ((x, a[0], b, bias), "matrices"),
        ((x, a, b, bias[1:]), r"bias \(39,\)"),
        ((x.half(), a, b, bias), "cast to one of"),
    ):
        with pytest.raises(KernelError, match=message):
            lowrank_linear(*wrong)
    with launch.force(lowrank_linear="narrow"), pytest.raises(KernelError, match="'narrow'"):
        lowrank_linear(x.repeat(3, 1), a, b, bias)
    with launch.force(lowrank_linear_backward="shared"), pytest.raises(KernelError, match="force 'gemms'"):
        lowrank_linear_backward(dy, x, None, a, b, [True, True, False, True])
    with pytest.raises(KernelError, match="needs x"):
        lowrank_linear_backward(dy, None, None, a, b, [True, True, False, True])


def test_forcing_without_a_gpu_is_told():
    x, a, b, bias, _ = Case(9, 24, 40, 5).operands()
    with launch.force(lowrank_linear="fused"), pytest.raises(KernelError, match="known GPU"):
        lowrank_linear(x, a, b, bias)


def test_a_second_derivative_is_refused():
    leaves = [t.requires_grad_() for t in Case(9, 24, 40, 5).operands()[:4] if t is not None]
    (grad,) = torch.autograd.grad(lowrank_linear(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(KernelError, match="no derivative"):
        grad.sum().backward()


def test_the_model_follows_the_sizes():
    """What is known for certain of the choice: launches weigh at small sizes, traffic and tile limits at large ones."""

    def forward(tokens: int, rank: int) -> cost.Choice:
        return family.predict_forward(Shape(tokens, 4096, 4096, rank), torch.bfloat16, H100)

    assert forward(16, 256).variant == "narrow" and forward(17, 256).variant != "narrow"
    assert forward(4096, 64).variant == "fused"
    assert forward(16384, 1024).variant == "gemms"
    whole = Shape(16384, 4096, 4096, 16, bias=True)
    again = family.predict_backward(whole, torch.bfloat16, H100)
    kept = family.predict_backward(whole, torch.bfloat16, H100, kept=True)
    assert kept.variant == "shared" and kept.seconds < again.seconds and kept.gemms == again.gemms
    frozen = family.predict_backward(whole, torch.bfloat16, H100, needed=(True, False, False, False))
    assert frozen.variant == "gemms" and frozen.seconds == frozen.gemms < kept.seconds
    for choice in (forward(16, 256), forward(4096, 64), kept):
        assert choice.gain > 1 and choice.seconds > 0
    both = family.predict(whole, torch.bfloat16, H100, needed=(True,) * 4, kept=True)
    first = family.predict_forward(whole, torch.bfloat16, H100)
    assert both.seconds == first.seconds + kept.seconds and both.variant == f"{first.variant} + shared"
    assert family.predict(whole, torch.bfloat16, H100) == first
    # fp32 without tf32 has no tensor cores: the library's products
    assert family.predict_forward(Shape(4096, 4096, 4096, 64), torch.float32, H100).variant == "gemms"
