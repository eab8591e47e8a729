"""Plans: what they decide about odd models, that planning touches nothing, and whose Plan it is."""

from __future__ import annotations

import json
from inspect import unwrap
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import AdoptError, CaptureError, Plan, PlanError, Recipe, RecipeError
from lrcompile.graph.names import plain_name
from lrcompile.weights.planner import check_globs

from .helpers import Spelled
from .test_canonicalize import LEFT_ALONE, SPELLINGS, masked

TORCHS_MARK = {"_is_torch_compile"}  # torch.compile leaves it on a module


class Block(nn.Module):
    """A residual MLP with everything that planning could disturb: dropout, a running mean, a frozen weight."""

    def __init__(self, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(0.5)
        self.down.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.drop(torch.relu(self.up(self.norm(x)))))


def block(**sizes: int) -> Block:
    torch.manual_seed(0)
    return Block(**sizes)


X = (torch.zeros(4, 32),)


def fingerprint_of(model: nn.Module) -> list[Any]:
    """Everything that planning must leave alone."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    seen = [(n, id(t), t.requires_grad, None if t.is_meta else t.detach().clone().tolist()) for n, t in tensors]
    grads = [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()]
    modules = [(n, id(m), type(m), m.training, sorted({*vars(m)} - TORCHS_MARK)) for n, m in model.named_modules()]
    return [seen, grads, modules, torch.random.get_rng_state().tolist()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference_mode", "autocast"])
def test_planning_touches_nothing(training: bool, mode: str) -> None:
    model = block().train(training)
    model(torch.randn(4, 32)).sum().backward()
    around = {
        "plain": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }[mode]
    before = fingerprint_of(model)
    with around():
        made = lrcompile.plan(model, X)
    assert fingerprint_of(model) == before
    assert {e.key for e in made.adopted} == {"up.weight", "down.weight"}


def test_planning_leaves_a_buffer_that_the_forward_replaces() -> None:
    class Ema(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.register_buffer("mean", torch.zeros(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return self.fc(x - self.mean) + x

    model = Ema()
    mean = model.mean
    lrcompile.plan(model, (torch.ones(4, 32),))
    assert model.mean is mean and not mean.any()


def test_a_meta_model_is_planned_like_a_real_one() -> None:
    with torch.device("meta"):
        shapes = Block()
    made, real = lrcompile.plan(shapes, X), lrcompile.plan(block(), X)
    assert all(p.is_meta for p in shapes.parameters())
    assert made == real


def test_the_dial_is_kept_and_told() -> None:
    made = lrcompile.plan(block(width=64, hidden=256), (torch.zeros(4, 64),), Recipe(compression=2.64))
    assert made.compression >= 2.64
    before, after = made.parameters
    assert before == sum(p.numel() for p in block(width=64, hidden=256).parameters())
    assert made.bytes == (4 * before, 4 * after)
    assert "2 of 2 weights become pairs" in str(made) and f"{before:,}" in str(made)
    for entry in made.adopted:
        name, shape = entry.key.removesuffix(".weight"), "x".join(map(str, entry.shape))
        assert f"{name} ({shape}): rank {entry.rank}" in str(made)
        assert entry.tokens == 4


def test_printed_repeated_layers_are_one_line() -> None:
    made = lrcompile.plan(nn.Sequential(*[block() for _ in range(3)]), X, Recipe(rank=4, exclude=("2.down",)))
    assert str(made).splitlines()[:3] == [
        "0-2.up (48x32 ×3): rank 4",
        "0-1.down (32x48 ×2): rank 4",
        "2.down (32x48): dense, excluded by '2.down'",
    ]


def test_json_round_trip() -> None:
    model = block()
    made = lrcompile.plan(model, X, Recipe(rank=4, exclude=("down",)))
    again = Plan.from_json(made.to_json())
    assert again == made and again.fingerprint == made.fingerprint
    assert Plan.from_json(again.to_json()).to_json() == made.to_json()
    lrcompile.adopt(model, again)
    assert model.up.weight_a.shape == (4, 32) and type(model.down) is nn.Linear
    assert next(e for e in again.entries if e.key == "down.weight").reason == "excluded by 'down'"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"format": "other/1"}', '{"format": "lrcompile-plan/1"}']
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="Plan"):
        Plan.from_json(text)


def _set(path: list[Any], value: Any) -> Any:
    def change(body: Any) -> None:
        for step in path[:-1]:
            body = body[step]
        body[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set(["model", "up.weight"], [48, 33]),
        _set(["model", "extra"], [2, 2]),
        lambda body: body["model"].pop("up.bias"),
        _set(["tied"], [["up.weight", "down.weight"]]),
        _set(["fingerprint"], "0" * 64),
        lambda body: body.pop("fingerprint"),
        _set(["entries", 0, "rank"], 0),
        _set(["entries", 0, "rank"], 33),
        _set(["entries", 0, "rank"], -1),
        _set(["entries", 0, "rank"], True),
        _set(["entries", 0, "rank"], 4.0),
        _set(["entries", 0, "rank"], "4"),
        _set(["entries", 0, "names"], []),
        _set(["entries", 0, "names"], ["nobody.weight"]),
        _set(["entries", 0, "names"], "up.weight"),
        _set(["entries", 0, "shape"], [32, 48]),
        _set(["entries", 0, "shape"], [48]),
        _set(["entries", 0, "surprise"], 1),
        lambda body: body["entries"][0].pop("shape"),
        lambda body: body["entries"].append(body["entries"][0]),
        _set(["entries"], None),
        _set(["entries"], [7]),
        _set(["model"], []),
        _set(["recipe"], None),
        _set(["recipe", "svd"], "magic"),
        lambda body: body.pop("breaks"),
    ],
)
def test_altered_json_is_refused(change: Any) -> None:
    body = json.loads(lrcompile.plan(block(), X, Recipe(rank=4)).to_json())
    change(body)
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(body))


_HALF = {"base": None, "init": "svd", "scale": 1.0}


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ({}, {"base": None}),
        ({}, {**_HALF, "scale": 4.0}),
        ({}, {**_HALF, "pair_dtype": "bfloat16"}),
        ({}, {**_HALF, "scale": 4.0, "factors": "int8"}),
        ({}, {"init": "svd"}),
        ({}, {"base": "dense", "init": "loftq"}),
        ({}, {"pair_dtype": "int8"}),
        ({"trainable": "*.up"}, {}),
        ({"trainable": [3]}, {}),
        ({"alternations": 0}, {}),
        ({"alternations": "many"}, {}),
    ],
)
def test_altered_json_of_a_base_and_a_pair_is_refused(recipe: dict[str, Any], changes: dict[str, Any]) -> None:
    body = json.loads(lrcompile.plan(block(), X, Recipe(weights="nf4", rank=4, init="zero")).to_json())
    assert Plan.from_json(json.dumps(body)).adopted[0].fate == "nf4 + rank 4"
    body["entries"][0] |= changes
    body["recipe"] |= recipe
    with pytest.raises(PlanError, match=r"doesn't go with|of a pair beside a base|is not known|recipe was altered"):
        Plan.from_json(json.dumps(body))


class Tied(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        if tie:
            self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


def test_a_plan_of_another_model_names_the_first_difference() -> None:
    made = lrcompile.plan(block(), X)
    wider, fewer, more = block(hidden=64), block(), block()
    fewer.norm = nn.Identity()
    more.extra = nn.Linear(3, 3)
    for other, said in [
        (wider, r"'up.weight' is \(48, 32\) there, \(64, 32\) here"),
        (fewer, "has a parameter 'norm.weight', this model has none"),
        (more, "has a parameter 'extra.weight', the Plan's has none"),
    ]:
        before = fingerprint_of(other)
        with pytest.raises(PlanError, match=said):
            lrcompile.adopt(other, made)
        assert fingerprint_of(other) == before
    for planned, given in [(True, False), (False, True)]:
        with pytest.raises(PlanError, match=r"a.weight = b.weight are tied in one"):
            lrcompile.adopt(Tied(given), lrcompile.plan(Tied(planned), X))


def test_planning_an_adopted_model_is_an_error() -> None:
    model = lrcompile.adopt(block(), Recipe(rank=4), X)
    with pytest.raises(AdoptError, match=r"up is adopted already.*merge"):
        lrcompile.plan(model, X)
    whole = nn.Sequential(nn.Linear(32, 32), model)
    with pytest.raises(AdoptError, match=r"1.up is adopted already"):
        lrcompile.plan(whole, X)


def test_models_without_a_linear() -> None:
    for model, x in [
        (nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU()), torch.zeros(1, 4, 8)),
        (nn.Embedding(10, 4), torch.zeros(1, 2, dtype=torch.long)),
        (nn.ReLU(), torch.zeros(2)),
    ]:
        with pytest.raises(PlanError, match="no linear weight"):
            lrcompile.plan(model, (x,))


def test_globs_that_match_nothing_are_named_with_what_there_is() -> None:
    for option in ("include", "exclude"):
        with pytest.raises(PlanError, match=f"{option}='q_proj' matches no module that holds.*has up, down, norm$"):
            lrcompile.plan(block(), X, Recipe(**{option: ("q_proj",)}))  # type: ignore[arg-type]
    deep = nn.Sequential(*[block() for _ in range(4)])
    with pytest.raises(
        PlanError, match=r"write '\*\.up' to match it at any depth; the model has 0-3\.up, 0-3\.down, 0-3"
    ):
        lrcompile.plan(deep, X, Recipe(exclude=("up",)))
    for many, end in [(8, "7"), (9, "0-8")]:
        with pytest.raises(PlanError, match=f"{end}$"):
            lrcompile.plan(nn.Sequential(*[nn.Linear(32, 32) for _ in range(many)]), X, Recipe(exclude=("up",)))
    wide = nn.ModuleDict({f"layer_{c}": nn.Linear(4, 4) for c in "abcdefghi"})
    with pytest.raises(PlanError, match="layer_h, …$"):
        check_globs(wide, Recipe(exclude=("up",)))


@pytest.mark.parametrize("function", [lrcompile.plan, lrcompile.inspect])
@pytest.mark.parametrize(
    ("inputs", "recipe", "said"),
    [
        (X, {"rank": 4, "exclude": ["up"]}, r"is a dict; pass lrcompile\.Recipe\(rank=4, exclude=\['up'\]\)"),
        (X, {"rnk": 4}, "unknown option 'rnk'; known are compression, rank"),
        (X, {}, r"pass lrcompile\.Recipe\(\)"),
        (X, 4, "must be a lrcompile.Recipe, got int; its fields are compression, rank"),
        (Recipe(rank=4), X, r"come before the recipe: pass \(model, example_inputs, recipe\)"),
        (Recipe(rank=4), None, "come before the recipe"),
    ],
)
def test_what_is_no_recipe_is_told_the_fix(function: Any, inputs: Any, recipe: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        unwrap(function)(block(), inputs, recipe)  # without the types that the tests check in front of it


def test_everything_excluded_is_a_plan_of_nothing() -> None:
    model = block()
    made = lrcompile.plan(model, X, Recipe(exclude=("*",)))
    assert made.adopted == [] and made.compression == 1 and made.parameters[0] == made.parameters[1]
    y = model.eval()(torch.ones(4, 32))
    assert torch.equal(lrcompile.adopt(model, made)(torch.ones(4, 32)), y)


def test_ranks_and_budgets_out_of_reach_are_named() -> None:
    for recipe, said in [
        (Recipe(rank=33), r"rank=33 is above min\(in, out\) = 32 of up.weight \(48x32\), the smallest selected weight"),
        (Recipe(compression=1000.0), "can't be reached: the most is 19.2, with rank 1"),
        (Recipe(budget_bytes=10), "can't be met: the least is 1216 bytes"),
    ]:
        with pytest.raises(PlanError, match=said):
            lrcompile.plan(block(), X, recipe)


def test_inputs_that_dont_fit() -> None:
    for inputs in ((), (1, 2, 3), {"y": 1}, (torch.zeros(4, 31),)):
        model = block()
        before = fingerprint_of(model)
        with pytest.raises(CaptureError, match="Block"):
            lrcompile.plan(model, inputs)
        assert fingerprint_of(model) == before


def test_every_weight_that_stays_dense_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40)
            self.mix = nn.Parameter(torch.randn(2, 32, 32))
            self.table = nn.Parameter(torch.randn(4, 32))
            self.block, self.narrow = Block(), nn.Linear(32, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.block(self.embed(ids) + self.table)
            x = x + self.narrow(x) + torch.einsum("bi,kij->bj", x, self.mix)
            return self.head(x)

    made = lrcompile.plan(Odd(), (torch.zeros(4, dtype=torch.long),))
    why = {e.key: e.reason for e in made.entries}
    assert {k for k, v in why.items() if not v} == {"block.up.weight", "block.down.weight"}
    assert why["embed.weight"] == "an embedding"
    assert why["head.weight"] == "an output head"
    assert "not read by a matrix product" in why["table"]
    assert why["mix"]
    assert "rank 1 would hold" in why["narrow.weight"]


class EverySpelling(nn.Module):
    """A module for each way of reading a matrix that the tests of the pass know."""

    def __init__(self, table: dict[str, Any]) -> None:
        super().__init__()
        self.each = nn.ModuleList(Spelled(function or masked, shape) for function, shape, _ in table.values())

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [spelled(x) for spelled in self.each]


def test_every_spelling_is_planned_or_says_why_not() -> None:
    torch.manual_seed(0)
    table = SPELLINGS | LEFT_ALONE
    made = lrcompile.plan(EverySpelling(table), (torch.randn(2, 5, 8),), Recipe(rank=1, include=("each.*.weight",)))
    entries = {e.key: e for e in made.entries}
    for i, name in enumerate(table):
        entry = entries[f"each.{i}.weight"]
        assert (entry.rank == 1 and not entry.reason) if name in SPELLINGS else entry.reason, (name, entry)


def test_every_spelling_is_adopted_and_compiled() -> None:
    """At full rank the adopted model is the dense one, as it stands and as the program passes write it."""
    torch.manual_seed(0)
    model, inputs = EverySpelling(SPELLINGS), (torch.randn(2, 5, 8),)
    expected = model(*inputs)
    recipe = Recipe(rank_ratio=1, require_saving=False, include=("each.*.weight",))
    lrcompile.adopt(model, recipe, inputs)
    assert all(hasattr(spelled, "weight_a") for spelled in model.each)
    compiled = torch.compile(model, backend="lrcompile", options={"inner": "eager", "verify": True})
    for got in (model(*inputs), compiled(*inputs)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_is_planned_by_its_plain_names() -> None:
    model = block()
    made = lrcompile.plan(torch.compile(model), X)  # type: ignore[arg-type]
    assert made == lrcompile.plan(model, X)
    lrcompile.adopt(torch.compile(model), made)  # type: ignore[arg-type]
    assert all(plain_name(n) == n for n, _ in model.named_parameters()) and model.up.weight_a.ndim == 2


def test_an_include_that_matches_no_weight_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    with pytest.raises(PlanError, match="include='0.bias' matches biases and norms only"):
        lrcompile.plan(model, (torch.randn(2, 8),), Recipe(rank=2, include=["0.bias"]))
