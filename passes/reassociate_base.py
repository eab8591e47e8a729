"""The sites of reassociate whose weight has a base, or decoded factors: x @ composeᵀ becomes what a Linear of that form runs."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from lrcompile.kernels.compose import DENSE
from lrcompile.kernels.lowrank_quant_linear import lowrank_quant_linear
from lrcompile.kernels.quant_linear import quant_linear
from lrcompile.kernels.quant_lowrank_linear import quant_lowrank_linear
from lrcompile.passes.chains import argument, value
from lrcompile.passes.chosen import emit_at
from lrcompile.passes.contract import PassResult
from lrcompile.passes.graphs import Site, composed, emit, linear_fn


def rewrite(site: Site) -> PassResult:
    """Rewrite one site, or say why it is left."""
    steps = [kind for kind, _ in site.chain.steps]
    source = site.chain.source
    dense = composed(source) and source.args[1] == DENSE
    if site.kind == "embedding":
        return PassResult(notes=["rows are looked up in the weight, which is composed for that"])
    if steps.count("t") % 2:
        return PassResult(notes=["multiplied without a transpose, which no kernel has; the weight is composed"])
    if "rows" in steps and (not dense or "t" in steps):
        return PassResult(notes=["some rows of a quantised weight are read; it is composed and cut"])
    if not composed(source):
        new, told = _decoded_pair(site, *source.args), "both factors decoded in the product"
    elif dense:
        new, told = _dense_base(site), "the base's product, and two thin ones"
    else:
        packed, layout, group, _, _, a, b, scale = source.args
        bias, told = argument(site.node, 2, "bias"), f"{layout} decoded in the product"
        if a is None:
            new = emit_at(site.scope, site.node, site.node, quant_linear, site.x, packed, layout, group, bias)
        else:
            a, b = (_as_x(site, side) for side in (a, b))
            new = emit_at(
                site.scope, site.node, site.node, quant_lowrank_linear, site.x, packed, layout, group, a, b, scale, bias
            )
    site.node.replace_all_uses_with(new)
    site.scope.gm.graph.erase_node(site.node)
    return PassResult(changed=[told])


def _decoded_pair(site: Site, b: Any, a: Any) -> fx.Node:
    parts = [part for side in (a, b) for part in side.args[:3]]
    bias = argument(site.node, 2, "bias")
    return emit_at(site.scope, site.node, site.node, lowrank_quant_linear, site.x, *parts, bias)


def _dense_base(site: Site) -> fx.Node:
    held, _, _, _, _, a, b, scale = site.chain.source.args
    base: Any = held[0]  # type: ignore[index]
    a, b = (_as_x(site, side) for side in (a, b))
    for kind, node in site.chain.steps:
        if kind == "cast":
            base = emit(site.scope, site.node, node.target, base, *node.args[1:], **dict[str, Any](node.kwargs))
        elif kind == "rows":
            base, b = again_by_rows(site, node, base), again_by_rows(site, node, b)
    wide = emit_at(site.scope, site.node, site.node, linear_fn, site.x, base, argument(site.node, 2, "bias"))
    thin = emit_at(site.scope, site.node, site.node, linear_fn, site.x, a)
    pair = emit_at(site.scope, site.node, site.node, linear_fn, thin, b)
    scaled = emit_at(site.scope, site.node, site.node, operator.mul, pair, scale)
    return emit_at(site.scope, site.node, site.node, operator.add, wide, scaled)


def _as_x(site: Site, side: Any) -> fx.Node:
    """A side of the pair in x's dtype, as the eager module has it."""
    dtype = value(site.x).dtype
    return side if value(side).dtype == dtype else emit(site.scope, site.node, "to", side, dtype)


def again_by_rows(site: Site, node: fx.Node, operand: Any) -> fx.Node:
    """The same rows of another matrix."""
    source = node.args[0]
    if isinstance(value(source), (tuple, list)):  # getitem of a split
        parts = emit(site.scope, site.node, source.target, operand, *source.args[1:], **source.kwargs)  # type: ignore[union-attr]
        return emit(site.scope, site.node, operator.getitem, parts, node.args[1])
    return emit(site.scope, site.node, operator.getitem, operand, node.args[1])
