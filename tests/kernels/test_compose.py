"""The composed weight: values against fp64, gradients of the pair, and torch's own checks of the operator."""

from __future__ import annotations

import pytest
import torch

from lrcompile import KernelError
from lrcompile.kernels.compose import compose
from lrcompile.weights.formats import dequantise, format_of, quantise

from .numbers import assert_same

BASES = ["dense", "nf4", "nf4-nested", "fp4", "int8", "int8-bnb", "int4-32"]


def operands(base: str, pair: bool = True, dtype: torch.dtype = torch.float32):
    weight = torch.randn(48, 64, dtype=dtype)
    a, b = torch.randn(5, 64).requires_grad_(), torch.randn(48, 5).requires_grad_()
    if base == "dense":
        held, decoded, layout, group = [weight], weight, "dense", 0
    else:
        form = format_of(base)
        packed = quantise(form, weight)
        held, layout, group = [packed[k] for k in form.keys], form.layout, form.group
        decoded = dequantise(form, packed, (48, 64), dtype)
    return (held, layout, group, 64, dtype, a if pair else None, b if pair else None, 0.5), decoded


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(base: str, dtype: torch.dtype):
    args, decoded = operands(base, dtype=dtype)
    a, b = args[5], args[6]
    w = compose(*args)
    exact = decoded.double() + 0.5 * b.detach().double() @ a.detach().double()
    assert w.dtype == dtype
    assert_same(w.detach(), exact.to(dtype), dtype, roundings=2)  # sums of up to 64 terms: 1 seen
    g = torch.randn_like(w)
    da, db = torch.autograd.grad(w, (a, b), g)
    # Computed in w's dtype, into which the other side is rounded first.
    assert_same(da.to(dtype), (0.5 * b.detach().double().T @ g.double()).to(dtype), dtype, roundings=2)
    assert_same(db.to(dtype), (0.5 * g.double() @ a.detach().double().T).to(dtype), dtype, roundings=2)
    alone, decoded = operands(base, pair=False, dtype=dtype)
    assert torch.equal(compose(*alone), decoded)


def test_a_dense_base_gets_a_gradient_where_it_wants_one():
    args, _ = operands("dense")
    base = args[0][0].requires_grad_()
    g = torch.randn(48, 64)
    (found,) = torch.autograd.grad(compose(*args), base, g)
    assert torch.equal(found, g)


@pytest.mark.parametrize("base", BASES)
def test_opcheck(base: str):
    torch.library.opcheck(compose, operands(base)[0])
    torch.library.opcheck(compose, operands(base, pair=False)[0])


def test_operands_that_do_not_fit():
    (held, *rest), _ = operands("nf4")
    with pytest.raises(KernelError, match="compose: a nf4 base of 64 columns"):
        compose(held[:1], *rest)
    rest[4] = torch.randn(5, 60)
    with pytest.raises(KernelError, match="don't fit a base of"):
        compose(held, *rest)
