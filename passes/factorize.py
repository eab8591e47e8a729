"""factorize: each weight with a rank becomes weight_b @ weight_a in the graph (approximating).

Only shapes are made here, on fake tensors; the numbers (a truncated SVD) are computed by adopt. The product is written the
way an adopted module reads its `weight`, so that `reassociate` finds in both the same thing.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from lrcompile.passes.contract import PassContext, PassResult, Weight, graph_pass
from lrcompile.passes.graphs import emit, fake_mode, refresh, scopes, value


@graph_pass(exact=False, weight_pass=True)
def factorize(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Add two inputs for every such weight, and read their product instead of it."""
    result = PassResult()
    pairs: dict[fx.Node, tuple[fx.Node, fx.Node, Weight]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        weight = ctx.weights.get(node.meta.get("lr_weight", ""))
        if weight is None or weight.rank is None:
            continue
        a = _leaf(gm, node, weight, "a", (weight.rank, weight.in_features))
        b = _leaf(gm, node, weight, "b", (weight.out_features, weight.rank))
        pairs[node] = (a, b, weight)
        result.changed.append(f"{weight.key}: {weight.out_features}x{weight.in_features} -> rank {weight.rank}")
    for scope in scopes(gm):
        for placeholder in list(scope.placeholders):
            root = scope.root(placeholder)
            if root not in pairs or not _readers(placeholder):
                continue
            a, b, weight = pairs[root]
            local_b, local_a = scope.add_operand(b), scope.add_operand(a)
            readers = _readers(placeholder)
            first = next(n for n in scope.gm.graph.nodes if n in readers)
            product = emit(scope, first, torch.matmul, local_b, local_a)
            if weight.stored_in_out:
                product = emit(scope, first, "t", product)
            placeholder.replace_all_uses_with(product, delete_user_cb=readers.__contains__)
            refresh(product)
        scope.gm.recompile()
    return result


def _readers(placeholder: fx.Node) -> set[fx.Node]:
    """Users that compute with it here, not those that only hand it to a sub-graph."""
    return {u for u in placeholder.users if not isinstance(u.target, torch._ops.HigherOrderOperator)}


def _leaf(gm: fx.GraphModule, node: fx.Node, weight: Weight, side: str, shape: tuple[int, int]) -> fx.Node:
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        leaf = gm.graph.placeholder(f"{node.name}_{side}")
    old = value(node)
    with fake_mode(gm):
        fake = nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device), requires_grad=old.requires_grad)
    leaf.meta.update(example_value=fake, lr_leaf=(weight.key, side))
    return leaf
