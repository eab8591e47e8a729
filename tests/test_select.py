"""Which weights get a pair: embeddings, heads, ties, globs, stored types, what is written, and where none saves anything."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrcompile import PlanError, Recipe, plan
from lrcompile.passes import Weight, canonicalize, select

from .helpers import BLOCKS, LanguageModel, ids, run


def selected(model: nn.Module, inputs, **options) -> tuple[set[str], dict[str, Weight]]:
    _, ctx, _ = run(model, inputs, [canonicalize, select], Recipe(rank=1, **options), verify=False)
    return {key for key, w in ctx.weights.items() if w.selected}, ctx.weights


def test_embeddings_and_heads_stay_dense_unless_named():
    got, weights = selected(LanguageModel(), (ids(),))
    assert got == BLOCKS
    assert weights["embed.weight"].reason == "an embedding" and weights["head.weight"].reason == "an output head"
    for name in ("head", "head.weight", "*head"):
        expected = BLOCKS | {"head.weight"} if name != "*head" else BLOCKS
        assert selected(LanguageModel(), (ids(),), include=("*", name))[0] == expected
    assert selected(LanguageModel(), (ids(),), include=("embed",))[0] == {"embed.weight"}
    assert selected(LanguageModel(), (ids(),), include=("head",))[0] == {"head.weight"}


def test_tied_heads_stay_dense_unless_named_by_either_name():
    got, weights = selected(LanguageModel(tied=True), (ids(),))
    assert got == BLOCKS and weights["embed.weight"].reason == "tied to an embedding"
    for name in ("head", "embed.weight"):
        assert selected(LanguageModel(tied=True), (ids(),), include=("*", name))[0] == BLOCKS | {"embed.weight"}


def test_globs_name_modules_and_parameters():
    up = {"body.blocks.0.up.weight", "body.blocks.1.up.weight"}
    assert selected(LanguageModel(), (ids(),), include=("*.up",))[0] == up
    assert selected(LanguageModel(), (ids(),), include=("*.up.weight",))[0] == up
    assert selected(LanguageModel(), (ids(),), include=("body.blocks.0.*",))[0] == {k for k in BLOCKS if ".0." in k}
    got, weights = selected(LanguageModel(), (ids(),), exclude=("*.down", "body.blocks.0.up.weight"))
    assert got == {"body.blocks.1.up.weight"}
    assert weights["body.blocks.0.down.weight"].reason == "excluded by '*.down'"
    assert selected(LanguageModel(), (ids(),), include=("*.up",))[1]["head.weight"].reason == "not included"


def test_globs_name_whole_blocks():
    first, second = ({k for k in BLOCKS if f".{i}." in k} for i in (0, 1))
    for option in ("body.blocks.0", "body.*.0", "*.blocks.0"):
        assert selected(LanguageModel(), (ids(),), include=(option,))[0] == first
        got, weights = selected(LanguageModel(), (ids(),), exclude=(option,))
        assert got == second and weights["body.blocks.0.up.weight"].reason == f"excluded by {option!r}"
    assert selected(LanguageModel(), (ids(),), exclude=("body",))[0] == set()


def test_a_module_around_an_embedding_or_a_head_does_not_name_it():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LanguageModel()

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids)

    inside = {f"model.{key}" for key in BLOCKS}
    got, weights = selected(Model(), (ids(),), include=("model",))
    assert got == inside and weights["model.head.weight"].reason == "an output head"
    assert weights["model.embed.weight"].reason == "an embedding"
    assert selected(Model(), (ids(),), include=("model", "*.head"))[0] == inside | {"model.head.weight"}


def test_a_weight_that_is_not_floating_is_an_error_unless_excluded():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 8, dtype=torch.int8), requires_grad=False)
            self.fc = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(torch.float32)) + self.fc(x)

    with pytest.raises(PlanError, match=r"weight is stored as torch\.int8.*exclude=\['weight'\]"):
        selected(Packed(), (torch.randn(5, 8),))
    assert selected(Packed(), (torch.randn(5, 8),), exclude=("weight",))[0] == {"fc.weight"}


def test_where_no_pair_saves_the_weight_stays_dense():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 8), nn.Tanh())
    got, weights = selected(model, (torch.randn(5, 8),), include=("*", "4"))
    assert got == {"0.weight"}
    assert weights["2.weight"].reason == "a pair of rank 1 would hold 9 numbers, not fewer than 8"
    assert "2.weight" in selected(model, (torch.randn(5, 8),), require_saving=False)[0]


# --- written weights --------------------------------------------------------------------------------------------------


class Writing(nn.Module):
    """A linear `fc` whose weight a function writes to before it multiplies, and another that is only read."""

    def __init__(self, write, tied: bool = False) -> None:
        super().__init__()
        self.write = write
        self.fc, self.other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8)
        if tied:
            self.twin.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.fc.weight, x)
        return x + self.twin(torch.relu(self.other(torch.tanh(self.fc(x)))))


def _set_row(w: Tensor, x: Tensor) -> None:
    w[0] = 0


def _augmented(w: Tensor, x: Tensor) -> None:
    w *= 0.9


def _augmented_rows(w: Tensor, x: Tensor) -> None:
    w.data[2:] -= 0.5


def _replaced(w: Tensor, x: Tensor) -> None:
    w.data = w.data * 0.9


@torch.library.custom_op("lrcompile_tests::halve_", mutates_args={"w"})
def _halve(x: Tensor, w: Tensor) -> None:
    w.mul_(0.5)


WRITES = {
    "data": (lambda w, x: w.data.mul_(0.9), "mul_"),
    "clamp_": (lambda w, x: w.clamp_(-1, 1), "clamp_"),
    "a row": (_set_row, "setitem"),
    "augmented": (_augmented, "imul"),
    "augmented rows": (_augmented_rows, "isub, setitem"),
    "replaced data": (_replaced, "set_"),
    "init": (lambda w, x: nn.init.constant_(w, 0.1), "fill_"),
    "orthogonal init": (lambda w, x: nn.init.eye_(w.data), "copy_|eye"),
    "out": (lambda w, x: torch.mul(w, 0.9, out=w), "mul"),
    "out of data": (lambda w, x: torch.mm(x[:8].t() @ x[:8], w, out=w.data), "mm"),
    "detached": (lambda w, x: w.detach().sub_(0.1), "sub_"),
    "transposed": (lambda w, x: w.t().view(8, 2, 4)[:, 1].zero_(), "zero_"),
    "flat": (lambda w, x: w.view(-1)[3:5].fill_(1), "fill_"),
    "chunk": (lambda w, x: w.chunk(2)[1].neg_(), "neg_"),
    "split, other axis": (lambda w, x: w.split(3, dim=1)[0].neg_(), "neg_"),
    "narrow": (lambda w, x: w.narrow(0, 1, 2).zero_(), "zero_"),
    "unbind": (lambda w, x: w.unbind()[0].zero_(), "zero_"),
    "diagonal": (lambda w, x: torch.diagonal(w).zero_(), "zero_"),
    "repeated": (lambda w, x: w[None].expand(1, 8, 8).mul_(2), "mul_"),
    "reshaped": (lambda w, x: w.reshape(4, 16).mul_(2), "mul_"),
    "list": (lambda w, x: torch._foreach_mul_([w], 0.9), "_foreach_mul_"),
    "switch": (lambda w, x: F.relu(w, inplace=True), "relu"),
    "switch by position": (lambda w, x: F.dropout(w, 0.5, True, True), "dropout"),
    "max_norm": (lambda w, x: F.embedding(x[:, 0].long(), w, max_norm=0.1), "embedding"),
    "copy": (lambda w, x: w.copy_(F.normalize(w)), "copy_"),
    "custom op": (lambda w, x: _halve(x, w), "halve_"),
    "custom op by name": (lambda w, x: torch.ops.lrcompile_tests.halve_(x=x, w=w.t()), "halve_"),
    "in a checkpoint": (lambda w, x: checkpoint(lambda v: v.data.mul_(0.9), w, use_reentrant=False), "mul_"),
    "a view in a checkpoint": (lambda w, x: checkpoint(lambda v: v.mul_(0.9), w.t(), use_reentrant=False), "mul_"),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_written_weight_stays_dense(name):
    """An adopted module's weight is computed at each read: what is written to it would be lost."""
    write, writer = WRITES[name]
    made = plan(Writing(write), (torch.rand(9, 8),), Recipe(rank=2, include=("*", "fc.weight")))
    entries = {e.key: e for e in made.entries}
    assert entries["other.weight"].rank == entries["twin.weight"].rank == 2
    assert entries["fc.weight"].rank is None and entries["fc.weight"].reason.startswith("written in the graph (by ")
    assert any(each in entries["fc.weight"].reason for each in writer.split("|")), entries["fc.weight"].reason


def test_a_written_weight_that_is_tied_counts_once():
    made = plan(Writing(lambda w, x: w.mul_(0.9), tied=True), (torch.rand(9, 8),), Recipe(rank=2))
    [entry] = [e for e in made.entries if "fc.weight" in e.names]
    assert entry.names == ("fc.weight", "twin.weight") and "written" in entry.reason and len(made.entries) == 2


@pytest.mark.parametrize("name", ["data", "a row", "transposed", "in a checkpoint"])
def test_the_backend_keeps_what_is_written(name):
    """Step by step the compiled model writes and reads as the eager one does, where the rest is at full rank."""
    model = Writing(WRITES[name][0])
    twin = copy.deepcopy(model)
    options = {"rank_ratio": 1, "require_saving": False, "include": ["*", "twin.weight"], "inner": "eager"}
    step = torch.compile(model, backend="lrcompile", options=options)
    for _ in range(3):
        x = torch.randn(9, 8)
        torch.testing.assert_close(step(x), twin(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.fc.weight, twin.fc.weight)
    assert type(model.fc) is nn.Linear and hasattr(model.other, "weight_a")


class Watching(nn.Module):
    """Reads its weight into buffers that it writes: an average of it, a momentum, a count."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("average", torch.zeros(8, 8))
        self.register_buffer("momentum", torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.9).add_(self.fc.weight.detach(), alpha=0.1)
            self.average.t()[0] = self.fc.weight[1]
            self.momentum += self.fc.weight
            torch.mul(self.fc.weight, 2, out=self.momentum)
            scaled = self.fc.weight.clone().mul_(2)
            scaled.t().copy_(self.fc.weight)
        return x + self.fc(x).mul_(2) + scaled.sum()


def test_what_is_written_from_a_weight_is_no_write_to_it():
    got, weights = selected(Watching(), (torch.randn(5, 8),))
    assert got == {"fc.weight"} and not weights["fc.weight"].writers


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_a_normed_weight_stays_dense(normed):
    """Its product reads w / sigma; that the power iteration multiplies w with vectors makes no pair worth having."""
    model = nn.Sequential(normed(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).train()
    got, weights = selected(model, (torch.randn(5, 8),))
    assert got == {"2.weight"}
    for key in set(weights) - {"2.weight", "4.weight"}:
        assert "read by truediv" in weights[key].reason or "(by _weight_norm" in weights[key].reason, weights[key]


def test_a_transposed_weight_that_is_also_viewed_stays_dense():
    class Viewed(nn.Module):
        def __init__(self, shape: tuple[int, int]) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            y = x @ (self.weight if self.weight.shape[0] == 8 else self.weight.t())
            return y[:, :1] * self.weight.view(-1).sum() + x

    _, weights = selected(Viewed((8, 6)), (torch.randn(5, 8),), include=("*", "weight"))
    assert weights["weight"].reason == "also read by view, which needs the layout it is stored in"
    assert selected(Viewed((6, 8)), (torch.randn(5, 8),), include=("*", "weight"))[0] == {"weight"}
