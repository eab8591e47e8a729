"""Which optimizer gets which parameter, with which group; Muon; decay of products; all of it sharded."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import Recipe
from lrcompile.errors import MissingLibraryError, TrainError
from lrcompile.train.optimizers import OPTIMIZERS, Muon, Spectron, decay_products, optimizers, roles, schedule
from lrcompile.train.optimizers.make import SPECTRON_LR

from ..helpers_adopt import IDS, Albert, Shared, adopted_shared
from ..helpers_train import Model, batch, loss_of

NAMES = [name for name in OPTIMIZERS if name != "adamw8bit"]


def adopted(**recipe: Any) -> nn.Module:
    return lrcompile.adopt(Model(), Recipe(**{"rank": 8, **recipe}), (batch(),))


def held(made: list[torch.optim.Optimizer]) -> list[int]:
    return [id(p) for o in made for g in o.param_groups for p in g["params"]]


def names_of(model: nn.Module, parameters: list[Any]) -> set[str]:
    called = {id(p): name for name, p in model.named_parameters()}
    return {called[id(p)] for p in parameters}


MODELS = {
    "dense": Model,
    "pairs": adopted,
    "base and pair": lambda: adopted(weights="dense", init="zero", trainable=()),
    "tied, shared, frozen": adopted_shared,
    "albert": lambda: lrcompile.adopt(Albert(), Recipe(rank=4), IDS),
    "no blocks": Shared,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", list(MODELS))
def test_every_trainable_parameter_is_in_one_optimizer(model: str, name: str) -> None:
    made = MODELS[model]()
    if name == "spectron" and model in ("dense", "no blocks"):
        with pytest.raises(TrainError, match="this model has none that are trainable"):
            optimizers(made, name, lr=1e-3)
        return
    parts = optimizers(made, name, lr=1e-3, product_decay=0.1)
    assert sorted(held(parts)) == sorted(id(p) for p in made.parameters() if p.requires_grad)
    groups = [g for o in parts for g in o.param_groups]
    rates = {1e-3, SPECTRON_LR} if name == "spectron" else {1e-3}
    assert all(g["params"] and g["base_lr"] == float(g["lr"]) and g["base_lr"] in rates for g in groups)
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    for p in made.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    for optimizer in parts:
        optimizer.step()
    assert {n for n, p in made.named_parameters() if not torch.equal(p, before[n])} == {
        n for n, p in made.named_parameters() if p.requires_grad
    }


def test_roles() -> None:
    model = adopted(exclude=("blocks.1.*",))
    model.blocks[2].up.weight_a.requires_grad_(False)
    found = roles(model)
    assert [id(p.a) for p in found.pairs] == [
        id(m.weight_a) for m in (model.blocks[0].up, model.blocks[0].down, model.blocks[2].down)
    ]
    assert (found.pairs[0].rank, found.pairs[0].in_features, found.pairs[0].out_features) == (8, 64, 256)
    assert names_of(model, found.sides) == {"blocks.2.up.weight_b"}
    assert names_of(model, found.hidden) == {"blocks.1.up.weight", "blocks.1.down.weight"}
    assert names_of(model, found.outer) == {"head.weight"}
    vectors = {n for n, p in model.named_parameters() if p.dim() == 1}
    assert names_of(model, found.plain) == {"embed.weight", *vectors}


def test_roles_without_blocks_and_of_tied_heads() -> None:
    model = Shared()
    found = roles(model)  # head tied to the embedding, side to up; down is frozen
    assert names_of(model, found.hidden) == {"attn.in_proj_weight", "attn.out_proj.weight", "up.weight"}
    assert "embed.weight" in names_of(model, found.plain) and not found.outer
    model = Shared(tie=False)
    model.get_output_embeddings = lambda: model.head  # as transformers' models have it
    assert names_of(model, roles(model).outer) == {"head.weight"}


def test_packed_attention_is_a_pair_with_its_own_names() -> None:
    model = adopted_shared()
    assert id(model.attn.in_proj_weight_a) in [id(p.a) for p in roles(model).pairs]


def test_groups() -> None:
    model = adopted(exclude=("blocks.1.*",))
    (adamw,) = optimizers(model, "adamw", lr=1e-3, factor_lr=lambda pair: 0.1 / pair.out_features, weight_decay=0.2)
    told = [(g["base_lr"], g["weight_decay"], len(g["params"])) for g in adamw.param_groups]
    vectors = sum(p.dim() == 1 for p in model.parameters())
    assert told == [(0.1 / 256, 0.0, 4), (0.1 / 64, 0.0, 4), (1e-3, 0.2, 2), (1e-3, 0.2, 1), (1e-3, 0.0, vectors + 1)]
    assert adamw.defaults["fused"] and adamw.defaults["betas"] == (0.9, 0.95)
    spectron, rest = optimizers(model, "spectron", lr=1e-3, factor_lr=0.02, momentum=0.9)
    assert isinstance(spectron, Spectron) and isinstance(rest, torch.optim.AdamW)
    assert [(g["lr"], g["momentum"], len(g["params"])) for g in spectron.param_groups] == [(0.02, 0.9, 8)]
    assert not spectron.param_groups[0]["nesterov"]
    assert optimizers(model, "spectron", lr=1e-3, nesterov=True)[0].param_groups[0]["nesterov"]
    muon, rest = optimizers(model, "muon", lr=1e-3, factor_lr=0.02, matrix_lr=0.01, weight_decay=0.2)
    assert [(g["lr"], g["weight_decay"]) for g in muon.param_groups] == [(0.02, 0.0), (0.01, 0.2)]
    assert names_of(model, rest.param_groups[0]["params"]) == {"head.weight"}


@pytest.mark.parametrize("name", NAMES)
def test_rates_of_some_parameters(name: str) -> None:
    model = adopted(exclude=("blocks.1.*",))
    rates = {"blocks.0": 0.5, "*.down": 0.25, "*.up.weight": 3.0, "head": 2.0}
    made = optimizers(model, name, lr=1e-3, factor_lr=1e-2, rates=rates)
    assert sorted(held(made)) == sorted(id(p) for p in model.parameters())
    rate = {id(p): g["base_lr"] for o in made for g in o.param_groups for p in g["params"]}
    assert rate[id(model.blocks[0].up.weight_a)] == rate[id(model.blocks[0].up.weight_b)] == 0.5e-2
    assert rate[id(model.blocks[0].down.weight_b)] == 0.5e-2  # the first glob that matches
    assert rate[id(model.blocks[2].down.weight_b)] == 0.25e-2
    assert rate[id(model.blocks[1].down.weight)] == 0.25e-3 and rate[id(model.blocks[1].up.weight)] == 3e-3
    up = model.blocks[2].up  # a pair goes by its weight's name, both sides alike
    assert rate[id(up.weight_a)] == rate[id(up.weight_b)] == 3e-2 and rate[id(up.bias)] == 1e-3


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"*.attn": 0.5}, r"rates\['\*.attn'\]: no trained parameter matches it; the model has embed, blocks.0.up, "),
        ({"up": 0.5}, r"rates\['up'\]: no trained parameter matches it; write '\*.up' to match it at any depth"),
        ({"*.Up": 0.5}, r"rates\['\*.Up'\]: no trained parameter matches it"),
        ({"*.norm": 0.5}, r"rates\['\*.norm'\]: no trained parameter matches it"),  # frozen
        ({"*": 1.0, "head": 2.0}, r"rates\['head'\]: every trained parameter that matches it goes by a glob before it"),
        ({"*.weight_a": 3.0}, r"rates\['\*.weight_a'\] would split pairs.* name their weight, as '\*.weight'"),
        ({"*.up.*_b": 3.0}, r"rates\['\*.up.\*_b'\] would split pairs"),
    ],
)
def test_rates_that_would_do_nothing_or_split_a_pair_are_refused(rates: dict[str, float], message: str) -> None:
    model = adopted()
    for block in model.blocks:
        block.norm.requires_grad_(False)
    with pytest.raises(TrainError, match=message):
        optimizers(model, "adamw", lr=1e-3, rates=rates)


def test_a_pair_beside_a_base_brings_its_scale() -> None:
    model = adopted(weights="dense", init="zero", trainable=())
    spectron, *rest = optimizers(model, "spectron", lr=1e-3)
    assert not rest  # nothing else is trained
    forms = [form for m in model.modules() for _, form in getattr(m, "lr_forms", ())]
    assert spectron.param_groups[0]["scales"] == [form.scale for form in forms]


def test_errors() -> None:
    model = adopted()
    with pytest.raises(TrainError, match="known are adamw, adamw8bit, muon, spectron"):
        optimizers(model, "adam", lr=1e-3)
    with pytest.raises(TrainError, match="Muon takes matrices"):
        Muon([nn.Parameter(torch.ones(3))])
    model.requires_grad_(False)
    with pytest.raises(TrainError, match="no parameter of the model is trainable"):
        optimizers(model, "adamw", lr=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_goes_on_to_the_bit(name: str) -> None:
    """Under a schedule set as the driver does; from a state dict, the same numbers."""
    model, ids = adopted(), batch()
    given = {"lr": 3e-3, "factor_lr": 0.3 if name == "spectron" else None, "product_decay": 0.01}
    made, at = optimizers(model, name, **given), schedule("cosine", steps=12, warmup=2)

    def run(model: nn.Module, made: list[torch.optim.Optimizer], steps: range) -> list[float]:
        losses = []
        for step in steps:
            for optimizer in made:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * at(step)
            loss = loss_of(model, ids)
            loss.backward()
            for optimizer in made:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    first = run(model, made, range(6))
    other = copy.deepcopy(model)
    again = optimizers(other, name, **given)
    for new, old in zip(again, made, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
        assert all(isinstance(v, torch.Tensor) for s in new.state_dict()["state"].values() for v in s.values())
    last = run(model, made, range(6, 12))
    assert run(other, again, range(6, 12)) == last
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert last[-1] < 0.9 * first[0]


# --- Muon -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_muon_is_torchs(shape: tuple[int, int]) -> None:
    ours, theirs = (nn.Parameter(torch.ones(shape) * 0.1) for _ in range(2))
    settings = {"lr": 0.01, "weight_decay": 0.3, "momentum": 0.9}
    muon = Muon([ours], **settings, dtype=torch.bfloat16)
    torchs = torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        torchs.step()
    moved = (theirs - 0.1).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 0.03 * moved  # fifteen products in bfloat16 a step; 0.016 is seen


# --- decay of products ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_product_decay_is_the_gradient_of_the_penalty(scale: float) -> None:
    a, b = nn.Parameter(torch.randn(4, 20)), nn.Parameter(torch.randn(12, 4))
    penalty = 0.03 / 2 * (scale * b @ a).square().sum()
    expected = [p.detach() - 0.1 * g for p, g in zip((a, b), torch.autograd.grad(penalty, (a, b)), strict=True)]
    group = {"params": [a, b], "scales": [scale], "lr": 0.1, "product_decay": 0.03}
    optimizer = torch.optim.SGD([group])
    decay_products(optimizer)
    assert not torch.equal(a, expected[0])  # no gradient: nothing happens, as in AdamW
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    optimizer.register_step_pre_hook(decay_products)
    optimizer.step()
    for p, e in zip((a, b), expected, strict=True):
        torch.testing.assert_close(p.detach(), e)


@pytest.mark.parametrize("name", NAMES)
def test_product_decay_shrinks_products_under_every_optimizer(name: str) -> None:
    def size(product_decay: float) -> float:
        torch.manual_seed(0)
        model = adopted()
        made = optimizers(model, name, lr=1e-3, product_decay=product_decay)
        for _ in range(20):
            loss_of(model, batch()).backward()
            for optimizer in made:
                optimizer.step()
                optimizer.zero_grad()
        return sum(float(m.weight.detach().norm()) for block in model.blocks for m in (block.up, block.down))

    assert size(10.0) < 0.97 * size(0.0)


# --- 8 bits -----------------------------------------------------------------------------------------------------------


def test_8_bits_without_torchao_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(MissingLibraryError, match=r"lrcompile\[quant\]"):
        optimizers(adopted(), "adamw8bit", lr=1e-3)


@pytest.mark.slow
def test_8_bits_follow_adamw() -> None:
    """torchao's step is compiled: seconds for each shape."""
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(32, 64)
    made = [optimizers(m, name, lr=1e-3)[0] for m, name in ((ours, "adamw8bit"), (theirs, "adamw"))]
    start = ours[0].weight.detach().clone()
    for step in range(10):
        for model, optimizer in zip((ours, theirs), made, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] / (step + 1)
            (model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    # The state's 8 bits: 1.3% of the way is seen, with any of six seeds.
    assert (ours[0].weight - theirs[0].weight).norm() < 0.02 * (theirs[0].weight - start).norm()
    assert any(type(v).__name__ == "OptimState8bit" for s in made[0].state.values() for v in s.values())
    again = optimizers(ours, "adamw8bit", lr=1.0)[0]
    again.load_state_dict(made[0].state_dict())
    for a, b in zip(made[0].state.values(), again.state.values(), strict=True):
        for key, value in a.items():
            x, y = ((t.dequantize() if type(t) is not torch.Tensor else t) for t in (value, b[key]))
            assert torch.equal(x, y) and type(value) is type(b[key])


# --- sharded ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "replicas", "names"),
    [
        pytest.param(2, 1, NAMES, marks=pytest.mark.slow, id="two"),
        pytest.param(3, 1, NAMES, id="three"),
        pytest.param(4, 2, NAMES, marks=pytest.mark.slow, id="hsdp"),
        pytest.param(3, 1, ["adamw8bit"], marks=pytest.mark.slow, id="three, 8 bits"),
    ],
)
def test_sharded_against_one_process(world: int, replicas: int, names: list[str], tmp_path: Path) -> None:
    """Pairs of rank 2: on three ranks, one has no row of weight_a."""
    script = [sys.executable, str(Path(__file__).with_name("sharded_optimizers.py"))]
    ranks = [
        subprocess.Popen(
            [*script, str(rank), str(world), str(tmp_path / "store"), str(replicas), *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=180)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode == 0 for process in ranks), "\n".join(said)
    assert [line.split()[0] for line in said[0].splitlines() if " within " in line] == names


def test_other_shardings_are_refused(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    a, b = (nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(1)])) for shape in ((2, 8), (8, 2)))
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    with pytest.raises(TrainError, match="without a shard_placement_fn"):
        Spectron([a, b]).step()
