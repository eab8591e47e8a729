"""What the passes that put operators of ours into a graph share: when they act, and the line that says why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from lrcompile.cost import MARGIN, Device
from lrcompile.kernels.lowrank_linear import Shape
from lrcompile.passes.chains import argument, value, written
from lrcompile.passes.contract import PassContext
from lrcompile.passes.graphs import Scope, Site, emit, rows_of


def active(ctx: PassContext) -> bool:
    """Whether operators of ours may be chosen at all: not for the CPU unless forced."""
    return ctx.kernels == "triton" or (ctx.kernels == "auto" and ctx.target is not None)


def choose(
    ctx: PassContext, ours: str, theirs: str, trains: bool, predict: Callable[[Device], tuple[float, float]]
) -> tuple[bool, str]:
    """Whether ours is taken, and why.

    Args:
        ctx: whose `kernels` and `target` decide.
        ours, theirs: what the two are called.
        trains: whether `predict` counts backward too.
        predict: device -> seconds of ours, of theirs.
    """
    if ctx.kernels != "auto" or ctx.target is None:
        return ctx.kernels == "triton", f"kernels={ctx.kernels!r}"
    seconds = predict(ctx.target)
    told = ", ".join(f"{name} {time * 1e6:.3g} µs" for name, time in zip((ours, theirs), seconds, strict=True))
    # An operator of ours stands in Inductor's way, so it has to promise something.
    taken = seconds[0] * MARGIN < seconds[1]
    return taken, f"predicted for {ctx.target.name}, forward{' and backward' * trains}: {told}"


def pair_operands(site: Site) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None]:
    """The nodes of x (..., in), weight_a (rank, in), weight_b (out, rank) and the bias, of a site that is a pair."""
    first = site.x
    return first.args[0], argument(first, 1, "weight"), argument(site.node, 1, "weight"), argument(site.node, 2, "bias")  # type: ignore[return-value]


def shape_of(site: Site) -> Shape:
    """The sizes of a site that is a pair; a dynamic size counts as in this call."""
    x, a, b, bias = pair_operands(site)
    return Shape(rows_of(x), int(value(a).shape[1]), int(value(b).shape[0]), int(value(a).shape[0]), bias is not None)


def wants_gradient(node: Any) -> bool:
    """Whether a gradient flows into a node's value."""
    return isinstance(node, fx.Node) and isinstance(value(node), torch.Tensor) and bool(value(node).requires_grad)


def fits(site: Site) -> bool:
    """Whether an operator of ours can stand for a site: the shapes of what autocast makes aren't known on `meta`."""
    return not (casts(site.node) or casts(site.x)) or value(site.node).device.type in ("cpu", "cuda")


def has_kernels(site: Site) -> bool:
    """Whether our kernels are made for a site's dtype."""
    return value(site.node).dtype in (torch.float32, torch.float16, torch.bfloat16)


def undisturbed(nodes: Iterable[fx.Node]) -> bool:
    """Whether what is computed at the first of these nodes of one graph could as well be computed at the last.

    Not where something between them writes to memory, or switches autocast or gradients.
    """
    inside = set(nodes)
    graph = next(iter(inside)).graph
    order = list(graph.nodes)
    places = [i for i, node in enumerate(order) if node in inside]
    between = order[places[0] : places[-1] + 1]
    return not any(written(n) or (n.op != "placeholder" and n.is_impure()) for n in between if n not in inside)


def casts(linear: fx.Node) -> bool:
    """Whether autocast is at work in a linear of the graph."""
    return _cast_from(linear.args, value(linear).dtype)


def _cast_from(operands: Any, dtype: torch.dtype) -> bool:
    tensors = (value(x) for x in tree_leaves(operands) if isinstance(x, fx.Node))
    return any(t.is_floating_point() and t.dtype != dtype for t in tensors if isinstance(t, torch.Tensor))


def emit_at(scope: Scope, before: fx.Node, like: fx.Node, op: Any, *args: Any) -> fx.Node:
    """Emit an operator that casts its operands as `like`, a linear, did: autocast may be on in the graph, or around it."""
    dtype = value(like).dtype
    cast = dtype in (torch.float16, torch.bfloat16) and _cast_from(args, dtype)
    with torch.autocast(value(like).device.type, dtype) if cast else nullcontext():
        return emit(scope, before, op, *args, like=like)
