"""A pair with both factors quantised."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from lrcompile import cost
from lrcompile.kernels import launch
from lrcompile.kernels import lowrank_quant_linear as family
from lrcompile.kernels.lowrank_quant_linear import lowrank_quant_linear
from lrcompile.kernels.quant_linear import Shape, predict_forward

from .numbers import assert_as_good
from .quant_cases import quantised

H100 = cost.find_device("NVIDIA H100 80GB HBM3", "sm_90")
assert H100 is not None
FORMATS = [("nf4", "nf4"), ("int8", "int8"), ("int4-32", "int4-32"), ("int4-32", "int8-bnb")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("form_a", "form_b"), FORMATS)
def test_numbers(interpreter: None, monkeypatch: pytest.MonkeyPatch, form_a: str, form_b: str, dtype: torch.dtype):
    x, bias, dy = (torch.randn(size).to(dtype) for size in ((7, 192), (70,), (7, 70)))
    a = quantised(form_a, (torch.randn(64, 192) / 14).to(dtype))
    b = quantised(form_b, (torch.randn(70, 64) / 8).to(dtype))
    if dtype != torch.float32:
        monkeypatch.setattr(launch, "describe", lambda device: H100)
    x.requires_grad_()
    with launch.force(
        **({} if dtype == torch.float32 else {"quant_linear": "fused", "quant_linear_backward": "fused"})
    ):
        y = lowrank_quant_linear(x, *a, *b, bias)
        (dx,) = torch.autograd.grad(y, x, dy)
    x = x.detach()
    plain_a, plain_b = a.values(192, dtype), b.values(64, dtype)
    wide_a, wide_b = a.values(192, torch.float64), b.values(64, torch.float64)
    exact = F.linear(F.linear(x.double(), wide_a), wide_b, bias.double())
    assert_as_good(y.detach(), family.reference(x, *a, *b, bias), exact)
    assert_as_good(dx, dy @ plain_b @ plain_a, dy.double() @ wide_b @ wide_a)


@pytest.mark.parametrize("shape", [(4, 64), (0, 64), (2, 3, 64)], ids=str)
def test_opcheck(shape: tuple[int, ...]):
    a, b = quantised("nf4-32-nested", torch.randn(32, 64)), quantised("int4-32", torch.randn(48, 32))
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(48, requires_grad=True)
    opcheck(lowrank_quant_linear, (x, *a, *b, bias))
    opcheck(lowrank_quant_linear, (x.detach(), *a, *b, None))


def test_the_model_adds_both_products():
    narrow, wide = Shape(1, 4096, 128, "int4", 128), Shape(1, 4096, 14336, "int4", 128)
    both = [predict_forward(shape, torch.bfloat16, H100) for shape in (narrow, wide)]
    assert both[1].variant == "fused"
    choice = family.predict_forward(narrow, wide, torch.bfloat16, H100)
    assert choice.variant == "fused" and choice.seconds == both[0].seconds + both[1].seconds
    assert choice.gemms == both[0].gemms + both[1].gemms
