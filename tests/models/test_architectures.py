"""Every architecture of the zoo: nothing is skipped, full rank is exact, it trains, it saves and loads.

The `check_*` functions hold what must be true of any model; test_pretrained.py asks the same of real weights.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Recipe

from .zoo import CASES, Case

# Two fp32 ways of computing one function, products grouped otherwise, through a few layers of width 128.
ROUNDING = 1e-4
FULL_RANK = Recipe(rank_ratio=1.0, require_saving=False)

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SOME = [case for case in CASES if case.name in ("llama", "gpt2", "torch_encoder")]
some_cases = pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def clean_dynamo():
    """Each test compiles from nothing: recompile limits count over a whole process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs(case: Case, model: nn.Module) -> Tensor:
    """The model's logits in evaluation mode, without gradients; puts the model's own mode back."""
    training = model.training
    with torch.no_grad():
        logits = case.logits(model.eval()(**case.inputs()))
    model.train(training)
    return logits


def assert_same(got: Tensor, wanted: Tensor, what: str, tolerance: float = ROUNDING) -> None:
    """Both are equal up to `tolerance` of the largest wanted value."""
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    assert error <= tolerance, f"{what}: off by {error:.1e} of the largest output, allowed is {tolerance:.0e}"


def check_full_rank(case: Case, recipe: Recipe = FULL_RANK) -> None:
    """With every rank kept, only the way of computing changed, not the function."""
    original = case.fresh()
    adopted = lrcompile.adopt(copy.deepcopy(original), recipe, case.inputs())
    assert len(list(adopted.parameters())) > len(list(original.parameters())), "nothing was replaced"
    assert_same(outputs(case, adopted), outputs(case, original), "full rank against the original")


def check_plan_and_adoption(case: Case, compression: float = 2.64) -> None:
    """Every block linear has its pair, the rest of the model stays what it was, and the saving is real."""
    model = case.fresh()
    before = dict(model.named_parameters())
    plan = lrcompile.plan(model, case.inputs(), Recipe(compression=compression))
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}, "plan wrote"

    planned = {name: entry for entry in plan.entries for name in entry.names}
    wanted = set(case.block_linears(model))
    assert wanted <= set(planned), f"skipped in silence: {sorted(wanted - set(planned))}"
    unexplained = [n for n, e in planned.items() if e.rank is None and not e.reason]
    assert not unexplained, f"left dense with no reason: {unexplained}"
    left = {n: planned[n].reason for n in wanted if planned[n].rank is None}
    assert not left, f"left dense: {left}"
    replaced = {e.names[0]: e for e in plan.entries if e.rank is not None}
    assert not case.dense(model) & {n for e in replaced.values() for n in e.names}, "an embedding or head is replaced"

    full = sum(math.prod(planned[n].shape) for n in wanted)
    pairs = sum(planned[n].rank * sum(planned[n].shape) for n in wanted)
    assert full / pairs >= compression, f"{full / pairs:.2f}x in the blocks, asked for {compression}x"

    kept = case.dense(model)
    lrcompile.adopt(model, plan)
    after = dict(model.named_parameters())
    assert not wanted & set(after), f"still dense parameters: {sorted(wanted & set(after))}"
    assert all(after[n] is before[n] for n in kept)
    saved = sum(math.prod(e.shape) - e.rank * sum(e.shape) for e in replaced.values())
    numbers = [sum(p.numel() for p in parameters.values()) for parameters in (before, after)]
    assert numbers[0] - numbers[1] == saved, "the model did not shrink by what its plan says"
    assert outputs(case, model).isfinite().all()


def train(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The losses of `steps` steps on the one batch of the case."""
    losses = []
    for _ in range(steps):
        loss = case.loss(model, model(**case.inputs()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_training(case: Case, inner: str, steps: int = 20, lr: float = 1e-3) -> None:
    """A script that built its optimizer first: the loss falls and the optimizer holds the pairs."""
    model = case.fresh()
    before = dict(model.named_parameters())
    linears = {id(before[n]) for n in case.block_linears(model)}
    optimizer = torch.optim.AdamW([p for p in before.values() if p.requires_grad], lr=lr)
    model.compile(backend="lrcompile", options={"inner": inner})
    losses = train(case, model, optimizer, steps)
    assert all(map(math.isfinite, losses)), losses
    assert losses[-1] < losses[0], losses

    after = dict(model.named_parameters())
    assert not linears & {id(p) for p in after.values()}, "the compiled model still has dense block weights"
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in after.values() if p.requires_grad)
    assert set(optimizer.state) <= set(after.values()), "state is left for parameters that are gone"
    old = {id(p) for p in before.values()}
    new = {n: p for n, p in after.items() if id(p) not in old and n.startswith(case.blocks)}
    assert len(new) == 2 * len(linears), f"{len(linears)} weights became {len(new)} parameters"
    unmoved = [n for n, p in new.items() if optimizer.state[p]["step"] != steps]
    assert not unmoved, f"not moved in every step: {unmoved}"


def scrambled(case: Case) -> nn.Module:
    """An untouched model whose parameters are not those of `case.fresh()`, a pretrained one's included."""
    model = case.fresh(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def check_saved_state(case: Case, folder: Path, recipe: Recipe, tolerance: float = ROUNDING) -> None:
    """What is saved gives the same bits when loaded; its dense form fits the untouched model."""
    model = lrcompile.adopt(case.fresh(), recipe, case.inputs())
    wanted = outputs(case, model)
    lrcompile.save(model, folder)
    loaded = scrambled(case)
    lrcompile.load(folder, loaded)
    assert torch.equal(outputs(case, loaded), wanted)

    state = lrcompile.original_state_dict(model)
    dense = scrambled(case)
    shapes = {n: t.shape for n, t in dense.state_dict().items()}
    assert {n: t.shape for n, t in state.items()} == shapes
    dense.load_state_dict(state, strict=True)
    assert_same(outputs(case, dense), wanted, "the dense state against the pairs", tolerance)


@all_cases
def test_full_rank_computes_the_same(case):
    check_full_rank(case)


@all_cases
def test_every_block_linear_gets_its_pair(case):
    check_plan_and_adoption(case)


@all_cases
def test_compiled_training_adopts_and_learns(case):
    check_training(case, inner="aot_eager")


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[] if c.name == "gpt2" else pytest.mark.slow) for c in SOME]
)
def test_training_through_inductor(case):
    check_training(case, inner="inductor")


@all_cases
def test_save_load_and_the_way_back(case, tmp_path):
    check_saved_state(case, tmp_path / "saved", Recipe())


@some_cases
def test_evaluation_finds_the_same_sites(case):
    """nn.TransformerEncoderLayer runs as one opaque operator in evaluation mode without gradients."""
    model = case.fresh()
    ranks = {tuple(e.names): e.rank for e in lrcompile.plan(model, case.inputs()).entries}
    with torch.no_grad():
        plan = lrcompile.plan(model.eval(), case.inputs())
    assert {tuple(e.names): e.rank for e in plan.entries} == ranks


@some_cases
def test_compiled_inference_equals_the_adopted_model(case):
    model = case.fresh()
    wanted = outputs(case, lrcompile.adopt(copy.deepcopy(model), Recipe(), case.inputs()))
    model.compile(backend="lrcompile", options={"inner": "aot_eager"})
    for call in ("first, eager", "second, traced anew", "third"):
        assert_same(outputs(case, model), wanted, f"compiled inference, {call}")
    assert not set(case.block_linears(case.fresh())) & {n for n, _ in model.named_parameters()}
