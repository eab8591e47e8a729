"""Open F.multi_head_attention_forward: its two projections are hidden in one node; record its body as nodes.

The body is run once on the node's fake tensors under a TorchFunctionMode that writes down every call. Nothing of
the body is repeated here, so whatever options it was called with are kept.
"""

from __future__ import annotations

import operator
import types
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from lrcompile.passes.graphs import Scope, mode_of, value

_QUERIES = {"dim", "size", "__get__", "is_floating_point", "is_nested", "numel", "stride", "is_contiguous"}


class _Recorder(TorchFunctionMode):
    """Writes every tensor-valued call before `at`, with the calls' fake values."""

    def __init__(self, scope: Scope, at: fx.Node) -> None:
        super().__init__()
        self.scope, self.at = scope, at
        self.node_of: dict[int, fx.Node] = {}
        self.alive: list[Any] = []  # ids must stay unique while recording

    def bind(self, tensor: Any, node: fx.Node) -> None:
        self.node_of[id(tensor)] = node
        self.alive.append(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if not tensors or getattr(func, "__name__", "") in _QUERIES:
            return out
        graph = self.scope.gm.graph
        with graph.inserting_before(self.at):
            new_args, new_kwargs = tree_map(self._to_node, (tuple(args), dict(kwargs)))
            name = getattr(func, "__name__", "")
            method = getattr(torch.Tensor, name, None) is func and not name.startswith("__")
            if name == "__getitem__":
                node = graph.call_function(operator.getitem, new_args)
            elif method:
                node = graph.call_method(name, new_args, new_kwargs)
            else:
                node = graph.call_function(func, new_args, new_kwargs)
            self._describe(node, out)
            if isinstance(out, (tuple, list)):
                for i, t in enumerate(out):
                    item = graph.call_function(operator.getitem, (node, i))
                    self._describe(item, t)
        return out

    def _describe(self, node: fx.Node, out: Any) -> None:
        node.meta.update(example_value=out, lr_written=True)
        for tag in ("nn_module_stack", "source_fn_stack", "stack_trace"):
            if tag in self.at.meta:
                node.meta[tag] = self.at.meta[tag]
        self.bind(out, node)

    def _to_node(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in self.node_of:
                raise LookupError(f"a tensor of {tuple(leaf.shape)} that no recorded call made")
            return self.node_of[id(leaf)]
        if isinstance(leaf, torch.SymInt):
            return self._size(leaf)
        if isinstance(leaf, torch.SymFloat) and leaf.node.expr.is_number:  # a constant dropout under dynamic shapes
            return float(leaf.node.expr)
        return leaf

    def _size(self, size: torch.SymInt) -> Any:
        """A symbolic size, as nodes: arithmetic over the sizes of tensors that stand before."""
        expression = size.node.expr
        if expression.is_number:
            return int(expression)
        env: dict[Any, Any] = {}
        for node in self.scope.gm.graph.nodes:
            if node is self.at:
                break
            v = value(node)
            if isinstance(v, torch.SymInt):
                env.setdefault(v.node.expr, fx.Proxy(node))
            elif isinstance(v, torch.Tensor) and node.op == "placeholder":
                for dim, extent in enumerate(v.shape):
                    if isinstance(extent, torch.SymInt) and extent.node.expr not in env and extent.node.expr.is_symbol:
                        item = self.scope.gm.graph.call_method("size", (node, dim))
                        item.meta["example_value"] = extent
                        env[extent.node.expr] = fx.Proxy(item)
        missing = expression.free_symbols - set(env)
        if missing:
            raise LookupError(f"no tensor in the graph has the size {missing}")
        out = sympy_interp(PythonReferenceAnalysis, {s: env[s] for s in expression.free_symbols}, expression).node
        out.meta["example_value"] = size
        return out


def open_attention(scope: Scope, node: fx.Node) -> None:
    """Replace an F.multi_head_attention_forward node by the nodes of its body.

    Raises what the body raises (under dynamic shapes torch can't fake every op of it); the graph is then as it was.
    """
    function: Any = node.target
    # The same code, told that no argument overrides torch functions: the mode must see the calls inside, not itself.
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    body.__kwdefaults__ = function.__kwdefaults__
    recorder = _Recorder(scope, node)
    for operand in node.all_input_nodes:
        recorder.bind(value(operand), operand)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    present = set(scope.gm.graph.nodes)
    try:
        with mode_of((args, kwargs)), recorder:
            out = body(*args, **kwargs)
        with scope.gm.graph.inserting_before(node):
            results = tree_map(recorder._to_node, out)
    except Exception:
        for written in reversed(scope.gm.graph.nodes):
            if written not in present:
                scope.gm.graph.erase_node(written)
        raise
    for user in list(node.users):  # getitem nodes: the op returns (output, weights)
        item = results[user.args[1]]
        if isinstance(item, fx.Node):  # else None: no weights were asked for, and nothing reads them
            user.replace_all_uses_with(item)
        scope.gm.graph.erase_node(user)
    scope.gm.graph.erase_node(node)
