"""canonicalize: every matrix product with a parameter in it becomes F.linear(x, matrix, bias), whatever its spelling.

Exact. The spellings stand in spellings.py; F.multi_head_attention_forward, which hides two products, is opened first.
Lists in `ctx.weights` how each weight is used: by products, by anything else, and whether something writes to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils._pytree import tree_leaves

from lrcompile.passes.chains import in_transform, readers, storages, target_name, value, written
from lrcompile.passes.contract import PassContext, PassResult, graph_pass
from lrcompile.passes.graphs import (
    Scope,
    Site,
    drop_dead,
    linear_fn,
    module_name,
    reads_weight,
    rows_of,
    scopes,
    sites,
)
from lrcompile.passes.open_attention import OPENED, open_attention
from lrcompile.passes.spellings import rewrite


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
            new, spelling = rewrite(scope, node)
            if new is None:
                continue
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
        if downstream is not None and any(_looks_like_head(site, weight.names, downstream) for site in products):
            weight.head = True
    for leaf, names in _writers(gm).items():
        weight = ctx.weights[leaf.meta["lr_weight"]]
        weight.writers = sorted({*weight.writers, *names})
    read = _other_readers(gm, {site.node: site for uses in used.values() for site in uses})
    for leaf, names in read.items():
        weight = ctx.weights[leaf.meta["lr_weight"]]
        weight.readers = sorted({*weight.readers, *names})
    for key in dict.fromkeys(leaf.meta["lr_weight"] for leaf in read):
        weight, others = ctx.weights[key], ", ".join(ctx.weights[key].readers)
        if weight.writers:
            continue  # it stays dense for that
        weight.reason = "" if weight.kinds else f"not read by a matrix product (by {others})"
        result.notes.append(f"{key}: {weight.reason or f'also read by {others}'}")


def _other_readers(gm: fx.GraphModule, known: dict[fx.Node, Site]) -> dict[fx.Node, set[str]]:
    """The weights' placeholders -> what reads them, here or in a sub-graph, that is none of the known sites."""
    found: dict[fx.Node, set[str]] = {}
    every = list(scopes(gm))
    bodies = {call: (scope, first) for scope in every for call, first in scope.calls}
    for scope in every:
        for placeholder in scope.placeholders:
            leaf = scope.root(placeholder)
            if leaf is None or not leaf.meta.get("lr_weight"):
                continue
            for reader, operand in readers(placeholder):
                if reader in bodies and _handed_down(reader, operand, leaf, *bodies[reader]):
                    continue  # what its body does with it is seen there
                site = known.get(reader)
                as_matrix = site is not None and (site.kind == "embedding" or site.x is not operand)
                if not as_matrix and operand not in written(reader):
                    for name in _reader_name(scope, reader):
                        found.setdefault(leaf, set()).add(name)
    return found


def _handed_down(call: fx.Node, operand: fx.Node, leaf: fx.Node, body: Scope, first: int) -> bool:
    places = [i - first for i, given in enumerate(call.args) if given is operand]
    return all(i >= 0 and body.root(body.placeholders[i]) is leaf for i in places)


def _reader_name(scope: Scope, reader: fx.Node) -> list[str]:
    """How a reader is told; nothing where it only asks for a size, a device."""
    if reader.op == "output":
        return ["the output"]
    if in_transform(reader):
        return [f"{_plain(reader)} inside a transform of torch.func"]
    if reads_weight(scope, reader):
        return ["matmul with another weight"]
    if reader.target in (linear_fn, F.linear):
        return ["linear as its input"]
    higher_order = isinstance(reader.target, torch._ops.HigherOrderOperator)
    tensors = any(isinstance(t, torch.Tensor) for t in tree_leaves(value(reader)))
    return [_plain(reader)] if tensors or higher_order else []


def _plain(node: fx.Node) -> str:
    name = str(node.args[1]) if node.target is getattr else target_name(node) or str(node.target)
    return {"_get_data_attr": "data"}.get(name, name)


def _writers(gm: fx.GraphModule) -> dict[fx.Node, set[str]]:
    """The weights' placeholders -> what writes to their memory, here or in a sub-graph, through whatever views."""
    owners: dict[int, set[fx.Node]] = {}
    found: dict[fx.Node, set[str]] = {}
    for scope in scopes(gm):
        for i, placeholder in enumerate(scope.placeholders):
            own = {placeholder} if scope.parent is None and placeholder.meta.get("lr_weight") else set()
            given = [call.args[first + i] for call, first in scope.calls]
            own = own.union(*(owners.get(s, ()) for operand in given for s in storages(operand)))
            for s in storages(placeholder) if own else ():
                owners[s] = owners.get(s, set()) | own
        for node in scope.gm.graph.nodes:
            for leaf in {leaf for operand in written(node) for s in storages(operand) for leaf in owners.get(s, ())}:
                found.setdefault(leaf, set()).add(_plain(node))
    return found


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


def _looks_like_head(site: Site, names: tuple[str, ...], downstream: set[fx.Node]) -> bool:
    """A last product, outside the repeated blocks, whose result is not added to a residual stream."""
    if site.scope.parent is not None or site.node in downstream:
        return False
    if any(part.isdigit() for name in names for part in name.split(".")[:-2]):
        return False  # inside blocks.11.…, however the compiled part of the model calls it
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
