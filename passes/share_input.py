"""share_input: pairs over one input become one operator, which reads it once (exact).

Query, key and value; gate and up. Their gradients to the input are summed in the product that makes them. Only where that
is expected to pay on the device at hand, forward and backward together.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from lrcompile.cost import Device
from lrcompile.kernels import lowrank_group
from lrcompile.passes import chosen
from lrcompile.passes.chains import value
from lrcompile.passes.contract import PassContext, PassResult, graph_pass
from lrcompile.passes.graphs import Site, emit, module_name, pair_of, sites


@graph_pass(exact=True)
def share_input(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Rewrite groups of pairs over one input where the cost model expects a gain."""
    result = PassResult()
    if not chosen.active(ctx):
        return result
    for group in list(groups(gm)):
        names = ", ".join(module_name(site.node) or site.node.name for site in group)
        place = _place(group)
        if place is None:
            result.notes.append(f"{names}: share an input, but not the moment: one is computed before another can be")
            continue
        ours, why = _choose(group, ctx)
        if not ours:
            result.notes.append(f"{names}: share an input, computed apart ({why})")
            continue
        result.changed.append(f"{names}: lrcompile::lowrank_group ({why})")
        _replace(group, place)
        group[0].scope.gm.recompile()
    return result


def groups(gm: fx.GraphModule) -> Iterator[list[Site]]:
    """Pairs of one scope over one input, two or more, as many as the operator's kernel takes; with a bias or all without."""
    found: dict[tuple[fx.GraphModule, fx.Node, bool, torch.dtype], list[Site]] = {}
    for site in sites(gm):
        if pair_of(site) is None or not chosen.fits(site):
            continue
        x, _, _, bias = chosen.pair_operands(site)
        key = (site.scope.gm, x, bias is None, value(site.node).dtype)
        found.setdefault(key, []).append(site)
    for same in found.values():
        for start in range(0, len(same) - 1, lowrank_group.MOST):
            part = same[start : start + lowrank_group.MOST]
            if len(part) > 1:
                yield part


def _place(group: list[Site]) -> fx.Node | None:
    """The node before which all pairs can be computed: the first that reads one of them; None where there is none."""
    order = {node: i for i, node in enumerate(group[0].scope.gm.graph.nodes)}
    users = [user for site in group for user in site.node.users]
    if not users or any(not site.node.users for site in group):
        return None
    first = min(users, key=lambda node: order[node])
    operands = [node for site in group for node in chosen.pair_operands(site) if node is not None]
    own = [node for site in group for node in (site.x, site.node)]
    if any(order[node] >= order[first] for node in operands) or not chosen.undisturbed([*own, first]):
        return None
    return first


def _choose(group: list[Site], ctx: PassContext) -> tuple[bool, str]:
    operands = [chosen.pair_operands(site) for site in group]
    of_x = chosen.wants_gradient(operands[0][0])
    of_pairs = tuple(tuple(chosen.wants_gradient(node) for node in pair[1:]) for pair in operands)
    trains = any(chosen.wants_gradient(user) for site in group for user in site.node.users)
    trains = trains and (of_x or any(map(any, of_pairs)))
    if ctx.kernels == "auto" and not chosen.has_kernels(group[0]):
        return False, f"our kernels are not for {value(group[0].node).dtype}"

    def predict(device: Device) -> tuple[float, float]:
        shapes, dtype = tuple(chosen.shape_of(site) for site in group), value(group[0].node).dtype
        choices = [lowrank_group.predict_forward(shapes, dtype, device)]
        if trains:
            choices.append(lowrank_group.predict_backward(shapes, dtype, device, (of_x, of_pairs)))  # type: ignore[arg-type]
        return sum(c.seconds for c in choices), sum(c.gemms for c in choices)

    return chosen.choose(ctx, "lowrank_group", "apart", trains, predict)


def _replace(group: list[Site], place: fx.Node) -> None:
    scope, op = group[0].scope, torch.ops.lrcompile.lowrank_group.default
    operands = [chosen.pair_operands(site) for site in group]
    a, b = [pair[1] for pair in operands], [pair[2] for pair in operands]
    bias = [pair[3] for pair in operands if pair[3] is not None]
    new = chosen.emit_at(scope, place, group[0].node, op, operands[0][0], a, b, bias)
    for i, site in enumerate(group):
        first = site.x
        site.node.replace_all_uses_with(emit(scope, place, operator.getitem, new, i, like=site.node))
        scope.gm.graph.erase_node(site.node)
        scope.gm.graph.erase_node(first)
