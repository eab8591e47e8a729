"""Devices, tiles and operands, as all kernel families take them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lrcompile import cost
from lrcompile.errors import KernelError
from lrcompile.kernels import launch
from lrcompile.kernels.launch import padded, rows, tuned

PROBE = """
import sys
sys.modules["triton"] = None  # as on a machine that has none
from lrcompile.kernels import lowrank_linear as family
import torch
x, a, b = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8), torch.randn(6, 3)
y = family.lowrank_linear(x, a, b, None)
y.sum().backward()
torch.testing.assert_close(y, family.reference(x, a, b))
"""


def test_the_operators_work_without_triton():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_families_do_not_import_triton():
    code = "import sys, lrcompile.weights.layers, lrcompile.kernels.lowrank_linear; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_padded_is_a_tile_side():
    assert [padded(size) for size in (1, 15, 16, 17, 64, 65)] == [16, 16, 16, 32, 64, 128]


def test_rows_keeps_views_and_makes_the_last_dimension_dense():
    x = torch.randn(4, 6, 10)
    assert rows(x).data_ptr() == x.data_ptr() and rows(x).shape == (24, 10)
    part = x[0, :, 2:7]
    assert rows(part).data_ptr() == part.data_ptr() and rows(part).stride() == (10, 1)
    assert rows(x[0].t()).is_contiguous() and torch.equal(rows(x[0].t()), x[0].t())
    assert rows(torch.ones(1).expand(3, 4)).stride(1) == 1
    far = torch.empty(2, 1 << 24)[:, :4]  # steps between rows that 32-bit offsets in a tile can't hold
    assert rows(far).is_contiguous()
    for shape in ((0, 5), (3, 0), (5,), (2, 0, 5)):
        assert rows(torch.empty(shape)).shape == (
            torch.empty(shape).numel() // shape[-1] if shape[-1] else 3,
            shape[-1],
        )


def test_tiles_are_the_first_that_fit():
    chosen = {rank: tuned("lowrank_linear", "fused", "sm_90", "half", rank=rank) for rank in (8, 64, 65, 256, 257)}
    table = [row for row in launch.table("lowrank_linear")["fused"] if "sm_90" in row["arch"]]
    by_limit = {row["up_to"]["rank"]: launch.Tile(**row["tile"]) for row in table if row["precision"] == "half"}
    assert chosen[8] == chosen[64] == by_limit[64]
    assert chosen[65] == by_limit[128] and chosen[256] == by_limit[256] and chosen[257] is None
    assert tuned("lowrank_linear", "fused", "sm_90", "single", rank=8) is None
    assert tuned("lowrank_linear", "fused", "sm_70", "half", rank=8) is None


def test_fp32_is_tf32_only_where_torch_allows_it():
    assert launch.precision(torch.bfloat16) == launch.precision(torch.float16) == "half"
    assert launch.precision(torch.float32) == "single" and launch.input_precision(torch.float32) == "ieee"
    try:
        for allow in (
            lambda: torch.set_float32_matmul_precision("high"),
            lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        ):
            allow()
            assert launch.precision(torch.float32) == "tf32" and launch.input_precision(torch.float32) == "tf32"
            torch.set_float32_matmul_precision("highest")
            assert launch.precision(torch.float32) == "single"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_force_ends_with_its_block():
    x = torch.ones(2, 2)

    def predict(device: cost.Device) -> cost.Choice:
        return cost.Choice("fused", 1.0, 2.0)

    device, op = cost.DEVICES[0], "lowrank_linear"
    assert launch.pick(op, x, device, predict) == "fused"
    assert launch.pick(op, x, None, predict) == launch.pick(op, x[:0], device, predict) == "gemms"
    with launch.force(lowrank_linear="narrow"):
        with launch.force(lowrank_linear="gemms", lowrank_group="fused"):
            assert launch.pick(op, x, device, predict) == "gemms"
        assert launch.pick(op, x, device, predict) == "narrow"
    with pytest.raises(ValueError), launch.force(lowrank_linear="narrow"):
        raise ValueError
    assert launch.pick(op, x, device, predict) == "fused"


def test_forcing_what_there_is_not_is_told():
    for wrong in ({"lowrank_lin": "fused"}, {"lowrank_linear": "shared"}):
        with pytest.raises(KernelError, match="names nothing; there are lowrank_linear: fused, narrow, gemms;"):
            launch.force(**wrong).__enter__()
    x = torch.ones(2, 2, dtype=torch.float64)
    with launch.force(quant_linear="fused"), pytest.raises(KernelError, match="not for torch.float64; force 'gemms'"):
        launch.pick("quant_linear", x, cost.DEVICES[0], lambda device: cost.Choice("fused", 1.0, 2.0))


def test_the_cpu_has_no_kernels():
    assert launch.describe(torch.device("cpu")) is None
