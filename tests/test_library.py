"""Models that bitsandbytes and torchao have quantised: planned, adopted as they are, trained beside, given back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import AdoptError, PlanError, Recipe
from lrcompile.weights.adopt import plan_of
from lrcompile.weights.formats import recognise
from lrcompile.weights.library import export_quantised

from .kernels.numbers import assert_same


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def with_bnb(dense: Net, kind: str, nested: bool = False) -> Net:
    bnb = pytest.importorskip("bitsandbytes")
    model = copy.deepcopy(dense)
    for name, layer in dense.named_children():
        if kind == "int8-bnb":
            made = bnb.nn.Linear8bitLt(
                layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
            )
        else:
            made = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, torch.float32, nested, kind
            )
        made.load_state_dict(layer.state_dict())
        setattr(model, name, made.to("cpu"))
    return model


def with_torchao(dense: Net, kind: str) -> Net:
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(dense)
    form = lrcompile.weights.formats.format_of(kind) if kind.startswith("int4") else None
    if form is None:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2))
        return model
    for layer in model.children():
        packed = lrcompile.weights.formats.quantise(form, layer.weight)
        exported = form.export(packed, tuple(layer.weight.shape), layer.weight.dtype)
        layer.weight = nn.Parameter(exported, requires_grad=False)
    return model


MADE = {
    "nf4": lambda m: with_bnb(m, "nf4"),
    "nf4-nested": lambda m: with_bnb(m, "nf4", True),
    "fp4": lambda m: with_bnb(m, "fp4"),
    "int8-bnb": lambda m: with_bnb(m, "int8-bnb"),
    "int8": lambda m: with_torchao(m, "int8"),
    "int4-32": lambda m: with_torchao(m, "int4-32"),
}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 64)


@pytest.fixture(params=MADE)
def made(request) -> tuple[str, Net]:
    return request.param, MADE[request.param](Net())


def packed_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("up", "down"):
        seen = recognise(model.get_submodule(name).weight)
        assert seen is not None
        found |= {f"{name}.{key}": t.clone() for key, t in seen.packed.items()}
    return found


def test_adopted_as_it_is_with_a_pair_and_given_back(made: tuple[str, Net], x: torch.Tensor):
    kind, model = made
    before = packed_of(model)
    recipe = Recipe(weights=kind, rank=4, trainable=[])
    kinds = {name: type(m) for name, m in model.named_modules()}
    planned = lrcompile.plan(model, (x,), recipe)
    assert {type(m) for m in model.modules()} == set(kinds.values()), "planning touches nothing"
    assert {e.fate for e in planned.adopted} == {f"{kind} + rank 4"} and {e.init for e in planned.adopted} == {"zero"}
    report = lrcompile.inspect(model, (x,), recipe, verify=True)
    assert set(report.errors.values()) == {0.0}
    lrcompile.adopt(model, recipe, (x,))
    names = {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"weight_a", "weight_b"}
    for name, module in (("up", model.up), ("down", model.down)):
        form = dict(module.lr_forms)["weight"]
        keys = form.format_of("base").keys
        for key, t in zip(keys, form.packed("base", module.lr_parts("weight")), strict=True):
            assert torch.equal(t, before[f"{name}.{key}"]), key
    model(x).sum().backward()
    assert model.up.weight_b.grad.abs().sum() > 0 and model.up.weight_a.grad is not None
    with pytest.raises(AdoptError, match="up.weight is .* rank 4, which no library holds"):
        export_quantised(model)


def test_base_alone_goes_there_and_back(made: tuple[str, Net], x: torch.Tensor):
    kind, model = made
    before = packed_of(model)
    wanted = copy.deepcopy(model)
    lrcompile.adopt(model, Recipe(weights=kind), (x,))
    assert {e.fate for e in plan_of(model).adopted} == {kind}
    y = model(x).detach()
    export_quantised(model)
    after = packed_of(model)
    assert before.keys() == after.keys() and all(torch.equal(after[k], t) for k, t in before.items())
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in wanted.named_modules()}
    if kind.startswith("int4"):
        return  # torchao has no such product on the CPU
    for theirs in (wanted(x), model(x)):
        assert_same(theirs.detach(), y, torch.float32, roundings=2)


def test_what_can_not_be(x: torch.Tensor):
    model = with_bnb(Net(), "nf4")
    with pytest.raises(PlanError, match="up.weight is quantised to nf4 already.*weights='nf4'"):
        lrcompile.plan(model, (x,), Recipe(rank=4))
    with pytest.raises(PlanError, match="quantised already, and init='loftq' starts from the dense weight"):
        lrcompile.plan(model, (x,), Recipe(weights="nf4", rank=4, init="loftq"))
    with pytest.raises(AdoptError, match="nothing of the model is adopted"):
        export_quantised(model)
