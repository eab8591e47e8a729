"""Decoding inside a kernel gives the values that the plain-torch reference gives, bit for bit."""

from __future__ import annotations

import pytest
import torch

from lrcompile.kernels import decode
from lrcompile.weights.formats import format_of, quantise

from .quant_cases import FORMATS, Weight, quantised

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def dense(interpreter: None):
    from lrcompile.kernels.decode_triton import dense

    return dense


def rows_of_all_sizes(out: int, inner: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(out, inner) * torch.logspace(-2, 1, out)[:, None]).to(dtype)


def same(dense, weight: Weight, inner: int, dtype: torch.dtype) -> None:
    found = dense(*weight, inner, dtype)
    assert found.dtype == dtype and torch.equal(found, weight.values(inner, dtype))


# Groups that hold several tiles and tiles that hold several groups; rows shorter and longer than a tile.
@pytest.mark.parametrize("name", [*FORMATS, "nf4-256", "fp4-128-nested", "int8-128", "int4", "int4-256"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_format(dense, name: str, dtype: torch.dtype):
    for out, inner in ((33, 256), (5, 768)):
        weight = quantised(name, rows_of_all_sizes(out, inner, dtype))
        for wanted in (dtype, torch.float32):
            same(dense, weight, inner, wanted)


@pytest.mark.parametrize("name", ["nf4", "nf4-nested", "fp4-512", "int8", "int8-bnb"])
@pytest.mark.parametrize("inner", [100, 66, 34])
def test_rows_that_end_inside_a_group_or_a_word(dense, name: str, inner: int):
    same(dense, quantised(name, rows_of_all_sizes(17, inner, torch.bfloat16)), inner, torch.bfloat16)


def test_codes_that_start_inside_a_word(dense):
    weight = quantised("int4-32", rows_of_all_sizes(17, 64, torch.float32))
    moved = torch.empty(weight.packed[0].numel() + 1, dtype=torch.int8)[1:].view_as(weight.packed[0])
    moved.copy_(weight.packed[0])
    same(dense, weight._replace(packed=[moved, *weight.packed[1:]]), 64, torch.float32)


def test_every_code(dense):
    """All bytes there are, at scales where rounding to the dtype matters."""
    codes = torch.arange(256, dtype=torch.uint8)
    for layout in ("nf4", "fp4"):
        weight = Weight([codes.view(-1, 1), torch.rand(8) + 0.5], layout, 64)
        for dtype in DTYPES:
            same(dense, weight, 64, dtype)
    signed = codes.view(torch.int8).view(4, 64)
    same(dense, Weight([signed, torch.rand(4, 1)], "int8", 0), 64, torch.bfloat16)
    scale, zero = torch.rand(4, 4).half(), torch.randn(4, 4).half()
    same(dense, Weight([signed, scale, zero], "int4", 32), 128, torch.float16)


def test_the_tables_are_the_libraries_own():
    functional = pytest.importorskip("bitsandbytes").functional
    cpu = torch.device("cpu")
    for layout in ("nf4", "fp4"):
        assert torch.equal(decode.code_table(layout, cpu), functional.get_4bit_type(layout, device="cpu"))


def test_the_rows_are_known_from_the_packed_tensors():
    for name in FORMATS:
        form = format_of(name)
        packed = list(quantise(form, torch.randn(6, 64)).values())
        assert decode.out_features(packed, form.layout, 64) == 6
