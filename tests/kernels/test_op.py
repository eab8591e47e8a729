"""What holds for every operator: whatever would be silently wrong is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from lrcompile.errors import KernelError
from lrcompile.kernels import (
    lowrank_epilogue,
    lowrank_group,
    lowrank_linear,
    lowrank_quant_linear,
    quant_linear,
    quant_lowrank_linear,
)

FLOAT8 = torch.float8_e4m3fn


def _int8(rows: int, columns: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    return [codes, torch.rand(rows, columns // 8, generator=generator)]


BASE, NARROW, WIDE = _int8(12, 16, 0), _int8(8, 16, 1), _int8(12, 8, 2)
A, B = torch.linspace(-1, 1, 48).view(3, 16), torch.linspace(1, -1, 36).view(12, 3)
OPS: dict[str, Callable[[Tensor], Any]] = {
    "lowrank_linear": lambda x: lowrank_linear.lowrank_linear(x, A.to(x), B.to(x), None),
    "lowrank_linear_keep": lambda x: lowrank_linear.lowrank_linear_keep(x, A.to(x), B.to(x), None)[0],
    "lowrank_group": lambda x: lowrank_group.lowrank_group(x, [A.to(x)] * 2, [B.to(x)] * 2, [])[1],
    "lowrank_epilogue": lambda x: lowrank_epilogue.lowrank_epilogue(x, A.to(x), B.to(x), None, "silu", None),
    "quant_linear": lambda x: quant_linear.quant_linear(x, BASE, "int8", 8, None),
    "quant_lowrank_linear": lambda x: quant_lowrank_linear.quant_lowrank_linear(
        x, BASE, "int8", 8, A.to(x), B.to(x), 0.5, None
    ),
    "lowrank_quant_linear": lambda x: lowrank_quant_linear.lowrank_quant_linear(
        x, NARROW, "int8", 8, WIDE, "int8", 8, None
    ),
}
every_op = pytest.mark.parametrize("name", OPS)


@every_op
def test_forward_mode_is_refused(name: str):
    op, x = OPS[name], torch.randn(4, 16)
    told = rf"lrcompile::{name} has no forward-mode derivative .*`reference` beside the operator"
    compiled = torch.compile(lambda x: torch.func.jvp(op, (x,), (x,)), backend="eager")
    with pytest.raises(KernelError, match=told):
        torch.func.jvp(op, (x,), (x,))
    with pytest.raises(RuntimeError, match=told):  # Dynamo's own, around ours
        compiled(x)
    with pytest.raises(KernelError, match=told), forward_ad.dual_level():
        op(forward_ad.make_dual(x, x))
    with pytest.raises(KernelError, match=told), torch.no_grad(), forward_ad.dual_level():
        op(forward_ad.make_dual(x, x))
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(op(x)).tangent is None


def test_forward_mode_over_a_backward_is_refused():
    x = torch.randn(4, 16, requires_grad=True)
    y = OPS["lowrank_linear"](x)
    with pytest.raises(KernelError, match="lowrank_linear_backward has no forward-mode"), forward_ad.dual_level():
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


@every_op
def test_transforms_of_torch_func_are_refused(name: str):
    op, x = OPS[name], torch.randn(4, 16)
    told = rf"lrcompile::{name} has no rule for torch.func .*use torch.autograd"
    for transform in (torch.func.grad, torch.func.hessian):
        with pytest.raises(KernelError, match=told):
            transform(lambda x: op(x).sum())(x)
    for transform in (torch.func.jacrev, lambda f: torch.vmap(torch.func.grad(lambda x: f(x).sum()))):
        with pytest.raises(KernelError, match=told):
            transform(op)(x)
    with pytest.raises(KernelError, match=told):
        torch.func.vjp(op, x)
    assert torch.func.vjp(lambda z: z * op(x), x.new_ones(4, 12))[0].shape == (4, 12)  # a constant of the transform


@every_op
def test_vmap_goes_slice_by_slice(name: str):
    op, x = OPS[name], torch.randn(4, 5, 16, requires_grad=True)
    with pytest.warns(UserWarning, match=rf"runs lrcompile::{name} once for each of 5 slices"):
        y = torch.vmap(op, in_dims=1, out_dims=1)(x)
    expected = op(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(result, x, dy, retain_graph=True)[0] for result in (y, expected))
    torch.testing.assert_close(found, wanted)
    with pytest.raises(KernelError, match="dimension of size 0"):
        torch.vmap(op)(x[:0])


def test_vmap_over_weights_in_a_list():
    x, a = torch.randn(4, 16), torch.randn(2, 3, 16)
    with pytest.warns(UserWarning, match="2 slices"):
        many = torch.vmap(lambda a: lowrank_group.lowrank_group(x, [a, A], [B, B], []))(a)
    for i in range(2):
        each = lowrank_group.lowrank_group(x, [a[i], A], [B, B], [])
        torch.testing.assert_close([t[i] for t in many], each)


@every_op
@pytest.mark.parametrize("dtype", [FLOAT8, torch.float8_e5m2, torch.int8, torch.int64, torch.bool, torch.complex64])
def test_dtypes_without_products_are_refused(name: str, dtype: torch.dtype):
    for x in (torch.ones(4, 16).to(dtype), torch.ones(4, 16, device="meta").to(dtype)):
        with pytest.raises(KernelError, match=rf"{dtype}.*torch.float32, torch.float16, torch.bfloat16, torch.float64"):
            OPS[name](x)


def test_other_operands_of_such_dtypes_are_refused():
    x, ones = torch.randn(4, 16), torch.ones(4, 12)
    for dtype in (FLOAT8, torch.int64):
        with pytest.raises(KernelError, match=f"other is .* {dtype} .*of one of torch.float32"):
            lowrank_epilogue.lowrank_epilogue(x, A, B, None, "add", ones.to(dtype))
    int4 = [torch.zeros(12, 8, dtype=torch.int8), *torch.ones(2, 2, 12).to(FLOAT8)]
    with pytest.raises(KernelError, match=f"scales and zero points are {FLOAT8}, none of torch.float32"):
        quant_linear.quant_linear(x, int4, "int4", 8, None)
    with pytest.raises(KernelError, match="two columns share a byte, and 15 is odd"):
        quant_linear.quant_linear(x[:, 1:], [int4[0], *torch.ones(2, 1, 12)], "int4", 15, None)


@pytest.mark.parametrize("name", ["quant_linear", "quant_lowrank_linear", "lowrank_quant_linear"])
def test_a_quantised_weight_that_wants_a_gradient_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    for which in ("BASE", "WIDE"):
        codes, scale = globals()[which]
        monkeypatch.setitem(globals(), which, [codes, scale.clone().requires_grad_()])
    with pytest.raises(KernelError, match=f"{name}: a quantised weight is frozen, .*detach it"):
        OPS[name](torch.randn(4, 16))
    with torch.no_grad():
        OPS[name](torch.randn(4, 16))


def test_a_factor_that_is_no_number_is_refused():
    for factor in (float("nan"), float("inf")):
        with pytest.raises(KernelError, match="give a finite one"):
            quant_lowrank_linear.quant_lowrank_linear(torch.randn(4, 16), BASE, "int8", 8, A, B, factor, None)


def test_a_backward_refuses_what_does_not_fit():
    x, dy = torch.randn(4, 16), torch.randn(4, 12)
    of_pair = [True, True, True, True]
    for wrong in (
        (dy[:, 1:], x, None, A, B, of_pair),
        (dy[1:], x, None, A, B, of_pair),
        (dy, x[:, 1:], None, A, B, of_pair),
        (dy, x, torch.randn(4, 9), A, B, of_pair),
    ):
        with pytest.raises(KernelError, match=r"lowrank_linear_backward: dY .* don't fit"):
            lowrank_linear.lowrank_linear_backward(*wrong)
    with pytest.raises(KernelError, match="give them one dtype"):
        lowrank_linear.lowrank_linear_backward(dy.half(), x, None, A, B, of_pair)
    with pytest.raises(KernelError, match="pair 1: dY"):
        lowrank_group.lowrank_group_backward([dy, dy[:, 1:]], x, [A, A], [B, B], True, [True] * 6)
    with pytest.raises(KernelError, match="2 dY, 1 weight_a"):
        lowrank_group.lowrank_group_backward([dy, dy], x, [A], [B], True, [True] * 3)
    with pytest.raises(KernelError, match="lowrank_epilogue_backward: dY"):
        lowrank_epilogue.lowrank_epilogue_backward(dy[1:], x, A, B, None, "silu", None, [True, False])
    for shape, columns, group in (((4, 11), 16, 8), ((4, 12), 15, 8), ((4, 12), 16, 4)):
        with pytest.raises(KernelError, match="quant_linear_backward: dY"):
            quant_linear.quant_linear_backward(torch.randn(shape), BASE, "int8", group, columns)
    with pytest.raises(KernelError, match="quant_lowrank_linear_backward: dY"):
        quant_lowrank_linear.quant_lowrank_linear_backward(dy[1:], x, BASE, "int8", 8, A, B, 1.0, [True, True, True])
