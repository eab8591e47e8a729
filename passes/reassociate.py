"""reassociate: x @ (weight_b @ weight_a)ᵀ becomes (x @ weight_aᵀ) @ weight_bᵀ, the dense product never formed (exact).

Transposes, casts and row slices between the product and its use are pushed into the factors:
(B A)ᵀ = Aᵀ Bᵀ, rows(B A) = rows(B) A. The order that needs fewer FLOPs is kept. A weight with a quantised base or
quantised factors becomes one operator that decodes inside the product (reassociate_base.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lrcompile.passes.chains import argument, value
from lrcompile.passes.chosen import emit_at
from lrcompile.passes.contract import PassContext, PassResult, graph_pass
from lrcompile.passes.graphs import (
    Site,
    composed,
    decoded_product,
    drop_dead,
    emit,
    linear_fn,
    looks_up_rows,
    module_name,
    pair_product,
    sites,
)
from lrcompile.passes.reassociate_base import again_by_rows, rewrite


@graph_pass(exact=True)
def reassociate(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Rewrite every site whose matrix is a product of two parameters."""
    result = PassResult()
    touched = {}
    for site in list(sites(gm)):
        name = module_name(site.node) or site.node.name
        if composed(site.chain.source) or decoded_product(site.chain.source):
            told = rewrite(site)
            if told.changed:
                touched[id(site.scope.gm)] = site.scope.gm
            result.changed += [f"{name}: {line}" for line in told.changed]
            result.notes += [f"{name}: {line}" for line in told.notes]
            continue
        if not pair_product(site.scope, site.chain.source):
            continue
        if site.kind != "embedding" and not _thin_is_cheaper(site):
            result.notes.append(f"{name}: the dense product needs fewer FLOPs here, kept")
            continue
        left, right = _factors(site)
        if site.kind == "embedding":
            new = _embedding(site, left, right)
            if new is None:
                result.notes.append(f"{name}: embedding options (max_norm, sparse) keep the dense product")
                continue
        else:
            x = emit_at(site.scope, site.node, site.node, linear_fn, site.x, right)
            new = emit_at(site.scope, site.node, site.node, linear_fn, x, left, argument(site.node, 2, "bias"))
        site.node.replace_all_uses_with(new)
        site.scope.gm.graph.erase_node(site.node)
        rank = value(right).shape[0]
        result.changed.append(f"{name}: two products of rank {rank}")
        touched[id(site.scope.gm)] = site.scope.gm
    for owner in touched.values():
        drop_dead(owner)
        owner.recompile()
    return result


def _factors(site: Site) -> tuple[fx.Node, fx.Node]:
    """(left, right) with matrix = left @ right, from the product and the steps after it."""
    left, right = site.chain.source.args[:2]
    for kind, node in site.chain.steps:
        if kind == "t":
            old_left, old_right = left, right
            left = emit(site.scope, site.node, "t", old_right)
            right = emit(site.scope, site.node, "t", old_left)
        elif kind == "cast":
            left, right = (_again(site, node, side) for side in (left, right))
        else:  # rows
            left = again_by_rows(site, node, left)
    return left, right  # type: ignore[return-value]


def _again(site: Site, cast: fx.Node, operand: Any) -> fx.Node:
    return emit(site.scope, site.node, cast.target, operand, *cast.args[1:], **dict[str, Any](cast.kwargs))


def _embedding(site: Site, left: fx.Node, right: fx.Node) -> fx.Node | None:
    """Look up rows of weight_b, then one thin product: embedding(i, B A) = embedding(i, B) A, and (B A)[i] = B[i] A."""
    node = site.node
    if looks_up_rows(node):
        rows = emit(site.scope, node, node.target, left, *node.args[1:], **dict[str, Any](node.kwargs))
        return emit(site.scope, node, torch.matmul, rows, right)
    padding, max_norm, scale, sparse = (
        argument(node, i, n, d)
        for i, n, d in (
            (2, "padding_idx", None),
            (3, "max_norm", None),
            (5, "scale_grad_by_freq", False),
            (6, "sparse", False),
        )
    )
    if max_norm is not None or scale or sparse or padding is not None:
        return None  # each acts on whole rows of the dense weight, or on its gradient
    rows = emit(site.scope, node, F.embedding, node.args[0], left)
    return emit(site.scope, node, torch.matmul, rows, right)


def _thin_is_cheaper(site: Site) -> bool:
    """FLOPs of two thin products (N r (in + out)) against product and dense use (r in out + N in out)."""
    shape = value(site.node.args[1] if len(site.node.args) > 1 else site.node.kwargs["weight"]).shape
    out, inner = (int(s) for s in shape)
    rank = int(value(site.chain.source.args[1]).shape[0])
    rows = 1
    for size in value(site.x).shape[:-1]:
        rows *= size if isinstance(size, int) else int(size.node.hint)
    return rows * rank * (inner + out) <= (rank + rows) * inner * out
