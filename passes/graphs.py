"""What every pass needs of a graph: its sub-graphs, its sites, and a way to write new nodes."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lrcompile.kernels.compose import compose
from lrcompile.passes.chains import PURE, Chain, argument, in_transform, target_name, trace_matrix, value, written

linear_fn = torch._C._nn.linear  # what Dynamo writes for F.linear

# --- scopes: a graph and the sub-graphs of its higher-order ops -------------------------------------------------------


@dataclass
class Scope:
    """One graph or sub-graph, and where its placeholders come from.

    Attributes:
        gm: the graph module.
        calls: the nodes in the parent that run it, with the position of its first operand in their args; empty at the top.
        parent: the scope of those nodes.
    """

    gm: fx.GraphModule
    parent: Scope | None = None
    calls: list[tuple[fx.Node, int]] = field(default_factory=list)

    @cached_property
    def placeholders(self) -> list[fx.Node]:
        return self.gm.graph.find_nodes(op="placeholder")

    def root(self, node: fx.Node) -> fx.Node | None:
        """The top graph's placeholder behind a placeholder of this scope; None where calls differ or it is computed."""
        if node.op != "placeholder":
            return None
        if self.parent is None:
            return node
        index = self.placeholders.index(node)
        roots = set()
        for call, first in self.calls:
            operand = call.args[first + index]
            roots.add(self.parent.root(operand) if isinstance(operand, fx.Node) else None)
        return roots.pop() if len(roots) == 1 else None

    def add_operand(self, root: fx.Node) -> fx.Node:
        """Make a placeholder of the top graph readable here, handing it down through every call."""
        if self.parent is None:
            return root
        above = self.parent.add_operand(root)
        for call, _ in self.calls:
            call.args = (*call.args, above)
        last = self.placeholders[-1]
        with self.gm.graph.inserting_after(last):
            node = self.gm.graph.placeholder(root.name)
        node.meta.update(root.meta)
        self.__dict__.pop("placeholders")
        return node


def scopes(gm: fx.GraphModule, notes: list[str] | None = None) -> Iterator[Scope]:
    """The graph itself, then the bodies of its higher-order ops, outer before inner."""
    yield from _scopes(Scope(gm), notes)


def _scopes(scope: Scope, notes: list[str] | None) -> Iterator[Scope]:
    yield scope
    bodies: dict[int, Scope] = {}  # by identity: one body may have two names
    for node in scope.gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        held = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"]
        held = [i for i in held if isinstance(getattr(scope.gm, str(node.args[i].target), None), fx.GraphModule)]
        if not held:
            continue
        body = getattr(scope.gm, str(node.args[held[-1]].target))
        count = len(body.graph.find_nodes(op="placeholder"))
        operands = node.args[held[-1] + 1 :]
        if len(held) == 1 and len(operands) >= count:
            bodies.setdefault(id(body), Scope(body, scope)).calls.append((node, len(node.args) - count))
        elif notes is not None:
            notes.append(f"{node.name}: the body of {node.target} is left as it is (its operands are not understood)")
    for body in bodies.values():
        yield from _scopes(body, notes)


def computing_readers(placeholder: fx.Node) -> set[fx.Node]:
    """Users that compute with a placeholder here, not those that only hand it to a sub-graph."""
    return {u for u in placeholder.users if not isinstance(u.target, torch._ops.HigherOrderOperator)}


# --- small tools for rewriting ----------------------------------------------------------------------------------------


def emit(scope: Scope, before: fx.Node, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
    """Insert a call before a node, with its fake value computed and provenance taken from `like` (or `before`)."""
    graph = scope.gm.graph
    with graph.inserting_before(before):
        if isinstance(target, str):
            node = graph.call_method(target, args, kwargs)
        else:
            node = graph.call_function(target, args, kwargs)
    for tag in ("nn_module_stack", "source_fn_stack", "stack_trace"):
        if tag in (like or before).meta:
            node.meta[tag] = (like or before).meta[tag]
    node.meta.update(example_value=_evaluate(node), lr_written=True)
    return node


def _evaluate(node: fx.Node) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    with mode_of((args, kwargs)):
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def refresh(node: fx.Node) -> None:
    """Compute the fake values anew of what reshapes a node: another matrix may have other strides."""
    for user in node.users:
        name = target_name(user)
        if user.op in ("call_function", "call_method") and name in PURE - {"matmul"}:
            user.meta["example_value"] = _evaluate(user)
            refresh(user)


def drop_dead(gm: fx.GraphModule) -> None:
    """Erase what a pass wrote, or left of the making of a matrix, and nothing reads any more.

    Not fx's `eliminate_dead_code` on all nodes: to that one `buffer.add_(1)` and `y.mul_(2)` are dead.
    """
    for node in reversed(gm.graph.nodes):
        name = target_name(node)
        known = node.meta.get("lr_written") or name in PURE or composed(node)
        pure = node.op in ("call_function", "call_method") and known
        if pure and not node.users and not node.is_impure() and not written(node):
            gm.graph.erase_node(node)


def fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    """The mode a captured graph was traced under."""
    return mode_of([value(node) for node in gm.graph.nodes])


def mode_of(tree: Any) -> FakeTensorMode:
    """The fake mode of the fake tensors among these values.

    Not torch's `detect_fake_mode`: while a backend runs, that answers with the mode prepared for what compiles next.
    """
    modes = (v.fake_mode for v in torch.utils._pytree.tree_leaves(tree) if isinstance(v, FakeTensor))
    mode = next(modes, None)
    assert mode is not None, "a captured graph carries fake values"
    return mode


def module_name(node: fx.Node) -> str:
    """The module that a node was traced in, as the model names it ("layers.0.mlp")."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = re.sub(r"^[LG]\['\w+'\]\.?", "", list(stack.values())[-1][0])  # without the frame's variable
    return path.replace("_modules['", "").replace("']", "").replace("._orig_mod", "")


@dataclass
class Site:
    """One matrix product with a weight in it, in canonical form: F.linear(x, matrix, bias), or an embedding lookup."""

    scope: Scope
    node: fx.Node
    chain: Chain
    kind: str

    @property
    def x(self) -> fx.Node:
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def leaf(self) -> fx.Node | None:
        """The top graph's placeholder that the weight comes from; None where it is computed."""
        return self.scope.root(self.chain.source)


def rows_of(x: fx.Node) -> int:
    """Rows of an operand (..., features), all leading dimensions together; a dynamic size counts as in this call."""
    rows = 1
    for size in value(x).shape[:-1]:
        rows *= size if isinstance(size, int) else int(size.node.hint)
    return rows


def sites(gm: fx.GraphModule) -> Iterator[Site]:
    """The canonical products of a graph and its sub-graphs whose matrix operand is a tensor of the graph.

    Not those inside a transform of torch.func (vmap), where nothing can be written anew.
    """
    for scope in scopes(gm):
        for node in list(scope.gm.graph.nodes):
            if node.op == "call_function" and node.target in (linear_fn, F.linear):
                matrix, kind = argument(node, 1, "weight"), node.meta.get("lr_spelling", "linear")
            elif node.op == "call_function" and node.target is F.embedding:
                matrix, kind = argument(node, 1, "weight"), "embedding"
            elif looks_up_rows(node):
                matrix, kind = node.args[0], "embedding"
            else:
                continue
            if in_transform(node):
                continue
            yield Site(scope, node, trace_matrix(matrix), kind)


def looks_up_rows(node: fx.Node) -> bool:
    """Whether a node takes rows of a matrix by a tensor of integers, as an embedding does: w[i], w[i, :], w.index_select(0, i)."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    matrix = value(node.args[0])
    if not isinstance(matrix, torch.Tensor) or matrix.dim() != 2:
        return False
    index: Any = None
    if node.target is operator.getitem:
        key = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        index = key[0] if key[1:] in ((), (slice(None),), (...,)) else None
    elif target_name(node) == "index_select" and argument(node, 1, "dim") in (0, -2):
        index = argument(node, 2, "index")
    index = value(index) if isinstance(index, fx.Node) else None
    return isinstance(index, torch.Tensor) and index.dtype in (torch.int32, torch.int64)


def is_parameter(scope: Scope, node: fx.Node) -> bool:
    """Whether a placeholder was given a parameter of the model."""
    root = scope.root(node)
    return root is not None and isinstance(value(root), torch.nn.Parameter)


def pair_product(scope: Scope, node: fx.Node) -> bool:
    """Whether a node is weight_b @ weight_a of two parameters: what an adopted module's `weight` reads."""
    is_matmul = node.op == "call_function" and node.target is torch.matmul and len(node.args) == 2
    matrices = is_matmul and all(isinstance(a, fx.Node) and is_parameter(scope, a) for a in node.args)
    return matrices and all(value(a).dim() == 2 for a in node.args)


def composed(node: Any) -> bool:
    """Whether a node is a weight made of a base (and a pair), or one decoded factor: compose.py's operator."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is compose


def decoded_product(node: fx.Node) -> bool:
    """Whether a node is decoded(weight_b) @ decoded(weight_a): what a module with a quantised pair reads."""
    is_matmul = node.op == "call_function" and node.target is torch.matmul and len(node.args) == 2
    return is_matmul and all(composed(a) for a in node.args)


def reads_weight(scope: Scope, node: fx.Node) -> bool:
    """Whether a node is what an adopted module's `weight` reads, whatever its form."""
    return pair_product(scope, node) or composed(node) or decoded_product(node)


def is_weight(scope: Scope, node: fx.Node) -> bool:
    """Whether a node is a parameter, or what an adopted module reads in a parameter's place."""
    return is_parameter(scope, node) or reads_weight(scope, node)


def pair_of(site: Site) -> int | None:
    """The rank, where a site is the second of two thin products of a pair."""
    inner = site.x
    if (
        site.kind == "embedding"
        or not isinstance(inner, fx.Node)
        or inner.target is not linear_fn
        or len(inner.users) != 1
        or argument(inner, 2, "bias") is not None
    ):
        return None
    first = trace_matrix(argument(inner, 1, "weight")).source
    if not (is_parameter(site.scope, site.chain.source) and is_parameter(site.scope, first)):
        return None
    rank, width = value(inner).shape[-1], min(value(site.node).shape[-1], value(inner.args[0]).shape[-1])
    return int(rank) if rank <= width else None
