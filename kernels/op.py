"""How a kernel family becomes a torch operator: one call registers its implementations, autograd and autocast rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrcompile.errors import KernelError

_LIBRARY = torch.library.Library("lrcompile", "FRAGMENT")


def register(
    name: str,
    schema: str,
    implementations: dict[str, Callable[..., Any]],
    fake: Callable[..., Any],
    autograd: tuple[Callable[..., Any], Callable[..., None]] | None = None,
    cast: bool = True,
    promoted: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Define lrcompile::name.

    Args:
        name: of the operator.
        schema: its arguments and results, "(Tensor x, Tensor? bias) -> Tensor".
        implementations: dispatch key ("CPU", "CUDA") -> function.
        fake: shapes, dtypes and strides of the results, from fake tensors.
        autograd: (backward, setup_context), as torch.library.register_autograd takes them. Without it, as for the
            operators of a backward, asking for a gradient raises KernelError.
        cast: under autocast, turn fp32 and 16-bit floating tensors into autocast's dtype, as F.linear does. False for
            an operator that runs in backward, where operands keep the dtype that forward gave them.
        promoted: positions of the arguments that autocast leaves alone, those of pointwise arithmetic.

    Returns:
        torch.ops.lrcompile.name.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key, function in implementations.items():
        _LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"lrcompile::{name}", fake, lib=_LIBRARY)
    backward, setup_context = autograd or (_no_second_derivative(name), None)
    torch.library.register_autograd(f"lrcompile::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.lrcompile, name).default
    for device, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
        _LIBRARY.impl(name, _autocast_rule(op, device, cast, promoted), key)
    return op


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def raises(ctx: Any, *gradients: Any) -> Any:
        raise KernelError(
            f"lrcompile::{name} has no derivative; for second derivatives run the model, or the plain products, uncompiled"
        )

    return raises


def _autocast_rule(op: Callable[..., Any], device: str, cast: bool, promoted: tuple[int, ...]) -> Callable[..., Any]:
    # torch.library.register_autocast casts to one dtype fixed beforehand; autocast's is chosen by the caller.
    def rule(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        if cast:
            args = tuple(arg if i in promoted else _cast(arg, device, dtype) for i, arg in enumerate(args))
        # The products inside would be cast once more otherwise.
        with torch.autocast(device, enabled=False):
            return op(*args)

    return rule


def _cast(arg: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_cast(item, device, dtype) for item in arg]
    eligible = isinstance(arg, Tensor) and arg.device.type == device and arg.is_floating_point()
    return arg.to(dtype) if eligible and arg.dtype != torch.float64 else arg
