"""How a kernel family becomes a torch operator: one call registers its implementations, autograd and autocast rules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from lrcompile.errors import KernelError

_INSTEAD = (
    """call the plain products instead (`reference` beside the operator; options={"kernels": "inductor"} compiled)"""
)


class _Library(torch.library.Library):
    """Puts a check before each autograd rule, since torch's own takes what it can't differentiate for a constant."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        if dispatch_key == "Autograd":
            fn = _refuse_what_has_no_rule(f"lrcompile::{op_name}", fn)
        super().impl(op_name, fn, dispatch_key, **options)


_LIBRARY = _Library("lrcompile", "FRAGMENT")


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
        torch.ops.lrcompile.name. Derivatives are reverse-mode's, of first order: forward mode (torch.func.jvp), the
        transforms of torch.func and second derivatives raise KernelError. torch.vmap calls it once for each slice.
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
    torch.library.register_vmap(f"lrcompile::{name}", _slice_by_slice(op), lib=_LIBRARY)
    return op


def _refuse_what_has_no_rule(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    def checked(keyset: Any, *args: Any) -> Any:
        tensors = list(_tensors(args))
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise KernelError(f"{name} has no forward-mode derivative (jvp, jacfwd, hessian); {_INSTEAD}")
        # torch lets no autograd rule of a library through its transforms, and says so in words about other things.
        transformed = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
        if transformed and any(t.requires_grad for t in tensors):
            raise KernelError(
                f"{name} has no rule for torch.func (grad, vjp, jacrev); use torch.autograd, or {_INSTEAD}"
            )
        return rule(keyset, *args)

    return checked


def _tensors(args: Any) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def _slice_by_slice(op: Any) -> Callable[..., Any]:
    # torch's own fallback does the same, but takes no lists of tensors.
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise KernelError(f"{op.name()}: torch.vmap over a dimension of size 0; leave the call out")
        warnings.warn(
            f"torch.vmap runs {op.name()} once for each of {info.batch_size} slices; a batch of x alone is faster as a "
            "leading dimension of x",
            stacklevel=2,
        )
        results = [
            op(*(tree_map(lambda t, dim, i=i: t if dim is None else t.select(dim, i), arg, dims)
                 for arg, dims in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]  # fmt: skip
        return tree_map(lambda *each: torch.stack(each), *results), tree_map(lambda _: 0, results[0])

    return rule


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def raises(ctx: Any, *gradients: Any) -> Any:
        raise KernelError(
            f"lrcompile::{name} has no derivative of its own; for second derivatives {_INSTEAD}, or lrcompile.merge(model) where "
            "a base is quantised"
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
