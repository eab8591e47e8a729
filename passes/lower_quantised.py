"""What lower says of the sites whose weight is quantised: which implementation their operator takes, and why.

There is nothing to choose in the graph: the operators decode inside the product or into a temporary, as the cost model says
for the very sizes of a call.
"""

from __future__ import annotations

from torch import fx

from lrcompile.cost import Device
from lrcompile.kernels import lowrank_quant_linear, quant_linear, quant_lowrank_linear
from lrcompile.kernels.quant_linear import Shape, shape_of
from lrcompile.passes.chains import value
from lrcompile.passes.contract import PassContext
from lrcompile.passes.graphs import module_name, rows_of, scopes

_NAMES = {
    quant_linear.quant_linear: "quant_linear",
    quant_lowrank_linear.quant_lowrank_linear: "quant_lowrank_linear",
    lowrank_quant_linear.lowrank_quant_linear: "lowrank_quant_linear",
}


def told(gm: fx.GraphModule, ctx: PassContext) -> list[str]:
    """One line for every such site."""
    lines = []
    for scope in scopes(gm):
        for node in scope.gm.graph.nodes:
            if node.op == "call_function" and node.target in _NAMES:
                name = _NAMES[node.target]
                lines.append(f"{module_name(node) or node.name}: lrcompile::{name}, {_why(node, name, ctx)}")
    return lines


def _why(node: fx.Node, name: str, ctx: PassContext) -> str:
    if ctx.target is None:
        return f"decoded into a temporary, library products ({ctx.device})"
    seconds = _seconds(node, name, ctx.target)
    variant = min(seconds, key=lambda v: seconds[v])
    where = {"fused": "decoded inside the product", "gemms": "decoded into a temporary, library products"}
    times = ", ".join(f"{v} {s * 1e6:.3g} µs" for v, s in seconds.items())
    return f"{where[variant]} (predicted for {ctx.target.name}, forward: {times})"


def _seconds(node: fx.Node, name: str, device: Device) -> dict[str, float]:
    x, dtype = node.args[0], value(node).dtype
    rows, width = rows_of(x), int(value(x).shape[-1])  # type: ignore[arg-type]

    def shape(columns: int, first: int, rank: int = 0) -> Shape:
        packed, layout, group = node.args[first : first + 3]
        return shape_of(rows, columns, [value(t) for t in packed], layout, group, rank)  # type: ignore[union-attr,arg-type]

    if name == "lowrank_quant_linear":
        down = shape(width, 1)
        found = lowrank_quant_linear.predict_forward(down, shape(down.out_features, 4), dtype, device)
    else:
        rank = int(value(node.args[4]).shape[0]) if name == "quant_lowrank_linear" else 0
        found = quant_linear.predict_forward(shape(width, 1, rank), dtype, device)
    return {"gemms": found.gemms} | ({"fused": found.seconds} if found.variant == "fused" else {})
