"""adopt, adopt_like and merge: odd modules, what survives, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import lrcompile
from lrcompile import AdoptError, PlanError, Recipe
from lrcompile.weights.layers import PairedModule

WIDTH = 32
TORCHS_MARK = {"_is_torch_compile"}  # torch.compile leaves it on a module
X = (torch.zeros(4, WIDTH),)


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH, hidden: int = 48, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, dtype=dtype), nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(width, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def adopted(model: nn.Module | None = None, rank: int = 4, inputs: Any = X, **recipe: Any) -> Any:
    return lrcompile.adopt(model or Mlp(), Recipe(rank=rank, **recipe), inputs)


def snapshot(model: nn.Module) -> list[Any]:
    """Objects, classes and values: equal only where nothing was changed."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    held = [(n, id(t), t.requires_grad, t.dtype, str(t.tolist()) if not t.is_meta else "") for n, t in tensors]
    return [held, [(n, id(m), type(m), sorted({*vars(m)} - TORCHS_MARK), m.training) for n, m in model.named_modules()]]


def dense_twin(model: nn.Module) -> nn.Module:
    """The same function with dense weights, to compare outputs and gradients with."""
    return lrcompile.merge(copy.deepcopy(model))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same_function(model: nn.Module, *inputs: torch.Tensor, **kwargs: Any) -> None:
    twin = dense_twin(model)
    assert not any(isinstance(m, PairedModule) for m in twin.modules())
    close(model(*inputs, **kwargs), twin(*inputs, **kwargs))


# --- what is adopted --------------------------------------------------------------------------------------------------


def test_a_linear_stays_the_same_object() -> None:
    model = Mlp()
    modules, weight = list(model.modules()), model.up.weight.detach().clone()
    assert lrcompile.adopt(model, Recipe(rank=WIDTH, require_saving=False), X) is model
    assert list(model.modules()) == modules
    up = model.up
    assert isinstance(up, nn.Linear) and isinstance(up, PairedModule)
    assert up.weight_a.shape == (WIDTH, WIDTH) and up.weight_b.shape == (48, WIDTH)
    assert up.weight.shape == (48, WIDTH) and up.weight.dtype == torch.float32 and up.weight.device.type == "cpu"
    close(up.weight, weight)  # full rank loses nothing
    assert [n for n, _ in model.named_parameters()] == [
        "up.weight_a", "up.weight_b", "up.bias", "down.weight_a", "down.weight_b", "norm.weight", "norm.bias",
    ]  # fmt: skip
    assert "in_features=32, out_features=48, bias=True, weight: rank 32" in repr(model)
    same_function(model, torch.randn(4, WIDTH))


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


def test_conv1d() -> None:
    Conv1D = pytest.importorskip("transformers").pytorch_utils.Conv1D

    class Gpt2Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc, self.c_proj = Conv1D(48, WIDTH), Conv1D(WIDTH, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.c_proj(F.gelu(self.c_fc(x)))

    model = Gpt2Mlp()
    nn.init.normal_(model.c_fc.bias)
    weight = model.c_fc.weight.detach().clone()
    adopted(model, inputs=(torch.zeros(2, 4, WIDTH),), rank=WIDTH, require_saving=False)
    assert model.c_fc.weight_a.shape == (WIDTH, WIDTH) and model.c_fc.weight_b.shape == (48, WIDTH)
    assert isinstance(model.c_fc, Conv1D) and model.c_fc.weight.shape == (WIDTH, 48)
    close(model.c_fc.weight, weight)
    same_function(model, torch.randn(2, 4, WIDTH))
    assert lrcompile.original_state_dict(model)["c_fc.weight"].is_contiguous()


class Attend(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True, **options)
        nn.init.normal_(self.attn.in_proj_bias)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        y = x if y is None else y
        return x + self.attn(x, y, y, need_weights=False)[0]


def test_multihead_attention() -> None:
    x, y = torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH)
    for options, inputs in [({}, (x,)), ({}, (x, y)), ({"kdim": WIDTH, "add_bias_kv": True}, (x,))]:
        model = adopted(Attend(**options), inputs=inputs)
        assert model.attn.in_proj_weight_a.shape == (4, WIDTH) and model.attn.in_proj_weight_b.shape == (3 * WIDTH, 4)
        assert model.attn.out_proj.weight_a.shape == (4, WIDTH)
        same_function(model, *inputs)
        same_function(model.eval(), *inputs)
        with torch.no_grad():
            same_function(model, *inputs)
        model(*inputs).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_separate_projections_of_multihead_attention() -> None:
    model = Attend(kdim=24, vdim=20)

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = model.attn

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return q + self.attn(q, k, v)[0]

    cross = Cross()
    inputs = (torch.randn(2, 5, WIDTH), torch.randn(2, 7, 24), torch.randn(2, 7, 20))
    adopted(cross, inputs=inputs)
    names = dict(cross.named_parameters())
    assert {f"attn.{c}_proj_weight_{s}" for c in "qkv" for s in "ab"} <= set(names)
    same_function(cross, *inputs)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_and_its_fast_path(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True, dropout=0.0, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x, mask = torch.randn(2, 6, WIDTH), torch.zeros(2, 6, dtype=torch.bool)
    mask[:, 4:] = True
    adopted(model, inputs={"src": x})
    assert sum(n.endswith("_a") for n, _ in model.named_parameters()) == 8
    model.eval()
    slow = model(x, src_key_padding_mask=mask)
    with torch.no_grad():  # torch hands the weights to one fused function here
        fast = model(x, src_key_padding_mask=mask)
    close(fast[:, :4], slow[:, :4], 1e-4)
    same_function(model, x, src_key_padding_mask=mask)


class Raw(nn.Module):
    """A parameter with no module of its own; some kept in torch's containers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, 48) / 6)
        self.more = nn.ParameterList([nn.Parameter(torch.randn(48, 48) / 7) for _ in range(2)])
        self.named = nn.ParameterDict({"out": nn.Parameter(torch.randn(48, WIDTH) / 7)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.w
        for w in self.more:
            y = torch.matmul(y, w).relu()
        return x + torch.einsum("bi,ij->bj", y, self.named["out"])


def test_raw_parameters_and_containers() -> None:
    model = adopted(Raw())
    assert model.w_a.shape == (4, WIDTH) and model.w_b.shape == (48, 4) and model.w.shape == (WIDTH, 48)
    assert len(model.more) == 2 and len(model.named) == 1 and list(model.named) == ["out"]
    assert [n for n, _ in model.named_parameters()] == [
        "w_a", "w_b", "more.0_a", "more.0_b", "more.1_a", "more.1_b", "named.out_a", "named.out_b",
    ]  # fmt: skip
    same_function(model, torch.randn(4, WIDTH))
    model(torch.randn(4, WIDTH)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    state = model.state_dict()
    again = lrcompile.adopt_like(Raw(), state)
    again.load_state_dict(state)
    assert torch.equal(again(torch.ones(4, WIDTH)), model(torch.ones(4, WIDTH)))


class Albert(nn.Module):
    """One module under two names, one weight in two modules, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        shared = Mlp()
        self.layers = nn.ModuleList([shared, shared, Mlp()])
        self.extra = nn.Linear(WIDTH, 48)
        self.extra.weight = shared.up.weight
        self.lm_head = nn.Linear(WIDTH, 64, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x + self.extra(x)[..., :WIDTH])


IDS = (torch.arange(8).reshape(2, 4),)


def test_shared_modules_and_weights_are_adopted_once() -> None:
    model = Albert()
    made = lrcompile.plan(model, IDS, Recipe(rank=4))
    shared = ("layers.0.up.weight", "layers.1.up.weight", "extra.weight")
    assert next(e for e in made.pairs if e.key == shared[0]).names == shared
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


# --- what survives ----------------------------------------------------------------------------------------------------


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


def test_hooks_on_replaced_modules_go_on_working() -> None:
    model, called = Mlp(), []
    up = model.up
    up.register_forward_pre_hook(lambda m, args: called.append("pre"))
    up.register_forward_hook(lambda m, args, out: called.append("post") or 2 * out)  # type: ignore[func-returns-value]
    up.register_full_backward_hook(lambda m, gi, go: called.append("backward"))
    up.register_state_dict_post_hook(lambda m, state, prefix, meta: called.append("state"))
    up.register_load_state_dict_post_hook(lambda m, keys: called.append("load"))
    up.register_load_state_dict_pre_hook(lambda m, state, prefix, *a: called.append("preload"))
    plain = copy.deepcopy(model)
    adopted(model, rank=WIDTH, require_saving=False)
    called.clear()
    x = torch.randn(4, WIDTH)
    y = model(x)
    y.sum().backward()
    model.load_state_dict(model.state_dict())
    assert called == ["pre", "post", "backward", "state", "preload", "load"]
    close(y, plain(x), 1e-4)
    called.clear()
    close(lrcompile.merge(model)(x), y, 1e-4)
    assert called == ["pre", "post"] and type(up) is nn.Linear


def test_a_replaced_forward_of_the_instance_stays() -> None:
    model = Mlp()
    model.up.forward = lambda x: F.linear(x, model.up.weight, model.up.bias) + 1  # type: ignore[method-assign]
    adopted(model)
    close(model.up(X[0]), model.up.bias.expand(4, 48) + 1)


def test_a_subclass_keeps_its_own_forward() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * F.linear(x, self.weight, self.bias)

    model = Mlp()
    model.up = Scaled(WIDTH, 48)
    adopted(model)
    assert isinstance(model.up, Scaled) and model.up.weight_a.shape == (4, WIDTH)
    same_function(model, torch.randn(4, WIDTH))


def test_eager_gradients_are_those_of_the_dense_product() -> None:
    model = adopted(Mlp(dtype=torch.float64), inputs=(torch.zeros(4, WIDTH, dtype=torch.float64),))
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    a, b = (p.detach().clone().requires_grad_() for p in (model.up.weight_a, model.up.weight_b))
    target = torch.randn(3, 4, 48, dtype=torch.float64)
    (model.up(x) * target).sum().backward()
    gx, x.grad = x.grad, None
    (F.linear(x, b @ a, model.up.bias.detach()) * target).sum().backward()
    for mine, autograd in [(gx, x.grad), (model.up.weight_a.grad, a.grad), (model.up.weight_b.grad, b.grad)]:
        close(mine, autograd, 1e-12)  # type: ignore[arg-type]
    (model.up.weight * torch.ones(48, WIDTH)).sum().backward()  # reading .weight is differentiable too


def test_weight_read_under_autocast_keeps_the_stored_dtype() -> None:
    model = adopted()
    product = model.up.weight.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.up.weight.dtype == torch.float32
        assert model.up(X[0]).dtype == torch.bfloat16
        state = lrcompile.original_state_dict(model)
        merged = dense_twin(model)
    assert torch.equal(state["up.weight"], product)
    assert torch.equal(merged.up.weight, product)  # type: ignore[arg-type,union-attr]


def test_copies_and_pickles(tmp_path: Path) -> None:
    model = adopted(Albert(), inputs=IDS)
    y = model(*IDS)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(again(*IDS), y)
        assert type(again.layers[0].up) is type(model.layers[0].up)
        assert again.extra.weight_a is again.layers[1].up.weight_a is not model.extra.weight_a
        assert list(again.state_dict()) == list(model.state_dict())
        again(*IDS).sum().backward()
        assert model.extra.weight_a.grad is None
        lrcompile.merge(again)
    shallow = copy.copy(model.layers[2].up)
    assert torch.equal(shallow(X[0]), model.layers[2].up(X[0]))


def test_another_process_reads_the_pickle(tmp_path: Path) -> None:
    model = lrcompile.adopt(nn.Sequential(nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, 4)), Recipe(rank=4), X)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); print(m(torch.ones(1, 32)).sum().item())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, check=True
    )
    assert float(out.stdout) == pytest.approx(model(torch.ones(1, WIDTH)).sum().item(), rel=1e-5)


def test_moving_and_converting_afterwards() -> None:
    model = adopted().to(torch.bfloat16)
    assert model.up.weight.dtype == torch.bfloat16 and model.up.weight_a.dtype == torch.bfloat16
    assert model(torch.zeros(4, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert all(p.is_meta for p in model.to("meta").parameters())
    model.requires_grad_(False)
    assert lrcompile.merge(model).up.weight.is_meta


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
        r"mean relative weight error (0\.\d{3}), \d+\.\d s",
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
        assert not isinstance(model.up, PairedModule) and model.down.weight_a.shape == (4, 48)
        dense = {e.key: e.reason for e in made.entries if e.rank is None}
        assert any(k.startswith("up.parametrizations") and why for k, why in dense.items()), dense
        assert torch.equal(model.up(X[0] + 1), y)
        model(torch.randn(4, WIDTH)).sum().backward()


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


# --- merge ------------------------------------------------------------------------------------------------------------


def test_merge_gives_the_dense_model_back() -> None:
    model = Mlp()
    names = list(model.state_dict())
    adopted(model)
    x = torch.randn(4, WIDTH)
    y = model(x)
    assert lrcompile.merge(model) is model
    assert type(model.up) is nn.Linear and type(model.down) is nn.Linear and list(model.state_dict()) == names
    assert model.up.weight.is_leaf and model.up.weight.requires_grad and model.up.weight.is_contiguous()
    assert "rank" not in repr(model) and "lr_pairs" not in vars(model.up)
    close(model(x), y)
    with pytest.raises(AdoptError, match="nothing to merge"):
        lrcompile.merge(model)
    adopted(model, rank=4)  # of rank 4 by now: nothing is lost
    close(model(x), y, 1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_merge_in_any_mode(mode: Any) -> None:
    model = adopted(Raw())
    with mode():
        lrcompile.merge(model)
    assert not model.w.is_inference() and model.w.requires_grad
    model(X[0] + 1).sum().backward()


# --- adopt_like -------------------------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: Any = None) -> None:
    x = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH) if x is None else x
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def resumed(file: Path, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What a user's script does, and the one line more."""
    saved = torch.load(file, weights_only=True)
    lrcompile.adopt_like(model, saved["model"])
    model.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer


@pytest.mark.parametrize("make", [Mlp, Raw, Albert])
def test_the_usual_script_resumes_bit_for_bit(make: type[nn.Module], tmp_path: Path) -> None:
    x = IDS[0] if make is Albert else None
    model = adopted(make(), inputs=IDS if make is Albert else X)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, 3, x)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    train(model, optimizer, 2, x)
    again, its = resumed(tmp_path / "last.pt", make())
    train(again, its, 2, x)
    for (n, p), (m, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert n == m and torch.equal(p, q), n
    assert repr(again) == repr(model)
    with torch.device("meta"):
        shapes = make()
    state = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    lrcompile.adopt_like(shapes, state).load_state_dict(state, assign=True)
    assert not any(p.is_meta for p in shapes.parameters())


def test_prefixes_of_wrappers_dont_matter(process_group: None) -> None:
    model = adopted(Albert(), inputs=IDS)
    y = model(*IDS)
    compiled: Any = torch.compile(model)
    inner = copy.deepcopy(model)
    inner.layers[2] = torch.compile(inner.layers[2])
    for wrapped in (model, compiled, nn.parallel.DistributedDataParallel(model), inner):
        state = wrapped.state_dict()
        fresh: Any = Albert()
        lrcompile.adopt_like(fresh, state)
        fresh.load_state_dict({k.replace("_orig_mod.", "").removeprefix("module."): v for k, v in state.items()})
        assert torch.equal(fresh(*IDS), y)
        fresh_compiled: Any = torch.compile(Albert())
        lrcompile.adopt_like(fresh_compiled, state)
        assert fresh_compiled._orig_mod.layers[2].up.weight_a.shape == (4, WIDTH)
    fresh_compiled.load_state_dict(compiled.state_dict())


def test_a_child_called_module() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.up = Mlp(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.up(self.module(x))

    model = adopted(Holder(), exclude=("up",))
    state = model.state_dict()
    again = lrcompile.adopt_like(Holder(), state)
    again.load_state_dict(state)
    assert type(again.up) is nn.Linear and torch.equal(again(X[0] + 1), model(X[0] + 1))


def test_states_that_dont_belong_are_refused() -> None:
    state = adopted().state_dict()
    before_bad = {**state, "up._extra_state": torch.zeros(3, dtype=torch.uint8)}
    for model, given, error, said in [
        (Mlp(), Mlp().state_dict(), AdoptError, "holds no lrcompile Plan"),
        (Mlp(), {}, AdoptError, "holds no lrcompile Plan"),
        (Raw(), state, PlanError, "another model.*'up.weight', this model has no such parameter"),
        (Mlp(hidden=64), state, PlanError, r"another model.*'up.weight' is \(48, 32\) there, \(64, 32\) here"),
        (Mlp(), adopted(Raw()).state_dict(), PlanError, "another model"),
    ]:
        before = snapshot(model)
        with pytest.raises(error, match=said):
            lrcompile.adopt_like(model, given)
        assert snapshot(model) == before
    with pytest.raises(AdoptError, match="adopted already"):
        lrcompile.adopt_like(adopted(), state)
    half = lrcompile.adopt_like(Mlp(), before_bad)  # the other module's pair is still told
    with pytest.raises(RuntimeError):
        half.load_state_dict(before_bad)


def test_a_state_of_another_rank_or_none_is_refused() -> None:
    model = adopted(rank=4)
    with pytest.raises(lrcompile.StateError, match=r"'weight': 8.*'weight': 4.*adopt_like"):
        model.load_state_dict(adopted(rank=8).state_dict())
    with pytest.raises(RuntimeError, match="weight_a"):
        model.load_state_dict(Mlp().state_dict())
    with pytest.raises(RuntimeError, match="weight_a"):
        Mlp().load_state_dict(model.state_dict())


def test_a_module_with_extra_state_of_its_own() -> None:
    class Counting(nn.Linear):
        calls = 0

        def get_extra_state(self) -> Any:
            return {"calls": self.calls}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"]

    def make() -> Mlp:
        model = Mlp()
        model.up = Counting(WIDTH, 48)
        return model

    model = adopted(make())
    model.up.calls = 7
    state = model.state_dict()
    again = lrcompile.adopt_like(make(), state)
    again.load_state_dict(state)
    assert again.up.calls == 7  # type: ignore[attr-defined]
    plain = make()
    plain.load_state_dict(lrcompile.original_state_dict(model))
    assert plain.up.calls == 7  # type: ignore[attr-defined]
