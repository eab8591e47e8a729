"""The quantised linear, alone and with a pair beside it: kernels in the interpreter, and operators."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from lrcompile import cost
from lrcompile.errors import KernelError
from lrcompile.kernels import launch
from lrcompile.kernels import quant_linear as family
from lrcompile.kernels.launch import Tile
from lrcompile.kernels.quant_linear import Shape, quant_linear, quant_linear_backward
from lrcompile.kernels.quant_lowrank_linear import quant_lowrank_linear, quant_lowrank_linear_backward

from .numbers import assert_as_good, assert_same
from .quant_cases import FORMATS, Case, quantised

H100 = cost.find_device("NVIDIA H100 80GB HBM3", "sm_90")
assert H100 is not None
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

cases = st.builds(
    Case,
    form=st.sampled_from(FORMATS),
    tokens=st.sampled_from([1, 3, 16, 17, 40]),
    in_features=st.sampled_from([64, 96, 160, 192]),
    out_features=st.sampled_from([33, 48, 70]),  # enough numbers for an RMS to mean something
    rank=st.sampled_from([1, 16, 37, 70]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    layout=st.sampled_from(["plain", "columns", "transposed", "batched"]),
    scale=st.sampled_from([1.0, 2.0**12]),
    seed=st.integers(0, 1000),
)
few = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def unfused(x: Tensor, dense: Tensor, a: Tensor | None, b: Tensor | None, factor: float, bias: Tensor | None) -> Tensor:
    """What torch computes from the decoded weight, in the dtype of the operands."""
    y = F.linear(x, dense, bias)
    return y if a is None or b is None else y + factor * F.linear(F.linear(x, a), b)


def gradients(function, leaves: dict[str, Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of all leaves, by name."""
    given = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    y = function(*(given.get(name) for name in leaves))
    found = torch.autograd.grad(y, list(given.values()), dy.reshape(y.shape))
    return {"y": y.detach(), **{f"gradient of {name}": grad for name, grad in zip(given, found, strict=True)}}


def check(case: Case, pair: bool, device: str = "cpu") -> None:
    """The operator's output and gradients against fp64, measured by torch's own in the case's dtype."""
    x, weight, a, b, bias, dy = case.operands(device)
    k, factor = case.in_features, 0.5
    leaves = {"x": x, "a": a if pair else None, "b": b if pair else None, "bias": bias}
    wide = {name: None if leaf is None else leaf.detach().double() for name, leaf in leaves.items()}

    def plain(dense: Tensor, x: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None) -> Tensor:
        return unfused(x, dense, a, b, factor, bias)

    def ours(x: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None) -> Tensor:
        if a is None:
            return quant_linear(x, *weight, bias)
        return quant_lowrank_linear(x, *weight, a, b, factor, bias)

    exact = gradients(functools.partial(plain, weight.values(k, torch.float64)), wide, dy.double())
    theirs = gradients(functools.partial(plain, weight.values(k, case.dtype)), leaves, dy)
    for name, found in gradients(ours, leaves, dy).items():
        assert_as_good(found, theirs[name], exact[name].cpu(), f"{name} of {case}, pair: {pair}")


@pytest.fixture(scope="module")
def kernels(interpreter: None):
    from lrcompile.kernels import quant_linear_triton

    return quant_linear_triton


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch, interpreter: None) -> None:
    """Operators take the CPU, where the interpreter runs the kernels, for an H100."""
    monkeypatch.setattr(launch, "describe", lambda device: H100)


@few
@given(cases, st.sampled_from([1, 3]), st.booleans(), st.sampled_from([Tile(16, 16, 32), Tile(16, 32, 64)]))
def test_forward_kernel(kernels, case: Case, splits: int, pair: bool, tile: Tile):
    x, weight, a, b, bias, _ = case.operands()
    x, k = launch.rows(x), case.in_features
    exact = unfused(*(None if t is None else t.double() for t in (x, weight.values(k, torch.float64))),
                    *((a.double(), b.double()) if pair else (None, None)), 0.5,
                    None if bias is None else bias.double())  # fmt: skip
    theirs = unfused(x, weight.values(k, case.dtype), a if pair else None, b if pair else None, 0.5, bias)
    y = kernels.forward(x, *weight, bias, tile, splits, kernels.Pair(x @ a.t(), b, 0.5) if pair else None)
    assert_as_good(y, theirs, exact, f"{case}, pair: {pair}")


@few
@given(cases, st.booleans(), st.sampled_from([Tile(16, 16, 32), Tile(16, 32, 64)]))
def test_backward_kernel(kernels, case: Case, pair: bool, tile: Tile):
    _, weight, a, b, _, dy = case.operands()
    dy, k = launch.rows(dy), case.in_features
    exact, theirs = dy.double() @ weight.values(k, torch.float64), dy @ weight.values(k, case.dtype)
    if pair:
        exact, theirs = exact + 0.5 * (dy.double() @ b.double() @ a.double()), theirs + 0.5 * (dy @ b @ a)
    dx = kernels.backward(dy, *weight, k, tile, kernels.Pair(dy @ b, a, 0.5) if pair else None)
    assert_as_good(dx, theirs, exact, f"{case}, pair: {pair}")


def test_every_block_has_its_program(kernels):
    """More blocks of tokens than neighbouring programs cover, the last stripe and the last blocks unfilled."""
    x, weight, _, _, bias, dy = Case("int8", 16 * 19 - 3, 64, 70, dtype=torch.bfloat16).operands()
    y = kernels.forward(x, *weight, bias, Tile(16, 16, 64))
    assert_same(y, F.linear(x, weight.values(64, x.dtype), bias), torch.bfloat16)
    dx = kernels.backward(dy, *weight, 64, Tile(16, 16, 32))
    assert_same(dx, dy @ weight.values(64, x.dtype), torch.bfloat16)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("variant", ["fused", "gemms"])
@pytest.mark.parametrize("form", FORMATS)
def test_the_operators_with_shipped_tiles(on_h100: None, form: str, variant: str, pair: bool):
    names = ["quant_linear", "quant_linear_backward", "quant_lowrank_linear", "quant_lowrank_linear_backward"]
    with launch.force(**dict.fromkeys(names, variant)):
        check(Case(form, 3, 384, 70, dtype=torch.bfloat16), pair)
        check(Case(form, 20, 128, 96, dtype=torch.float16, layout="transposed", bias=False), pair)


def test_a_row_not_in_whole_groups(on_h100: None):
    with launch.force(quant_linear="fused", quant_linear_backward="fused"):
        check(Case("nf4-nested", 5, 100, 33, dtype=torch.bfloat16, layout="batched"), pair=False)


@pytest.mark.parametrize("tokens", [16, 64, 65])
def test_each_regime_has_its_tile(on_h100: None, tokens: int):
    with launch.force(quant_lowrank_linear="fused", quant_lowrank_linear_backward="fused"):
        check(Case("int4-32", tokens, 256, 40, dtype=torch.bfloat16), pair=True)


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_cpu_decodes_and_multiplies(tokens: int, dtype: torch.dtype):
    x, weight, a, b, bias, _ = Case("int8-32", tokens, 64, 48, dtype=torch.float32).operands()
    x, a, b, bias = (t.to(dtype) for t in (x, a, b, bias))
    dense = weight.values(64, dtype)
    assert torch.equal(quant_linear(x, *weight, bias), F.linear(x, dense, bias))
    found = quant_lowrank_linear(x, *weight, a, b, 2.0, bias)
    assert_same(found, unfused(x, dense, a, b, 2.0, bias), dtype, roundings=2)


@pytest.mark.parametrize(
    ("form", "shape"),
    [("nf4-32-nested", shape) for shape in ((4, 64), (0, 64), (1, 64), (2, 3, 64), (64,))]
    + [(form, (2, 3, 64)) for form in ("int4-32", "int8", "int8-bnb")],
)
def test_opcheck(form: str, shape: tuple[int, ...]):
    weight = quantised(form, torch.randn(48, 64))
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 48)
    a, b, bias = (torch.randn(size, requires_grad=True) for size in ((5, 64), (48, 5), (48,)))
    opcheck(quant_linear, (x, *weight, bias))
    opcheck(quant_linear, (x.detach(), *weight, None))
    opcheck(quant_linear_backward, (dy, *weight, 64))
    opcheck(quant_lowrank_linear, (x, *weight, a, b, 0.5, bias))
    opcheck(quant_lowrank_linear, (x, *weight, a.detach(), b, 0.5, None))
    plain = [t.detach() for t in (x, a, b)]
    backward = (dy, plain[0], *weight, *plain[1:], 0.5)
    opcheck(quant_lowrank_linear_backward, (*backward, [True, False, True]))
    opcheck(quant_lowrank_linear_backward, (dy, None, *backward[2:], [True, False, False]))


def test_only_what_a_gradient_needs_is_computed_and_saved():
    x, weight, a, b, bias, dy = Case("nf4", 9, 64, 40).operands()
    full = {"x": x, "a": a, "b": b, "bias": bias}
    everything = gradients(lambda x, a, b, bias: unfused(x, weight.values(64, x.dtype), a, b, 0.5, bias), full, dy)
    for wanted in (["x"], ["a"], ["b"], ["bias"], ["x", "bias"], ["a", "b"], ["x", "a", "b", "bias"]):
        leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in full.items()}
        shapes: list[tuple[int, ...]] = []

        def note(tensor: Tensor, shapes: list[tuple[int, ...]] = shapes) -> Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = quant_lowrank_linear(leaves["x"], *weight, leaves["a"], leaves["b"], 0.5, leaves["bias"])
        assert (tuple(x.shape) in shapes) == bool({"a", "b"} & set(wanted))
        assert not {(9, 5), (9, 40), (40, 64)} & set(shapes), "nothing dense, nothing that can be computed again"
        y.backward(dy)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in wanted)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, everything[f"gradient of {name}"])


def test_compiles_whole_with_dynamic_shapes_and_checkpointing():
    _, weight, a, b, _, _ = Case("nf4-32-nested", 1, 64, 64).operands()
    a, b = a.requires_grad_(), b.requires_grad_()
    graphs = []

    def block(x: Tensor) -> Tensor:
        return quant_linear(quant_lowrank_linear(x, *weight, a, b, 0.5, None).relu(), *weight, None)

    def counting(gm: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    def model(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    for tokens in (6, 7, 11):  # not 5: sizes that are equal at first are taken to stay so, and the rank is 5
        x = torch.randn(tokens, 64, requires_grad=True)
        found = torch.autograd.grad(compiled(x).square().sum(), (x, a, b))
        expected = torch.autograd.grad(block(x).square().sum(), (x, a, b))
        torch.testing.assert_close(found, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(dtype: torch.dtype, compiled: bool):
    x, weight, a, b, bias, dy = Case("int4-32", 9, 64, 40).operands()

    def ours(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return quant_lowrank_linear(x, *weight, a, b, 0.5, bias) + quant_linear(x, *weight, None)

    def plain(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return unfused(x, weight.values(64, torch.float32), a, b, 0.5, bias) + F.linear(x, weight.values(64, dtype))

    run = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    leaves = {"x": x, "a": a, "b": b, "bias": bias}
    with torch.autocast("cpu", dtype):
        expected = gradients(plain, leaves, dy.to(dtype))
        found = gradients(run, leaves, dy.to(dtype))
    assert found["y"].dtype == dtype and found["gradient of a"].dtype == torch.float32
    assert_same(found, expected, dtype)


def test_what_does_not_fit_is_told(on_h100: None):
    x, weight, a, b, bias, _ = Case("int8-32", 9, 64, 40).operands()
    packed, layout, group = weight
    for wrong, message in (
        (
            (x[:, 1:], packed, layout, group, bias),
            r"x \(9, 63\) and an int8 weight in groups of 32: .*groups divide its columns",
        ),
        ((x, packed, "int5", group, bias), "there is no such layout; known: nf4"),
        ((x, packed[:1], layout, group, bias), "held in 2 tensors, not 1"),
        ((x, packed, layout, 64, bias), r"tensor 1 is \(40, 2\) torch.float32, where \(40, 1\) torch.float32 belongs"),
        ((x, [packed[0].float(), packed[1]], layout, group, bias), "torch.float32, where .* torch.int8 belongs"),
        ((x, packed, layout, group, bias[1:]), r"bias \(39,\)"),
        ((x.half(), packed, layout, group, bias), "give both one dtype of"),
        ((x, [packed[0].to("meta"), packed[1]], layout, group, bias), "move them to one device"),
    ):
        with pytest.raises(KernelError, match=message):
            quant_linear(*wrong)
    with pytest.raises(KernelError, match=r"weight_a \(4, 64\) and weight_b \(40, 5\) don't fit a base of \(40, 64\)"):
        quant_lowrank_linear(x, *weight, a[1:], b, 1.0, bias)
    with pytest.raises(KernelError, match="one dtype and device"):
        quant_lowrank_linear(x, *weight, a.half(), b, 1.0, bias)
    with launch.force(quant_linear="fused"), pytest.raises(KernelError, match="'fused' implementation is not for"):
        quant_linear(x, *weight, bias)  # fp32 where torch doesn't allow tf32


def test_the_model_follows_the_sizes():
    def forward(tokens: int, form: str = "nf4", group: int = 64, rank: int = 0) -> cost.Choice:
        return family.predict_forward(Shape(tokens, 4096, 14336, form, group, rank=rank), torch.bfloat16, H100)

    for choice in (forward(1), forward(16), forward(1, "int4", 128), forward(1, "int8", 0)):
        assert choice.variant == "fused" and choice.gain > 2, "decoded to memory the weight would be read twice"
    assert forward(16384).variant == "gemms", "each block of tokens decodes the weight again"
    assert forward(1, rank=64).seconds > forward(1).seconds
    assert Shape(1, 4096, 64, "int8", 0).packed_bytes == 64 * 4096 + 64 * 4
    for form in FORMATS:
        packed, layout, group = quantised(form, torch.randn(64, 512, dtype=torch.bfloat16))
        shape = family.shape_of(1, 512, packed, layout, group)
        per_block = [t for t in packed if t.numel() != 256 and t.dim()]
        assert shape.packed_bytes == pytest.approx(sum(t.numel() * t.element_size() for t in per_block), rel=1e-2)
    assert family.predict_forward(Shape(1, 4096, 4096, "nf4", 64), torch.float32, H100).variant == "gemms"


COMPILE = """
import json, sys
from lrcompile.kernels import launch
from lrcompile.kernels.aot import compile_for
from lrcompile.kernels.quant_linear_triton import specimen

for layout, group in (("int4", 32), ("int8_row", 0)):
    for kernel, rows in launch.table("quant_linear").items():
        for row in rows:
            for arch in {"sm_80", "sm_90", "sm_120"} & set(row["arch"]):
                found = compile_for(arch, specimen(kernel, row, layout, group), launch.Tile(**row["tile"]))
                print(found.fits and found.tensor_cores, arch, layout, group, kernel, row["tile"], found)
"""


@pytest.mark.slow
@pytest.mark.important
def test_the_tiles_fit_for_the_other_formats_too():
    """The table's own check (test_aot.py) compiles for nf4 with nested scales."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [row for rows in launch.table("quant_linear").values() for row in rows]
    compiled = sum(len({"sm_80", "sm_90", "sm_120"} & set(row["arch"])) for row in rows)
    assert len(done.stdout.splitlines()) == 2 * compiled > 0
    assert [line for line in done.stdout.splitlines() if not line.startswith("True")] == []


# --- operands ---------------------------------------------------------------------------------------------------------


def _packed(layout: str) -> tuple[list[torch.Tensor], int]:
    """A (64, 128) matrix of random codes."""

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8)

    if layout == "nf4":
        return [codes(64 * 64, 1).view(torch.uint8), torch.rand(128) + 0.5], 64
    if layout == "nested":
        outer = [torch.rand(1), torch.linspace(-1, 1, 256), torch.tensor(0.3)]
        return [codes(64 * 64, 1).view(torch.uint8), codes(128).view(torch.uint8), *outer], 64
    if layout == "int8":
        return [codes(64, 128), torch.rand(64, 4)], 32
    if layout == "int8_row":
        return [codes(64, 128), torch.rand(64)], 0
    return [codes(64, 64), torch.rand(4, 64), torch.rand(4, 64)], 32


LAYOUTS = ["nf4", "nested", "int8", "int8_row", "int4"]


def _run(x: torch.Tensor, packed: list[torch.Tensor], layout: str, group: int) -> torch.Tensor:
    return torch.ops.lrcompile.quant_linear(x, packed, "nf4" if layout == "nested" else layout, group, None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_leaves_scales_as_they_are(layout: str) -> None:
    x, (packed, group) = torch.randn(3, 128), _packed(layout)
    with torch.autocast("cpu", torch.bfloat16):
        got = _run(x, packed, layout, group)
    assert torch.equal(got, _run(x.bfloat16(), packed, layout, group))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_tensors_of_any_strides(layout: str) -> None:
    x, (packed, group) = torch.randn(3, 128), _packed(layout)
    strided = [t if t.dim() == 0 else torch.stack((t, t), -1)[..., 0] for t in packed]
    assert not any(t.is_contiguous() for t in strided if t.numel() > 1)
    assert torch.equal(_run(x, strided, layout, group), _run(x, packed, layout, group))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrong", ["dtype", "size", "count", "group", "features", "scalar"])
def test_operands_that_do_not_fit_are_refused(layout: str, wrong: str) -> None:
    x, (packed, group) = torch.randn(3, 128), _packed(layout)
    if wrong == "dtype":
        packed[0] = packed[0].view(torch.int8 if packed[0].dtype == torch.uint8 else torch.uint8)
    elif wrong == "size":
        packed[-1] = torch.rand(7)
    elif wrong == "count":
        packed = packed[:-1]
    elif wrong == "group":
        group = 5 if layout == "int8_row" else 24
    elif wrong == "features":
        x = torch.randn(3, 100)
    else:
        x = torch.tensor(1.0)
    with pytest.raises(KernelError, match="quant_linear: x"):
        _run(x, packed, layout, group)


def test_a_result_may_be_written_to() -> None:
    packed, group = _packed("int8")
    for shape in ((3, 128), (2, 3, 128), (128,)):
        y = _run(torch.randn(shape, requires_grad=True), packed, "int8", group)
        y.add_(1).sum().backward()
