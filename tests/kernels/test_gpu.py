"""The same numbers on a GPU, by the operators with their shipped tiles: pytest -m gpu."""

from __future__ import annotations

import pytest
import torch

from lrcompile.kernels import launch
from lrcompile.kernels.lowrank_linear import lowrank_linear, lowrank_linear_keep

from .lowrank_cases import Case, Op, check, train, unfused
from .numbers import assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OPS = {"computed again": lowrank_linear, "kept": lambda *operands: lowrank_linear_keep(*operands)[0]}


@pytest.fixture(autouse=True)
def _known_gpu():
    if launch.describe(torch.device("cuda")) is None:
        pytest.skip("our kernels don't run on this GPU, or there is no Triton")


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("variant", ["fused", "narrow", "gemms", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_lowrank_linear(tf32: None, op: str, variant: str | None, dtype: torch.dtype):
    small = [Case(16, 512, 384, 256, dtype), Case(1, 1001, 77, 1024, dtype, bias=False), Case(7, 96, 130, 20, dtype)]
    large = [
        Case(1000, 512, 768, rank, dtype, layout=layout)
        for rank, layout in ((16, "plain"), (33, "columns"), (64, "transposed"), (128, "batched"), (256, "plain"))
    ]
    for case in small if variant == "narrow" else small[2:] + large:
        backward = "shared" if case.rank <= 64 and variant != "gemms" else "gemms"
        if variant is None:
            check(case, OPS[op], "cuda")
        else:
            with launch.force(lowrank_linear=variant, lowrank_linear_backward=backward):
                check(case, OPS[op], "cuda")


def test_offsets_beyond_32_bits():
    # 300,000 rows of 8,192 numbers are 2.46e9 numbers, more than 2^31, and 4.9 GB each way.
    x = torch.zeros(300_000, 8192, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1
    a = torch.full((16, 8192), 2.0**-13, dtype=torch.bfloat16, device="cuda")
    b = torch.full((8192, 16), 0.25, dtype=torch.bfloat16, device="cuda")
    with launch.force(lowrank_linear="fused"):
        y = lowrank_linear(x, a, b, None)
    assert bool((y[-1] == 4).all()) and not bool(y[:-1].any())


@pytest.mark.parametrize("op", OPS)
def test_training_goes_the_same_way(op: str):
    with launch.force(lowrank_linear="fused", lowrank_linear_backward="shared"):
        ours = train(OPS[op], torch.bfloat16, "cuda")
    theirs = train(unfused, torch.bfloat16, "cuda")
    assert theirs[-1] < 0.5 * theirs[0]
    # Both round to bf16, 2^-9 of a number at most, and a weight that went the other way once stays apart. The unfused losses
    # on a CPU are 6e-4 apart with the intermediate rounded or kept in fp32, and 2e-3 from a training in fp32 alone, which
    # bounds what rounding does here; 5 times that.
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_cuda_graphs(op: str):
    run: Op = OPS[op]
    x, a, b, bias, _ = Case(64, 512, 384, 64, torch.bfloat16).operands("cuda")
    with launch.force(lowrank_linear="fused"):
        expected = run(x, a, b, bias)  # compiles the kernel, which a capture can't
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(x, a, b, bias)
    graph.replay()
    assert torch.equal(y, expected)


def test_inductor_with_fullgraph():
    x, a, b, bias, dy = Case(300, 512, 384, 64, torch.bfloat16).operands("cuda")
    leaves = [t.requires_grad_() for t in (x, a, b, bias) if t is not None]

    def step(*operands: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(lowrank_linear(*operands))

    with launch.force(lowrank_linear="fused", lowrank_linear_backward="shared"):
        found = torch.autograd.grad(torch.compile(step, fullgraph=True)(*leaves), leaves, dy)
        expected = torch.autograd.grad(step(*leaves), leaves, dy)
    # Inductor keeps in fp32 what eager rounds to bf16 between operators, once before GELU and once after.
    assert_same(found, expected, torch.bfloat16, roundings=2)
