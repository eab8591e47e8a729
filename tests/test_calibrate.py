"""Calibration sees what forward hooks see, and weights that no hook reaches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrcompile
from lrcompile import AdoptError, CaptureError, PlanError, Recipe
from lrcompile.graph import calibrate
from lrcompile.graph.calibrate import covariances
from lrcompile.weights.planner import plan

from .helpers import VOCAB, WIDTH, Attention, Block, LanguageModel, Spelled, Stack, tiny_llama
from .kernels.numbers import assert_same


def hooked(model: nn.Module, batches: list) -> dict[str, Tensor]:
    """Σ x xᵀ for every nn.Linear and Conv1D by forward hooks, float64; shared modules and tied weights summed."""
    found: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    handles = []
    for name, p in model.named_parameters():
        names[id(p)] = name
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":

            def add(module: nn.Module, args: tuple) -> None:
                x = args[0].detach().double().flatten(0, -2)
                found[id(module.weight)] = found.get(id(module.weight), 0) + x.T @ x

            handles.append(module.register_forward_pre_hook(add))
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(*batch)
    for handle in handles:
        handle.remove()
    return {names[key]: total for key, total in found.items()}


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, total in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), total, rtol=1e-4, atol=1e-5 * float(total.abs().max()))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every graph that Dynamo makes."""
    calls: list[int] = []
    backend = calibrate._Totals.backend
    monkeypatch.setattr(calibrate._Totals, "backend", lambda *args: calls.append(1) or backend(*args))
    return calls


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


# --- against forward hooks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
def test_llama(checkpointed):
    model = tiny_llama().train(checkpointed)
    if checkpointed:  # transformers checkpoints in training mode only
        model.gradient_checkpointing_enable()
    # Of several lengths, as real text has.
    batches = [{"input_ids": tokens(2, n, seed=n), "use_cache": False} for n in (5, 9, 9, 7, 3)]
    expected = hooked(model, batches)
    found = covariances(model, iter(batches))
    check_same(found, expected)
    assert len(found) == 2 * 7 + 1 and found.keys() >= {e.key for e in plan(model, batches[0], Recipe(rank=2)).adopted}
    for i in (0, 1):
        q, k, v, o, gate, up, down = (
            found[f"model.layers.{i}.{n}_proj.weight"]
            for n in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
        )
        assert q is k and k is v and gate is up, "one x, one tensor"
        assert len({id(t) for t in (q, o, gate, down)}) == 4
    assert len({id(t) for t in found.values()}) == 2 * 4 + 1


def test_gpt2_with_its_weights_stored_in_out_and_its_graph_breaks():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    batches = [{"input_ids": tokens(2, n)} for n in (8, 6)]
    expected = hooked(model, batches)
    # The head is tied to the embedding, whose name comes first.
    assert "transformer.wte.weight" in expected and model.lm_head.weight is model.transformer.wte.weight
    found = covariances(model, batches)
    check_same(found, expected)
    assert found["transformer.h.0.mlp.c_proj.weight"].shape == (128, 128), "in_features, not the first dimension"


class Odd(nn.Module):
    """A graph break, a checkpoint inside a checkpoint, one layer used twice, two weights tied, one read beside a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        self.tied = nn.Linear(8, 6, bias=False)
        self.tied.weight = self.last.weight
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(torch.tanh(self.first(x)))

        def deep(h: Tensor) -> Tensor:
            return self.inner(torch.relu(h))

        def body(h: Tensor) -> Tensor:
            return checkpoint(deep, torch.tanh(self.twice(h)), use_reentrant=False)

        torch._dynamo.graph_break()
        h = checkpoint(body, h, use_reentrant=False)
        return self.last(h) + 2 * self.tied(h.sin()) + self.last.weight.sum()


def test_a_hand_written_module():
    model, batches = Odd(), [(torch.randn(4, 3, 6),), (torch.randn(2, 3, 6),), {"x": torch.randn(5, 6)}]
    found = covariances(model, batches)
    check_same(found, hooked(model, batches))
    assert found.keys() == {"first.weight", "twice.weight", "inner.weight", "last.weight"}


class Blocks(nn.Module):
    """Blocks that Dynamo compiles one by one, for the break in the loop: one graph is entered again with others' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return x


def test_a_graph_entered_again_counts_for_the_weights_it_was_called_with(monkeypatch):
    calls = counted(monkeypatch)
    model, batches = Blocks(), [(torch.randn(5, 8),), (torch.randn(5, 8),)]
    found = covariances(model, batches)
    check_same(found, hooked(model, batches))
    assert len({id(t) for t in found.values()}) == 8 and len(calls) < 4


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype, checkpointed):
    model, batches = Stack(checkpointed=checkpointed).to(dtype), [(torch.randn(300, 32, dtype=dtype),)]
    check_same(covariances(model, batches), hooked(model, batches))


def test_under_autocast_too():
    model, x = Stack(), torch.randn(300, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = covariances(model, [(x,)])
        expected = hooked(model, [(x,)])
    first = "blocks.0.up.weight"
    assert_same(found[first].double(), expected[first], torch.float32, roundings=8)  # sums of 300 rows: 2 seen
    assert all(t.dtype == torch.float32 for t in found.values())


def test_float64_stays_so():
    model, x = Stack().double(), torch.randn(5, 32, dtype=torch.float64)
    found = covariances(model, [(x,)])
    for name, total in hooked(model, [(x,)]).items():
        torch.testing.assert_close(found[name], total, rtol=1e-12, atol=1e-12)


# --- what hooks don't reach -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, w: x @ w, (8, 5)),
        (lambda x, w: torch.einsum("bti,oi->bto", x, w), (5, 8)),
        (lambda x, w: F.linear(x, w[:3]), (5, 8)),
        (lambda x, w: F.linear(x.view(-1, 8), w.float()), (5, 8)),
    ],
)
def test_every_spelling(function, shape):
    model, x = Spelled(function, shape), torch.randn(2, 3, 8)
    total = x.flatten(0, 1).T @ x.flatten(0, 1)
    found = covariances(model, [(x,), (2 * x,)])
    assert list(found) == ["weight"]
    torch.testing.assert_close(found["weight"], 5 * total)


def test_packed_attention():
    model, x, memory = Attention(), torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    found = covariances(model.eval(), [(x,)])
    total = x.flatten(0, 1).T @ x.flatten(0, 1)
    assert found.keys() == {"attn.in_proj_weight", "attn.out_proj.weight"}
    torch.testing.assert_close(found["attn.in_proj_weight"], total, rtol=1e-4, atol=1e-4)
    across = covariances(model, [(x, memory)])["attn.in_proj_weight"]
    keys = memory.flatten(0, 1).T @ memory.flatten(0, 1)
    torch.testing.assert_close(across, total + keys, rtol=1e-4, atol=1e-4)


def test_a_matrix_multiplied_both_ways_counts_as_it_is_first():
    """Of x Wᵀ W the second factor's inputs have another width; they are no inputs of W's in_features."""
    model, x = Spelled(lambda x, w: F.linear(torch.tanh(F.linear(x, w)), w.t()), (5, 8)), torch.randn(4, 8)
    found = covariances(model, [(x,)])
    torch.testing.assert_close(found["weight"], x.T @ x)


def test_a_write_between_two_reads_is_seen():
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 1
            a = self.one(h)
            h.mul_(3)
            return a + self.two(h)

    x = torch.randn(5, 6)
    found = covariances(Written(), [(x,)])
    torch.testing.assert_close(found["one.weight"], x.T @ x)
    torch.testing.assert_close(found["two.weight"], 9 * x.T @ x)


def test_an_embedding_is_no_site_and_a_head_tied_to_it_is():
    assert "embed.weight" not in covariances(LanguageModel(), [(tokens(2, 7),)])
    found = covariances(LanguageModel(tied=True), [(tokens(2, 7),)])
    assert found["embed.weight"].shape == (WIDTH, WIDTH)


# --- what it leaves, and how it is asked for --------------------------------------------------------------------------


def test_it_leaves_no_trace():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    found = covariances(model, [(torch.ones(4, 8),), (torch.randn(4, 8, generator=torch.Generator()),)])
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(t.requires_grad for t in found.values()) and all(p.grad is None for p in model.parameters())
    assert "_compiled_call_impl" not in model.__dict__ and "_is_torch_compile" not in model.__dict__


def test_a_recipe_says_which():
    model, batches = Stack(), [(torch.randn(4, 32),)]
    found = covariances(model, batches, Recipe(include=["blocks.1"], exclude=["*.down"]))
    assert list(found) == ["blocks.1.up.weight"]
    with pytest.raises(PlanError, match="include='block' matches no module"):
        covariances(model, batches, Recipe(include=["block"]))


def test_a_compiled_model_is_called_by_its_plain_names():
    model = torch.compile(Stack(), backend="eager")
    assert set(covariances(model, [(torch.randn(4, 32),)])) == {
        f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down")
    }


def test_compiled_once_however_many_batches(monkeypatch):
    calls = counted(monkeypatch)
    model, batches = Stack(), [(torch.randn(n, 32),) for n in (3, 4, 5, 6, 7, 8)]
    check_same(covariances(model, batches), hooked(model, batches))
    assert len(calls) == 2, "one graph for the first size, one for all sizes"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_numbers_that_are_none_are_told_with_weight_and_batch(bad):
    batches = [(torch.randn(3, 6),) for _ in range(3)]
    batches[1][0][0, 2] = bad
    with pytest.raises(
        CaptureError, match=r"calibration batch 1 brings NaN, Inf or .* into the inputs of first\.weight"
    ):
        covariances(Odd(), batches)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no calibration batch"),
        (iter([]), "no calibration batch"),
        ([(torch.randn(2, 32),), (torch.randn(2, 31),)], "Stack could not be run with calibration batch 1"),
        ([(torch.randn(2, 32),), {"y": 1}], r"calibration batch 1: example_inputs don't fit Stack\.forward"),
        ([torch.randn(2, 32)], "calibration batch 0: example_inputs is a tensor; wrap it in a tuple"),
        (torch.randn(2, 32), r"batches is one Tensor; give a list of them: \[batch\]"),
        ({"x": torch.randn(2, 32)}, "batches is one dict; give a list"),
    ],
)
def test_batches_that_cannot_be_run_are_told_by_index(batches, message):
    with pytest.raises(CaptureError, match=message):
        covariances(Stack(), batches)


def test_models_that_cannot_be_calibrated_are_refused():
    with torch.device("meta"):
        model = Stack()
    with pytest.raises(CaptureError, match="Stack is on the meta device, and calibration computes"):
        covariances(model, [(torch.randn(2, 32),)])
    with pytest.raises(PlanError, match="Embedding multiplies with none of the weights"):
        covariances(nn.Embedding(4, 5), [(torch.tensor([1]),)])
    adopted = lrcompile.adopt(Stack(), Recipe(rank=2), (torch.randn(2, 32),))
    with pytest.raises(AdoptError, match="adopted already"):
        covariances(adopted, [(torch.randn(2, 32),)])
