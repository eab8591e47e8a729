"""The spellings of a product with a matrix: how each becomes F.linear, and what it takes to give the axes back.

A rewriting function gets the node and returns the node that replaces it, or None where the node is no product of a
weight's matrix with something. Each comes down to `_contract`: one axis of x against one axis of the matrix.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrcompile.passes.chains import BROADCASTS, in_transform, storages, target_name, trace_matrix, value
from lrcompile.passes.graphs import Scope, emit, is_weight, linear_fn, reads_weight


def rewrite(scope: Scope, node: fx.Node) -> tuple[fx.Node | None, str]:
    """Write a product anew, as F.linear, before its node.

    Returns:
        (the node that gives the same values in the same layout, the spelling), or (None, "") for what is no such product.
    """
    if target_name(node) not in SPELLINGS or not _is_torchs(node.target):
        return None, ""
    if target_name(node) in ("mv", "addmv") and _under_autocast(scope):
        return None, ""  # it casts F.linear everywhere, these not on every device
    spelling, function = SPELLINGS[target_name(node)]
    new = function(scope, node)
    return (None, "") if new is None else (_laid_out_as(scope, node, new), spelling)


def _is_torchs(target: Any) -> bool:
    function = isinstance(target, (types.FunctionType, types.BuiltinFunctionType))
    return isinstance(target, str) or (function and str(target.__module__).split(".")[0] in ("torch", "_operator"))


def _under_autocast(scope: Scope) -> bool:
    """Whether autocast is on around the graph, or somewhere in it."""
    entered = any(target_name(node) == "_enter_autocast" for node in scope.gm.graph.nodes)
    return (
        entered or torch._C._is_any_autocast_enabled() or (scope.parent is not None and _under_autocast(scope.parent))
    )


def _laid_out_as(scope: Scope, node: fx.Node, new: fx.Node) -> fx.Node:
    """The same values in the layout of the node that goes: what follows was traced for it (a view, say)."""
    before, after = value(node), value(new)
    if before.stride() == after.stride():
        return new
    if before.is_contiguous():
        return emit(scope, node, "contiguous", new)
    order = sorted(range(before.dim()), key=lambda axis: -before.stride(axis))
    if not before.permute(order).is_contiguous():
        return new
    packed = emit(scope, node, "contiguous", emit(scope, node, "permute", new, *order))
    return emit(scope, node, "permute", packed, *(order.index(axis) for axis in range(len(order))))


# --- the one form -----------------------------------------------------------------------------------------------------


def _matrix(scope: Scope, operand: Any) -> fx.Node | None:
    """The 2-D operand that is a parameter, or a product of two (an adopted weight), behind casts and the like.

    A matrix repeated along leading axes, `w.expand(batch, -1, -1)`, counts as the matrix.
    """
    if not _is_tensor(operand):
        return None
    node = operand
    while _is_tensor(node) and value(node).dim() > 2 and target_name(node) in BROADCASTS:
        node = node.args[0]
    if not _is_tensor(node) or value(node).dim() != 2:
        return None
    if node is not operand:
        whole, matrix = value(operand), value(node)
        repeated = all(stride == 0 or n == 1 for n, stride in zip(whole.shape[:-2], whole.stride()[:-2], strict=True))
        same = whole.shape[-2:] == matrix.shape and whole.stride()[-2:] == matrix.stride()
        start = storages(operand) == storages(node) and whole.storage_offset() == matrix.storage_offset()
        if not (repeated and same and start):
            return None
    source = trace_matrix(node).source
    return node if is_weight(scope, source) else None


def _is_matrix(scope: Scope, operand: Any) -> bool:
    return _is_tensor(operand) and _matrix(scope, operand) is operand


def _is_tensor(operand: Any) -> bool:
    return isinstance(operand, fx.Node) and isinstance(value(operand), torch.Tensor) and not in_transform(operand)


def _contract(
    scope: Scope, node: fx.Node, x: Any, axis: int, matrix: fx.Node, inner: int, bias: fx.Node | None = None
) -> fx.Node | None:
    """Sum over `axis` of x and `inner` of the matrix. Axes of the result: x's others in order, then the matrix's other."""
    if not _is_tensor(x) or value(x).dim() == 0 or value(x).shape[axis] != value(matrix).shape[inner]:
        return None  # some spellings repeat an axis of size 1, F.linear doesn't
    if axis not in (-1, value(x).dim() - 1):
        x = emit(scope, node, "movedim", x, axis, -1)
    if inner in (0, -2):
        matrix = emit(scope, node, "t", matrix)
    new = emit(scope, node, linear_fn, x, matrix, bias)
    new.meta["lr_spelling"] = "mv" if value(x).dim() == 1 else SPELLINGS[target_name(node)][0]
    return new


def _moved(scope: Scope, node: fx.Node, y: fx.Node | None, to: int) -> fx.Node | None:
    """The result of `_contract` with the matrix's axis moved from the end to where the spelling has it."""
    return y if y is None or value(y).dim() == 1 else emit(scope, node, "movedim", y, -1, to)


def _times(scope: Scope, node: fx.Node, left: Any, right: Any, bias: fx.Node | None = None) -> fx.Node | None:
    """left @ right, one of them a matrix; a bias only with the matrix on the right."""
    matrix = _matrix(scope, right)
    if matrix is not None and _same_rows(left, right):
        return _contract(scope, node, left, -1, matrix, 0, bias)
    matrix = _matrix(scope, left)
    if bias is None and matrix is not None and _same_rows(right, left):
        return _moved(scope, node, _contract(scope, node, right, max(-2, -value(right).dim()), matrix, 1), -2)
    return None


def _same_rows(x: Any, operand: Any) -> bool:
    """Whether a matrix was not repeated more often than x has batches: the result has as many rows as the larger."""
    return _is_tensor(x) and (value(operand).dim() == 2 or value(x).shape[:-2] == value(operand).shape[:-2])


def _operands(node: fx.Node, *names: tuple[str, ...]) -> list[Any] | None:
    """The operands, each by position or by one of its names; None where anything else is given (`out=`, a dtype)."""
    known = {name for several in names for name in several}
    if len(node.args) + len(node.kwargs) != len(names) or not known.issuperset(node.kwargs):
        return None
    rest = [next((node.kwargs[n] for n in several if n in node.kwargs), None) for several in names[len(node.args) :]]
    return [*node.args, *rest]


# --- the spellings ----------------------------------------------------------------------------------------------------


def _matmul(scope: Scope, node: fx.Node) -> fx.Node | None:
    """matmul, mm, bmm, mv, @."""
    operands = _operands(node, ("input",), ("other", "mat2", "vec"))
    if operands is None or reads_weight(scope, node):  # the latter is the weight itself
        return None
    return _times(scope, node, *operands)


def _inner(scope: Scope, node: fx.Node) -> fx.Node | None:
    """Over the last axis of both."""
    operands = _operands(node, ("input",), ("other",))
    return None if operands is None else _over(scope, node, operands[0], operands[1], -1, -1)


def _tensordot(scope: Scope, node: fx.Node) -> fx.Node | None:
    """Over one axis of each: dims=1, or dims=([i], [j])."""
    operands = _operands(node, ("a",), ("b",), ("dims",))
    if operands is None:
        return None
    a, b, dims = operands
    if dims == 1:
        return _over(scope, node, a, b, -1, 0)
    if not isinstance(dims, (tuple, list)) or len(dims) != 2:
        return None
    axes = [d[0] if isinstance(d, (tuple, list)) and len(d) == 1 else d for d in dims]
    return _over(scope, node, a, b, axes[0], axes[1]) if all(isinstance(d, int) for d in axes) else None


def _over(scope: Scope, node: fx.Node, a: Any, b: Any, a_axis: int, b_axis: int) -> fx.Node | None:
    if _is_matrix(scope, b):
        return _contract(scope, node, a, a_axis, b, b_axis)
    if _is_matrix(scope, a):
        return _moved(scope, node, _contract(scope, node, b, b_axis, a, a_axis), 0)
    return None


def _add_product(scope: Scope, node: fx.Node) -> fx.Node | None:
    """addmm (GPT-2's Conv1D), addmv, baddbmm: beta * input + alpha * (left @ right)."""
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    named = {k: v for k, v in node.kwargs.items() if k not in ("beta", "alpha")}
    names = (("input",), ("mat1", "mat", "batch1"), ("mat2", "vec", "batch2"))
    given: list[Any] = [*node.args, *(named[n] for several in names[len(node.args) :] for n in several if n in named)]
    if len(given) != 3 or len(node.args) + len(named) != 3:
        return None  # `out=`, a dtype
    if not all(isinstance(factor, (int, float)) for factor in (beta, alpha)) or beta == 0:
        return None  # with beta=0 the input has a gradient of zeros, which no sum gives it
    added, left, right = given
    if not _is_tensor(added):
        return None
    width = value(right).shape[-1] if _is_tensor(right) and value(right).dim() > 1 else None
    if beta == alpha == 1 and value(added).dim() == 1 and value(added).shape[0] == width and _matrix(scope, right):
        return _times(scope, node, left, right, added)
    y = _times(scope, node, left, right)
    if y is None:
        return None
    y = y if alpha == 1 else emit(scope, node, torch.mul, y, alpha)
    if value(added).dtype != value(node).dtype:  # under autocast, which casts all three
        added = emit(scope, node, "to", added, value(node).dtype)
    return emit(scope, node, torch.add, y, added if beta == 1 else emit(scope, node, torch.mul, added, beta))


def _einsum(scope: Scope, node: fx.Node) -> fx.Node | None:
    """Two operands, one a 2-D parameter, one contracted index; the output permuted to where the equation has it."""
    equation, operands = _equation(node)
    if len(operands) != 2 or equation is None or node.kwargs:
        return None
    inputs, _, output = equation.partition("->")
    indices = inputs.split(",")
    if _is_matrix(scope, operands[0]):
        operands, indices = operands[::-1], indices[::-1]
    x, matrix = operands
    x_axes, w_axes = indices
    if not _is_matrix(scope, matrix) or not _is_tensor(x):
        return None
    rank_of_dots = value(x).dim() - len(x_axes.replace("...", ""))
    free = [c for c in "ABCDEFGHIJKLMNOP" if c not in equation][:rank_of_dots]
    x_axes, output = x_axes.replace("...", "".join(free)), output.replace("...", "".join(free))
    contracted = [c for c in w_axes if c in x_axes and c not in output]
    new = [c for c in w_axes if c in output and c not in x_axes]
    letters = [*x_axes, *w_axes]
    if len(w_axes) != 2 or len(contracted) != 1 or len(new) != 1 or any(letters.count(c) > 2 for c in letters):
        return None
    axes = [*(c for c in x_axes if c != contracted[0]), new[0]]
    if sorted(axes) != sorted(output) or len(set(output)) != len(output):
        return None
    y = _contract(scope, node, x, x_axes.index(contracted[0]), matrix, w_axes.index(contracted[0]))
    if y is None or axes == list(output):
        return y
    return emit(scope, node, "permute", y, *(axes.index(c) for c in output))


def _equation(node: fx.Node) -> tuple[str | None, tuple[Any, ...]]:
    """einsum's equation with its "->", and the operands, from either way of giving them: a string, or lists of indices."""
    args: tuple[Any, ...] = node.args or (None,)
    if isinstance(args[0], str):
        listed = len(args) == 2 and isinstance(args[1], (tuple, list))
        equation, operands = args[0].replace(" ", ""), tuple(args[1]) if listed else args[1:]
    else:  # x, [0, 1], w, [1, 2], and maybe the output's list
        count = len(args) // 2
        operands, lists = args[: 2 * count : 2], [*args[1 : 2 * count : 2], *args[2 * count :]]
        if not all(isinstance(each, (tuple, list)) for each in lists):
            return None, ()
        names = ["".join("..." if i is ... else _LETTERS[i] for i in each) for each in lists]
        equation = ",".join(names[:count]) + "".join("->" + output for output in names[count:])
    if "->" not in equation:  # what stands once, in the order of the alphabet
        letters = equation.replace("...", "").replace(",", "")
        once = sorted(c for c in set(letters) if letters.count(c) == 1)
        equation += "->" + ("..." if "..." in equation else "") + "".join(once)
    return equation, operands


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # of the indices 0, 1, ... in einsum's lists

# What a node calls -> (how the spelling is called, what rewrites it).
SPELLINGS: dict[str, tuple[str, Callable[[Scope, fx.Node], fx.Node | None]]] = {
    "matmul": ("matmul", _matmul),
    "__matmul__": ("matmul", _matmul),
    "linalg_matmul": ("matmul", _matmul),
    "mm": ("matmul", _matmul),
    "mv": ("matmul", _matmul),
    "bmm": ("bmm", _matmul),
    "inner": ("inner", _inner),
    "tensordot": ("tensordot", _tensordot),
    "einsum": ("einsum", _einsum),
    "addmm": ("addmm", _add_product),
    "addmv": ("addmv", _add_product),
    "baddbmm": ("baddbmm", _add_product),
}
