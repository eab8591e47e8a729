"""The quantised products on a GPU, by the operators with their shipped tiles: pytest -m gpu."""

from __future__ import annotations

import pytest
import torch

from lrcompile.kernels import launch
from lrcompile.kernels.quant_linear import quant_linear
from lrcompile.kernels.quant_lowrank_linear import quant_lowrank_linear

from .numbers import assert_same
from .quant_cases import FORMATS, Case, quantised
from .test_quant_linear import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
OPERATORS = ["quant_linear", "quant_linear_backward", "quant_lowrank_linear", "quant_lowrank_linear_backward"]


@pytest.fixture(autouse=True)
def _known_gpu():
    if launch.describe(torch.device("cuda")) is None:
        pytest.skip("our kernels don't run on this GPU, or there is no Triton")


@pytest.mark.parametrize("name", [*FORMATS, "nf4-256", "int8-128", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_decoded_values_are_the_references(name: str, dtype: torch.dtype):
    from lrcompile.kernels import decode_triton

    dense = (torch.randn(300, 768) * torch.logspace(-2, 1, 300)[:, None]).to(dtype)
    weight = quantised(name, dense, "cuda")
    assert torch.equal(decode_triton.dense(*weight, 768, dtype), weight.values(768, dtype))


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("variant", ["fused", "gemms", None])
@pytest.mark.parametrize("form", FORMATS)
def test_numbers(form: str, variant: str | None, pair: bool):
    for tokens, layout in ((1, "plain"), (13, "columns"), (60, "transposed"), (300, "batched")):
        case = Case(form, tokens, 1536, 520, rank=70, dtype=torch.bfloat16, layout=layout)
        with launch.force(**({} if variant is None else dict.fromkeys(OPERATORS, variant))):
            check(case, pair, "cuda")


def test_a_sum_split_over_the_inputs_is_the_same_every_time():
    x, weight, _, _, bias, _ = Case("nf4", 3, 8192, 512, dtype=torch.bfloat16).operands("cuda")
    with launch.force(quant_linear="fused"):
        first = quant_linear(x, *weight, bias)
        assert all(torch.equal(quant_linear(x, *weight, bias), first) for _ in range(20))


def test_cuda_graphs_and_inductor():
    x, weight, a, b, bias, dy = Case("nf4-nested", 64, 512, 384, rank=64, dtype=torch.bfloat16).operands("cuda")
    with launch.force(**dict.fromkeys(OPERATORS, "fused")):
        expected = quant_lowrank_linear(x, *weight, a, b, 0.5, bias)  # compiles the kernel, which a capture can't
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = quant_lowrank_linear(x, *weight, a, b, 0.5, bias)
        graph.replay()
        assert torch.equal(y, expected)
        leaves = [t.requires_grad_() for t in (x, a, b)]

        def step(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(quant_lowrank_linear(x, *weight, a, b, 0.5, bias))

        found = torch.autograd.grad(torch.compile(step, fullgraph=True)(*leaves), leaves, dy)
        wanted = torch.autograd.grad(step(*leaves), leaves, dy)
    # Inductor keeps in fp32 what eager rounds to bf16 between operators, once before GELU and once after.
    assert_same(found, wanted, torch.bfloat16, roundings=2)
