"""What a graph costs: parameters read, FLOPs, bytes saved for backward; and how far two graphs' outputs are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import lrcompile.kernels.lowrank_epilogue  # noqa: F401  registers the operators
import lrcompile.kernels.lowrank_group  # noqa: F401
from lrcompile.graph.pipeline import run_on_fakes
from lrcompile.passes.graphs import scopes, value


def read_inputs(gm: fx.GraphModule) -> set[fx.Node]:
    """The top graph's placeholders that something computes with, here or in a sub-graph."""
    found: set[fx.Node] = set()
    all_scopes = list(scopes(gm))
    hands_down = {call for scope in all_scopes for call, _ in scope.calls}
    for scope in all_scopes:
        for node in scope.placeholders:
            root = scope.root(node)
            if root is not None and any(user not in hands_down or _first_operand(user, node) for user in node.users):
                found.add(root)
    return found


def _first_operand(call: fx.Node, node: fx.Node) -> bool:
    """Whether a node is read by a higher-order op itself (a condition) and not only by its body."""
    body = [i for i, a in enumerate(call.args) if isinstance(a, fx.Node) and a.op == "get_attr"]
    return node in call.args[: body[0]]


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _lowrank_linear(x: Any, a: Any, b: Any, bias: Any = None, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(x[:-1]) * a[0] * (a[1] + b[0])


def _lowrank_group(x: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sum(_lowrank_linear(x, *pair) for pair in zip(a, b, strict=True))


def _quant_linear(x: Any, packed: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(x) * out_shape[-1]


def _quant_lowrank(
    x: Any, packed: Any, layout: Any, group: Any, a: Any, *args: Any, out_shape: Any = None, **kw: Any
) -> int:
    return _quant_linear(x, packed, out_shape=out_shape) + 2 * math.prod(x[:-1]) * a[0] * (a[1] + out_shape[-1])


def _lowrank_quant(
    x: Any, a: Any, layout: Any, group: Any, b: Any, *args: Any, out_shape: Any = None, **kw: Any
) -> int:
    codes = math.prod(a[0]) * (2 if layout in ("nf4", "fp4", "int4") else 1)
    rank = codes // x[-1]
    return 2 * math.prod(x[:-1]) * rank * (x[-1] + out_shape[-1])


def _compose(
    base: Any, layout: Any, group: Any, columns: Any, dtype: Any, a: Any, *args: Any, out_shape: Any = None, **kw: Any
) -> int:
    return 0 if a is None else 2 * math.prod(out_shape) * a[0]


# What torch's counter doesn't know: the fused attention of the CPU, and our operators.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.lrcompile.lowrank_linear: _lowrank_linear,
    torch.ops.lrcompile.lowrank_linear_keep: _lowrank_linear,
    torch.ops.lrcompile.lowrank_epilogue: _lowrank_linear,
    torch.ops.lrcompile.lowrank_group: _lowrank_group,
    torch.ops.lrcompile.quant_linear: _quant_linear,
    torch.ops.lrcompile.quant_lowrank_linear: _quant_lowrank,
    torch.ops.lrcompile.lowrank_quant_linear: _lowrank_quant,
    torch.ops.lrcompile.compose: _compose,
}


def cost(gm: fx.GraphModule) -> tuple[int, int]:
    """(FLOPs of one forward, bytes that autograd saves for backward) on the inputs the graph was captured with.

    2 FLOPs a multiply-add, matrix products, convolutions and attention counted. Saved tensors that are parameters or inputs
    of the graph don't count, and each storage counts once. Nothing is computed: the graph is run on fake tensors.
    """
    return run_on_fakes(gm, lambda inputs: _cost(gm, inputs))


def _cost(gm: fx.GraphModule, inputs: list[Any]) -> tuple[int, int]:
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    # Inputs in training need no gradient unless an earlier graph made them; the fakes know which.
    with torch.enable_grad(), counter:
        size = saved_bytes(lambda: gm(*inputs), (x for x in inputs if isinstance(x, torch.Tensor)))
    return counter.get_total_flops(), size


def saved_bytes(call: Callable[[], Any], given: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd saves for backward in a call; each storage counts once, those of the given tensors not at all."""
    apart = {t.untyped_storage()._cdata for t in given}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in apart:
            saved[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    size = sum(storage.nbytes() for storage in saved.values())
    del out
    return size


@torch.no_grad()
def outputs(gm: fx.GraphModule, inputs: list[Any]) -> list[torch.Tensor]:
    """The floating outputs on real inputs, which are left as they are; the random stream is restarted."""
    # Parameters are only read; buffers may be written (a running mean), so those are copied.
    fresh = [x.clone() if isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter) else x for x in inputs]
    devices = list({x.device for x in fresh if isinstance(x, torch.Tensor) and x.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        out = torch.utils._pytree.tree_leaves(gm(*fresh))
    return [t.detach() for t in out if isinstance(t, torch.Tensor) and t.is_floating_point()]


def output_error(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """‖after - before‖ / ‖before‖ over all outputs together; infinities of masked scores are left out."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    wrong, size = 0.0, 0.0
    for a, b in zip(before, after, strict=True):
        a, b = (torch.where(torch.isfinite(t), t, torch.zeros_like(t)).double() for t in (a, b))
        wrong += float((a - b).square().sum())
        size += float(a.square().sum())
    return (wrong / size) ** 0.5 if size > 0 else float(wrong > 0)


__all__ = ["FORMULAS", "cost", "output_error", "outputs", "read_inputs", "saved_bytes", "value"]
