"""What Dynamo makes of a model, and that looking at it leaves no trace."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lrcompile import CaptureError
from lrcompile.graph import capture as capture_module
from lrcompile.graph.capture import capture
from lrcompile.passes.graphs import scopes

from .helpers import Attention, Block, LanguageModel, Stack, ids, tiny_llama, tiny_t5


def parameter_keys(captured) -> set[str]:
    """The first name of every parameter that some graph reads."""
    return {captured.names[id(p)][0] for g in captured.graphs for p in g.parameters().values()}


def test_one_graph_with_the_models_own_parameters():
    model = Stack()
    captured = capture(model, (torch.randn(3, 32),))
    assert len(captured.graphs) == 1 and captured.breaks == [] and captured.graphs[0].last
    assert {id(p) for p in captured.graphs[0].parameters().values()} == {id(p) for p in model.parameters()}
    assert parameter_keys(captured) == {name for name, _ in model.named_parameters()}


class Broken(nn.Module):
    """Breaks the trace between its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        torch._dynamo.graph_break()
        return self.second(h)


def test_a_graph_break_gives_two_graphs_and_its_reason():
    captured = capture(Broken(), (torch.randn(2, 4),))
    assert [g.last for g in captured.graphs] == [False, True]
    assert len(captured.breaks) == 1 and "graph_break" in captured.breaks[0]
    assert parameter_keys(captured) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    # The reasons of an earlier capture aren't told again.
    assert capture(Stack(), (torch.randn(3, 32),)).breaks == []
    assert len(capture(Broken(), (torch.randn(2, 4),)).breaks) == 1


class DataDependent(nn.Module):
    """Chooses by a number that meta tensors don't have, after its first product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if h.sum().item() > 1e9:
            return h
        return self.second(h)


def test_a_branch_on_data_is_a_break():
    real = capture(DataDependent(), (torch.randn(2, 4),))
    assert parameter_keys(real) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert real.breaks
    meta = capture(DataDependent().to("meta"), (torch.randn(2, 4),))
    assert {"first.weight", "first.bias"} <= parameter_keys(meta) and meta.breaks


def test_meta_model_with_real_or_meta_inputs():
    with torch.device("meta"):
        model = Stack()
    for x in (torch.randn(3, 32), torch.randn(3, 32, device="meta")):
        captured = capture(model, (x,))
        assert parameter_keys(captured) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside the mode"])
def test_a_model_of_fake_tensors(inside):
    mode = FakeTensorMode()
    with mode:
        model = LanguageModel(tied=True)
        fake_ids = ids()
    before = dict(model.named_parameters())
    if inside:
        with mode:
            captured = capture(model, (fake_ids,))
    else:
        captured = capture(model, (ids(),))
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[name] for name, p in model.named_parameters())
    # Parameters are told by identity with the model's own fakes, tied ones once.
    assert parameter_keys(captured) == {name for name, _ in model.named_parameters()}


def test_keyword_inputs_and_batch_encodings():
    from transformers import BatchEncoding

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, scale: float = 1.0, shift: Tensor | None = None) -> Tensor:
            y = self.fc(x) * scale
            return y if shift is None else y + shift

    x = torch.randn(2, 4)
    for inputs in ({"x": x, "scale": 2.0, "shift": torch.ones(4)}, BatchEncoding({"x": x}), (x,), [x]):
        assert parameter_keys(capture(Named(), inputs)) == {"fc.weight", "fc.bias"}


def test_encoder_decoder():
    model = tiny_t5().eval()
    captured = capture(model, {"input_ids": ids(2, 6), "labels": ids(2, 5)})
    assert parameter_keys(captured) >= {name for name, _ in model.named_parameters() if "layer" in name}
    shared = captured.names[id(model.shared.weight)]
    assert {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} <= set(shared)


def test_tied_parameters_are_named_together():
    model = LanguageModel(tied=True)
    captured = capture(model, (ids(),))
    assert captured.names[id(model.embed.weight)] == ("embed.weight", "head.weight")
    assert sum(p is model.embed.weight for p in captured.graphs[0].parameters().values()) == 1


def test_a_module_used_twice_is_one_parameter():
    block = Block()
    model = nn.Sequential(block, block)
    captured = capture(model, (torch.randn(3, 32),))
    assert captured.names[id(block.up.weight)] == ("0.up.weight", "1.up.weight")
    assert sum(p is block.up.weight for p in captured.graphs[0].parameters().values()) == 1


def body_count(captured) -> int:
    return sum(1 for g in captured.graphs for scope in scopes(g.gm) if scope.parent is not None)


def test_checkpoint_bodies():
    captured = capture(Stack(3, checkpointed=True).train(), (torch.randn(3, 32),))
    assert len(captured.graphs) == 1 and body_count(captured) == 3
    tops = set()
    for scope in scopes(captured.graphs[0].gm):
        tops |= {scope.root(p) for p in scope.placeholders if scope.parent is not None}
    read = captured.graphs[0].parameters()
    assert set(read) <= tops


def test_gradient_checkpointing_of_transformers():
    model = tiny_llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    captured = capture(model, {"input_ids": ids(), "use_cache": False})
    assert body_count(captured) == 2
    assert parameter_keys(captured) == {name for name, _ in model.named_parameters()}


class Noisy(nn.Module):
    """Writes a running mean, draws random numbers, counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.drop(self.norm(self.fc(x))) + torch.rand_like(x)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_model_or_the_random_stream_changes(training):
    model = Noisy().train(training)
    model.drop.train(not training)  # a mode of its own
    modes = {name: m.training for name, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    objects = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    torch.manual_seed(3)
    stream = torch.get_rng_state()
    capture(model, (torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),))
    assert torch.equal(torch.get_rng_state(), stream)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())} == objects
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("grad", [True, False])
def test_the_callers_gradient_mode_is_kept(grad):
    with torch.set_grad_enabled(grad):
        capture(Stack(), (torch.randn(3, 32),))
        assert torch.is_grad_enabled() == grad


@pytest.mark.parametrize("enabled", [True, False])
def test_the_encoder_layer_of_torch_is_seen_into_without_gradients(enabled):
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with torch.no_grad():
            [graph] = capture(model, (torch.randn(2, 5, 16),)).graphs
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert F.multi_head_attention_forward in {n.target for n in graph.gm.graph.nodes}


def test_inputs_that_do_not_fit_say_what_to_do():
    model = LanguageModel()
    with pytest.raises(CaptureError, match=r"wrap it in a tuple: \(x,\)"):
        capture(model, ids())
    with pytest.raises(CaptureError, match="a tuple or a dict, got int"):
        capture(model, 3)
    with pytest.raises(CaptureError, match=r"don't fit LanguageModel\.forward\(ids\)"):
        capture(model, {"input_ids": ids()})
    with pytest.raises(CaptureError, match=r"don't fit LanguageModel\.forward\(ids\)"):
        capture(model, ())
    with pytest.raises(CaptureError, match="could not be run with these example inputs.*as the model is called"):
        capture(Stack(), (torch.randn(3, 31),))
    with pytest.raises(CaptureError, match="nn.Module, got builtin"):
        capture(torch.sigmoid, (torch.randn(3, 31),))


class Strict(nn.Module):
    """Refuses some inputs itself, with an error that another one led to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        torch._dynamo.graph_break()
        try:
            return y + {4: 1}[x.shape[0]]
        except KeyError as error:
            raise ValueError(f"made for 4 rows, not {x.shape[0]}") from error


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("model", "x", "said"),
    [
        (Stack, torch.randn(3, 31), r"RuntimeError: .*32.*31"),
        (lambda: nn.Linear(32, 8), torch.randn(3, 31), r"RuntimeError: .*31.*32"),
        (lambda: nn.Embedding(4, 8), torch.randn(3), "RuntimeError: .*Long.*float"),
        (LanguageModel, torch.randn(3, 8), "RuntimeError: .*Long.*float"),
    ],
)
def test_what_the_model_says_of_wrong_inputs_is_told_and_nothing_else(model, x, said, device, caplog, monkeypatch):
    log = logging.getLogger("torch._subclasses.fake_tensor")  # which torch doesn't let pytest see
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    with pytest.raises(CaptureError, match=rf"could not be run with these example inputs: {said}.*\. Pass the inputs"):
        capture(model().to(device), (x,))
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == [] and log.filters == []


def test_an_error_of_the_models_own_is_told_and_not_what_led_to_it():
    with pytest.raises(CaptureError, match=r"example inputs: ValueError: made for 4 rows, not 3\. Pass"):
        capture(Strict(), (torch.randn(3, 8),))
    assert len(capture(Strict(), (torch.randn(4, 8),)).graphs) == 2


def test_a_failed_capture_leaves_no_trace_either():
    model = Noisy().train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError):
        capture(model, (torch.randn(5, 3),))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_a_model_without_a_graph():
    class Plain(nn.Module):
        def forward(self, x: int) -> int:
            return x + 1

    with pytest.raises(CaptureError, match="Dynamo made no graph of Plain"):
        capture(Plain(), (3,))


def test_a_compiled_model_is_captured_and_not_recompiled():
    calls = 0

    def counting(gm, inputs):
        nonlocal calls
        calls += 1
        return gm.forward

    model, x = Stack(), torch.randn(3, 32)
    compiled = torch.compile(model, backend=counting)
    compiled(x)
    assert calls == 1
    captured = capture(compiled, (x,))
    assert parameter_keys(captured) == {name for name, _ in model.named_parameters()}
    capture(model, (x,))
    compiled(x)
    assert calls == 1


@pytest.mark.parametrize("per_block", [False, True])
def test_a_model_compiled_in_place_is_captured_and_not_recompiled(per_block):
    calls = 0

    def counting(gm, inputs):
        nonlocal calls
        calls += 1
        return gm.forward

    model, x = Stack(), torch.randn(3, 32)
    for part in model.blocks if per_block else [model]:
        part.compile(backend=counting)
    model(x)
    before = calls
    captured = capture(model, (x,))
    assert parameter_keys(captured) == {name for name, _ in model.named_parameters()}
    assert len(captured.graphs) == 1
    model(x)
    assert calls == before > 0


def test_many_captures_never_run_into_dynamos_recompile_limit():
    model = Attention()
    for tokens in range(2, 14):
        captured = capture(model, {"x": torch.randn(2, tokens, 16)})
        assert len(captured.graphs) == 1 and captured.breaks == []


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1+cu128", "1.13.1"])
def test_an_old_torch_is_refused(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    with pytest.raises(CaptureError, match=rf"needs torch 2\.11 or later, this is {version.split('+')[0]}"):
        capture(Stack(), (torch.randn(3, 32),))


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git123", "2.13.0+cpu", "3.0"])
def test_a_torch_that_is_new_enough(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    capture_module.check_torch()


def test_a_forward_that_torch_does_not_trace_is_told() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0]

    with pytest.raises(CaptureError, match="torch doesn't trace a forward that runs an nn.LSTM"):
        capture(Recurrent(), (torch.randn(3, 2, 8),))
