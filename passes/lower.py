"""lower: choose what computes every pair on the device at hand, and leave a clean graph (exact).

On a GPU the cost model decides between our kernel and the two thin linears that Inductor turns into library products; on
the CPU those are always the choice. Nothing is timed, so that all ranks of a training run decide alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrcompile.kernels import lowrank_linear
from lrcompile.passes.chains import argument
from lrcompile.passes.contract import PassContext, PassResult, graph_pass
from lrcompile.passes.graphs import Site, drop_dead, emit, module_name, pair_of, rows_of, scopes, sites, value


@graph_pass(exact=True)
def lower(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Put our operator where it is expected to be faster, say of each pair what computes it and why, check the graph."""
    result = PassResult()
    for site in list(sites(gm)):
        rank = pair_of(site)
        if rank is None:
            continue
        ours, why = _choice(site, rank, ctx)
        name = module_name(site.node) or site.node.name
        what = "lrcompile::lowrank_linear" if ours else "two thin linears"
        result.changed.append(f"{name}: {what} of rank {rank} ({why})")
        if ours:
            _replace(site)
    for scope in scopes(gm):
        drop_dead(scope.gm)
        scope.gm.graph.lint()
        scope.gm.recompile()
    return result


def _choice(site: Site, rank: int, ctx: PassContext) -> tuple[bool, str]:
    """Whether our kernel computes a pair, and why."""
    if ctx.kernels != "auto":
        return ctx.kernels == "triton", f"kernels={ctx.kernels!r}"
    if ctx.target is None:
        return False, ctx.device
    x, out, inner = value(site.x.args[0]), value(site.node), site.x.args[0]
    shape = lowrank_linear.Shape(
        rows_of(inner), int(x.shape[-1]), int(out.shape[-1]), rank, argument(site.node, 2, "bias") is not None
    )
    forward = lowrank_linear.predict_forward(shape, out.dtype, ctx.target)
    ours, theirs = forward.seconds, forward.gemms
    needed = tuple(_wants_gradient(n) for n in (inner, *_factors(site), argument(site.node, 2, "bias")))
    told = f"{ctx.target.name}: {_micro(forward.seconds)} {forward.variant} against {_micro(forward.gemms)} of Inductor"
    if any(needed):
        backward = lowrank_linear.predict_backward(shape, out.dtype, ctx.target, needed)
        ours, theirs = ours + backward.seconds, theirs + backward.gemms
        told += f" forward, {_micro(backward.seconds)} {backward.variant} against {_micro(backward.gemms)} backward"
    if forward.variant == "gemms" and theirs <= ours:
        return False, f"{told}: no gain expected"
    return ours < theirs, told


def _factors(site: Site) -> tuple[Any, Any]:
    """The nodes of weight_a (rank, in) and weight_b (out, rank), as the thin linears take them."""
    return argument(site.x, 1, "weight"), argument(site.node, 1, "weight")


def _wants_gradient(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(value(node), torch.Tensor) and value(node).requires_grad


def _replace(site: Site) -> None:
    a, b = _factors(site)
    op = torch.ops.lrcompile.lowrank_linear.default
    new = emit(site.scope, site.node, op, site.x.args[0], a, b, argument(site.node, 2, "bias"))
    site.node.replace_all_uses_with(new)
    site.scope.gm.graph.erase_node(site.node)


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs"
