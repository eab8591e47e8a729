"""fuse_epilogue: what follows a pair moves into the kernel of its up-projection (exact).

GELU (both forms), SiLU, a gated product (SwiGLU, GeGLU) or a sum with a residual, where the pair's result has no other
use. Only where that is expected to pay on the device at hand, forward and backward together.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lrcompile.cost import Device
from lrcompile.kernels import lowrank_epilogue
from lrcompile.passes import chosen
from lrcompile.passes.chains import PURE, argument, target_name, value
from lrcompile.passes.contract import PassContext, PassResult, graph_pass
from lrcompile.passes.graphs import Site, linear_fn, module_name, pair_of, sites

_SUMS = {operator.add, torch.add, "add"}
_PRODUCTS = {operator.mul, torch.mul, torch.multiply, "mul", "multiply"}
_SIGMOIDS = {torch.sigmoid, F.sigmoid, torch.special.expit, "sigmoid"}
_MATRIX_PRODUCTS = {linear_fn, F.linear, torch.matmul, operator.matmul, torch.bmm, torch.addmm}


@dataclass
class Match:
    """What follows a pair.

    Attributes:
        kind: as lowrank_epilogue names it.
        other: its other operand.
        nodes: all that is replaced after the pair, the result first.
    """

    kind: str
    other: fx.Node | None
    nodes: list[fx.Node]


@graph_pass(exact=True)
def fuse_epilogue(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Rewrite each pair with a known epilogue to one operator where the cost model expects a gain."""
    result = PassResult()
    if not chosen.active(ctx):
        return result
    touched = {}
    for site in list(sites(gm)):
        match = None if pair_of(site) is None else match_epilogue(site)
        if match is None:
            continue
        ours, why = _choose(site, match, ctx)
        name, what = module_name(site.node) or site.node.name, f"{match.kind} after the pair"
        if not ours:
            result.notes.append(f"{name}: {what} stays a kernel of Inductor's ({why})")
            continue
        result.changed.append(f"{name}: lrcompile::lowrank_epilogue, {what} ({why})")
        _replace(site, match)
        touched[id(site.scope.gm)] = site.scope.gm
    for owner in touched.values():
        owner.recompile()
    return result


def match_epilogue(site: Site) -> Match | None:
    """What follows a pair and fits the operator; None where nothing does."""
    found = _match(site.node)
    if found is None:
        return None
    z, y = value(site.node), value(found.nodes[0])
    dtypes = [z.dtype] if found.other is None else [z.dtype, value(found.other).dtype]
    promoted = torch.promote_types(dtypes[0], dtypes[-1])
    if not chosen.fits(site) or y.shape != z.shape or y.dtype != promoted or y.device != z.device:
        return None
    return found if chosen.undisturbed([site.x, site.node, *found.nodes]) else None


def _match(z: fx.Node) -> Match | None:
    activation, at, nodes = _activation_after(z)
    user = _only_user(at)
    if user is not None and user.target in _PRODUCTS:
        other = _other_operand(user, at)
        if other is not None and activation:
            return Match(f"{activation}_mul", other, [user, *nodes])
        if other is not None:
            gate, source, inside = _activation_at(other)
            if gate and _same(source, z):
                return Match(f"mul_{gate}", source, [user, *nodes, *inside])
            return Match("mul", other, [user, *nodes])
    if user is not None and user.target in _SUMS and not activation:
        other = _other_operand(user, at)
        if other is not None:
            return Match("add", other, [user, *nodes])
    return Match(activation, None, nodes) if activation else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _same(node: Any, like: fx.Node) -> bool:
    """Whether a node is a floating tensor of the same shape and device."""
    x, y = value(node), value(like)
    is_tensor = isinstance(node, fx.Node) and isinstance(x, torch.Tensor)
    return is_tensor and x.is_floating_point() and x.shape == y.shape and x.device == y.device


def _other_operand(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """The second operand of a plain a + b or a * b with `one` in it, of the same shape."""
    if len(node.args) != 2 or node.kwargs:
        return None
    other = node.args[1] if node.args[0] is one else node.args[0]
    return other if other is not one and _same(other, one) else None  # type: ignore[return-value]


def _activation_after(z: fx.Node) -> tuple[str, fx.Node, list[fx.Node]]:
    """(activation, its result, the nodes that make it, last first): of z's only use; ("", z, []) where it is no activation.

    A dropout that is switched off is stepped over.
    """
    user = _only_user(z)
    skipped: list[fx.Node] = []
    if user is not None and _idle_dropout(user):
        skipped = [user]
        z, user = user, _only_user(user)
    if user is not None and (name := _named(user)):
        return name, user, [user, *skipped]
    if len(z.users) == 2:
        for user in z.users:
            name, source, inside = _activation_at(user, alone=False)
            if name and source is z and set(z.users) == set(inside):
                return name, user, [*inside, *skipped]
    return "", z, skipped


def _activation_at(node: fx.Node, alone: bool = True) -> tuple[str, Any, list[fx.Node]]:
    """(activation, operand, nodes) of what a node computes; ("", None, []) where that is none, or, `alone`, is used twice."""
    if alone and len(node.users) != 1:
        return "", None, []
    if name := _named(node):
        return name, node.args[0], [node]
    if node.target in _PRODUCTS and len(node.args) == 2 and not node.kwargs:
        for x, gate in (node.args, node.args[::-1]):
            if not isinstance(gate, fx.Node) or gate.target not in _SIGMOIDS or len(gate.users) != 1:
                continue
            if isinstance(x, fx.Node) and gate.args == (x,):
                return "silu", x, [node, gate]
    return "", None, []


def _named(node: fx.Node) -> str:
    """The activation that one call computes, out of place."""
    if node.op != "call_function" or len(node.args) < 1 or argument(node, 1, "inplace") is True:
        return ""
    if node.target is F.silu:
        return "silu"
    if node.target is F.gelu:
        approximate = node.kwargs.get("approximate", "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate), "")
    return ""


def _idle_dropout(node: fx.Node) -> bool:
    if node.target is not F.dropout or argument(node, 3, "inplace", False):
        return False
    return argument(node, 2, "training", True) is False or argument(node, 1, "p", 0.5) == 0.0


def _choose(site: Site, match: Match, ctx: PassContext) -> tuple[bool, str]:
    needed = tuple(chosen.wants_gradient(node) for node in (*chosen.pair_operands(site), match.other))
    trains = any(needed) and chosen.wants_gradient(match.nodes[0])
    if ctx.kernels == "auto" and not chosen.has_kernels(site):
        return False, f"our kernels are not for {value(site.node).dtype}"
    if ctx.kernels == "auto" and match.other is not None and not _stands(match.other):
        return False, f"{match.other.name} is computed there too, and isn't stored"

    def predict(device: Device) -> tuple[float, float]:
        other = None if match.other is None else value(match.other).dtype
        given = (chosen.shape_of(site), match.kind, value(site.node).dtype, device, other)
        choices = [lowrank_epilogue.predict_forward(*given)]
        if trains:
            choices.append(lowrank_epilogue.predict_backward(*given, needed))  # type: ignore[arg-type]
        return sum(c.seconds for c in choices), sum(c.gemms for c in choices)

    return chosen.choose(ctx, "lowrank_epilogue", "apart", trains, predict)


def _stands(node: fx.Node) -> bool:
    """Whether a tensor is in memory anyway; else Inductor computes it in the pointwise kernel that we would replace."""
    while len(node.users) == 1 and target_name(node) in PURE and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    made_whole = node.op in ("placeholder", "get_attr") or node.target in _MATRIX_PRODUCTS
    ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "lrcompile"
    return made_whole or ours or len(node.users) > 1


def _replace(site: Site, match: Match) -> None:
    y = match.nodes[0]
    op = torch.ops.lrcompile.lowrank_epilogue.default
    new = chosen.emit_at(site.scope, y, site.node, op, *chosen.pair_operands(site), match.kind, match.other)
    y.replace_all_uses_with(new)
    first = site.x
    for node in (*match.nodes, site.node, first):
        site.scope.gm.graph.erase_node(node)
