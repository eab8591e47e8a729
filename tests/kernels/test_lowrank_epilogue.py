"""The low-rank linear with an epilogue: its kernels in the interpreter, and its operators."""

from __future__ import annotations

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
from lrcompile.kernels import epilogue, launch
from lrcompile.kernels import lowrank_epilogue as family
from lrcompile.kernels.epilogue import KINDS
from lrcompile.kernels.launch import Tile
from lrcompile.kernels.lowrank_epilogue import lowrank_epilogue, lowrank_epilogue_backward
from lrcompile.kernels.lowrank_linear import Shape

from .lowrank_cases import Case
from .numbers import assert_as_good, assert_same

H100 = cost.find_device("NVIDIA H100 80GB HBM3", "sm_90")
assert H100 is not None
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Tile(16, 16, 16)

sizes = st.sampled_from([1, 16, 23, 48])
cases = st.builds(
    Case,
    tokens=st.sampled_from([1, 15, 16, 17]),
    in_features=sizes,
    out_features=sizes,
    rank=st.sampled_from([1, 3, 20]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    layout=st.sampled_from(["plain", "columns", "transposed", "batched"]),
    scale=st.sampled_from([1.0, 2.0**12]),
    seed=st.integers(0, 1000),
)
kinds = st.sampled_from(sorted(KINDS))
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def operands(case: Case, kind: str, wide: bool = False) -> tuple[dict[str, Tensor | None], Tensor]:
    """x, a, b, bias and other, by name, and the gradient of the output; `wide`: other is in fp32."""
    x, a, b, bias, dy = case.operands()
    generator = torch.Generator().manual_seed(case.seed + 1)
    other = torch.randn(dy.shape, generator=generator).to(torch.float32 if wide else case.dtype)
    joined = KINDS[kind].join != ""
    return {"x": x, "a": a, "b": b, "bias": bias, "other": other if joined else None}, dy


def gradients(op, given: dict[str, Tensor | None], kind: str, dy: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of all operands, by name."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in given.items()}
    y = op(leaves["x"], leaves["a"], leaves["b"], leaves["bias"], kind, leaves["other"])
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(y, list(wanted.values()), dy.reshape(y.shape).to(y.dtype))
    return {"y": y.detach(), **{f"gradient of {name}": g for name, g in zip(wanted, found, strict=True)}}


def check(case: Case, kind: str, wide: bool = False) -> None:
    """Output and gradients of the operator against fp64, measured by those of the unfused sequence."""
    given, dy = operands(case, kind, wide)
    exact = gradients(family.reference, {n: None if t is None else t.double() for n, t in given.items()}, kind, dy)
    theirs, ours = (gradients(op, given, kind, dy) for op in (family.reference, lowrank_epilogue))
    for name in exact:
        assert_as_good(ours[name], theirs[name], exact[name], f"{name} of {kind}, {case}", independent=True)


@pytest.fixture(scope="module")
def kernels(interpreter: None):
    from lrcompile.kernels import lowrank_epilogue_triton, lowrank_linear_triton

    return lowrank_linear_triton, lowrank_epilogue_triton


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch, interpreter: None) -> Iterator[None]:
    """Operators take the CPU, where the interpreter runs the kernels, for an H100."""
    monkeypatch.setattr(launch, "describe", lambda device: H100)
    torch.set_float32_matmul_precision("high")  # the table has tiles for tf32; the interpreter computes fp32
    yield
    torch.set_float32_matmul_precision("highest")


@few
@given(cases, kinds, st.booleans(), st.sampled_from([1, 2]))
def test_forward_kernels(kernels, case: Case, kind: str, wide: bool, splits: int):
    operand, _ = operands(case, kind, wide)
    operand = {n: t if t is None or n not in ("x", "other") else launch.rows(t) for n, t in operand.items()}
    x, a, b, bias, other = operand.values()
    exact = family.reference(*(None if t is None else t.double() for t in (x, a, b, bias)), kind,
                             None if other is None else other.double())  # fmt: skip
    theirs = family.reference(x, a, b, bias, kind, other)
    ways = [kernels[0].fused]
    if case.tokens <= 16:
        ways.append(kernels[0].narrow)
    for way in ways:
        y, _ = way(x, a, b, bias, SMALL, splits, epilogue=KINDS[kind], other=other)
        assert_as_good(y, theirs, exact, f"{way.__name__} of {kind}, {case}", independent=True)


@few
@given(cases, kinds.filter(lambda kind: KINDS[kind].needs_z), st.booleans(), st.sampled_from([1, 2]))
def test_gradient_kernel(kernels, case: Case, kind: str, wide: bool, splits: int):
    operand, dy = operands(case, kind, wide)
    x, other, dy = (None if t is None else launch.rows(t) for t in (operand["x"], operand["other"], dy))
    a, b, bias, what = operand["a"], operand["b"], operand["bias"], KINDS[kind]
    z = family.lowrank_linear.reference(x, a, b, bias)
    exact_h = x.double() @ a.double().t()
    exact_z = exact_h @ b.double().t() + (0 if bias is None else bias.double())
    exact = epilogue.gradients(what, dy.double(), exact_z, None if other is None else other.double())
    theirs = epilogue.gradients(what, dy, z, other)
    found = kernels[1].gradient(dy, x, a, b, bias, what, other, (True, True), SMALL, splits)
    for name, got, unfused, right in zip(("dz", "dother"), found, theirs, exact, strict=False):
        assert (got is None) == (right is None)
        if got is not None:
            assert_as_good(got, unfused, right, f"{name} of {kind}, {case}", independent=True)
    assert_as_good(found[2], x @ a.t(), exact_h, f"intermediate of {kind}, {case}", independent=True)


@pytest.mark.parametrize("variant", ["fused", "narrow", "gemms"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_operator_with_shipped_tiles(on_h100: None, kind: str, variant: str):
    again = "gemms" if variant == "gemms" else "fused"
    with launch.force(lowrank_epilogue=variant, lowrank_epilogue_backward=again, lowrank_linear_backward="gemms"):
        check(Case(13, 70, 99, 20, torch.bfloat16), kind)
        check(Case(10, 33, 48, 16, torch.float16, bias=False, layout="batched"), kind, wide=True)
        check(Case(3, 33, 65, 64, torch.float32, layout="transposed"), kind)


def note(shapes: list[tuple[int, ...]], tensor: Tensor) -> Tensor:
    shapes.append(tuple(tensor.shape))
    return tensor


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_only_what_a_gradient_needs_is_computed_and_saved(kind: str):
    given, dy = operands(Case(9, 24, 40, 5), kind)
    everything = gradients(family.reference, given, kind, dy)
    names = [name for name, t in given.items() if t is not None]
    for wanted in (["x"], ["a"], ["b"], ["bias"], names[-1:], ["x", names[-1]], names):
        leaves = {n: None if t is None else t.detach().requires_grad_(n in wanted) for n, t in given.items()}
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(note, shapes), lambda t: t):
            y = lowrank_epilogue(leaves["x"], leaves["a"], leaves["b"], leaves["bias"], kind, leaves["other"])
        assert shapes.count((9, 40)) == (KINDS[kind].join == "mul"), "other alone, never z"
        if kind == "add":
            assert ((9, 24) in shapes) == ("a" in wanted or "b" in wanted)
        y.backward(dy)
        for name in names:
            assert (leaves[name].grad is not None) == (name in wanted)
            if name in wanted:
                torch.testing.assert_close(leaves[name].grad, everything[f"gradient of {name}"])


@pytest.mark.parametrize(
    ("shape", "kind"),
    [*((shape, "gelu") for shape in [(4, 8), (0, 8), (1, 8), (2, 3, 8), (8,)])]
    + [(shape, kind) for shape in [(0, 8), (2, 3, 8)] for kind in ("mul_silu", "add")],
    ids=str,
)
def test_opcheck(shape: tuple[int, ...], kind: str):
    x, a, b, bias = (torch.randn(size) for size in (shape, (3, 8), (6, 3), (6,)))
    dy = torch.randn(*shape[:-1], 6)
    other = torch.randn(*shape[:-1], 6, dtype=torch.bfloat16) if KINDS[kind].join else None
    opcheck(lowrank_epilogue, (x, a, b, None, kind, other))
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, a, b, bias, other)]
    opcheck(lowrank_epilogue, (*leaves[:4], kind, leaves[4]))
    if KINDS[kind].needs_z:
        opcheck(lowrank_epilogue_backward, (dy, x, a, b, bias, kind, other, [True, other is not None]))
        opcheck(lowrank_epilogue_backward, (dy, x, a, b, None, kind, other, [other is None, other is not None]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "silu_mul", "mul_gelu_tanh", "add"])
def test_under_autocast_it_is_the_unfused_sequence(kind: str, compiled: bool):
    """F.linear is cast, arithmetic promotes: a residual stream in fp32 stays so."""
    given, dy = operands(Case(9, 24, 40, 5), kind)
    op = torch.compile(lowrank_epilogue, backend="aot_eager", fullgraph=True) if compiled else lowrank_epilogue
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (gradients(f, given, kind, dy) for f in (family.reference, op))
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert_same(found[name], expected[name], torch.bfloat16)


def test_compiles_whole_with_dynamic_shapes():
    given, _ = operands(Case(4, 8, 6, 3), "mul_silu")
    a, b = given["a"].requires_grad_(), given["b"].requires_grad_()
    graphs = []

    def model(x: Tensor, other: Tensor) -> Tensor:
        return lowrank_epilogue(lowrank_epilogue(x, a, b, None, "mul_silu", other) @ b @ a, a, b, None, "gelu", None)

    def counting(gm: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    for tokens in (5, 7, 11):
        x, other = torch.randn(tokens, 8, requires_grad=True), torch.randn(tokens, 6, requires_grad=True)
        found = torch.autograd.grad(compiled(x, other).square().sum(), (x, a, b, other))
        expected = torch.autograd.grad(model(x, other).square().sum(), (x, a, b, other))
        torch.testing.assert_close(found, expected)
    assert len(graphs) == 1


def test_what_does_not_fit_is_told():
    given, _ = operands(Case(9, 24, 40, 5), "add")
    x, a, b, bias, other = given.values()
    for kind, operand, message in (
        ("relu", None, "'relu' is none of gelu, "),
        ("gelu", other, "takes no other"),
        ("add", None, "needs an other"),
        ("add", other[0], r"\(40,\) torch.float32 on cpu; \(9, 40\) on cpu of one of"),
        ("add", other.long(), "of one of torch.float32"),
    ):
        with pytest.raises(KernelError, match=message):
            lowrank_epilogue(x, a, b, bias, kind, operand)


def test_the_model_follows_the_sizes():
    """What is known for certain: fusing saves a launch for a few tokens, traffic for many; erf is what it costs."""

    def both(tokens: int, kind: str, rank: int = 64) -> tuple[cost.Choice, cost.Choice]:
        shape, half = Shape(tokens, 4096, 14336, rank), torch.bfloat16
        other = half if KINDS[kind].join else None
        return tuple(f(shape, kind, half, H100, other) for f in (family.predict_forward, family.predict_backward))

    forward, backward = both(16384, "mul_silu")
    assert forward.variant == backward.variant == "fused"
    assert forward.gemms - forward.seconds > 16384 * 14336 * 2 / H100.bandwidth  # the write of z, or its read, at least
    assert both(1, "gelu", 128)[0].variant == "narrow" and both(1, "gelu", 128)[0].gain > 1
    assert both(16384, "gelu")[0].seconds > both(16384, "silu")[0].seconds
    assert both(16384, "silu", 1024)[0].variant == "gemms"
    assert both(16384, "add")[1].variant == "gemms"
    frozen = family.predict_backward(
        Shape(16384, 4096, 14336, 64), "mul", torch.bfloat16, H100, torch.bfloat16, (True, False, False, False, False)
    )
    assert frozen.variant == "gemms" and frozen.seconds == frozen.gemms  # it reads no z
