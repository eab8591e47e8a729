"""lower: choose what computes every pair on the device at hand, and leave a clean graph (exact).

On a GPU the cost model decides between our kernel and the two thin linears that Inductor turns into library products; on
the CPU those are always the choice. Nothing is timed, so that all ranks of a training run decide alike.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from lrcompile.cost import MARGIN
from lrcompile.kernels import lowrank_linear
from lrcompile.passes import chosen, lower_quantised
from lrcompile.passes.chains import value
from lrcompile.passes.contract import PassContext, PassResult, graph_pass
from lrcompile.passes.graphs import Site, drop_dead, emit, module_name, pair_of, scopes, sites

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
        what, why = _choice(site, ctx)
        result.changed.append(f"{module_name(site.node) or site.node.name}: {what} of rank {rank} ({why})")
        if what != THIN:
            _replace(site, keep=what == KEEP)
    result.changed += lower_quantised.told(gm, ctx)
    for scope in scopes(gm):
        drop_dead(scope.gm)
        scope.gm.graph.lint()
        scope.gm.recompile()
    return result


def _choice(site: Site, ctx: PassContext) -> tuple[str, str]:
    """What computes a pair, and why."""
    if ctx.kernels == "auto" and ctx.target is None:
        return THIN, ctx.device
    if not chosen.undisturbed([site.x, site.node]):
        return THIN, "what stands between the two writes to memory, or switches autocast or gradients"
    if not chosen.fits(site):
        return THIN, "what autocast makes of it isn't known on meta"
    if ctx.kernels != "auto" or ctx.target is None:
        return RECOMPUTE if ctx.kernels == "triton" else THIN, f"kernels={ctx.kernels!r}"
    shape, dtype = chosen.shape_of(site), value(site.node).dtype
    if not chosen.has_kernels(site):
        return THIN, f"our kernels are not for {dtype}"
    x, a, b, bias = map(chosen.wants_gradient, chosen.pair_operands(site))
    trains = chosen.wants_gradient(site.node)
    seconds: dict[str, float] = {}
    for what, kept in ((RECOMPUTE, False), *([(KEEP, True)] * trains)):
        found = lowrank_linear.predict(shape, dtype, ctx.target, (x, a, b, bias) if trains else None, kept)
        seconds |= {what: found.seconds, THIN: found.gemms}
    best = min(seconds, key=lambda what: seconds[what])
    # An operator of ours stands in Inductor's way, so it has to promise something.
    what = best if seconds[best] * MARGIN < seconds[THIN] else THIN
    told = ", ".join(f"{name} {time * 1e6:.3g} µs" for name, time in seconds.items())
    return what, f"predicted for {ctx.target.name}, forward{' and backward' * trains}: {told}"


def _replace(site: Site, *, keep: bool) -> None:
    name = "lowrank_linear_keep" if keep else "lowrank_linear"
    op = getattr(torch.ops.lrcompile, name).default
    new = chosen.emit_at(site.scope, site.node, site.node, op, *chosen.pair_operands(site))
    if keep:  # (y, x @ weight_aᵀ)
        new = emit(site.scope, site.node, operator.getitem, new, 0)
    site.node.replace_all_uses_with(new)
    site.scope.gm.graph.erase_node(site.node)
