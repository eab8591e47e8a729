"""A traced program in operators that XNNPACK takes: exact rewrites, so that a layer is one piece of it and not six.

At every seam between XNNPACK's pieces and the runtime's own kernels a token waits for threads to be woken and shapes to be
looked at, which for a small model costs more than its products. XNNPACK takes no mean over one dimension, no norm, no
reshape to a symbolic size, no slice or join of a tensor whose length isn't known; each can be said otherwise:

=====================================  ==============================================
in the program                         instead
=====================================  ==============================================
mean over the last dimension           a product with a row of 1/n
layer_norm, rms_norm                   such means, differences, rsqrt
halves turned (rotary positions)       a product with the signed permutation
view, reshape, unsqueeze               view with -1 for the length
pow(x, 3)                              x · x · x
transpose, and transposed back         nothing
=====================================  ==============================================

Numerics change by rounding alone; what a rewrite doesn't recognise stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

aten = torch.ops.aten


def rewrite(program: ExportedProgram) -> ExportedProgram:
    """Rewrite what torch.export gave, in place; returns it."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and (change := _CHANGES.get(node.target)) is not None:
            with graph.inserting_before(node):
                new = change(_Maker(program, node), node)
            if new is not None:
                node.replace_all_uses_with(new)
    graph.eliminate_dead_code(lambda node: node.is_impure() or node.op == "placeholder" or _writes(node))
    program.graph_module.recompile()
    return program


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op != "call_function" or schema is None or schema.is_mutable or "assert" in schema.name


class _Maker:
    """Makes nodes in an old one's place, with its module's name and with values of their own."""

    def __init__(self, program: ExportedProgram, old: fx.Node) -> None:
        self.program, self.old = program, old

    def __call__(self, op: Any, *args: Any) -> fx.Node:
        values = fx.map_arg(args, lambda a: a.meta["val"])
        with self.old.meta["val"].fake_mode:
            value = op(*values)  # first, so that what can't be made leaves nothing behind
        node = self.program.graph.call_function(op, args)
        kept = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "from_node")
        node.meta = {name: self.old.meta[name] for name in kept if name in self.old.meta} | {"val": value}
        return node

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A buffer of the program; the same name is the same one."""
        graph, signature = self.program.graph, self.program.graph_signature
        first = next(iter(graph.nodes))
        node = next((n for n in graph.nodes if n.op == "placeholder" and n.name == name), None)
        if node is None:
            with graph.inserting_before(first):
                node = graph.placeholder(name)
            node.meta["val"] = self.old.meta["val"].fake_mode.from_tensor(value, static_shapes=True)
            spec = InputSpec(InputKind.BUFFER, TensorArgument(name), name, persistent=True)
            signature.input_specs.insert(0, spec)
            self.program.state_dict[name] = value
        return node


def _shape(node: Any) -> list[Any]:
    return list(node.meta["val"].shape)


def _args(node: fx.Node) -> Any:
    """All arguments of a call in the schema's order. The program leaves out those at the end that have their defaults."""
    target: Any = node.target
    wanted, given = target._schema.arguments, node.args
    more = [node.kwargs.get(a.name, a.default_value) for a in wanted[len(given) :]]
    return (*given, *more)


def _fp32(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.meta["val"].dtype == torch.float32


def _last(node: fx.Node, dim: int) -> bool:
    return dim in (-1, len(_shape(node)) - 1)


def _row_mean(make: _Maker, x: fx.Node) -> fx.Node:
    width = _shape(x)[-1]
    row = make.constant(f"row_of_{width}", torch.full((1, width), 1 / width))
    return make(aten.linear.default, x, row)


def _mean(make: _Maker, node: fx.Node) -> fx.Node | None:
    x, dims, keep, dtype = _args(node)
    if not (_fp32(x) and _fp32(node) and keep and dims and len(dims) == 1 and _last(x, dims[0]) and dtype is None):
        return None
    return _row_mean(make, x) if isinstance(_shape(x)[-1], int) else None


def _layer_norm(make: _Maker, node: fx.Node) -> fx.Node | None:
    x, dims, weight, bias, epsilon, _ = _args(node)
    if not _one_width(x, dims):
        return None
    return _scaled(make, make(aten.sub.Tensor, x, _row_mean(make, x)), epsilon, weight, bias)


def _rms_norm(make: _Maker, node: fx.Node) -> fx.Node | None:
    x, dims, weight, epsilon = _args(node)
    if not _one_width(x, dims):
        return None
    return _scaled(make, x, torch.finfo(torch.float32).eps if epsilon is None else epsilon, weight, None)


def _one_width(x: Any, dims: Any) -> bool:
    """Normalised over the last dimension alone, in fp32; the norms of more dimensions stay as they are."""
    return _fp32(x) and len(dims) == 1 and isinstance(dims[0], int)


def _scaled(make: _Maker, x: fx.Node, epsilon: float, weight: Any, bias: Any) -> fx.Node:
    """x / sqrt(mean(x · x) + epsilon) · weight + bias"""
    square = _row_mean(make, make(aten.mul.Tensor, x, x))
    out = make(aten.mul.Tensor, x, make(aten.rsqrt.default, make(aten.add.Tensor, square, epsilon)))
    out = out if weight is None else make(aten.mul.Tensor, out, weight)
    return out if bias is None else make(aten.add.Tensor, out, bias)


def _view(make: _Maker, node: fx.Node) -> fx.Node | None:
    """The size that isn't known is -1, where there is one alone."""
    x = _args(node)[0]
    shape = [d if isinstance(d, int) else -1 for d in _shape(node)]
    if not _fp32(x) or shape.count(-1) != 1:
        return None
    try:
        return make(aten.view.default, x, shape)
    except (RuntimeError, ValueError):  # a reshape that copies, since x lies in memory otherwise
        return None


def _turn(make: _Maker, node: fx.Node) -> fx.Node | None:
    """cat(-x[half:], x[:half]) over the last dimension."""
    parts, dim = _args(node)
    if len(parts) != 2 or not _fp32(node) or not _last(node, dim):
        return None
    minus, right = parts
    if minus.target is not aten.neg.default:
        return None
    left, width = minus.args[0], _shape(node)[-1]
    if not left.target is right.target is aten.slice.Tensor or left.args[0] is not right.args[0] or width % 2:
        return None
    x, half = left.args[0], width // 2
    if _shape(x)[-1] != width or _cut(left) != (half, width, 1) or _cut(right) != (0, half, 1):
        return None
    turn = torch.zeros(width, width)
    turn[:half, half:], turn[half:, :half] = -torch.eye(half), torch.eye(half)
    return make(aten.linear.default, x, make.constant(f"turn_of_{width}", turn))


def _cut(node: fx.Node) -> tuple[int, int, int] | None:
    """(first, end, step) of a slice of the last dimension; None: of another one, or by numbers that aren't known."""
    x, dim, start, end, step = _args(node)
    width = _shape(x)[-1]
    start, end = 0 if start is None else start, width if end is None else end
    known = _last(x, dim) and all(isinstance(n, int) for n in (width, start, end, step))
    return (start, min(end, width), step) if known else None


def _cube(make: _Maker, node: fx.Node) -> fx.Node | None:
    x, power = _args(node)
    return make(aten.mul.Tensor, make(aten.mul.Tensor, x, x), x) if power == 3 and _fp32(x) else None


def _back(make: _Maker, node: fx.Node) -> fx.Node | None:
    x, *dims = _args(node)
    again = x.target is aten.transpose.int and sorted(x.args[1:]) == sorted(dims) and min(dims) >= 0
    return x.args[0] if again else None


_CHANGES: dict[Any, Callable[[_Maker, fx.Node], fx.Node | None]] = {
    aten.mean.dim: _mean,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten.unsqueeze.default: _view,
    aten.cat.default: _turn,
    aten.pow.Tensor_Scalar: _cube,
    aten.transpose.int: _back,
}
