"""The rewrites of a traced program: what XNNPACK doesn't take is gone, and the values are the same to rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lrcompile.export.rewrite import rewrite

aten = torch.ops.aten


class Calls(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = (nn.Parameter(torch.randn(16)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight, self.bias)


def turned(x: torch.Tensor) -> torch.Tensor:
    return turned_by(x, 8)


def turned_by(x: torch.Tensor, half: int) -> torch.Tensor:
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def ops(program: torch.export.ExportedProgram) -> set[object]:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def traced(function: Callable[..., torch.Tensor]) -> torch.export.ExportedProgram:
    dynamic = ({1: torch.export.Dim("length", min=1, max=64)},)
    return torch.export.export(Calls(function), (torch.randn(1, 3, 16),), dynamic_shapes=dynamic, strict=False)


@pytest.mark.parametrize(
    ("function", "gone"),
    [
        (lambda x, w, b: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), {aten.mean.dim}),
        (lambda x, w, b: F.layer_norm(x, (16,), w, b, 1e-5), {aten.layer_norm.default}),
        (lambda x, w, b: F.layer_norm(x, (16,)), {aten.layer_norm.default}),
        (lambda x, w, b: turned(x) * w, {aten.slice.Tensor, aten.cat.default, aten.neg.default}),
        (lambda x, w, b: x.pow(3), {aten.pow.Tensor_Scalar}),
        (lambda x, w, b: x.view(1, x.shape[1], 4, 4).transpose(1, 2).transpose(1, 2), {aten.transpose.int}),
        (
            lambda x, w, b: x.view(1, x.shape[1], 2, 8).transpose(1, 2) + x.unsqueeze(1)[..., :8],
            {aten.unsqueeze.default},
        ),
    ],
    ids=["rms norm", "layer norm", "layer norm alone", "rotary", "cube", "there and back", "views"],
)
def test_the_same_in_other_operators(function: Callable[..., torch.Tensor], gone: set[object]) -> None:
    torch.manual_seed(0)
    program = traced(function)
    assert gone <= ops(program)
    inputs = [torch.randn(1, length, 16) for length in (1, 3, 40)]
    before = [program.module()(x) for x in inputs]
    rewrite(program)
    assert not gone & ops(program)
    symbolic = [
        n
        for n in program.graph.nodes
        if n.target is aten.view.default and any(isinstance(d, torch.fx.Node) for d in n.args[1])
    ]
    assert not symbolic
    # Two float32 steps of each number, which are up to 69; and where sums cancel two of their terms', up to 4. 4.8e-7, one of
    # those, was seen.
    for x, want in zip(inputs, before, strict=True):
        torch.testing.assert_close(program.module()(x), want, rtol=2.4e-7, atol=9.6e-7)


@pytest.mark.parametrize("epsilon", [None, 0.0, 1e-5, 0.5], ids=lambda e: f"epsilon {e}")
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_layer_norm_in_float64(weight: bool, bias: bool, epsilon: float | None) -> None:
    """epsilon None: not in the call, nor in the program, as where cuDNN is enabled and stands after it."""
    more = {} if epsilon is None else {"eps": epsilon}

    def norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(x, (16,), w if weight else None, b if bias else None, **more)

    check_norm(norm, {aten.layer_norm.default})


@pytest.mark.parametrize("epsilon", [None, 0.0, 1e-5, 0.5], ids=lambda e: f"epsilon {e}")
@pytest.mark.parametrize("spelling", ["rms_norm", "rms_norm alone", "pow", "square", "product"])
def test_rms_norm_in_float64(spelling: str, epsilon: float | None) -> None:
    tiny = torch.finfo(torch.float32).eps  # what None is in fp32

    def norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if spelling.startswith("rms_norm"):
            return F.rms_norm(x, (16,), None if spelling.endswith("alone") else w, epsilon)
        squares = {"pow": x.pow(2), "square": torch.square(x), "product": x * x}[spelling]
        return x / torch.sqrt(squares.mean(dim=-1, keepdim=True) + (tiny if epsilon is None else epsilon)) * w

    check_norm(norm, {aten.rms_norm.default, aten.mean.dim})


def check_norm(norm: Callable[..., torch.Tensor], gone: set[object]) -> None:
    torch.manual_seed(0)
    program = traced(norm)
    assert gone & ops(program)
    rewrite(program)
    assert not gone & ops(program)
    module, x = program.module(), torch.randn(1, 40, 16) * 0.3 + 1
    want = norm(x.double(), module.weight.double(), module.bias.double())
    # Outputs are up to 5.4, where float32 has steps of 4.8e-7: four of them; two were seen.
    torch.testing.assert_close(module(x).double(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: F.layer_norm(x.view(1, x.shape[1], 4, 4), (4, 4), w.view(4, 4), b.view(4, 4), 0.5),
        lambda x, w, b: F.layer_norm(x.transpose(1, 2), (x.shape[1],)),  # over the length
        lambda x, w, b: F.rms_norm(x.view(1, x.shape[1], 4, 4), (4, 4), w.view(4, 4), 0.5),
        lambda x, w, b: torch.mean(x, dim=None, keepdim=True) * w,
        lambda x, w, b: x.mean(-1, keepdim=True, dtype=torch.float64),
        lambda x, w, b: (8 * x).long().pow(3.0) * w,
        lambda x, w, b: x.view(1, x.shape[1], 4, 4).transpose(2, 3).reshape(1, x.shape[1], 16),  # a copy
        lambda x, w, b: torch.cat((-x[..., 7:15], x[..., :7]), dim=-1),
        lambda x, w, b: turned_by(x[..., :15] * 1, 7),  # its halves differ
        lambda x, w, b: torch.cat((-x[:, : x.shape[1]], x[:, : x.shape[1]]), dim=-1),  # rows, of no known number
        lambda x, w, b: x.mean(1, keepdim=True) * w,  # over the length
        lambda x, w, b: x.mean(-1),
        lambda x, w, b: torch.cat((-x[..., :8], x[..., 8:]), dim=-1),  # not turned
        lambda x, w, b: torch.cat((-x[..., 8:], 2 * x[..., :8]), dim=-1),
        lambda x, w, b: x.pow(4),
        lambda x, w, b: x.view(1, x.shape[1], 4, 4).transpose(1, 2).transpose(2, 3),
    ],
)
def test_what_is_something_else_stays(function: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    program = traced(function)
    x = torch.randn(1, 5, 16)
    want = program.module()(x)
    kept = ops(program) - {aten.view.default}
    rewrite(program)
    assert kept - {aten.sym_size.int} <= ops(program)
    torch.testing.assert_close(program.module()(x), want, rtol=0, atol=0)
