"""lower: choose what computes every pair on the device at hand, and leave a clean graph (exact).

On a GPU the cost model decides between our kernel and the two thin linears that Inductor turns into library products; on
the CPU those are always the choice. Nothing is timed, so that all ranks of a training run decide alike.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lrcompile.cost import MARGIN
from lrcompile.kernels import lowrank_linear
from lrcompile.passes.chains import argument
from lrcompile.passes.contract import PassContext, PassResult, graph_pass
from lrcompile.passes.graphs import Site, drop_dead, emit, module_name, pair_of, rows_of, scopes, sites, value

THIN = "two thin linears"
RECOMPUTE, KEEP = "lrcompile::lowrank_linear", "lrcompile::lowrank_linear_keep"


@graph_pass(exact=True)
def lower(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Put an operator of ours where it is expected to be faster, say of each pair what computes it and why; lint."""
    result = PassResult()
    for site in list(sites(gm)):
        rank = pair_of(site)
        if rank is None:
            continue
        what, why = _choice(site, rank, ctx)
        result.changed.append(f"{module_name(site.node) or site.node.name}: {what} of rank {rank} ({why})")
        if what != THIN:
            _replace(site, keep=what == KEEP)
    for scope in scopes(gm):
        drop_dead(scope.gm)
        scope.gm.graph.lint()
        scope.gm.recompile()
    return result


def _choice(site: Site, rank: int, ctx: PassContext) -> tuple[str, str]:
    """What computes a pair, and why."""
    if ctx.kernels != "auto":
        return RECOMPUTE if ctx.kernels == "triton" else THIN, f"kernels={ctx.kernels!r}"
    if ctx.target is None:
        return THIN, ctx.device
    inner, bias, dtype = site.x.args[0], argument(site.node, 2, "bias"), value(site.node).dtype
    features = int(value(inner).shape[-1]), int(value(site.node).shape[-1])
    shape = lowrank_linear.Shape(rows_of(inner), *features, rank, bias is not None)  # type: ignore[arg-type]
    forward = lowrank_linear.predict_forward(shape, dtype, ctx.target)
    seconds = {RECOMPUTE: forward.seconds, THIN: forward.gemms}
    needed = tuple(_wants_gradient(node) for node in (inner, *_factors(site), bias))
    if any(needed):
        for what, kept in ((RECOMPUTE, False), (KEEP, True)):
            backward = lowrank_linear.predict_backward(shape, dtype, ctx.target, needed, kept)  # type: ignore[arg-type]
            seconds[what] = forward.seconds + backward.seconds
        seconds[THIN] += backward.gemms
    best = min(seconds, key=lambda what: seconds[what])
    # An operator of ours stands in Inductor's way, so it has to promise something.
    what = best if seconds[best] * MARGIN < seconds[THIN] else THIN
    told = ", ".join(f"{name} {time * 1e6:.3g} µs" for name, time in seconds.items())
    return what, f"predicted for {ctx.target.name}, forward{' and backward' * any(needed)}: {told}"


def _factors(site: Site) -> tuple[Any, Any]:
    """The nodes of weight_a (rank, in) and weight_b (out, rank), as the thin linears take them."""
    return argument(site.x, 1, "weight"), argument(site.node, 1, "weight")


def _wants_gradient(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(value(node), torch.Tensor) and value(node).requires_grad


def _replace(site: Site, *, keep: bool) -> None:
    name = "lowrank_linear_keep" if keep else "lowrank_linear"
    op = getattr(torch.ops.lrcompile, name).default
    new = emit(site.scope, site.node, op, site.x.args[0], *_factors(site), argument(site.node, 2, "bias"))
    if keep:  # (y, x @ weight_aᵀ)
        new = emit(site.scope, site.node, operator.getitem, new, 0)
    site.node.replace_all_uses_with(new)
    site.scope.gm.graph.erase_node(site.node)
