"""What follows a weight when a pair takes its place, and back: optimizers, attributes, gradients; what can't is refused."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lrcompile
from lrcompile import AdoptError, Recipe

from .helpers_train import AOT, EAGER, Model, batch, check_followed, loss_of, pairs, train


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "lrcompile" and r.levelno >= logging.WARNING]


# --- optimizers, when adopting and merging by hand --------------------------------------------------------------------


def test_an_optimizer_built_before_adopting_by_hand_follows() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    lrcompile.adopt(model, Recipe(), (batch(),))
    check_followed(model, optimizer)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    losses = train(model, optimizer, 8, batch())
    assert losses[-1] < 0.5 * losses[0]


def test_adopting_by_hand_after_a_step_is_refused() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 1, batch())
    with pytest.raises(AdoptError, match="AdamW holds state for blocks.0.up.weight"):
        lrcompile.adopt(model, Recipe(), (batch(),))
    assert pairs(model) == 0


def test_an_optimizer_built_before_adopt_like_follows_and_its_state_loads() -> None:
    model, resumed = Model(), Model()
    lrcompile.adopt(model, Recipe(), (batch(),))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 2, batch())
    later = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    lrcompile.adopt_like(resumed, model.state_dict())
    resumed.load_state_dict(model.state_dict())
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    check_followed(resumed, later)
    ids = batch()
    assert train(model, optimizer, 3, ids) == train(resumed, later, 3, ids)


def test_an_optimizer_follows_a_merge_and_an_adoption_after_it(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    names = [n for n, _ in model.named_parameters()]
    first = list(model.parameters())
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    lrcompile.adopt(model, Recipe(), (batch(),))
    train(model, optimizer, 2, batch())
    lrcompile.merge(model)
    assert warned(caplog)[1:] == ["AdamW starts anew for the merged weights: its state for the pairs is dropped"]
    check_followed(model, optimizer)
    assert optimizer.param_groups[0]["param_names"] == names
    losses = train(model, optimizer, 8, batch())
    assert losses[-1] < losses[0]
    optimizer.state.clear()
    lrcompile.adopt(model, Recipe(), (batch(),))
    check_followed(model, optimizer)
    late = torch.optim.SGD(first, lr=0.1)  # the parameters of two generations ago
    train(model, late, 1, batch())
    check_followed(model, late)


# --- what a parameter carries -----------------------------------------------------------------------------------------


def test_attributes_of_a_parameter_go_over_to_both_leaves() -> None:
    model = Model()
    model.blocks[0].up.weight.no_decay = True  # type: ignore[attr-defined]
    lrcompile.adopt(model, Recipe(), (batch(),))
    assert model.blocks[0].up.weight_a.no_decay and model.blocks[0].up.weight_b.no_decay
    assert lrcompile.merge(model).blocks[0].up.weight.no_decay


def test_a_gradient_goes_over_by_the_chain_rule() -> None:
    """Half of an accumulated batch before the adoption and half after is the same as all of it after."""
    model, ids = Model().double(), batch()
    for block in model.blocks:  # of low rank already: the pair computes the same function
        for linear in (block.up, block.down):
            u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
            linear.weight.data = (u[:, :8] * s[:8]) @ v[:8]
    recipe = Recipe(rank=8, svd="full")
    model(ids).square().mean().backward()
    lrcompile.adopt(model, recipe, (ids,))
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(ids).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-6, atol=1e-12)


def test_a_sparse_gradient_goes_over_and_none_to_leaves_yet_to_be_filled() -> None:
    model = nn.Sequential(nn.Embedding(20, 16, sparse=True), nn.Linear(16, 32))
    ids = torch.tensor([[1, 3]])
    recipe = Recipe(rank=2, include=["0"])
    model(ids).sum().backward()
    dense = model[0].weight.grad.to_dense()
    lrcompile.adopt(model, recipe, (ids,))
    torch.testing.assert_close(model[0].weight_b.grad, dense @ model[0].weight_a.detach().T)
    again = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 32))
    again(ids).sum().backward()
    lrcompile.adopt_like(again, model.state_dict())
    assert again[0].weight_a.grad is None and again[1].weight.grad is not None


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_are_refused_by_name(register: str) -> None:
    for adopt in (
        lambda m: lrcompile.adopt(m, Recipe(), (batch(),)),
        lambda m: torch.compile(m, backend="lrcompile", options=EAGER)(batch()),
    ):
        model = Model()
        getattr(model.blocks[1].down.weight, register)(lambda g: None)
        with pytest.raises(AdoptError, match="blocks.1.down.weight has a gradient hook.*exclude="):
            adopt(model)
        assert pairs(model) == 0


def test_our_own_watch_is_no_reason_to_refuse() -> None:
    model = Model()
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    run(batch())
    lrcompile.merge(model)
    lrcompile.adopt(model, Recipe(rank=4), (batch(),))
    assert pairs(model) == 6


def test_owners_outside_the_adopted_part_get_the_pair_too() -> None:
    model = Model()
    other = nn.Linear(64, 256)
    other.weight = model.blocks[0].up.weight
    lrcompile.adopt(model, Recipe(), (batch(),))
    assert other.weight_a is model.blocks[0].up.weight_a


def test_lists_made_before_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    mine = list(model.parameters())
    lrcompile.adopt(model, Recipe(), (batch(),))
    (said,) = warned(caplog)
    assert f"1 collection(s) of parameters made before the adoption still hold replaced weights (of {len(mine)}" in said
    caplog.clear()
    del mine
    model = Model()
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], foreach=True)
    torch.compile(model, backend="lrcompile", options=EAGER)(batch())
    check_followed(model, optimizer)
    assert not warned(caplog)


# --- writes to what is computed ---------------------------------------------------------------------------------------


def test_a_write_to_a_computed_weight_is_warned_of() -> None:
    model = lrcompile.adopt(Model(), Recipe(), (batch(),))
    with pytest.warns(UserWarning, match="a write to LowRankLinear.weight is lost"):
        nn.init.zeros_(model.blocks[0].up.weight)
    with pytest.warns(UserWarning, match="a write to LowRankLinear.weight is lost"), torch.no_grad():
        model.blocks[0].up.weight.t().mul_(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.blocks[0].up.weight.sum().backward()
        gc.collect()


def test_assigning_a_computed_weight_is_an_error() -> None:
    model = lrcompile.adopt(Model(), Recipe(), (batch(),))
    with pytest.raises(AdoptError, match="weight of LowRankLinear is computed from weight_a and weight_b"):
        model.blocks[0].up.weight = nn.Parameter(torch.zeros(256, 64))
    model.blocks[0].up.bias = nn.Parameter(torch.zeros(256))


# --- first calls that are not the plain one ---------------------------------------------------------------------------


def test_several_threads_at_the_first_call() -> None:
    model, ids = Model(), batch()
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    start, results, errors = threading.Barrier(4), [], []

    def call() -> None:
        try:
            start.wait()
            results.append(run(ids).detach())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and pairs(model) == 6
    for result in results:
        torch.testing.assert_close(result, model(ids).detach(), rtol=1e-4, atol=1e-5)


def test_a_first_call_inside_checkpoint_is_refused_with_the_fix() -> None:
    model, ids = Model(), batch()
    run = torch.compile(model.blocks[0], backend="lrcompile", options=AOT)
    x = model.embed(ids)
    with pytest.raises(AdoptError, match="inside torch.utils.checkpoint.*call lrcompile.adopt"):
        checkpoint(run, x, use_reentrant=False)
    assert pairs(model) == 0
    lrcompile.adopt(model, Recipe(), (ids,))
    checkpoint(run, x, use_reentrant=False).sum().backward()
    assert model.blocks[0].up.weight_a.grad is not None


def test_a_first_call_without_rows(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    with caplog.at_level(logging.INFO, "lrcompile"):
        torch.compile(model, backend="lrcompile", options=EAGER)(batch(0))
    assert "adopted 6 of 6" in caplog.text or "adopted 6 of 7" in caplog.text


def test_options_on_an_adopted_model_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    run = torch.compile(model, backend="lrcompile", options={"rank": 4, **EAGER})
    run(batch())
    run(batch())
    assert not warned(caplog), "the same options, traced again"
    torch._dynamo.reset()
    torch.compile(model, backend="lrcompile", options={"rank": 8, **EAGER})(batch())
    assert "adopted already: the options for what weights become (rank) have no effect" in caplog.text


def test_regions_compiled_once_for_many_layers() -> None:
    @torch.compiler.nested_compile_region
    def call(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return block(x)

    class Nested(Model):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = call(block, x)
            return self.head(x)

    model, ids = Nested(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = torch.compile(model, backend="lrcompile", options=AOT)
    losses = train(run, optimizer, 8, ids)
    assert pairs(model) == 6 and losses[-1] < losses[0]
    torch.testing.assert_close(run(ids), model(ids))


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merge_reaches_owners_outside_the_model() -> None:
    model = Model()
    other = nn.ModuleDict({"tied": nn.Linear(64, 256), "own": nn.Linear(64, 64)})
    other["tied"].weight = model.blocks[0].up.weight
    lrcompile.adopt(other["own"], Recipe(rank=4, include=["weight"]), (torch.randn(2, 64),))
    optimizer = torch.optim.SGD([*model.parameters(), *other["tied"].parameters()][:-2], lr=0.5)
    lrcompile.adopt(model, Recipe(rank=4), (batch(),))
    lrcompile.merge(model)
    assert type(other["tied"]) is nn.Linear and other["tied"].weight is model.blocks[0].up.weight
    assert type(other["own"]).__name__ == "LowRankLinear", "not part of what was merged"
    assert id(other["tied"].weight) in [id(p) for p in optimizer.param_groups[0]["params"]]


def test_merge_unsettles_and_keeps_training_what_one_side_trained() -> None:
    model = Model()
    lrcompile.adopt(model, Recipe(rank=4, include=["blocks.0"]), (batch(),))
    model.blocks[0].up.weight_a.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    lrcompile.merge(model)
    assert model.blocks[0].up.weight.requires_grad
    check_followed(model, optimizer)
    torch.compile(model, backend="lrcompile", options={"rank": 4, **EAGER})(batch())
    assert pairs(model) == 6, "what the merged Plan had left dense is decided anew"


# --- odd owners -------------------------------------------------------------------------------------------------------


def test_a_class_that_refuses_subclasses_is_named_before_anything_is_touched() -> None:
    class Registered(nn.Module):
        def __init_subclass__(cls, *, name: str, **rest: object) -> None:
            super().__init_subclass__(**rest)

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(32, 48)
            self.w = nn.Parameter(torch.randn(48, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.first(x) @ self.w

    model = Registered()
    with pytest.raises(AdoptError, match=r"w: its Registered can't be subclassed \(TypeError.*exclude=\['w'\]"):
        lrcompile.adopt(model, Recipe(rank=4), (torch.randn(2, 32),))
    assert pairs(model) == 0


def test_a_module_that_locks_its_attributes_is_adopted() -> None:
    class Locked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 32))
            self.__dict__["locked"] = True

        def __setattr__(self, name: str, value: object) -> None:
            if self.__dict__.get("locked") and name in ("lr_told", "__class__"):
                raise AttributeError("locked")
            super().__setattr__(name, value)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (x @ self.w).relu()

    model = lrcompile.adopt(Locked(), Recipe(rank=4), (torch.randn(2, 32),))
    assert model.w_a.shape == (4, 32)
    lrcompile.merge(model)
    assert type(model) is Locked


def test_a_slice_of_a_parameter_list() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ws = nn.ParameterList(nn.Parameter(torch.randn(32, 32) / 6) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for w in self.ws[1:]:
                x = x + (x @ w).relu()
            return x

    model, x = Chain(), torch.randn(4, 32)
    run = torch.compile(model, backend="lrcompile", options={"rank": 4, **EAGER})
    run(x).sum().backward()
    run(x).sum().backward()
    torch.testing.assert_close(run(x), model(x))
    for p in model.parameters():
        assert p.grad is not None or p is model.ws[0]


def test_a_weight_read_without_gradients_gives_them_where_it_is_used() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                w = self.fc.weight
            return x + torch.nn.functional.linear(x, w).relu()

    model, x = Scaled(), torch.randn(3, 32)
    run = torch.compile(model, backend="lrcompile", options={"rank": 4, **AOT})
    run(x)
    found = torch.autograd.grad(run(x).sum(), list(model.fc.parameters())[:2])
    wanted = torch.autograd.grad(model(x).sum(), list(model.fc.parameters())[:2])
    torch.testing.assert_close(found, wanted)
    assert all(g.norm() > 0 for g in wanted)


def test_training_only_a_head_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    optimizer = torch.optim.Adam(model.head.parameters(), 1e-2)
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    for _ in range(6):
        loss_of(run, batch()).backward()
        optimizer.step()
        model.zero_grad()
    assert any("get gradients, and no optimizer holds them" in said for said in warned(caplog))


def test_a_state_averaged_or_converted_loads() -> None:
    model = lrcompile.adopt(Model(), Recipe(rank=4), (batch(),))
    state = model.state_dict()
    model.load_state_dict({k: 0.5 * v + 0.5 * v for k, v in state.items()})
    model.load_state_dict({k: v.half() for k, v in state.items()})
    with pytest.raises(lrcompile.StateError, match="_extra_state"):
        model.load_state_dict({k: v * 0.3 for k, v in state.items()})


def test_objects_hidden_by_gc_freeze() -> None:
    model = Model()
    gc.freeze()
    try:
        lrcompile.adopt(model, Recipe(rank=4), (batch(),))
    finally:
        gc.unfreeze()
    assert pairs(model) == 6
