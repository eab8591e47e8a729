"""The eager module: its class, its computed weight, forward and gradients; hooks, copies, pickles, moves."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrcompile
from lrcompile import Recipe
from lrcompile.weights.layers import AdoptedModule

from .helpers_adopt import IDS, WIDTH, Albert, Mlp, Raw, X, adopted, close, dense_twin, same_function

# --- each kind of module ----------------------------------------------------------------------------------------------


def test_a_linear_stays_the_same_object() -> None:
    model = Mlp()
    modules, weight = list(model.modules()), model.up.weight.detach().clone()
    assert lrcompile.adopt(model, Recipe(rank=WIDTH, require_saving=False), X) is model
    assert list(model.modules()) == modules
    up = model.up
    assert isinstance(up, nn.Linear) and isinstance(up, AdoptedModule)
    assert up.weight_a.shape == (WIDTH, WIDTH) and up.weight_b.shape == (48, WIDTH)
    assert up.weight.shape == (48, WIDTH) and up.weight.dtype == torch.float32 and up.weight.device.type == "cpu"
    close(up.weight, weight)  # full rank loses nothing
    assert [n for n, _ in model.named_parameters()] == [
        "up.weight_a", "up.weight_b", "up.bias", "down.weight_a", "down.weight_b", "norm.weight", "norm.bias",
    ]  # fmt: skip
    assert "in_features=32, out_features=48, bias=True, weight: rank 32" in repr(model)
    same_function(model, torch.randn(4, WIDTH))


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


# --- its forward, and reading its weight ------------------------------------------------------------------------------


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


# --- hooks, copies, pickles, moves ------------------------------------------------------------------------------------


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
