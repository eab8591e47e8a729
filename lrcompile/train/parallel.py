"""How a model is spread over ranks: blocks recomputed, compiled and sharded one by one, in that order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lrcompile.errors import TrainError

RECOMPUTE = ("none", "block", "selective")


def mesh(device_type: str, shard: int | None = None, replicate: int = 1, *, always: bool = False) -> DeviceMesh | None:
    """The mesh of all ranks: one axis that parameters are sharded over, or two with `replicate` copies (HSDP).

    Args:
        shard: ranks that share one copy; None: all, divided by `replicate`.
        replicate: copies.
        always: make a mesh of one rank too: there is nothing to shard, but mixed precision is FSDP's.

    Returns:
        None in a world of one process, unless `always`.

    Raises:
        TrainError: the two don't multiply to the number of ranks.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    shard = world // replicate if shard is None else shard
    if shard * replicate != world:
        raise TrainError(
            f"parallel.shard={shard} times parallel.replicate={replicate} is {shard * replicate}, and there are {world} "
            "ranks; the product must be that number"
        )
    if world == 1 and not always:
        return None
    if replicate == 1:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def parallelise(
    model: nn.Module,
    blocks: Sequence[str],
    *,
    over: DeviceMesh | None,
    recompute: str = "none",
    backend: str | Callable[..., Any] | None = None,
    options: dict[str, Any] | None = None,
    compute: torch.dtype | None = None,
    reduce: torch.dtype | None = None,
) -> None:
    """Recompute, compile and shard a model's blocks, in place, and shard what is left around them.

    A block that shares a parameter with another, or with what is around, isn't gathered by itself: it goes with the rest.

    Args:
        model: adopted, on `meta` or not.
        blocks: names of the layers.
        over: mesh to shard over; None shards nothing.
        recompute: what of a block's forward is computed again in backward: "none" of it; the whole "block"; "selective":
            all but products and attention.
        backend, options: for torch.compile; None leaves the blocks eager.
        compute: dtype of the parameters in a step (mixed precision); None: their own. Integers stay as they are.
        reduce: dtype that gradients are summed in over the ranks; None: `compute`.

    Raises:
        TrainError: an unknown `recompute`; a block trains parameters of two dtypes.
    """
    if recompute not in RECOMPUTE:
        raise TrainError(f"parallel.checkpoint={recompute!r} is not known; choose from {', '.join(RECOMPUTE)}")
    layers = [model.get_submodule(name) for name in blocks]
    for layer in dict.fromkeys(layers):
        forward = layer.forward
        if recompute != "none":
            forward = _recomputed(forward, recompute)
        if backend is not None:
            # The forward, not the module: what FSDP hangs on the module's call stays outside the compiled code.
            forward = torch.compile(forward, backend=backend, options=options)
        if forward is not layer.forward:
            layer.forward = forward
    if over is None:
        return
    layers = apart(model, blocks)
    check_dtypes(model, layers)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
    for layer in layers:
        fully_shard(layer, mesh=over, mp_policy=policy)
    fully_shard(model, mesh=over, mp_policy=policy)
    # A rank may leave out parameters that others use, as experts that are modules: all must sum the same.
    model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]


def apart(model: nn.Module, blocks: Sequence[str]) -> list[nn.Module]:
    """The blocks, each once, whose parameters nothing else has."""
    layers = {name: model.get_submodule(name) for name in blocks}
    owners: dict[int, set[nn.Module | None]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owner = next((layer for block, layer in layers.items() if name.startswith(f"{block}.")), None)
        owners.setdefault(id(p), set()).add(owner)
    return [x for x in dict.fromkeys(layers.values()) if all(len(owners[id(p)]) == 1 for p in x.parameters())]


def check_dtypes(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Raise TrainError where FSDP would be asked to sum gradients of two dtypes at once."""
    inside = {id(p) for layer in layers for p in layer.parameters()}
    around = [p for p in model.parameters() if id(p) not in inside]
    for unit in [around, *(list(layer.parameters()) for layer in layers)]:
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in unit if p.requires_grad})
        if len(dtypes) > 1:
            raise TrainError(
                f"{' and '.join(dtypes)} parameters are trained side by side, and FSDP sums gradients of one dtype: set "
                "model.dtype and recipe.pair_dtype to the same, or train the pairs alone (recipe.trainable = [])"
            )


def _recomputed(forward: Callable[..., Any], kind: str) -> Callable[..., Any]:
    context: dict[str, Any] = {}
    if kind == "selective":
        context["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **context, **kwargs)

    return run


_KEPT = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
         "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu"}  # fmt: skip


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = op.name().partition("::")[2].partition(".")[0]
    ours = op.name().startswith("lrcompile::")
    return CheckpointPolicy.MUST_SAVE if ours or name in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
