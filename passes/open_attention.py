"""Open attention that Dynamo keeps as one node, with its projections hidden inside; record its body as nodes.

The body is run once on the node's fake tensors under a TorchFunctionMode that writes down every call. Nothing of
the body is repeated here, so whatever options it was called with are kept.
"""

from __future__ import annotations

import operator
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
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
    """Replace an attention node (`OPENED`) by the nodes of its body.

    Raises what the body raises (under dynamic shapes torch can't fake every op of it); the graph is then as it was.
    """
    body = OPENED[node.target]
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
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):  # getitem nodes: the op returns (output, weights)
            item = results[user.args[1]]
            if isinstance(item, fx.Node):  # else None: no weights were asked for, and nothing reads them
                user.replace_all_uses_with(item)
            scope.gm.graph.erase_node(user)
    scope.gm.graph.erase_node(node)


def _without_overrides(function: Any) -> Any:
    """The same code, told that no argument overrides torch functions: a mode sees the calls inside, not the function."""
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _native_attention(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, qkv_weight: Tensor, qkv_bias: Tensor,
    out_weight: Tensor, out_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True,
    average: bool = True, mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """torch._native_multi_head_attention: self-attention of (rows, length, width) tensors, without gradients or dropout."""
    rows, length, _ = query.shape
    same = query is key and key is value
    if not same or query.is_nested:
        raise LookupError("the fused op is opened for self-attention of plain tensors only")
    q, k, v = (
        t.reshape(rows, length, heads, width // heads).transpose(1, 2)
        for t in F.linear(query, qkv_weight, qkv_bias).chunk(3, dim=-1)
    )
    allowed = None
    if mask is not None:  # type 0: (length, length); 1: (rows, length) of padding; 2: (rows, heads, length, length)
        if mask_type not in (0, 1, 2):
            raise LookupError(f"mask type {mask_type} is not known")
        allowed = ~mask.to(torch.bool)
        allowed = allowed.reshape(rows, 1, 1, length) if mask_type == 1 else allowed
    if not need_weights:
        attended, weights = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed), None
    else:
        scores = torch.matmul(q * (width // heads) ** -0.5, k.transpose(-2, -1))
        scores = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
        every = torch.softmax(scores, dim=-1)
        attended, weights = torch.matmul(every, v), every.mean(dim=1) if average else every
    return F.linear(attended.transpose(1, 2).reshape(rows, length, width), out_weight, out_bias), weights


def _encoder_layer(
    x: Tensor, width: int, heads: int, qkv_weight: Tensor, qkv_bias: Tensor, out_weight: Tensor, out_bias: Tensor,
    gelu: bool, norm_first: bool, eps: float, norm1: Tensor, norm1_bias: Tensor, norm2: Tensor, norm2_bias: Tensor,
    up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """torch._transformer_encoder_layer_fwd: what nn.TransformerEncoderLayer runs in evaluation."""

    def attend(h: Tensor) -> Tensor:
        own = (qkv_weight, qkv_bias, out_weight, out_bias)
        return _native_attention(h, h, h, width, heads, *own, mask, False, True, mask_type)[0]

    def feed(h: Tensor) -> Tensor:
        inner = F.linear(h, up, up_bias)
        return F.linear(F.gelu(inner) if gelu else F.relu(inner), down, down_bias)

    def first(h: Tensor) -> Tensor:
        return F.layer_norm(h, (width,), norm1, norm1_bias, eps)

    def second(h: Tensor) -> Tensor:
        return F.layer_norm(h, (width,), norm2, norm2_bias, eps)

    if norm_first:
        x = x + attend(first(x))
        return x + feed(second(x))
    x = first(x + attend(x))
    return second(x + feed(x))


# The last two are the fused paths that nn.MultiheadAttention and nn.TransformerEncoderLayer take in evaluation.
OPENED: dict[Any, Any] = {
    F.multi_head_attention_forward: _without_overrides(F.multi_head_attention_forward),
    torch._native_multi_head_attention: _native_attention,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
}
