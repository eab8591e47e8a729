"""quantize: each weight with a base becomes base + scale · weight_b @ weight_a in the graph, or base alone (approximating)."""

from __future__ import annotations

from torch import fx

from lrcompile.passes.contract import PassContext, PassResult, graph_pass
from lrcompile.passes.stand_in import stand_in


@graph_pass(exact=False, weight_pass=True)
def quantize(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Add the base's packed tensors, and the pair's sides, and read what they make up instead of the weight."""
    return stand_in(gm, ctx, lambda weight: weight.base is not None)
