"""What follows a pair moves into its kernel: which patterns, what is left alone, and that numbers and gradients stay."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrcompile
from lrcompile import Recipe
from lrcompile.passes.graphs import scopes

from .helpers import Stack, tiny_llama
from .helpers_train import Model, batch, train

OP = torch.ops.lrcompile.lowrank_epilogue.default
Function = Callable[..., Tensor]


class Followed(nn.Module):
    """Two linears over x, and a function (z, u, x) -> y of their results and their input."""

    def __init__(
        self, function: Function, width: int = 32, features: int = 32, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.first = nn.Linear(width, features, dtype=dtype)
        self.second = nn.Linear(width, features, bias=False, dtype=dtype)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), self.second(x), x)


def recipe(model: nn.Module, rank: int = 3) -> Recipe:
    """A linear that ends a model counts as its head, and is left dense unless it is named."""
    named = [name for name, _ in model.named_modules() if name.endswith(("first", "second"))]
    return Recipe(rank=rank, include=["*", *named])


def fused(model: nn.Module, inputs: object, **options: object) -> tuple[list[tuple[str, bool]], lrcompile.Report]:
    """(kind, whether there is another operand) of every fused operator, and the report; validated by its numbers."""
    options = {"kernels": "triton", "verify": True, **options}
    report = lrcompile.inspect(model, inputs, recipe(model), **options)
    stage = report["fuse_epilogue"]
    assert not options["verify"] or stage.verified <= 1.0
    nodes = [n for scope in scopes(stage.graph) for n in scope.gm.graph.nodes if n.target is OP]
    return [(n.args[4], n.args[5] is not None) for n in nodes], report


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (lambda z, u, x: F.gelu(z), ["gelu"]),
        (lambda z, u, x: F.gelu(z, approximate="tanh"), ["gelu_tanh"]),
        (lambda z, u, x: F.silu(z), ["silu"]),
        (lambda z, u, x: z * torch.sigmoid(z), ["silu"]),
        (lambda z, u, x: z.sigmoid().mul(z), ["silu"]),
        (lambda z, u, x: F.silu(z) * u, ["silu_mul"]),
        (lambda z, u, x: u * F.silu(z), ["silu_mul"]),
        (lambda z, u, x: (z * z.sigmoid()) * u, ["silu_mul"]),
        (lambda z, u, x: torch.mul(F.gelu(z), x), ["gelu_mul"]),
        (lambda z, u, x: z * F.silu(x), ["mul_silu"]),
        (lambda z, u, x: F.gelu(x, approximate="tanh") * z, ["mul_gelu_tanh"]),
        (lambda z, u, x: z * (x * x.sigmoid()), ["mul_silu"]),
        (lambda z, u, x: z * x, ["mul"]),
        (lambda z, u, x: x + z, ["add"]),
        (lambda z, u, x: torch.add(z, x), ["add"]),
        (lambda z, u, x: x + F.dropout(z, 0.1, training=False), ["add"]),
        (lambda z, u, x: (x + z) + u, ["add", "add"]),
        # left alone
        (lambda z, u, x: F.gelu(z) + z, []),
        (lambda z, u, x: F.relu(z), []),
        (lambda z, u, x: torch.add(z, x, alpha=2), []),
        (lambda z, u, x: z + 1, []),
        (lambda z, u, x: z * x[:1], []),
        (lambda z, u, x: z * z, []),
        (lambda z, u, x: x + F.dropout(z, 0.0, training=True) * z, []),
        (lambda z, u, x: z.add_(x), []),
    ],
)
def test_the_patterns(function: Function, kinds: list[str]) -> None:
    found, _ = fused(Followed(function), (torch.randn(5, 32),))
    assert [kind for kind, _ in found] == kinds


def test_what_happens_between_is_respected() -> None:
    """A pair isn't moved past a write to its input, nor out of an autocast region."""

    def writes(z: Tensor, u: Tensor, x: Tensor) -> Tensor:
        keep = x * 1
        x.mul_(2)
        return z + keep

    def leaves_autocast(z: Tensor, u: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            pass
        return z + x

    for function in (writes, leaves_autocast):
        model = Followed(function)
        outer = nn.Sequential(nn.Tanh(), model)
        assert fused(outer, (torch.randn(5, 32),))[0] == []


@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast_a_residual_in_fp32_stays_so(inside: bool) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Followed(lambda z, u, x: x + z)

        def forward(self, x: Tensor) -> Tensor:
            if not inside:
                return self.model(x)
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x)

    x, model = torch.randn(5, 32), Residual()
    lrcompile.adopt(model, recipe(model), (x,))
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        found, report = fused(model, (x,))
    assert found == [("add", True)]
    (y,) = [n for n in report["lower"].graph.graph.nodes if n.op == "output"][0].args[0]
    assert y.meta["example_value"].dtype == torch.float32


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_gpt(checkpointed: bool) -> None:
    found, report = fused(Stack(checkpointed=checkpointed), (torch.randn(2, 5, 32),))
    assert sorted(found) == [("add", True)] * 2 + [("gelu", False)] * 2
    assert report["fuse_epilogue"].flops == report["reassociate"].flops > 0
    assert checkpointed or report["fuse_epilogue"].saved < report["reassociate"].saved, "z is not kept"


def test_a_llama() -> None:
    found, report = fused(tiny_llama(), {"input_ids": torch.arange(14).view(2, 7)})
    assert sorted(found) == [("add", True)] * 4 + [("silu_mul", True)] * 2
    line = "model.layers.0.mlp.gate_proj: lrcompile::lowrank_epilogue, silu_mul after the pair (kernels='triton')"
    assert line in report["fuse_epilogue"].changed


def test_training_with_the_operator_forced() -> None:
    model, ids = Model(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"kernels": "triton", "inner": "aot_eager"}
    losses = train(torch.compile(model, backend="lrcompile", options=options), optimizer, 8, ids)
    assert losses[-1] < 0.5 * losses[0]
    compiled = torch.compile(model, backend="lrcompile", options=options)(ids)
    torch.testing.assert_close(compiled, model(ids))


@pytest.mark.parametrize("options", [{"kernels": "auto"}, {"kernels": "inductor", "target": "H100"}])
def test_nothing_is_done_on_the_cpu_or_where_switched_off(options: dict[str, str]) -> None:
    found, report = fused(Stack(), (torch.randn(3, 32),), **options)
    assert found == [] and not report["fuse_epilogue"].changed and not report["fuse_epilogue"].notes


@pytest.mark.parametrize("function", [F.silu, F.gelu], ids=["silu", "gelu"])
@pytest.mark.parametrize("trains", [False, True])
def test_for_a_gpu_the_predicted_times_decide(function: Function, trains: bool) -> None:
    """From shapes alone: the model lives on `meta`, the GPU nowhere. Both outcomes are seen."""
    outcomes = set()
    for tokens, rank in ((128, 64), (16384, 64), (16384, 512)):
        with torch.device("meta"):
            model = Followed(lambda z, u, x: function(z), 4096, 4096, torch.bfloat16).requires_grad_(trains)
        x = torch.empty(tokens, 4096, dtype=torch.bfloat16)
        stage = lrcompile.inspect(model, (x,), recipe(model, rank), target="H100")["fuse_epilogue"]
        (line,) = [*stage.changed, *stage.notes]
        pattern = r"predicted for H100, forward( and backward)?: lowrank_epilogue ([\d.e+]+) µs, apart ([\d.e+]+) µs"
        backward, ours, theirs = re.search(pattern, line).groups()  # type: ignore[union-attr]
        assert bool(backward) == trains
        assert bool(stage.changed) == (1.05 * float(ours) < float(theirs)), line
        assert any(n.target is OP for n in stage.graph.graph.nodes) == bool(stage.changed)
        outcomes.add(bool(stage.changed))
    assert trains or outcomes == {True, False}


def test_an_operand_that_inductor_would_not_store_keeps_the_pair_apart() -> None:
    with torch.device("meta"):
        model = Followed(lambda z, u, x: z * torch.tanh(x), 4096, 4096, torch.bfloat16)
    stage = lrcompile.inspect(
        model, (torch.empty(16384, 4096, dtype=torch.bfloat16),), recipe(model, 64), target="H100"
    )["fuse_epilogue"]
    assert not stage.changed and "isn't stored" in stage.notes[0]
