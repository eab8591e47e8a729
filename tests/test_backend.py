"""The one-word change: torch.compile(model, backend="lrcompile") on models as scripts have them."""

from __future__ import annotations

import copy
import logging
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lrcompile
from lrcompile.backend import parse_options
from lrcompile.weights.layers import PairedModule

VOCAB, WIDTH, BLOCKS = 50, 64, 3


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.checkpointed = checkpointed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def batch(rows: int = 4) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, 16))


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def train(model, optimizer, steps: int, ids: torch.Tensor, scheduler=None, accumulate: int = 1) -> list[float]:
    losses = []
    for _ in range(steps):
        for _ in range(accumulate):
            loss = loss_of(model, ids) / accumulate
            loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()) * accumulate)
    return losses


def pairs(model: nn.Module) -> int:
    return sum(isinstance(m, PairedModule) for m in model.modules())


def held(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(p) for g in optimizer.param_groups for p in g["params"]]


def check_followed(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    assert sorted(held(optimizer)) == sorted(id(p) for p in model.parameters() if p.requires_grad)


EAGER = {"inner": "eager"}
AOT = {"inner": "aot_eager"}


# --- the four ways of compiling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["torch.compile", "model.compile", "per block", "closure", "global"])
def test_ways_of_compiling(way: str) -> None:
    global _model_of_the_module
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = model
    if way == "torch.compile":
        run = torch.compile(model, backend="lrcompile", options=AOT)
    elif way == "model.compile":
        model.compile(backend="lrcompile", options=AOT)
    elif way == "per block":
        for block in model.blocks:
            block.compile(backend="lrcompile", options=AOT)
    elif way == "closure":
        run = torch.compile(lambda ids: model(ids), backend="lrcompile", options=AOT)
    else:
        _model_of_the_module = model
        run = torch.compile(_through_a_global, backend="lrcompile", options=AOT)
    losses = train(run, optimizer, 8, batch())
    assert pairs(model) == 2 * BLOCKS
    assert type(model.head) is nn.Linear and type(model.embed) is nn.Embedding
    assert losses[-1] < 0.5 * losses[0]
    check_followed(model, optimizer)


def _through_a_global(ids: torch.Tensor) -> torch.Tensor:
    return _model_of_the_module(ids)


def test_first_call_computes_on_the_pairs() -> None:
    model = Model()
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    ids = batch()
    first = run(ids)
    second = run(ids)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first, model(ids), rtol=1e-5, atol=1e-5)


def test_gradients_of_the_first_step_reach_the_pairs() -> None:
    model = Model()
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    ids = batch()
    loss_of(run, ids).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss_of(model, ids).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(got[n], p.grad, rtol=1e-4, atol=1e-6)


# --- options ----------------------------------------------------------------------------------------------------------


def test_unknown_option_lists_the_known_ones() -> None:
    run = torch.compile(Model(), backend="lrcompile", options={"compresion": 2.0})
    with pytest.raises(Exception, match=r"unknown option 'compresion'; known are .*compression.*rank_ratio"):
        run(batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "tensorrt"}, "choose from inductor, aot_eager, eager"),
        ({"recipe": 3}, "takes a lrcompile.Recipe"),
        ({"recipe": lrcompile.Recipe(), "rank": 3}, "put rank into the recipe"),
        ({"inner": "eager", "inductor": {}}, "no effect"),
        ({"rank": 0}, "rank must be 1 or more"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(lrcompile.RecipeError, match=message):
        parse_options(options)


def test_recipe_options_are_obeyed() -> None:
    model = Model()
    torch.compile(model, backend="lrcompile", options={"rank": 5, "exclude": ["blocks.0.*", "*.down"], **EAGER})(
        batch()
    )
    assert [n for n, m in model.named_modules() if isinstance(m, PairedModule)] == ["blocks.1.up", "blocks.2.up"]
    assert model.blocks[1].up.weight_a.shape == (5, WIDTH)


def test_globs_see_the_outermost_names_when_a_block_is_compiled() -> None:
    model = Model()
    for block in model.blocks:
        block.compile(backend="lrcompile", options={"exclude": ["blocks.*.down"], **EAGER})
    model(batch())
    assert pairs(model) == BLOCKS and type(model.blocks[1].down) is nn.Linear


def test_a_glob_that_matches_nothing() -> None:
    with pytest.raises(Exception, match="exclude='layers.*' matches no module"):
        torch.compile(Model(), backend="lrcompile", options={"exclude": ["layers.*"], **EAGER})(batch())


def test_budget_bytes_is_refused_by_the_backend() -> None:
    with pytest.raises(Exception, match="budget_bytes is about the whole model"):
        torch.compile(Model(), backend="lrcompile", options={"budget_bytes": 10**6, **EAGER})(batch())


# --- circumstances ----------------------------------------------------------------------------------------------------


def test_dynamic_shapes_and_fullgraph() -> None:
    model = Model()
    run = torch.compile(model, backend="lrcompile", dynamic=True, fullgraph=True, options=AOT)
    for rows in (4, 4, 5, 7):
        ids = batch(rows)
        torch.testing.assert_close(run(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert pairs(model) == 2 * BLOCKS


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return model(ids).float()

    run = torch.compile(step, backend="lrcompile", options=AOT)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        losses = train(run, optimizer, 10, batch())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_activation_checkpointing() -> None:
    model = Model(checkpointed=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = torch.compile(model, backend="lrcompile", fullgraph=True, options=AOT)
    losses = train(run, optimizer, 8, batch())
    assert pairs(model) == 2 * BLOCKS and losses[-1] < 0.5 * losses[0]
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


def test_evaluation_under_no_grad_before_training() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = torch.compile(model, backend="lrcompile", options=AOT)
    model.eval()
    with torch.no_grad():
        before = float(loss_of(run, batch()))
    model.train()
    losses = train(run, optimizer, 8, batch())
    assert math.isfinite(before) and losses[-1] < 0.5 * losses[0]
    check_followed(model, optimizer)


def test_inference_mode_first_leaves_trainable_weights() -> None:
    model = Model().eval()
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    with torch.inference_mode():
        run(batch())
    assert all(not p.is_inference() for p in model.parameters())
    model.train()
    train(run, torch.optim.SGD(model.parameters(), lr=0.1), 2, batch())


def test_frozen_weights_stay_frozen() -> None:
    model = Model().requires_grad_(False)
    model.head.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    train(run, optimizer, 5, batch())
    assert pairs(model) == 2 * BLOCKS and not model.blocks[0].up.weight_a.requires_grad
    check_followed(model, optimizer)


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


def test_a_model_adopted_by_hand_is_left_as_it_is() -> None:
    model = Model()
    lrcompile.adopt(model, lrcompile.Recipe(include=("blocks.0.*",)), (batch(),))
    for block in model.blocks:
        block.compile(backend="lrcompile", options=EAGER)
    model(batch())
    model(batch())
    assert pairs(model) == 2, "the other blocks were left dense on purpose"


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


def test_an_optimizer_built_later_from_an_older_list_follows() -> None:
    model = Model()
    old = list(model.parameters())
    run = torch.compile(model, backend="lrcompile", options=EAGER)
    run(batch())
    optimizer = torch.optim.AdamW(old, lr=1e-2)
    losses = train(run, optimizer, 8, batch())
    assert losses[-1] < 0.5 * losses[0]
    check_followed(model, optimizer)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_optimizer_state_already_filled_is_refused() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 1, batch())
    with pytest.raises(lrcompile.AdoptError, match=r"AdamW holds state for blocks.*call lrcompile.adopt"):
        torch.compile(model, backend="lrcompile", options=EAGER)(batch())
    assert pairs(model) == 0


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


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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


def test_nan_in_a_weight_is_named() -> None:
    model = Model()
    with torch.no_grad():
        model.blocks[1].up.weight[0, 0] = float("nan")
    with pytest.raises(lrcompile.AdoptError, match=r"blocks.1.up.weight holds 1 NaN or Inf"):
        torch.compile(model, backend="lrcompile", options=EAGER)(batch())
    assert pairs(model) == 0


# --- the log, and exactness -------------------------------------------------------------------------------------------


def test_one_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lrcompile"):
        run = torch.compile(Model(), backend="lrcompile", options=EAGER)
        for _ in range(3):
            run(batch())
    (line,) = [r.getMessage() for r in caplog.records if r.name == "lrcompile"]
    for part in (
        "adopted 6 of 7 linear weights",
        "98,304 ->",
        "all parameters 106,098 ->",
        "mean relative weight error",
        " s",
    ):
        assert part in line


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_compiled_training_equals_eager_training(inner: str) -> None:
    """20 steps of an adopted model: aot_eager runs the same kernels; Inductor fuses, so its sums round differently."""
    compiled, ids = Model(), batch()
    lrcompile.adopt(compiled, lrcompile.Recipe(), (ids,))
    eager = copy.deepcopy(compiled)
    run = torch.compile(compiled, backend="lrcompile", options={"inner": inner})
    got = train(run, torch.optim.SGD(compiled.parameters(), lr=0.1), 20, ids)
    want = train(eager, torch.optim.SGD(eager.parameters(), lr=0.1), 20, ids)
    if inner == "aot_eager":
        assert got == want, "bit for bit"
    else:
        assert got == pytest.approx(want, rel=2e-5)  # fp32 rounding grown over 20 steps
    assert want[-1] < want[0]


def test_verify_option_checks_the_program_passes() -> None:
    model, ids = Model(), batch()
    lrcompile.adopt(model, lrcompile.Recipe(), (ids,))
    torch.testing.assert_close(
        torch.compile(model, backend="lrcompile", options={"verify": True, **EAGER})(ids), model(ids)
    )


def test_found_by_name_without_importing_us() -> None:
    import subprocess
    import sys

    code = (
        "import torch, sys; m = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(3)]);"
        "f = torch.compile(m, backend='lrcompile', options={'inner': 'eager'}); f(torch.randn(2, 64));"
        "print(type(m[0]).__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True)
    assert out.stdout.split() == ["LowRankLinear"]


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
