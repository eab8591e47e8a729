"""What the last pass chooses to compute each pair with, what it says of that, and that its operator computes the same."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import KernelError, Recipe, RecipeError
from lrcompile.cost import device_named
from lrcompile.passes.graphs import scopes

from .helpers import ALL, Stack, run
from .helpers_train import Model, batch, train
from .kernels.numbers import assert_same

KEEP = torch.ops.lrcompile.lowrank_linear_keep.default
OP = torch.ops.lrcompile.lowrank_linear.default


EPILOGUE = torch.ops.lrcompile.lowrank_epilogue.default


def plain() -> nn.Module:
    """Four linears and a head, and nothing between them that belongs to another pass."""
    blocks = (module for _ in "ab" for module in (nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh()))
    return nn.Sequential(*blocks, nn.Linear(32, 8))


def count(gm: torch.fx.GraphModule, op: object = OP) -> int:
    return sum(node.target is op for scope in scopes(gm) for node in scope.gm.graph.nodes)


def test_on_the_cpu_every_pair_stays_two_thin_linears() -> None:
    captured, _, stages = run(Stack(), (torch.randn(3, 32),), ALL, Recipe(rank=3))
    assert len(stages[-1].result.changed) == 4
    assert "blocks.0.up: two thin linears of rank 3 (cpu)" in stages[-1].result.changed
    assert count(captured.graphs[0].gm) == 0


def test_forced_the_operator_computes_the_same_with_its_gradients() -> None:
    """Translation validation of the pass, outputs and gradients."""
    report = lrcompile.inspect(plain(), (torch.randn(3, 32),), Recipe(rank=3), kernels="triton", verify=True)
    assert count(report["lower"].graph) == 4 and count(report["reassociate"].graph) == 0
    assert report["lower"].verified is not None and report["lower"].verified <= 1.0
    assert "0: lrcompile::lowrank_linear of rank 3 (kernels='triton')" in report["lower"].changed
    assert report["lower"].flops == report["reassociate"].flops > 0
    assert report["lower"].saved < report["reassociate"].saved, "x @ weight_aᵀ is not kept"
    assert "lowrank_linear" in report["lower"].diff()


@pytest.mark.parametrize("kernels", ["triton", "inductor"])
def test_training_with_the_operator_forced(kernels: str) -> None:
    model, ids = Model(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"kernels": kernels, "inner": "aot_eager"}
    losses = train(torch.compile(model, backend="lrcompile", options=options), optimizer, 8, ids)
    assert losses[-1] < 0.5 * losses[0]
    compiled = torch.compile(model, backend="lrcompile", options=options)(ids)
    torch.testing.assert_close(compiled, model(ids))


def test_inside_activation_checkpointing_too() -> None:
    model = Model(checkpointed=True)
    report = lrcompile.inspect(model, (batch(),), Recipe(rank=4), kernels="triton", verify=True)
    assert count(report["lower"].graph) + count(report["lower"].graph, EPILOGUE) == 6


@pytest.mark.parametrize("tokens", [1, 64, 16384])
def test_for_a_gpu_the_predicted_times_are_told_and_decide(tokens: int) -> None:
    """From shapes alone: the model lives on `meta`, the GPU nowhere."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16), nn.Tanh(), nn.Linear(4096, 8))
    x = torch.empty(tokens, 4096, dtype=torch.bfloat16)
    for trains in (True, False):
        report = lrcompile.inspect(
            nn.Sequential(*model[:2]).requires_grad_(trains), (x,), Recipe(rank=64, include=["0"]), target="H100"
        )
        (line,) = report["lower"].changed
        what, told = re.fullmatch(
            r"0: (.*) of rank 64 \(predicted for H100, forward(?: and backward)?: (.*)\)", line
        ).groups()  # type: ignore[union-attr]
        seconds = {name: float(time) for name, time in re.findall(r"([\w: ]+?) ([\d.e+]+) µs(?:, )?", told)}
        assert ("lrcompile::lowrank_linear_keep" in seconds) == trains, line
        fastest = min(seconds, key=lambda name: seconds[name])
        assert what in (fastest, "two thin linears"), line
        assert (what != "two thin linears") == (1.05 * seconds[fastest] < seconds["two thin linears"]), line
        ops = {n.target for n in report["lower"].graph.graph.nodes if n.op == "call_function"}
        assert (OP in ops or KEEP in ops) == (what != "two thin linears")


def test_all_ranks_decide_alike() -> None:
    """Two inspections of equal shapes say the same, word for word: nothing is timed."""
    made = [
        lrcompile.inspect(Stack(), (torch.randn(3, 32),), Recipe(rank=3), target="A100")["lower"].changed for _ in "ab"
    ]
    assert made[0] == made[1]


def test_bad_switches_list_the_known_ones() -> None:
    with pytest.raises(Exception, match="RecipeError: kernels=.cuda. is not known; choose from auto, triton, inductor"):
        torch.compile(Model(), backend="lrcompile", options={"kernels": "cuda"})(batch())
    with pytest.raises(RecipeError, match="kernels='cuda' is not known"):
        lrcompile.inspect(Stack(), (torch.randn(3, 32),), kernels="cuda")
    with pytest.raises(KernelError, match="no device 'H1000' in the cost table; there are .*H100"):
        lrcompile.inspect(Stack(), (torch.randn(3, 32),), target="H1000")
    assert device_named("h100").arch == "sm_90"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kernels", ["auto", "triton", "inductor"])
def test_on_a_gpu_twenty_steps_go_the_way_of_eager(kernels: str) -> None:
    model, ids = Model().cuda(), batch().cuda()
    lrcompile.adopt(model, Recipe(), (ids,))
    eager = copy.deepcopy(model)
    run = torch.compile(model, backend="lrcompile", options={"kernels": kernels})
    got = train(run, torch.optim.AdamW(model.parameters(), lr=1e-2), 20, ids)
    want = train(eager, torch.optim.AdamW(eager.parameters(), lr=1e-2), 20, ids)
    assert want[-1] < 0.5 * want[0]
    assert got == pytest.approx(want, rel=2e-2)


# --- what looks like a pair, and isn't one ----------------------------------------------------------------------------


class Beside(nn.Module):
    """Two linears of the user's own beside one that is adopted; `between` says what stands between the two."""

    def __init__(self, between: str, bias: bool = False) -> None:
        super().__init__()
        self.big = nn.Linear(64, 64)
        self.down, self.up = nn.Linear(64, 8, bias=bias), nn.Linear(8, 64, bias=False)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.big(x) * 1.0
        if self.between == "no_grad":
            with torch.no_grad():
                h = self.down(x)
            return x + self.up(h)
        h = self.down(x)
        if self.between == "write":
            x.add_(1)
        if self.between == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return x + self.up(h)
        return x + self.up(h)


@pytest.mark.parametrize(
    ("between", "bias", "frozen"),
    [("nothing", True, False), ("no_grad", False, False), ("write", False, True), ("autocast", False, False)],
)
def test_two_linears_that_are_no_pair_stay_as_they_are(between: str, bias: bool, frozen: bool) -> None:
    model, x = Beside(between, bias), torch.randn(16, 64)
    lrcompile.adopt(model, Recipe(rank=4, include=["big"]), (x,))
    model.requires_grad_(not frozen)
    run = torch.compile(model, backend="lrcompile", options={"kernels": "triton", "inner": "aot_eager"})
    got, want = run(x), model(x)
    torch.testing.assert_close(got, want)
    leaves = [p for p in model.parameters() if p.requires_grad]
    if leaves:
        found, wanted = (torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (got, want))
        for a, b in zip(found, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def test_autocast_around_mixed_dtypes() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU())
    x = torch.randn(8, 32)
    lrcompile.adopt(model, Recipe(rank=4, include=["0", "2"]), (x,))
    model[0].weight_b.data = model[0].weight_b.data.bfloat16()
    model[2].weight_a.data, model[2].weight_b.data = (w.data.bfloat16() for w in (model[2].weight_a, model[2].weight_b))
    run = torch.compile(model, backend="lrcompile", options={"kernels": "triton", "inner": "aot_eager"})
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(x), model(x), torch.bfloat16)
