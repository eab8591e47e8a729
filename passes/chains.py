"""How a matrix in a graph was made: the steps between a parameter and the product that reads it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


def value(node: Any) -> Any:
    """The fake value of a node, or the constant itself."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def target_name(node: fx.Node) -> str:
    """What a node calls: the method's or the function's name."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def in_place(node: fx.Node) -> bool:
    """Whether a node writes to its first argument, by torch's naming: x.mul_(y), x[0] = y, x += y."""
    name = target_name(node)
    return name.rstrip("_") + "_" == name or name == "setitem" or node.target in _IN_PLACE_OPERATORS


@dataclass
class Chain:
    """How a matrix in the graph was made from one or two leaves: `leaf` or `left @ right`, then `steps`, in order.

    steps are ("t",), ("cast", node) or ("rows", node): transposed, converted, or part of the rows taken.
    """

    source: fx.Node
    steps: list[tuple[str, fx.Node]]

    @property
    def transposed(self) -> bool:
        return sum(kind == "t" for kind, _ in self.steps) % 2 == 1


_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "contiguous", "type_as", "clone"}
_TRANSPOSES = {"t", "transpose", "swapaxes", "permute"}
_SPLITS = {"chunk", "split", "tensor_split", "unbind"}
_ATTRIBUTES = {"T", "mT"}
_IN_PLACE_OPERATORS = {getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "matmul", "pow")}
PURE = {*_CASTS, *_TRANSPOSES, *_SPLITS, "getitem", "getattr", "size", "matmul"}


def trace_matrix(node: fx.Node) -> Chain:
    """Walk back from a matrix operand through transposes, casts and row slices to what it was made from."""
    steps: list[tuple[str, fx.Node]] = []
    while True:
        kind, source = _step(node)
        if kind == "" or source is None or any(_writes(user, node) for user in node.users):
            return Chain(node, steps[::-1])
        steps.append((kind, node))
        node = source


def _step(node: fx.Node) -> tuple[str, fx.Node | None]:
    if node.op not in ("call_method", "call_function") or not node.args or not isinstance(node.args[0], fx.Node):
        return "", None
    source = node.args[0]
    matrix = value(source)
    name = target_name(node)
    if node.target is getattr and node.args[1] in _ATTRIBUTES and _is_matrix(matrix):
        return "t", source
    if node.target is operator.getitem:
        if isinstance(matrix, (tuple, list)) and source.args and isinstance(source.args[0], fx.Node):
            split_name = target_name(source)
            dim = source.kwargs.get("dim", source.args[2] if len(source.args) > 2 else 0)
            whole = source.args[0]
            if split_name in _SPLITS - {"unbind"} and dim == 0 and _is_matrix(value(whole)):
                return "rows", whole
        if _is_matrix(matrix) and isinstance(node.args[1], slice) and not _has_nodes(node.args[1]):
            return "rows", source
        return "", None
    if not (_is_matrix(matrix) and _is_matrix(value(node))):
        return "", None
    out = value(node)
    if name in _TRANSPOSES and out.shape == matrix.shape[::-1] and out.stride() == matrix.stride()[::-1]:
        return "t", source
    if name in _CASTS and out.is_floating_point() and out.shape == matrix.shape and out.device == matrix.device:
        return "cast", source
    return "", None


def _writes(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node changes another."""
    return in_place(user) and bool(user.args) and user.args[0] is node


def _is_matrix(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() == 2


def _has_nodes(s: slice) -> bool:
    return any(isinstance(v, fx.Node) for v in (s.start, s.stop, s.step))
