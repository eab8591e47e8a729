"""lower: choose how every site is computed on the device at hand, and leave a clean graph (exact).

On the CPU a pair stays two thin linears, which Inductor turns into two packed GEMMs with the bias in the second.
"""

from __future__ import annotations

from torch import fx

from lrcompile.passes.contract import PassContext, PassResult, graph_pass
from lrcompile.passes.graphs import drop_dead, module_name, pair_of, scopes, sites


@graph_pass(exact=True)
def lower(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Say what computes each pair, drop what nothing reads, and check the graph."""
    result = PassResult()
    for site in sites(gm):
        rank = pair_of(site)
        if rank is not None:
            result.changed.append(
                f"{module_name(site.node) or site.node.name}: two thin linears of rank {rank} ({ctx.device})"
            )
    for scope in scopes(gm):
        drop_dead(scope.gm)
        scope.gm.graph.lint()
        scope.gm.recompile()
    return result
