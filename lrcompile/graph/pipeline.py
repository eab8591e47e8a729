"""The pipeline: runs passes in order over the graphs of a model, keeps a snapshot of each, and can check them.

Translation validation: with `verify=True`, every graph is run before and after each *exact* pass on the same inputs,
and the outputs and gradients must agree to rounding; the pass that breaks them is named.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from lrcompile.errors import LrcompileError, PassError
from lrcompile.graph.capture import Capture, CapturedGraph
from lrcompile.passes import PassContext, PassFunction, PassResult, Weight
from lrcompile.passes.graphs import fake_mode, value

# Relative error above which two results are called different: about a thousand roundings.
_ROUNDING = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass
class Snapshot:
    """One stage: the graphs as a pass left them.

    Attributes:
        name: of the pass; "capture" for the graphs as they came.
        exact: whether the pass promises to keep the numerics.
        graphs: one copy for each captured graph.
        result: what it did, over all graphs.
        seconds: it took.
        verified: the largest relative difference seen by translation validation; None where it wasn't run.
    """

    name: str
    exact: bool
    graphs: list[fx.GraphModule]
    result: PassResult = field(default_factory=PassResult)
    seconds: float = 0.0
    verified: float | None = None


def bind_weights(graphs: Sequence[CapturedGraph], names: dict[int, tuple[str, ...]], ctx: PassContext) -> None:
    """Tell the graphs' inputs which parameter of the model each is, and list those in the context."""
    for graph in graphs:
        for node, parameter in graph.parameters().items():
            if parameter.dim() < 2 or id(parameter) not in names:
                continue
            key = names[id(parameter)][0]
            node.meta["lr_weight"] = key
            weight = Weight(names[id(parameter)], tuple(parameter.shape), parameter.dtype)
            quantised = getattr(parameter, "lr_quantised", None)  # a stand-in of weights/library.py
            weight.held = quantised.format.name if quantised is not None else ""
            ctx.weights.setdefault(key, weight)


def run_passes(
    captured: Capture,
    passes: Sequence[PassFunction],
    ctx: PassContext,
    *,
    snapshots: bool = False,
    verify: bool = False,
    values: Callable[[CapturedGraph, fx.GraphModule], list[Any]] | None = None,
) -> list[Snapshot]:
    """Run the passes over the captured graphs, in place.

    Args:
        captured: from `capture`.
        passes: in order; each is run over all graphs before the next.
        ctx: shared by them all.
        snapshots: keep a copy of every graph after every pass.
        verify: check the exact passes on the sample inputs.
        values: the inputs to run a graph with, for verify; by default those it was captured with.

    Returns:
        a snapshot for each stage, "capture" first; their graphs are empty without `snapshots`.

    Raises:
        PassError: a pass raised, left a malformed graph, or claimed to be exact and wasn't; named.
    """
    values = values or (lambda graph, gm: graph.inputs)
    stages = [Snapshot("capture", True, [copy_graph(g.gm) for g in captured.graphs] if snapshots else [])]
    for function in passes:
        name, exact = function.__name__, bool(function.exact)  # type: ignore[attr-defined]
        stage = Snapshot(name, exact, [])
        start = time.perf_counter()
        for graph in captured.graphs:
            before = copy_graph(graph.gm) if verify and exact else None
            ctx.last = graph.last
            done = _run_one(function, graph.gm, ctx)
            stage.result.changed += done.changed
            stage.result.notes += done.notes
            if before is not None:
                # What a pass says of itself is not believed: only a graph found unchanged has nothing to compare.
                same = _written_out(before) == _written_out(graph.gm)
                worst = 0.0 if same else _verify(name, before, graph.gm, values(graph, graph.gm))
                stage.verified = max(stage.verified or 0.0, worst)
                if worst > 1.0:
                    raise PassError(
                        f"pass {name!r} says it is exact, but outputs or gradients differ by {worst:.3g} times what "
                        "rounding allows; fix the pass, or mark it exact=False"
                    )
        stage.seconds = time.perf_counter() - start
        if snapshots:
            stage.graphs = [copy_graph(g.gm) for g in captured.graphs]
        stages.append(stage)
    return stages


def _run_one(function: PassFunction, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    name = function.__name__
    try:
        done = function(gm, ctx)
        gm.graph.lint()
        gm.recompile()
    except LrcompileError:
        raise
    except Exception as error:
        raise PassError(f"pass {name!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(done, PassResult):
        raise PassError(f"pass {name!r} returned {type(done).__name__}; a pass returns a PassResult")
    return done


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """An independent copy of a graph and its sub-graphs; tensors and fake values are shared."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    graph.output(output[0]).meta.update(gm.graph.output_node().meta)
    root = nn.Module()
    bodies: dict[int, fx.GraphModule] = {}  # one body under two names stays one
    for key, child in gm._modules.items():
        if isinstance(child, fx.GraphModule):
            root._modules[key] = bodies.setdefault(id(child), copy_graph(child))
        else:
            root._modules[key] = child
    for key, item in gm.__dict__.items():
        if isinstance(item, torch.Tensor) and not key.startswith("_"):
            setattr(root, key, item)
    for key, tensor in (*gm._buffers.items(), *gm._parameters.items()):
        setattr(root, key, tensor)
    new = fx.GraphModule(root, graph)
    new.meta.update(gm.meta)
    return new


def _verify(name: str, before: fx.GraphModule, after: fx.GraphModule, inputs: list[Any]) -> float:
    if any(isinstance(x, torch.Tensor) and (x.is_meta or isinstance(x, FakeTensor)) for x in inputs):
        raise PassError(f"pass {name!r} can't be verified on the meta device: verifying computes; use a real model")
    try:
        return compare(before, after, inputs)
    except Exception as error:
        raise PassError(f"pass {name!r} left a graph that can't be run: {type(error).__name__}: {error}") from error


def _written_out(gm: fx.GraphModule) -> list[Any]:
    """Every node of a graph and its sub-graphs by its place, whatever it is called."""
    place = {node: f"%{i}" for i, node in enumerate(gm.graph.nodes)}
    lines: list[Any] = []
    for node in gm.graph.nodes:
        target = node.op if node.op in ("placeholder", "output") else node.target
        lines.append((node.op, target, str(fx.node.map_arg((node.args, node.kwargs), lambda n: place[n]))))
    return lines + [(k, _written_out(m)) for k, m in gm._modules.items() if isinstance(m, fx.GraphModule)]


def compare(before: fx.GraphModule, after: fx.GraphModule, inputs: list[Any]) -> float:
    """The largest difference between two graphs, in units of what rounding explains (1.0).

    Outputs, inputs that a graph writes to (a running mean), and the gradients of every floating input are compared.
    Infinite where the two differ in number, shape or dtype, or in where they hold NaN, infinities or masks.
    """
    for gradients in ("all", "wanted", "none"):
        try:
            left = _run_with_gradients(before, inputs, gradients)
        except RuntimeError:  # no gradient can be asked of an input (batch_norm's running mean), or of an op at all
            if gradients == "none":
                raise
        else:
            break
    right = _run_with_gradients(after, inputs, gradients)
    precision = _precision([*(t for tensors in left for t in tensors), *_values(before)])
    return max(_gap(a, b, _ROUNDING[precision]) for a, b in zip(left, right, strict=True))


def _gap(left: list[torch.Tensor | None], right: list[torch.Tensor | None], rounding: float) -> float:
    if len(left) != len(right):
        return float("inf")
    # What is zero in exact arithmetic (the gradient of a key bias under softmax) holds only rounding: it is measured by
    # its peers. By the median, twice, so that neither masks nor a single large peer hide an error elsewhere.
    sizes = [_median(t.detach().double()[_plain(t)]) for t in left if t is not None and t.is_floating_point()]
    typical = statistics.median([size for size in sizes if size > 0] or [0.0])
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if a is None or b is None:
            worst = max(worst, 0.0 if a is b else float("inf"))
        elif a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        elif not a.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
        else:
            worst = max(worst, _distance(a, b, rounding, typical))
    return worst


def _distance(a: torch.Tensor, b: torch.Tensor, rounding: float, typical: float) -> float:
    plain = _plain(a)
    if not torch.equal(plain, _plain(b)) or not torch.equal(torch.isnan(a), torch.isnan(b)):
        return float("inf")
    if not torch.equal(torch.sign(a[~plain]).nan_to_num(), torch.sign(b[~plain]).nan_to_num()):
        return float("inf")
    a, b = a[plain].double(), b[plain].double()
    # Numbers far above the others (scores masked by -1e9) are a group of their own.
    bulk = a.abs() <= 1e3 * _median(a)
    worst = 0.0
    for group in (bulk, ~bulk):
        if not bool(group.any()):
            continue
        gap = float((a - b)[group].norm())
        allowed = rounding * (float(a[group].norm()) + 1e-2 * typical * int(group.sum()) ** 0.5)
        worst = max(worst, gap / allowed if allowed > 0 else (0.0 if gap == 0 else float("inf")))
    return worst


def _plain(t: torch.Tensor) -> torch.Tensor:
    """Where a number is one, and not NaN, infinite, or the lowest of its type, which masks are made of."""
    return torch.isfinite(t) & (t.abs() < torch.finfo(t.dtype).max / 4)


def _median(t: torch.Tensor) -> float:
    """The median magnitude of the numbers that aren't zero; 0 where all are."""
    t = t[t != 0].abs()
    return float(t.median()) if t.numel() else 0.0


def _values(gm: fx.GraphModule) -> list[torch.Tensor]:
    """The fake values of all nodes, sub-graphs' too: autocast inside computes in less than the outputs show."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    found = (value(node) for graph in graphs for node in graph.nodes)
    return [v for v in found if isinstance(v, torch.Tensor)]


def _precision(tensors: list[torch.Tensor | None]) -> torch.dtype:
    kinds = [t.dtype for t in tensors if t is not None and t.dtype in _ROUNDING]
    return max(kinds, key=lambda d: _ROUNDING[d], default=torch.float32)


def _run_with_gradients(
    gm: fx.GraphModule, inputs: list[Any], gradients: str
) -> tuple[list[Any], list[Any], list[Any]]:
    """Outputs, inputs afterwards, and gradients, with the random stream restarted.

    `gradients` is of every floating input ("all"), of those that require one ("wanted"), or "none".
    """
    leaves: list[torch.Tensor] = []

    def leaf(x: Any) -> Any:
        if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return x.node.hint  # a dynamic size, as it is in this call
        if not isinstance(x, torch.Tensor):
            return x
        copy = x.detach().clone()
        if x.is_floating_point() and (gradients == "all" or (gradients == "wanted" and x.requires_grad)):
            leaves.append(copy.requires_grad_(True))
        return copy

    fresh = [leaf(x) for x in inputs]
    devices = {x.device for x in fresh if isinstance(x, torch.Tensor) and x.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
        torch.manual_seed(0)
        given = [x * 1 if isinstance(x, torch.Tensor) and x.requires_grad else x for x in fresh]
        out = gm(*given)
        outputs = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        targets = [t for t in outputs if t.requires_grad and t.is_floating_point()]
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(t.shape, generator=generator).to(t) for t in targets]
        grads = torch.autograd.grad(targets, leaves, seeds, allow_unused=True) if targets else ()
    states = [x.detach() for x in given if isinstance(x, torch.Tensor)]
    return [t.detach() for t in outputs], states, list(grads)


def fake_inputs(gm: fx.GraphModule) -> list[Any]:
    """The fake values that a graph was traced with, to run it without computing."""
    return [value(node) for node in gm.graph.find_nodes(op="placeholder")]


def run_on_fakes(gm: fx.GraphModule, run: Callable[[list[Any]], Any]) -> Any:
    """Call `run` with the graph's fake inputs, under the fake mode they belong to."""
    with fake_mode(gm):
        return run(fake_inputs(gm))
