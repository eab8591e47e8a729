"""Optimizers follow a model that the backend adopts; one that can't, or never moves the new leaves, is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lrcompile

from .helpers_train import AOT, EAGER, Model, batch, check_followed, held, loss_of, pairs, train

# --- following --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.Adagrad(p, lr=5e-2),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
        lambda p: torch.optim.NAdam(p, lr=1e-2),
    ],
    ids=["sgd", "adamw-foreach", "adamw-fused", "adagrad", "rmsprop", "nadam"],
)
def test_optimizers_follow(build) -> None:
    model = Model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build(model.parameters())
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    losses = train(run, optimizer, 10, batch())
    assert losses[-1] < losses[0]
    check_followed(model, optimizer)
    assert not [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]


def test_lbfgs_whose_closure_makes_the_first_call() -> None:
    model, ids = Model(), batch()
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(run, ids)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(4)]
    assert losses[-1] < losses[0]
    check_followed(model, optimizer)


def test_an_optimizer_built_later_from_an_older_list_follows() -> None:
    model = Model()
    old = list(model.parameters())
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    run(batch())
    optimizer = torch.optim.AdamW(old, lr=1e-2)
    losses = train(run, optimizer, 8, batch())
    assert losses[-1] < 0.5 * losses[0]
    check_followed(model, optimizer)


def test_gradient_accumulation_and_schedule() -> None:
    model = Model()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1, "lr": 1e-2}, {"params": rest, "weight_decay": 0.0, "lr": 2e-2}]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    run = torch.compile(model, backend="lrcompile", options=AOT)
    losses = train(run, optimizer, 8, batch(), scheduler, accumulate=3)
    assert losses[-1] < 0.5 * losses[0]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.0) and scheduler.base_lrs == [1e-2, 2e-2]
    assert held(optimizer)[: len(optimizer.param_groups[0]["params"])] == [
        id(p) for p in model.parameters() if p.dim() >= 2
    ], "every pair stands where its weight stood"


# --- refused ----------------------------------------------------------------------------------------------------------


def test_optimizer_state_already_filled_is_refused() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 1, batch())
    with pytest.raises(lrcompile.AdoptError, match=r"AdamW holds state for blocks.*call lrcompile.adopt"):
        torch.compile(model, backend="lrcompile", options=EAGER)(batch())
    assert pairs(model) == 0


# --- the watch for leaves that never move -----------------------------------------------------------------------------


def test_an_optimizer_that_never_moves_the_new_leaves_is_an_error() -> None:
    model = Model()
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer = torch.optim.SGD(copies, lr=0.1)
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    with pytest.raises(lrcompile.AdoptError, match="none of the low-rank weights moved"):
        for _ in range(5):
            loss_of(run, batch()).backward()
            optimizer.step()
            model.zero_grad()


def test_a_handwritten_optimizer_over_an_older_list_is_an_error() -> None:
    model = Model()
    old = list(model.parameters())
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    with pytest.raises(lrcompile.AdoptError, match="none of the low-rank weights moved"):
        for _ in range(5):
            loss_of(run, batch()).backward()
            for p in old:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-0.1)
            model.zero_grad()


def test_a_handwritten_optimizer_over_the_model_is_fine() -> None:
    model = Model()
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    for _ in range(6):
        loss_of(run, batch()).backward()
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-0.1)
            p.grad = None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_without_any_step_are_fine(set_to_none: bool) -> None:
    model = Model()
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    for _ in range(8):
        loss_of(run, batch()).backward()
        model.zero_grad(set_to_none=set_to_none)


def test_names_in_the_optimizer_follow() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    torch.compile(model, backend="lrcompile", options=EAGER)(batch())
    (group,) = optimizer.param_groups
    assert group["param_names"] == [n for n, _ in model.named_parameters()]
