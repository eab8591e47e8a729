"""stub until merged"""

from dataclasses import dataclass
from typing import Any
import torch
from lrcompile.weights.factor import svd_pair, singular_values
from lrcompile.weights.formats import quantise, dequantise


@dataclass
class Start:
    weight_a: Any
    weight_b: Any
    packed: Any
    base: Any
    error: float
    output_error: Any = None


def initialise(
    weight,
    *,
    rank,
    init,
    base=None,
    dense_base=False,
    scale=1.0,
    pair_dtype=None,
    covariance=None,
    svd="auto",
    alternations=5,
    name="weight",
):
    pd = pair_dtype or weight.dtype
    if base is None and not dense_base:
        p = svd_pair(weight, rank, svd, name)
        return Start(p.weight_a, p.weight_b, None, None, p.error)
    a = b = None
    rest = weight
    if rank:
        if init == "zero":
            a = torch.randn(rank, weight.shape[1]).to(pd)
            b = torch.zeros(weight.shape[0], rank, dtype=pd)
        else:
            p = svd_pair(weight.double(), rank, "full", name)
            a, b = (p.weight_a / scale**0.5).to(pd), (p.weight_b / scale**0.5).to(pd)
            rest = (weight.double() - scale * b.double() @ a.double()).to(weight.dtype)
    if dense_base:
        return Start(a, b, None, rest, 0.0)
    packed = quantise(base, rest.contiguous(), name)
    hat = dequantise(base, packed, tuple(weight.shape), weight.dtype).double()
    if rank:
        hat = hat + scale * b.double() @ a.double()
    return Start(a, b, packed, None, float((weight.double() - hat).norm() / weight.double().norm()))


def spectrum(weight, covariance=None):
    s = singular_values(weight) ** 2
    return s / s.sum()
