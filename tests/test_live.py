"""The owners that the backend finds: each model and block keeps its own pairs; wrappers are recognised."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.weights.layers import AdoptedModule

from .helpers_train import BLOCKS, EAGER, WIDTH, Model, batch, pairs, train

# --- whose weights they are -------------------------------------------------------------------------------------------


def test_identical_blocks_compiled_one_by_one_keep_their_own_weights() -> None:
    model = Model()
    dense = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(backend="lrcompile", options={"rank_ratio": 1.0, "require_saving": False, **EAGER})
    ids = batch()
    for _ in range(2):  # once adopting, once on the adopted blocks
        torch.testing.assert_close(model(ids), dense(ids), rtol=1e-4, atol=1e-4)
    assert pairs(model) == 2 * BLOCKS


def test_a_second_model_of_the_class_gets_its_own_pairs() -> None:
    first, second = Model(), Model()
    dense = copy.deepcopy(second)
    options = {"rank_ratio": 1.0, "require_saving": False, **EAGER}
    ids = batch()
    torch.compile(first, backend="lrcompile", options=options)(ids)
    run = torch.compile(second, backend="lrcompile", options=options)
    for _ in range(2):
        torch.testing.assert_close(run(ids), dense(ids), rtol=1e-4, atol=1e-4)
    assert pairs(first) == pairs(second) == 2 * BLOCKS
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert not shared


def test_one_compiled_function_enters_a_second_model() -> None:
    models = [Model(), Model()]
    dense = copy.deepcopy(models)
    options = {"rank_ratio": 1.0, "require_saving": False, **EAGER}
    run = torch.compile(lambda model, ids: model(ids), backend="lrcompile", options=options)
    ids = batch()
    for _ in range(2):
        for model, reference in zip(models, dense, strict=True):
            torch.testing.assert_close(run(model, ids), reference(ids), rtol=1e-4, atol=1e-4)
    assert [pairs(m) for m in models] == [2 * BLOCKS] * 2


def test_a_block_left_dense_by_hand_enters_a_function_compiled_for_an_untouched_one() -> None:
    run = torch.compile(lambda block, x: block(x), backend="lrcompile", options=EAGER)
    x = torch.randn(4, WIDTH)
    first, second = Model(), Model()
    run(first.blocks[1], x)
    lrcompile.adopt(second, lrcompile.Recipe(include=("blocks.0.*",)), (batch(),))
    block = second.blocks[1]
    for _ in range(2):
        torch.testing.assert_close(run(block, x), block(x))
    assert pairs(first) == 2 and pairs(second) == 2 and type(block.up) is nn.Linear


def test_a_model_held_by_something_that_is_no_module() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.parts = {"net": Model()}

        def step(self, ids: torch.Tensor) -> torch.Tensor:
            return self.parts["net"](ids)

    trainer = Trainer()
    torch.compile(trainer.step, backend="lrcompile", options={"exclude": ["blocks.0.*"], **EAGER})(batch())
    assert pairs(trainer.parts["net"]) == 2 * BLOCKS - 2


def test_two_models_in_one_function_keep_their_own() -> None:
    teacher, student = Model().requires_grad_(False), Model()
    dense = copy.deepcopy([teacher, student])
    options = {"rank_ratio": 1.0, "require_saving": False, **EAGER}
    run = torch.compile(lambda ids: (teacher(ids), student(ids)), backend="lrcompile", options=options)
    ids = batch()
    for _ in range(2):
        for got, reference in zip(run(ids), dense, strict=True):
            torch.testing.assert_close(got, reference(ids), rtol=1e-4, atol=1e-4)
    assert pairs(teacher) == pairs(student) == 2 * BLOCKS


# --- wrappers ---------------------------------------------------------------------------------------------------------


def test_ddp_already_wrapped_is_refused(process_group) -> None:
    model = nn.parallel.DistributedDataParallel(Model())
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    with pytest.raises(lrcompile.AdoptError, match=r"DistributedDataParallel already: call lrcompile.adopt.* before"):
        run(batch())
    assert pairs(model) == 0


def test_fully_shard_already_applied_is_refused(process_group) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Model()
    for block in model.blocks:
        block.compile(backend="lrcompile", options=EAGER)
        fully_shard(block)
    fully_shard(model)
    with pytest.raises(lrcompile.AdoptError, match=r"call lrcompile.adopt.* before"):
        model(batch())
    assert pairs(model) == 0


def test_adopted_then_ddp_trains(process_group) -> None:
    model = Model()
    lrcompile.adopt(model, lrcompile.Recipe(), (batch(),))
    wrapped = nn.parallel.DistributedDataParallel(model)
    run = torch.compile(wrapped, backend="lrcompile", options=EAGER)
    losses = train(run, torch.optim.AdamW(model.parameters(), lr=1e-2), 8, batch())
    assert losses[-1] < 0.5 * losses[0]


# --- blocks and parts of models, compiled one by one ------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


def low_rank(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, AdoptedModule)]


@pytest.mark.parametrize("left", ["0", "1", "2"])
def test_globs_hold_for_each_block_though_one_compiled_function_serves_all(left: str, caplog) -> None:
    model = nn.Sequential(Residual(), Residual(), Residual())
    for block in model:
        block.compile(backend="lrcompile", options={"rank": 4, "exclude": [left], **EAGER})
    with caplog.at_level("INFO", "lrcompile"):
        for _ in range(3):
            model(torch.randn(3, 32))
    assert low_rank(model) == [f"{i}.mlp.{j}" for i in "012" if i != left for j in (0, 2)]
    assert f"excluded by '{left}'" in caplog.text


@pytest.mark.parametrize("compile_", ["shell", "method"])
def test_ddp_around_compiled_blocks_is_refused(process_group, compile_: str) -> None:
    model = nn.Sequential(Residual(), Residual())
    for i in range(2):
        if compile_ == "shell":
            model[i] = torch.compile(model[i], backend="lrcompile", options={"rank": 4, **EAGER})
        else:
            model[i].compile(backend="lrcompile", options={"rank": 4, **EAGER})
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(lrcompile.AdoptError, match="in the hands of DistributedDataParallel"):
        wrapped(torch.randn(3, 32))
    assert not low_rank(model)


def test_names_of_the_whole_model_are_known_inside_a_compiled_part() -> None:
    model = nn.ModuleDict({"encoder": Residual(), "decoder": Residual()})
    for name in model:
        options = {"rank": 4, "exclude": ["decoder"], **EAGER}
        model[name] = torch.compile(model[name], backend="lrcompile", options=options)
        model[name](torch.randn(3, 32))
    assert low_rank(model) == ["encoder._orig_mod.mlp.0", "encoder._orig_mod.mlp.2"]


def test_the_last_product_of_a_block_is_no_head() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Residual().mlp for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    model = Layers()
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend="lrcompile", options={"rank": 4, **EAGER})
    model(torch.randn(3, 32))
    assert len(low_rank(model)) == 4


# --- copies, and models adopted in part -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "assign"])
def test_leaves_of_a_copy_are_not_factored_again_whoever_holds_it(how: str) -> None:
    model, x = Residual(), torch.randn(3, 32)
    lrcompile.adopt(model, lrcompile.Recipe(rank=8), (x,))

    class Trainer:
        pass

    trainer = Trainer()
    if how == "deepcopy":
        trainer.model = copy.deepcopy(model)
    else:
        model.load_state_dict(model.state_dict(), assign=True)
        trainer.model = model
    names = [n for n, _ in trainer.model.named_parameters()]
    run = torch.compile(lambda t, x: t.model(x), backend="lrcompile", options={"compression": 2, **EAGER})
    torch.testing.assert_close(run(trainer, x), model(x))
    assert [n for n, _ in trainer.model.named_parameters()] == names


@pytest.mark.parametrize("copied", [True, False])
def test_a_part_adopted_by_hand_stays_and_the_rest_is_adopted(copied: bool) -> None:
    part, x = Residual(), torch.randn(3, 32)
    lrcompile.adopt(part, lrcompile.Recipe(rank=8), (x,))
    part = copy.deepcopy(part) if copied else part
    model = nn.Sequential(part, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    torch.compile(model, backend="lrcompile", options={"rank": 6, **EAGER})(x)
    assert low_rank(model) == ["0.mlp.0", "0.mlp.2", "1"]
    assert part.mlp[0].weight_a.shape == (8, 32) and model[1].weight_a.shape == (6, 32)


def test_a_weight_only_read_before_a_break_is_decided_where_it_is_multiplied() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            size = self.a.weight.norm()
            torch._dynamo.graph_break()
            y = x + self.a(x) / size
            return y + self.b(y)

    model = Broken()
    run = torch.compile(model, backend="lrcompile", options={"rank": 4, **EAGER})
    run(torch.randn(3, 32))
    assert low_rank(model) == ["a", "b"]
    penalty = torch.compile(lambda ps: sum(p.square().sum() for p in ps), backend="lrcompile", options=EAGER)
    other = Broken()
    penalty(list(other.parameters()))
    torch.compile(other, backend="lrcompile", options={"rank": 4, **EAGER})(torch.randn(3, 32))
    assert low_rank(other) == ["a", "b"]
