"""The owners that the backend finds: each model and block keeps its own pairs; wrappers are recognised."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lrcompile

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
