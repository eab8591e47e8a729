"""What factorize and quantize share: a weight's leaves as inputs of the graph, and what they make up read instead of it.

Only shapes are made here, on fake tensors; the numbers are computed by adopt. The weight is written the way an adopted module
reads it (`Form.read`), so that `reassociate` finds in both the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import fx, nn

from lrcompile.passes.contract import PassContext, PassResult, Weight
from lrcompile.passes.graphs import computing_readers, emit, fake_mode, refresh, scopes, value
from lrcompile.weights.form import Form, Leaf


def stand_in(gm: fx.GraphModule, ctx: PassContext, wanted: Callable[[Weight], bool]) -> PassResult:
    """Add the leaves of every wanted weight, and read their composition instead of it; one line a change."""
    result = PassResult()
    leaves: dict[fx.Node, tuple[Form, dict[str, fx.Node]]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        weight = ctx.weights.get(node.meta.get("lr_weight", ""))
        form = weight.form(ctx.recipe) if weight is not None and wanted(weight) else None
        if weight is None or form is None:
            continue
        made = {suffix: _leaf(gm, node, weight.key, suffix, leaf) for suffix, leaf in form.leaves.items()}
        leaves[node] = (form, made)
        bits = (
            ""
            if form.base is None
            else f", {8 * form.nbytes / (form.out_features * form.in_features):.2f} bits a weight"
        )
        result.changed.append(f"{weight.key}: {weight.out_features}x{weight.in_features} -> {form}{bits}")
    for scope in scopes(gm):
        for placeholder in list(scope.placeholders):
            root = scope.root(placeholder)
            readers = computing_readers(placeholder)
            if root not in leaves or not readers:
                continue
            form, tops = leaves[root]
            local = {suffix: scope.add_operand(top) for suffix, top in reversed(tops.items())}
            first = next(n for n in scope.gm.graph.nodes if n in readers)
            product = form.read(local, partial(emit, scope, first))
            placeholder.replace_all_uses_with(product, delete_user_cb=readers.__contains__)
            refresh(product)
        scope.gm.recompile()
    return result


def _leaf(gm: fx.GraphModule, node: fx.Node, key: str, suffix: str, leaf: Leaf) -> fx.Node:
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        placeholder = gm.graph.placeholder(f"{node.name}{suffix}")
    old = value(node)
    trains = leaf.pair and old.requires_grad
    with fake_mode(gm):
        fake = nn.Parameter(torch.empty(leaf.shape, dtype=leaf.dtype, device=old.device), requires_grad=trains)
    placeholder.meta.update(example_value=fake, lr_leaf=(key, suffix))
    return placeholder
