"""A graph as readable Python: the model's own names for parameters and modules, Dynamo's only for what has no other.

Made for reading and for diffs: a value keeps its name from stage to stage, also where a pass computes it anew.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lrcompile.passes.graphs import Scope, module_name, scopes, value

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**", "matmul": "@",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "and_": "&", "or_": "|", "xor": "^",
    "iadd": "+", "isub": "-", "imul": "*", "itruediv": "/",
}  # fmt: skip
_SHORT = {
    "float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32",
    "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "b8",
}  # fmt: skip

Names = dict[tuple[int, str], str]  # (position of the scope in its graph, node name) -> what to call the value


def describe_value(x: Any) -> str:
    """ "f32[2, 8, 64]" for a tensor, a tuple of them for several, "" for anything else."""
    if isinstance(x, torch.Tensor):
        dtype = str(x.dtype).removeprefix("torch.")
        return f"{_SHORT.get(dtype, dtype)}[{', '.join(map(str, x.shape))}]"
    if isinstance(x, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in x):
        return f"({', '.join(describe_value(v) for v in x)})"
    return ""


def code(gm: fx.GraphModule, inputs: dict[str, str], names: Names | None = None, title: str = "forward") -> str:
    """The graph, its sub-graphs first, as Python text.

    Args:
        gm: a captured graph.
        inputs: placeholder name -> what the model calls it ("layers.0.fc.weight", "input_ids").
        names: from `stable_names`.
        title: the name of the function.
    """
    parts = [_Writer(scope, i, inputs, names or {}).text(title) for i, scope in enumerate(scopes(gm))]
    return "\n\n".join(reversed(parts)) + "\n"


def diff(before: str, after: str, before_name: str, after_name: str) -> str:
    """The unified diff of two texts; "" where they are equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), before_name, after_name, lineterm="", n=2)
    return "\n".join(lines)


def input_name(node: fx.Node) -> str:
    """What Dynamo's name of an input says: "l_kwargs_input_ids_" is "input_ids"."""
    name = node.name.strip("_")
    for head in ("l_kwargs_", "l_"):
        if name.startswith(head):
            return name.removeprefix(head)
    return name


def stable_names(before: fx.GraphModule, after: fx.GraphModule, known: Names) -> Names:
    """Names for a stage that differ from the stage before only where it computes something new.

    A node that stands where a vanished one stood, in the arguments of a node that stayed, takes its name.
    """
    out: Names = {}
    for i, (old_scope, new_scope) in enumerate(zip(scopes(before), scopes(after), strict=False)):
        old = {n.name: n for n in old_scope.gm.graph.nodes}
        new = {n.name: n for n in new_scope.gm.graph.nodes}
        out |= {(i, name): known[i, name] for name in new if (i, name) in known}
        for name in old.keys() & new.keys():
            was, now = _operands(old[name]), _operands(new[name])
            if len(was) != len(now):
                continue
            for a, b in zip(was, now, strict=True):
                if a.name not in new and b.name not in old:
                    out[i, b.name] = known.get((i, a.name), a.name)
    return out


def _operands(node: fx.Node) -> list[fx.Node]:
    return [x for x in torch.utils._pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)]


def _namespace(target: Any) -> str:
    """ "F." or "torch.": functions mustn't look like the values that Dynamo names after them."""
    home = getattr(target, "__module__", None) or ""
    if "_nn" in home or home == "torch.nn.functional":
        return "F."
    name = getattr(target, "__name__", "")
    return "F." if getattr(F, name, None) is target else "torch." if getattr(torch, name, None) is target else ""


class _Writer:
    """Writes one scope."""

    def __init__(self, scope: Scope, index: int, inputs: dict[str, str], names: Names) -> None:
        self.scope, self.index, self.inputs, self.names = scope, index, inputs, names
        self.called: dict[fx.Node, str] = {}
        taken: set[str] = set()
        for node in scope.gm.graph.nodes:
            name = self._name(node)
            while name in taken and node.op != "placeholder":
                name += "_"
            taken.add(name)
            self.called[node] = name

    def _name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            root = self.scope.root(node)
            if root is not None and root.name in self.inputs:
                return self.inputs[root.name]
            return input_name(node)
        return self.names.get((self.index, node.name), node.name)

    def text(self, title: str) -> str:
        return "\n".join(self._lines(title))

    def _lines(self, title: str) -> Iterator[str]:
        if self.scope.parent is not None:
            call = self.scope.calls[0][0]
            title = next(str(a.target) for a in call.args if isinstance(a, fx.Node) and a.op == "get_attr")
        own = [n for n in self.scope.placeholders if not isinstance(value(n), torch.nn.Parameter) and n.users]
        yield f"def {title}({', '.join(dict.fromkeys(self._signature(n) for n in own))}):"
        module = None
        for node in self.scope.gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            if node.op == "output":
                yield f"    return {self._write(node.args[0])}"
                continue
            if module_name(node) != module:
                module = module_name(node)
                yield f"    # {module or 'the model'}"
            about = describe_value(value(node))
            target = f"{self.called[node]} = " if node.users else ""
            yield f"    {target}{self._call(node)}" + (f"  # {about}" if about else "")

    def _signature(self, node: fx.Node) -> str:
        about = describe_value(value(node))
        return f"{self.called[node]}: {about}" if about else self.called[node]

    def _call(self, node: fx.Node) -> str:
        args, kwargs = list(node.args), dict(node.kwargs)
        if node.op == "call_method":
            return f"{self._write(args[0])}.{node.target}({self._arguments(args[1:], kwargs)})"
        target: Any = node.target
        name = getattr(target, "__name__", str(target))
        if target is operator.getitem:
            return f"{self._write(args[0])}[{self._index(args[1])}]"
        if target is getattr and len(args) == 2:
            return f"{self._write(args[0])}.{args[1]}"
        if getattr(target, "__module__", "") == "_operator" and name in _INFIX and len(args) == 2:
            return f"{self._write(args[0])} {_INFIX[name]} {self._write(args[1])}"
        return f"{_namespace(target)}{name}({self._arguments(args, kwargs)})"

    def _arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
        return ", ".join([*map(self._write, args), *(f"{k}={self._write(v)}" for k, v in kwargs.items())])

    def _write(self, x: Any) -> str:
        if isinstance(x, fx.Node):
            return str(x.target) if x.op == "get_attr" else self.called[x]
        if isinstance(x, tuple):
            return f"({', '.join(map(self._write, x))}{',' if len(x) == 1 else ''})"
        if isinstance(x, list):
            return f"[{', '.join(map(self._write, x))}]"
        if isinstance(x, dict):
            return "{" + ", ".join(f"{k!r}: {self._write(v)}" for k, v in x.items()) + "}"
        if isinstance(x, slice):
            return f"slice({self._write(x.start)}, {self._write(x.stop)}, {self._write(x.step)})"
        if isinstance(x, torch.device):
            return repr(str(x))
        return "..." if x is Ellipsis else str(x) if isinstance(x, torch.dtype) else repr(x)

    def _index(self, x: Any) -> str:
        if isinstance(x, tuple) and x:
            return ", ".join(map(self._index, x))
        if isinstance(x, slice):
            start, stop, step = ("" if v is None else self._write(v) for v in (x.start, x.stop, x.step))
            return f"{start}:{stop}" + (f":{step}" if step else "")
        return self._write(x)
