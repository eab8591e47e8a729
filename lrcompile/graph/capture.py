"""Capture: the graphs Dynamo makes of a model, before autograd, with the parameters they read.

The only file that touches private Dynamo names. Parameters enter a Dynamo graph as inputs, as the very
`nn.Parameter` objects of the model, so identity tells which is which, on the `meta` device too.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor

from lrcompile.errors import CaptureError
from lrcompile.graph.names import parameter_names

# Not before torch 2.12; there a capture's cache entries count towards the user's recompile limit.
_OWN_REGION: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)

Inputs = tuple[Any, ...] | list[Any] | dict[str, Any]


@dataclass
class CapturedGraph:
    """One Dynamo graph.

    Attributes:
        gm: the graph; its placeholders carry fake tensors in `meta["example_value"]`.
        inputs: what each placeholder was given: parameters and buffers of the model, the model's inputs, ints.
        last: whether no further graph follows it in the model's call.
    """

    gm: fx.GraphModule
    inputs: list[Any]
    last: bool = True

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.gm.graph.find_nodes(op="placeholder")

    def parameters(self) -> dict[fx.Node, nn.Parameter]:
        """Placeholder -> the parameter it was given."""
        pairs = zip(self.placeholders, self.inputs, strict=True)
        return {node: value for node, value in pairs if isinstance(value, nn.Parameter)}


@dataclass
class Capture:
    """Everything one call of a model was traced into.

    Attributes:
        graphs: in the order of execution; several where the trace broke.
        names: id(parameter) -> all its names in the model, tied names together.
        breaks: why the trace broke, as Dynamo tells it; empty for one whole graph.
    """

    graphs: list[CapturedGraph]
    names: dict[int, tuple[str, ...]]
    breaks: list[str] = field(default_factory=list)


def capture(model: nn.Module, example_inputs: Inputs) -> Capture:
    """Trace one call of the model.

    Args:
        model: any module; real, fake or on the `meta` device. Its parameters, buffers, mode and random state
            are as before afterwards.
        example_inputs: a tuple of positional arguments or a dict of keyword arguments, as the model is called.
            Tensors are moved to the `meta` device where the model is there.

    Returns:
        the graphs, in order.

    Raises:
        CaptureError: the inputs don't fit the model, nothing of it could be traced, or torch is older than 2.11.
    """
    check_torch()
    if not isinstance(model, nn.Module):
        raise CaptureError(f"a model is an nn.Module, got {type(model).__name__}")
    args, kwargs = split_inputs(example_inputs)
    check_signature(model, args, kwargs)
    plain = getattr(model, "_orig_mod", model)
    graphs: list[CapturedGraph] = []

    def collect(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        if graphs:
            graphs[-1].last = False
        graphs.append(CapturedGraph(gm, list(inputs)))
        return gm.forward

    with _on_meta_if_fake(plain) as real_of, traced(plain, collect, dynamic=False) as run:
        args, kwargs = _to_device_of(plain, (args, kwargs))
        before = dict(counters["graph_break"])
        try:
            run(*args, **kwargs)
        except Exception as error:
            # After the first graph a model may fail on fake or meta data only (a data-dependent branch): what
            # was captured is then reported as a break, not lost.
            if not graphs or not any(p.is_meta for p in plain.parameters()):
                raise CaptureError(
                    f"{type(plain).__name__} could not be run with these example inputs: {cause(error)}. "
                    "Pass the inputs as the model is called: a tuple of positional or a dict of keyword arguments."
                ) from error
            counters["graph_break"][cause(error)] += 1
        for graph in graphs:
            graph.inputs = [real_of.get(id(value), value) for value in graph.inputs]
    breaks = [why for why, n in counters["graph_break"].items() if n > before.get(why, 0)]
    if not graphs:
        recurrent = any(isinstance(m, nn.RNNBase) for m in plain.modules())
        raise CaptureError(
            f"Dynamo made no graph of {type(plain).__name__}: "
            + (
                "; ".join(_first_line(b) for b in breaks)
                or ("torch doesn't trace a forward that runs an nn.LSTM, GRU or RNN" if recurrent else "")
                or "its forward runs no tensor operation or compiling is disabled"
            )
        )
    return Capture(graphs, parameter_names(plain), breaks)


@contextmanager
def traced(
    model: nn.Module, backend: Callable[[fx.GraphModule, list[Any]], Any], dynamic: bool | None = None
) -> Iterator[Callable[..., Any]]:
    """The model as a backend compiles it, to be called inside this context; as it was afterwards, and uncompiled.

    It has its own region of Dynamo's cache: the user's compiled code and recompile budget stay as they are.
    """
    limits = torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20)
    with _state_kept(model), _as_if_uncompiled(model), _opened_up(), _told_once(), limits:
        yield torch.compile(model, backend=backend, dynamic=dynamic, **_OWN_REGION)


def check_torch() -> None:
    """Raise CaptureError where torch is older than 2.11, the first with all of Dynamo that is used here."""
    major, minor = (int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if (major, minor) < (2, 11):
        raise CaptureError(f"lrcompile needs torch 2.11 or later, this is {torch.__version__}; upgrade torch")


def split_inputs(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tuple or dict of inputs -> (args, kwargs)."""
    if isinstance(example_inputs, torch.Tensor):
        raise CaptureError("example_inputs is a tensor; wrap it in a tuple: (x,), or name it: {'input_ids': x}")
    if hasattr(example_inputs, "keys"):
        return (), dict(example_inputs)  # a plain dict, or transformers' BatchEncoding
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise CaptureError(f"example_inputs is a tuple or a dict, got {type(example_inputs).__name__}")


def frame_modules() -> dict[str, nn.Module]:
    """The modules that the frame being compiled holds, by the name of the variable. Only inside a backend call."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output: Any = InstructionTranslator.current_tx().output
    frame = output.root_tx
    held = dict(frame.f_locals)
    for source in (str(arg.source.name) for arg in output.graphargs):
        if source.startswith("G['"):
            name = source.split("'")[1]
            held.setdefault(name, frame.f_globals.get(name))
    modules = {k: getattr(v, "_orig_mod", v) for k, v in held.items() if isinstance(v, nn.Module)}
    inner = {id(m) for top in modules.values() for m in top.modules() if m is not top}
    return {k: m for k, m in modules.items() if id(m) not in inner}


def frame_goes_on() -> bool:
    """Whether the graph being compiled ends at a graph break, with more of the frame to follow."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    reason = InstructionTranslator.current_tx().output.compile_subgraph_reason
    return bool(reason is not None and reason.graph_break)


def tracing_lock() -> AbstractContextManager[Any]:
    """Held, no other thread traces: changing a model under a trace would make it fail."""
    from torch._dynamo.convert_frame import compile_lock

    return compile_lock


def in_recomputed_region() -> bool:
    """Whether torch.utils.checkpoint, without reentry, is running the caller and will compare a second run with it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def cause(error: BaseException) -> str:
    """What went wrong in the model, in one line: Dynamo's own exceptions only wrap it."""
    inner: BaseException | None = error
    while inner is not None and type(inner).__module__.startswith("torch._dynamo"):
        error, inner = inner, inner.__cause__ or inner.__context__
    error = error if inner is None else inner
    line = _first_line(error).rstrip(".")
    return line if line == type(error).__name__ else f"{type(error).__name__}: {line}"


@contextmanager
def _told_once() -> Iterator[None]:
    """An operator that fails on its inputs is told by our error; torch would print the whole traceback before that."""

    def mild(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(mild)
    try:
        yield
    finally:
        log.removeFilter(mild)


def check_signature(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise CaptureError where the model can't be called with these."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(inspect.signature(model.forward).parameters)
        raise CaptureError(f"example_inputs don't fit {type(model).__name__}.forward({names}): {error}") from error


def _to_device_of(model: nn.Module, tree: Any) -> Any:
    if any(p.is_meta for p in model.parameters()):
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), tree)
    return tree


@contextmanager
def _on_meta_if_fake(model: nn.Module) -> Iterator[dict[int, nn.Parameter]]:
    """Dynamo makes its own fakes and refuses those of another mode: lend the model meta tensors meanwhile."""
    real_of: dict[int, nn.Parameter] = {}
    fakes: list[tuple[dict[str, Any], str, Any]] = []
    lent: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if isinstance(value, FakeTensor) or isinstance(getattr(value, "data", None), FakeTensor):
                    fakes.append((store, name, value))
    try:
        for store, name, value in fakes:
            meta: torch.Tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            if isinstance(value, nn.Parameter):
                meta = nn.Parameter(meta, requires_grad=value.requires_grad)
            store[name] = lent.setdefault(id(value), meta)  # type: ignore[assignment]
            if isinstance(value, nn.Parameter):
                real_of[id(store[name])] = value
        yield real_of
    finally:
        for store, name, value in fakes:
            store[name] = value


@contextmanager
def _as_if_uncompiled(model: nn.Module) -> Iterator[None]:
    """What `module.compile()` installed would answer in place of the trace: out of the way meanwhile."""
    calls = [(m, m.__dict__.pop("_compiled_call_impl")) for m in model.modules() if "_compiled_call_impl" in m.__dict__]
    try:
        yield
    finally:
        for module, call in calls:
            module.__dict__["_compiled_call_impl"] = call


@contextmanager
def _opened_up() -> Iterator[None]:
    """Every product in sight, each call on its own.

    A region traced once and called with several layers' weights (nested_compile_region) is inlined, and
    nn.TransformerEncoderLayer doesn't take the one opaque operator it runs as without gradients.
    """
    known = hasattr(torch._dynamo.config, "inline_invoke_subgraph")
    inlined = torch._dynamo.config.patch(inline_invoke_subgraph=True) if known else nullcontext()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with inlined:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Random state and buffers (a running mean) as they were, both what they hold and which tensors they are."""
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    places = [(module, dict(module._buffers)) for module in model.modules()]
    devices = {b.device for b in (*model.parameters(), *model.buffers()) if b.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            model.__dict__.pop("_is_torch_compile", None)  # left there by torch.compile
            for module, held in places:
                module._buffers.clear()
                module._buffers.update(held)
            with torch.no_grad():
                for live, kept in buffers:
                    if not torch.equal(live, kept):  # batch_norm writes without counting a version
                        live.copy_(kept)
