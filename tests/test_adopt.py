"""adopt: the best pair, shared weights once, what survives, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import AdoptError, PlanError, Recipe
from lrcompile.weights.layers import AdoptedModule

from .helpers_adopt import IDS, WIDTH, Albert, Mlp, X, adopted, close, dense_twin, same_function, snapshot

# --- what is adopted --------------------------------------------------------------------------------------------------


def test_plan_and_recipe_do_the_same() -> None:
    one = Mlp()
    other = copy.deepcopy(one)
    lrcompile.adopt(one, lrcompile.plan(one, X, Recipe(rank=5)))
    lrcompile.adopt(other, Recipe(rank=5), X)
    for (n, p), (m, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert n == m and torch.equal(p, q)


def test_the_pair_is_the_best_of_its_rank() -> None:
    model = Mlp()
    weight = model.up.weight.detach().clone()
    adopted(model)
    s = torch.linalg.svdvals(weight.double())
    best = s[4:].square().sum().sqrt()
    found = torch.linalg.norm((weight - model.up.weight).double())
    assert found <= best * (1 + 1e-5)
    close(model.up.weight_a.norm(dim=1), model.up.weight_b.norm(dim=0), 1e-4)  # √Σ on each side


def test_shared_modules_and_weights_are_adopted_once() -> None:
    model = Albert()
    made = lrcompile.plan(model, IDS, Recipe(rank=4))
    shared = ("layers.0.up.weight", "layers.1.up.weight", "extra.weight")
    assert next(e for e in made.adopted if e.key == shared[0]).names == shared
    assert next(e for e in made.entries if "lm_head.weight" in e.names).reason == "tied to an embedding"
    lrcompile.adopt(model, made)
    assert model.layers[0] is model.layers[1]
    assert model.extra.weight_a is model.layers[0].up.weight_a and model.extra.weight_b is model.layers[0].up.weight_b
    assert model.lm_head.weight is model.embed.weight and type(model.embed) is nn.Embedding
    assert made.parameters[1] == sum(p.numel() for p in model.parameters())
    twin = dense_twin(model)
    assert twin.extra.weight is twin.layers[1].up.weight  # type: ignore[union-attr,index]
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in Albert().named_parameters()]
    same_function(model, *IDS)
    both = copy.deepcopy(model)
    assert both.extra.weight_a is both.layers[1].up.weight_a is not model.extra.weight_a


def test_a_tied_head_is_taken_by_name() -> None:
    model = adopted(Albert(), inputs=IDS, include=("*", "lm_head"))
    assert model.embed.weight_a is model.lm_head.weight_a and model.embed.weight_a.shape == (4, WIDTH)
    assert isinstance(model.embed, nn.Embedding) and "weight: rank 4" in repr(model.embed)
    same_function(model, *IDS)
    twin = dense_twin(model)
    assert twin.embed.weight is twin.lm_head.weight
    model(*IDS).sum().backward()
    twin(*IDS).sum().backward()
    close(model.embed.weight_b.grad, twin.embed.weight.grad @ model.embed.weight_a.T, 1e-4)  # type: ignore[union-attr,operator]


# --- what survives, whatever mode the caller is in --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_mode_gradients_and_buffers_survive(dtype: torch.dtype) -> None:
    model = Mlp(dtype=dtype).eval()
    model.down.weight.requires_grad_(False)
    model.up.register_buffer("counts", torch.arange(3))
    model.up.train()
    counts = model.up.counts
    adopted(model, inputs=(torch.zeros(4, WIDTH, dtype=dtype),))
    assert not model.training and model.up.training and not model.down.training
    assert model.up.counts is counts
    for p in model.parameters():
        assert p.dtype == dtype and p.device.type == "cpu" and p.is_leaf and isinstance(p, nn.Parameter)
    assert model.up.weight.dtype == dtype
    assert not model.down.weight_a.requires_grad and not model.down.weight_b.requires_grad
    assert model.up.weight_a.requires_grad and model.up.weight_b.requires_grad
    assert model(torch.zeros(4, WIDTH, dtype=dtype)).dtype == dtype
    assert not dense_twin(model).down.weight.requires_grad  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "autocast", "default_dtype", "default_device"])
def test_leaves_are_ordinary_whatever_mode_the_caller_is_in(mode: str) -> None:
    model = Mlp()
    plain = adopted(copy.deepcopy(model))
    around: Any = {
        "inference_mode": torch.inference_mode,
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "default_dtype": lambda: torch.autograd.graph.save_on_cpu(),
        "default_device": lambda: torch.device("meta"),
    }[mode]
    made = lrcompile.plan(model, X, Recipe(rank=4))
    if mode == "default_dtype":
        torch.set_default_dtype(torch.float64)
    try:
        with around():
            lrcompile.adopt(model, made)
            state = model.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.is_leaf and p.requires_grad and not p.is_inference(), name
        assert p.dtype == torch.float32 and torch.equal(p, q), name
    model(torch.randn(4, WIDTH)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    lrcompile.adopt_like(Mlp(), state).load_state_dict(state)


def test_adopting_by_recipe_under_inference_mode() -> None:
    model = Mlp()
    with torch.inference_mode():
        adopted(model)
    model(torch.randn(4, WIDTH)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_random_stream_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024))
    before = torch.random.get_rng_state()
    lrcompile.adopt(model, Recipe(rank=8, svd="randomized", include=("*", "0")), (torch.zeros(1, 1024),))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_meta_model_allocates_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        model = Mlp(8192, 32768)
    lrcompile.adopt(model, Recipe(), (torch.zeros(1, 8192),))
    assert all(p.is_meta for p in model.parameters()) and model.up.weight.is_meta
    assert all(p.requires_grad for p in model.parameters())
    assert "mean relative weight error not computed" in caplog.text


def test_the_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lrcompile")
    model = Mlp()
    before = sum(p.numel() for p in model.parameters())
    adopted(model, exclude=("up",))
    after = sum(p.numel() for p in model.parameters())
    [record] = [r for r in caplog.records if r.name.startswith("lrcompile") and r.levelno == logging.INFO]
    said = re.fullmatch(
        r"adopted 1 of 2 linear weights: ([\d,]+) -> ([\d,]+) numbers \(([\d.]+)x\), "
        r"all parameters ([\d,]+) -> ([\d,]+), "
        r"mean relative weight error (0\.\d{3}), \d+\.\d s; left dense: excluded by 'up': up",
        record.getMessage(),
    )
    assert said, record.getMessage()
    numbers = [int(n.replace(",", "")) for n in said.group(1, 2, 4, 5)]
    assert numbers == [48 * WIDTH, 4 * (48 + WIDTH), before, after]
    assert float(said[3]) == pytest.approx(numbers[0] / numbers[1], abs=0.01)


# --- what is refused, and that nothing is changed then ----------------------------------------------------------------


def refused(model: nn.Module, error: type[Exception], said: str, *args: Any) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=said):
        lrcompile.adopt(model, *args)
    assert snapshot(model) == before


def test_twice_is_an_error() -> None:
    model = Mlp()
    made = lrcompile.plan(model, X)
    lrcompile.adopt(model, made)
    refused(model, AdoptError, "up is adopted already", made)
    refused(model, AdoptError, "up is adopted already", Recipe(), X)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_named_and_nothing_is_changed(bad: float) -> None:
    model = Mlp()
    with torch.no_grad():
        model.down.weight[3, 5] = bad
    refused(model, AdoptError, "down.weight holds 1 NaN or Inf", Recipe(rank=4), X)
    adopted(model, exclude=("down.weight",))


def test_an_integer_weight_is_named() -> None:
    class Quantised(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=torch.int8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x @ self.q.to(x.dtype) + x)

    refused(Quantised(), PlanError, r"q is stored as torch.int8.*exclude=\['q'\]", Recipe(rank=4), X)
    assert adopted(Quantised(), exclude=("q",)).q.dtype == torch.int8


def test_arguments_that_dont_go_together() -> None:
    refused(Mlp(), AdoptError, "needs example inputs", Recipe())
    refused(Mlp(), AdoptError, "a Plan has its decisions", lrcompile.plan(Mlp(), X), X)
    refused(Mlp(), AdoptError, "a Plan or a Recipe, got float", 2.64, X)
    refused(Mlp(), PlanError, "rank=40 is above", Recipe(rank=40), X)


def test_names_that_are_taken_already() -> None:
    class Lora(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, 48)
            self.weight_a = nn.Parameter(torch.randn(4, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + (x @ self.weight_a.T).sum()

    model = Mlp()
    model.up = Lora()
    refused(model, AdoptError, "up.*weight_a.*exclude", Recipe(rank=4), X)
    adopted(model, exclude=("up.weight", "up.weight_a"))


def test_parametrized_modules_stay_dense_and_work() -> None:
    class Doubled(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    def by_weight_norm(m: nn.Module) -> None:
        nn.utils.parametrizations.weight_norm(m)

    def by_spectral_norm(m: nn.Module) -> None:
        nn.utils.parametrizations.spectral_norm(m)

    def by_own(m: nn.Module) -> None:
        nn.utils.parametrize.register_parametrization(m, "weight", Doubled())

    for wrap in (by_weight_norm, by_spectral_norm, by_own):
        model = Mlp().eval()
        wrap(model.up)
        y = model.up(X[0] + 1)
        made = lrcompile.plan(model, X, Recipe(rank=4))
        lrcompile.adopt(model, made)
        assert not isinstance(model.up, AdoptedModule) and model.down.weight_a.shape == (4, 48)
        dense = {e.key: e.reason for e in made.entries if e.rank is None}
        assert any(k.startswith("up.parametrizations") and why for k, why in dense.items()), dense
        assert torch.equal(model.up(X[0] + 1), y)
        model(torch.randn(4, WIDTH)).sum().backward()


def test_wrapped_models_are_refused_with_the_fix(process_group: None) -> None:
    ddp = nn.parallel.DistributedDataParallel(Mlp())
    made = lrcompile.plan(Mlp(), X, Recipe(rank=4))
    for args in ((Recipe(rank=4), X), (made,)):
        refused(ddp, AdoptError, r"wrapped in DistributedDataParallel already; call lrcompile.adopt.*before", *args)
    with pytest.raises(AdoptError, match=r"before wrapping"):
        lrcompile.adopt_like(ddp, adopted().state_dict())


def test_sharded_models_are_refused_with_the_fix(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    made = lrcompile.plan(Mlp(), X, Recipe(rank=4))
    model = Mlp()
    model.up.weight = nn.Parameter(distribute_tensor(model.up.weight.data, mesh))
    for args in ((made,), (Recipe(rank=4), X)):
        with pytest.raises(AdoptError, match=r"up.weight is a DTensor.*before fully_shard"):
            lrcompile.adopt(model, *args)
    assert isinstance(model.up.weight, DTensor)
    for args in ((made,), (Recipe(rank=4), X)):
        with pytest.raises(AdoptError, match=r"before fully_shard"):
            lrcompile.adopt(fully_shard(Mlp(), mesh=mesh), *args)


def test_adopted_models_are_wrapped_and_sharded(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = adopted()
    x = torch.randn(4, WIDTH)
    y = model(x)
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    assert torch.equal(ddp(x), y)
    sharded = copy.deepcopy(model)
    for child in (sharded.up, sharded):
        fully_shard(child, mesh=init_device_mesh("cpu", (1,)))
    close(sharded(x), y)
    sharded(x).sum().backward()
    optimizer = torch.optim.AdamW(sharded.parameters())
    optimizer.step()
    assert not torch.equal(sharded(x), y)
    with pytest.raises(AdoptError, match="up.weight_a is a DTensor"):
        lrcompile.merge(sharded)
