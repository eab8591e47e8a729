"""Regions that Dynamo traced once and calls with several layers' weights, written out call by call.

`torch.compiler.nested_compile_region` becomes an `invoke_subgraph` node with one body for all calls. To decide what each
call's weights become, and to run the first call outside any compiler, the calls have to stand apart.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx


def inline_regions(gm: fx.GraphModule) -> None:
    """Replace every `invoke_subgraph` node by a copy of its body, in place, nested ones too."""
    region = torch.ops.higher_order.invoke_subgraph
    found = gm.graph.find_nodes(op="call_function", target=region)
    while found:
        for node in found:
            _inline(gm, node)
        found = gm.graph.find_nodes(op="call_function", target=region)
    gm.recompile()


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    body_node, _, *operands = node.args
    assert isinstance(body_node, fx.Node)
    body: fx.GraphModule = getattr(gm, str(body_node.target))
    copies: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            copies[inner] = gm.graph.node_copy(inner, copies.__getitem__)
            if inner.op == "get_attr":  # a body within the body, a constant
                name = f"{body_node.target}_{inner.target}"
                setattr(gm, name, getattr(body, str(inner.target)))
                copies[inner].target = name
    outputs: Any = fx.node.map_arg(body.graph.output_node().args[0], copies.__getitem__)
    for user in list(node.users):
        assert user.target is operator.getitem, "invoke_subgraph returns a tuple"
        user.replace_all_uses_with(outputs[int(str(user.args[1]))])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    if not body_node.users:
        gm.graph.erase_node(body_node)
