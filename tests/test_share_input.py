"""Pairs over one input become one operator: which, what is left alone, and that numbers and gradients stay."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrcompile
from lrcompile import Recipe
from lrcompile.passes.graphs import scopes

from .helpers import Attention, Stack, tiny_llama

OP = torch.ops.lrcompile.lowrank_group.default


class Block(nn.Module):
    """Self-attention with separate projections, and a GeGLU; (batch, tokens, width) -> the same."""

    def __init__(
        self, width: int = 32, bias: tuple[bool, bool, bool] = (False, False, False), dtype: Any = None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.q, self.k, self.v = (
            nn.Linear(width, features, bias=b, dtype=dtype)
            for features, b in zip((width, width // 2, width // 2), bias, strict=True)
        )
        self.gate, self.up = (nn.Linear(width, 2 * width, dtype=dtype) for _ in "ab")
        self.down = nn.Linear(2 * width, width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        q = q.unflatten(-1, (2, -1)).transpose(1, 2).mean(1)
        x = x + F.pad(F.scaled_dot_product_attention(q, k, v), (0, x.shape[-1] - k.shape[-1]))
        return x + self.down(F.gelu(self.gate(x)) * self.up(x))


def grouped(model: nn.Module, inputs: object, rank: int = 3, **options: Any) -> tuple[list[int], lrcompile.Report]:
    """Pairs in every group, and the report; validated by its numbers."""
    options = {"kernels": "triton", "verify": True, **options}
    report = lrcompile.inspect(model, inputs, Recipe(rank=rank), **options)
    stage = report["share_input"]
    assert not options["verify"] or stage.verified <= 1.0
    nodes = [n for scope in scopes(stage.graph) for n in scope.gm.graph.nodes if n.target is OP]
    return [len(n.args[1]) for n in nodes], report


class Several(nn.Module):
    """Linears over one input, and a function (list of their results, x) -> y; the last keeps any from being the head."""

    def __init__(self, function: Any, count: int = 2, bias: tuple[bool, ...] = (True,) * 5) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(32, 32, bias=b) for b in bias[:count])
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.function(self.linears, x))


@pytest.mark.parametrize(
    ("function", "count", "bias", "sizes"),
    [
        (lambda f, x: f[0](x).tanh() + f[1](x).sin(), 2, (True, True), [2]),
        (lambda f, x: f[0](x).tanh() + f[1](x).sin(), 2, (False, False), [2]),
        (lambda f, x: sum(g(x).tanh() for g in f), 3, (True,) * 3, [3]),
        (lambda f, x: sum(g(x).tanh() for g in f), 5, (True,) * 5, [3, 2]),
        (lambda f, x: sum(g(x).tanh() for g in f), 4, (True,) * 4, [3]),
        (lambda f, x: sum(g(x).tanh() for g in f), 4, (True, False, True, False), [2, 2]),
        # left alone
        (lambda f, x: sum(g(x).tanh() for g in f), 2, (True, False), []),
        (lambda f, x: f[0](x).tanh() + f[1](x * 2).sin(), 2, (True, True), []),
        (lambda f, x: f[1](f[0](x).tanh()).sin(), 2, (True, True), []),
    ],
)
def test_the_patterns(function: Any, count: int, bias: tuple[bool, ...], sizes: list[int]) -> None:
    found, _ = grouped(Several(function, count, bias), (torch.randn(5, 32),))
    assert found == sizes


def test_a_write_between_keeps_them_apart() -> None:
    def writes(f: Any, x: Tensor) -> Tensor:
        x = x * 1
        y = f[0](x)
        x.mul_(2)
        return y.tanh() + f[1](x).sin()

    found, report = grouped(Several(writes), (torch.randn(5, 32),))
    assert found == [] and "not the moment" in report["share_input"].notes[0]


@pytest.mark.parametrize("bias", [(False, False, False), (True, True, True), (True, False, True)], ids=str)
def test_a_block_with_attention_and_geglu(bias: tuple[bool, bool, bool]) -> None:
    """Gate and up go to fuse_epilogue, which comes first; q, k and v are here."""
    found, report = grouped(Block(bias=bias), (torch.randn(2, 5, 32),))
    assert found == [2 if sum(bias) == 2 else 3]
    assert report["share_input"].flops == report["reassociate"].flops > 0
    assert report["share_input"].saved < report["fuse_epilogue"].saved, "the intermediates are not kept"


def test_a_llama() -> None:
    found, report = grouped(tiny_llama(), {"input_ids": torch.arange(14).view(2, 7)})
    assert found == [3, 3]
    names = ", ".join(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert f"{names}: lrcompile::lowrank_group (kernels='triton')" in report["share_input"].changed


def test_checkpointed_and_packed_attention_stay_right() -> None:
    assert grouped(Stack(checkpointed=True), (torch.randn(2, 5, 32),))[0] == []
    grouped(Attention(), (torch.randn(2, 5, 16),))


def test_training_with_the_operator_forced() -> None:
    model, x = nn.Sequential(Block(), Block(), nn.Linear(32, 4)), torch.randn(2, 5, 32)
    options = {"kernels": "triton", "inner": "aot_eager", "rank": 8}
    step = torch.compile(model, backend="lrcompile", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = (step(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(step(x), model(x))


@pytest.mark.parametrize("options", [{"kernels": "auto"}, {"kernels": "inductor", "target": "H100"}])
def test_nothing_is_done_on_the_cpu_or_where_switched_off(options: dict[str, str]) -> None:
    found, report = grouped(Block(), (torch.randn(2, 5, 32),), **options)
    assert found == [] and not report["share_input"].changed and not report["share_input"].notes


@pytest.mark.parametrize("trains", [False, True])
def test_for_a_gpu_the_predicted_times_decide(trains: bool) -> None:
    """From shapes alone: the model lives on `meta`, the GPU nowhere. Both outcomes are seen."""
    outcomes = set()
    for tokens, rank in ((16384, 64), (16384, 1024)):
        with torch.device("meta"):
            model = Block(4096, dtype=torch.bfloat16).requires_grad_(trains)
        x = torch.empty(1, tokens, 4096, dtype=torch.bfloat16)
        found, report = grouped(model, (x,), rank, kernels="auto", target="H100", verify=False)
        stage = report["share_input"]
        line = next(line for line in [*stage.changed, *stage.notes] if line.startswith("q, k, v: "))
        pattern = r"predicted for H100, forward( and backward)?: lowrank_group ([\d.e+]+) µs, apart ([\d.e+]+) µs"
        backward, ours, theirs = re.search(pattern, line).groups()  # type: ignore[union-attr]
        assert bool(backward) == trains
        assert (line in stage.changed) == (1.05 * float(ours) < float(theirs)) == (3 in found), line
        outcomes.add(line in stage.changed)
    assert outcomes == {True, False}


def test_a_member_that_nothing_is_derived_from_gets_no_gradient() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.a(x).tanh() + self.b(x).detach())

    model, x = Detached(), torch.randn(4, 64)
    lrcompile.adopt(model, lrcompile.Recipe(rank=8, include=["a", "b"]), (x,))
    run = torch.compile(model, backend="lrcompile", options={"kernels": "triton", "inner": "aot_eager"})
    run(x).sum().backward()
    assert model.b.weight_a.grad is None and model.b.weight_b.grad is None and model.b.bias.grad is None
    found = model.a.weight_a.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(found, model.a.weight_a.grad)
