"""How a matrix in a graph was made: the steps between a parameter and what reads it, and what writes to its memory."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves


def value(node: Any) -> Any:
    """The fake value of a node, or the constant itself."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def target_name(node: fx.Node) -> str:
    """What a node calls: the method's or the function's name."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def in_transform(node: Any) -> bool:
    """Whether a node's value is a tensor inside a transform of torch.func (vmap): it lives in that alone."""
    tensors = (t for t in tree_leaves(value(node)) if isinstance(t, torch.Tensor))
    return any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


# --- what is written --------------------------------------------------------------------------------------------------

_AUGMENTED = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
_IN_PLACE_FUNCTIONS = {operator.setitem, *(getattr(operator, f"i{name}") for name in _AUGMENTED)}
_SWITCHES = {"inplace": 0, "max_norm": 1}  # arguments that make a function write, and the argument it then writes to


def written(node: fx.Node) -> set[fx.Node]:
    """The operands that a node writes to: `x.mul_(y)`, `x += y`, `x[0] = y`, `out=x`, `inplace=True`, and by its schema."""
    if node.op not in ("call_function", "call_method"):
        return set()
    positions, names, switches = _written_arguments(node.target)
    given = [node.args[i] for i in positions if i < len(node.args)]
    given += [x for name, x in node.kwargs.items() if name in names]
    for name, position, (operand, operand_name) in switches:
        if argument(node, position, name) not in (None, False):
            given.append(argument(node, operand, operand_name))
    return {x for x in tree_leaves(given) if isinstance(x, fx.Node)}


@functools.cache
def _written_arguments(target: Any) -> tuple[set[int], set[str], list[tuple[str, int, tuple[int, str]]]]:
    """(positions, names) of the arguments that a target writes to, and the switches (name, position, what is written)."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    positions, names = set(), {"out"}
    if target in _IN_PLACE_FUNCTIONS or name.rstrip("_") + "_" == name:  # torch's naming
        positions, names = {0}, {"out", "input", "self"}
    op = target if isinstance(target, torch._ops.OpOverload) else getattr(torch.ops.aten, name, None)
    op = target if isinstance(target, torch._ops.OpOverloadPacket) else op
    overloads = [getattr(op, o) for o in op.overloads()] if isinstance(op, torch._ops.OpOverloadPacket) else [op]
    for schema in (o._schema for o in overloads if isinstance(o, torch._ops.OpOverload)):
        for i, a in enumerate(schema.arguments):
            if a.alias_info is not None and a.alias_info.is_write:
                names.add(a.name)
                positions |= set() if a.kwarg_only else {i}
    parameters = list(inspect.signature(target).parameters) if inspect.isfunction(target) else []
    found = [(s, parameters.index(s), (i, parameters[i])) for s, i in _SWITCHES.items() if s in parameters]
    return positions, names, found


def storages(node: Any) -> set[int]:
    """The memory that a node's value lies in. Views share it, so whatever is written there is written to them all."""
    if in_transform(node):
        return set()  # can't be asked there
    tensors = (t for t in tree_leaves(value(node)) if isinstance(t, torch.Tensor) and t.layout is torch.strided)
    return {t.untyped_storage()._cdata for t in tensors}


def is_written(node: fx.Node) -> bool:
    """Whether something writes to the memory of a node's value, directly or through a view made of it."""
    memory, seen, queue = storages(node), {node}, [node]
    while queue:
        at = queue.pop()
        for user in at.users:
            if at in written(user):
                return True
            if user not in seen and storages(user) & memory:
                seen.add(user)
                queue.append(user)
    return False


# --- chains -----------------------------------------------------------------------------------------------------------


@dataclass
class Chain:
    """How a matrix in the graph was made from one or two leaves: `leaf` or `left @ right`, then `steps`, in order.

    steps are ("t", node), ("cast", node) or ("rows", node): transposed, converted (or detached, or copied), or part of
    the rows taken.
    """

    source: fx.Node
    steps: list[tuple[str, fx.Node]]

    @property
    def transposed(self) -> bool:
        return sum(kind == "t" for kind, _ in self.steps) % 2 == 1


# Each commutes with the product: cast(B A) = cast(B) cast(A), and what is detached passes no gradient to either.
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "contiguous", "type_as", "clone"}
_CASTS |= {"detach", "_get_data_attr"}  # the latter is `.data`
_TRANSPOSES = {"t", "transpose", "swapaxes", "permute"}
_SPLITS = {"chunk", "split", "tensor_split", "unbind"}
_ATTRIBUTES = {"T", "mT", "H", "mH"}  # of real matrices
_RESHAPES = {"view", "reshape", "flatten", "view_as", "reshape_as", "expand", "expand_as", "squeeze"}
BROADCASTS = {"expand", "expand_as", "broadcast_to", "unsqueeze", "getitem"}
PURE = {*_CASTS, *_TRANSPOSES, *_SPLITS, *_RESHAPES, *BROADCASTS, "getattr", "size", "matmul"}


def trace_matrix(node: fx.Node) -> Chain:
    """Walk back from a matrix operand through transposes, casts and row slices to what it was made from."""
    steps: list[tuple[str, fx.Node]] = []
    while True:
        kind, source = _step(node)
        if source is None or is_written(node):
            return Chain(node, steps[::-1])
        if kind != "same":
            steps.append((kind, node))
        node = source


def readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What reads a matrix at last, behind the steps of a chain: (reader, the operand it reads)."""
    for user in node.users:
        parts = target_name(user) in _SPLITS and isinstance(value(user), (tuple, list))
        for item in list(user.users) if parts else [user]:
            if _step(item)[1] is node and not is_written(item):
                yield from readers(item)
            else:
                yield user, node


def _step(node: fx.Node) -> tuple[str, fx.Node | None]:
    if node.op not in ("call_method", "call_function") or not node.args or not isinstance(node.args[0], fx.Node):
        return "", None
    source = node.args[0]
    matrix = value(source)
    name = target_name(node)
    if node.target is getattr and node.args[1] in _ATTRIBUTES and _is_matrix(matrix) and not matrix.is_complex():
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
    same = out.shape == matrix.shape and out.stride() == matrix.stride() and out.dtype == matrix.dtype
    if name in _RESHAPES and same:
        return "same", source
    if name in _CASTS and out.is_floating_point() and out.shape == matrix.shape and out.device == matrix.device:
        return "cast", source
    return "", None


def _is_matrix(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() == 2


def _has_nodes(s: slice) -> bool:
    return any(isinstance(v, fx.Node) for v in (s.start, s.stop, s.step))
