"""factorize: each weight with a rank and no base becomes weight_b @ weight_a in the graph (approximating)."""

from __future__ import annotations

from torch import fx

from lrcompile.passes.contract import PassContext, PassResult, graph_pass
from lrcompile.passes.stand_in import stand_in


@graph_pass(exact=False, weight_pass=True)
def factorize(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Add two inputs for every such weight, and read their product instead of it."""
    return stand_in(gm, ctx, lambda weight: weight.base is None)
