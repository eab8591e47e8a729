"""canonicalize: every matrix product with a parameter in it becomes F.linear(x, matrix, bias), whatever its spelling.

Exact. Known spellings: F.linear; addmm (GPT-2's Conv1D); matmul, mm, @; einsum of two operands;
F.multi_head_attention_forward, which hides two products and is opened. Fills `ctx.weights`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lrcompile.passes.contract import PassContext, PassResult, graph_pass
from lrcompile.passes.graphs import (
    Scope,
    Site,
    argument,
    drop_dead,
    emit,
    is_parameter,
    linear_fn,
    module_name,
    pair_product,
    rows_of,
    scopes,
    sites,
    trace_matrix,
    value,
)
from lrcompile.passes.open_attention import OPENED, open_attention

_MATMULS = {"matmul", "mm", "__matmul__"}


@graph_pass(exact=True)
def canonicalize(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Rewrite the spellings and list the weights with all their uses."""
    result = PassResult()
    for scope in scopes(gm, result.notes):
        for node in list(scope.gm.graph.nodes):
            if node.target in OPENED:
                name = module_name(node)
                try:
                    open_attention(scope, node)
                except Exception as error:  # whatever it was, the compile goes on with the node as it is
                    result.notes.append(f"{name}: attention left closed ({type(error).__name__}: {error})")
                else:
                    result.changed.append(f"{name}: attention opened into its products")
        for node in list(scope.gm.graph.nodes):
            if node.target in (linear_fn, F.linear, F.embedding):
                _by_position(node)
            new, spelling = _to_linear(scope, node)
            if new is None:
                continue
            before, after = value(node), value(new)
            if before.is_contiguous() and before.stride() != after.stride():
                new = emit(scope, node, "contiguous", new)  # what follows was traced for this layout: a view, say
            node.replace_all_uses_with(new)
            scope.gm.graph.erase_node(node)
            result.changed.append(f"{module_name(new)}: {spelling} -> linear")
        drop_dead(scope.gm)
        scope.gm.recompile()
    _list_weights(gm, ctx, result)
    return result


def _by_position(node: fx.Node) -> None:
    """F.linear(input=x, weight=w) -> F.linear(x, w), in place."""
    kwargs = dict(node.kwargs)
    names = ("input", "weight") if node.target is F.embedding else ("input", "weight", "bias")
    args = [*node.args, *(kwargs.pop(name) for name in names[len(node.args) :] if name in kwargs)]
    node.args, node.kwargs = tuple(args), kwargs


def _to_linear(scope: Scope, node: fx.Node) -> tuple[fx.Node | None, str]:
    if node.op not in ("call_function", "call_method"):
        return None, ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "addmm":
        return _addmm(scope, node), "addmm"
    if name in _MATMULS or node.target is operator.matmul:
        return _matmul(scope, node), "matmul"
    if name == "einsum":
        return _einsum(scope, node), "einsum"
    return None, ""


def _from_parameter(scope: Scope, node: Any) -> bool:
    """Whether a 2-D operand is a parameter, or a product of two (an adopted weight), behind casts and the like."""
    if not isinstance(node, fx.Node) or not isinstance(value(node), torch.Tensor) or value(node).dim() != 2:
        return False
    source = trace_matrix(node).source
    if pair_product(scope, source):
        return True
    return is_parameter(scope, source)


def _addmm(scope: Scope, node: fx.Node) -> fx.Node | None:
    bias, x, matrix = (argument(node, i, n) for i, n in enumerate(("input", "mat1", "mat2")))
    plain = argument(node, 9, "beta", 1) == 1 and argument(node, 9, "alpha", 1) == 1
    if not plain or len(node.args) != 3 or not _from_parameter(scope, matrix):
        return None
    if value(bias).dim() != 1 or value(bias).shape[0] != value(matrix).shape[1]:
        return None
    return _linear(scope, node, "addmm", x, matrix, transpose=True, bias=bias)


def _matmul(scope: Scope, node: fx.Node) -> fx.Node | None:
    if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args) or node.kwargs:
        return None
    left, right = node.args
    if pair_product(scope, node):
        return None  # the weight itself
    if _from_parameter(scope, right) and value(left).dim() >= 2:
        return _linear(scope, node, "matmul", left, right, transpose=True)
    if _from_parameter(scope, left) and value(right).dim() >= 2:
        x = emit(scope, node, "transpose", right, -2, -1)
        y = _linear(scope, node, "matmul", x, left, transpose=False)
        return emit(scope, node, "transpose", y, -2, -1)
    return None


def _einsum(scope: Scope, node: fx.Node) -> fx.Node | None:
    """Two operands, one a 2-D parameter, one contracted index: permute, multiply, permute back."""
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    equation = node.args[0]
    if len(operands) != 2 or not isinstance(equation, str) or "->" not in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    indices = inputs.split(",")
    if _from_parameter(scope, operands[0]):
        operands, indices = operands[::-1], indices[::-1]
    if not _from_parameter(scope, operands[1]) or not isinstance(operands[0], fx.Node):
        return None
    x, matrix = operands
    x_axes, w_axes = indices
    rank_of_dots = value(x).dim() - len(x_axes.replace("...", ""))
    free = [c for c in "ABCDEFGHIJKLMNOP" if c not in equation][:rank_of_dots]
    x_axes, output = x_axes.replace("...", "".join(free)), output.replace("...", "".join(free))
    contracted = [c for c in w_axes if c in x_axes and c not in output]
    new = [c for c in w_axes if c in output and c not in x_axes]
    letters = [*x_axes, *w_axes]
    if len(w_axes) != 2 or len(contracted) != 1 or len(new) != 1 or any(letters.count(c) > 2 for c in letters):
        return None
    kept = [c for c in x_axes if c != contracted[0]]
    if sorted([*kept, *new]) != sorted(output) or len(set(output)) != len(output):
        return None
    order = [x_axes.index(c) for c in [*kept, contracted[0]]]
    if order != list(range(len(order))):
        x = emit(scope, node, "permute", x, *order)
    y = _linear(scope, node, "einsum", x, matrix, transpose=w_axes[0] == contracted[0])
    back = [[*kept, new[0]].index(c) for c in output]
    return y if back == list(range(len(back))) else emit(scope, node, "permute", y, *back)


def _linear(
    scope: Scope, node: fx.Node, spelling: str, x: Any, matrix: Any, *, transpose: bool, bias: fx.Node | None = None
) -> fx.Node:
    if transpose:
        matrix = emit(scope, node, "t", matrix)
    new = emit(scope, node, linear_fn, x, matrix, bias)
    new.meta["lr_spelling"] = spelling
    return new


# --- the list of weights ----------------------------------------------------------------------------------------------


def _list_weights(gm: fx.GraphModule, ctx: PassContext, result: PassResult) -> None:
    used: dict[fx.Node, list[Site]] = {}
    for site in sites(gm):
        leaf = site.leaf
        if leaf is not None and leaf.meta.get("lr_weight"):
            used.setdefault(leaf, []).append(site)
    downstream = _reaches_a_site(gm, used) if ctx.last else None
    for leaf, uses in used.items():
        weight = ctx.weights[leaf.meta["lr_weight"]]
        weight.kinds += [site.kind for site in uses]
        products = [site for site in uses if site.kind != "embedding"]
        if products:
            weight.stored_in_out = products[0].chain.transposed
            weight.tokens += sum(rows_of(site.x) for site in products)
        if downstream is not None and any(_looks_like_head(site, downstream) for site in products):
            weight.head = True
    for node in gm.graph.find_nodes(op="placeholder"):
        key = node.meta.get("lr_weight")
        if key and node not in used and node.users and ctx.weights[key].kinds == []:
            targets = sorted({str(getattr(u.target, "__name__", u.target)) for u in node.users})
            ctx.weights[key].reason = f"not read by a matrix product (by {', '.join(targets)})"
            result.notes.append(f"{key}: {ctx.weights[key].reason}")


def _reaches_a_site(gm: fx.GraphModule, used: dict[fx.Node, list[Site]]) -> set[fx.Node]:
    """Nodes of the top graph from which a site is reached (the site itself not counted)."""
    at: set[fx.Node] = {site.node for uses in used.values() for site in uses if site.scope.parent is None}
    for scope in scopes(gm):
        if scope.parent is not None and scope.parent.parent is None:
            at |= {call for call, _ in scope.calls}
    reaching: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if any(user in at or user in reaching for user in node.users):
            reaching.add(node)
    return reaching


def _looks_like_head(site: Site, downstream: set[fx.Node]) -> bool:
    """A last product, outside the repeated blocks, whose result is not added to a residual stream."""
    if site.scope.parent is not None or site.node in downstream:
        return False
    leaf = site.leaf
    path = str(leaf.meta["lr_weight"]).split(".")[:-1] if leaf is not None else []
    if any(part.isdigit() for part in path[:-1]):
        return False  # inside blocks.11.…
    width = value(site.node).shape[-1]
    seen, queue = set(), [site.node]
    while queue:
        node = queue.pop()
        for user in node.users:
            if user in seen or not isinstance(value(user), torch.Tensor):
                continue
            seen.add(user)
            name = getattr(user.target, "__name__", user.target)
            others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
            residual = [a for a in others if isinstance(value(a), torch.Tensor) and value(a).dim() > 1]
            if name in ("add", "iadd", "add_", "__add__") and residual and value(user).shape[-1] == width:
                return False
            queue.append(user)
    return True
