"""What all kernel families share when they launch: the device, the shipped tiles, the shape of the operands."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from lrcompile import cost
from lrcompile.errors import KernelError


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut up: what one program computes, and the threads it has.

    Attributes:
        block_m, block_n, block_k: rows (tokens), output columns and summed columns at a time; powers of two, >= 16.
        warps: warps of a program.
        stages: depth of the software pipeline of its loads.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3

    @property
    def options(self) -> dict[str, int]:
        """As Triton's launcher takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (TRITON_INTERPRET=1 before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# What operators take. Kernels of ours are for all but fp64; other floating types (float8) have products elsewhere.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def describe(device: torch.device) -> cost.Device | None:
    """The table's entry for a CUDA or ROCm device; None where our Triton kernels don't run."""
    if device.type != "cuda" or not _has_triton():
        return None
    return _describe(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _describe(index: int) -> cost.Device | None:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return cost.find_device(properties.name, arch)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def table(family: str) -> dict[str, list[dict[str, Any]]]:
    """The shipped tiles of a family: kernel -> rows, of which the first that fits is taken.

    A row: {"arch": ["sm_90"], "precision": "half", "up_to": {"rank": 128}, "tile": {"block_m": 128, ...}}. `precision`
    is as the function of this name gives it, and `up_to` the largest sizes that the tile serves.
    """
    text = resources.files(__package__).joinpath("tuning").joinpath(f"{family}.json").read_text("utf-8")
    rows: dict[str, list[dict[str, Any]]] = json.loads(text)
    return rows


@functools.cache
def tuned(family: str, kernel: str, arch: str, precision: str, **sizes: int) -> Tile | None:
    """The shipped tile for these sizes, or None where none is shipped: this kernel is not for them.

    So it is for fp32 products on NVIDIA's cards unless torch allows tf32: without tensor cores the library's are best.
    """
    for row in table(family)[kernel]:
        fits = all(sizes[name] <= limit for name, limit in row["up_to"].items())
        if arch in row["arch"] and row["precision"] == precision and fits:
            return Tile(**row["tile"])
    return None


def padded(size: int) -> int:
    """The power of two that holds `size`, at least 16: what a tile's side may be."""
    return max(16, 1 << (size - 1).bit_length())


def rows(x: Tensor) -> Tensor:
    """x (..., features) as (tokens, features) with unit stride along the features; a view where its strides allow."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    # Offsets inside a tile of at most 256 rows are 32-bit in the kernels.
    return flat if flat.stride(1) == 1 and flat.stride(0) < 1 << 23 else flat.contiguous()


def shaped(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A contiguous result (tokens, features) in its own shape, and not as a view: autograd lets no one write to a view
    that an operator returned."""
    return torch.ops.aten._unsafe_view(y, shape)


def tf32() -> bool:
    """Whether torch lets fp32 products round their inputs to tf32."""
    # This reads right whichever of torch's three switches was used; the two older ones raise after the newest.
    return torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None


def input_precision(dtype: torch.dtype) -> str:
    """As tl.dot takes it: fp32 stays fp32 unless torch allows tf32."""
    return "tf32" if precision(dtype) == "tf32" else "ieee"


def precision(dtype: torch.dtype) -> str:
    """How products of this dtype are computed: "half", "tf32" or "single", as cost.Device.rate takes it."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if tf32() else "single"


# What `force` may name: an operator's implementations.
VARIANTS = {
    "lowrank_linear": ("fused", "narrow", "gemms"),
    "lowrank_linear_backward": ("shared", "gemms"),
    "lowrank_group": ("fused", "joined", "gemms"),
    "lowrank_epilogue": ("fused", "narrow", "gemms"),
    "lowrank_epilogue_backward": ("fused", "gemms"),
    "quant_linear": ("fused", "gemms"),
    "quant_linear_backward": ("fused", "gemms"),
    "quant_lowrank_linear": ("fused", "gemms"),
    "quant_lowrank_linear_backward": ("fused", "gemms"),
}

_forced: dict[str, str] = {}


@contextmanager
def force(**variants: str) -> Iterator[None]:
    """Make ops use one implementation whatever the cost model says: `force(lowrank_linear="gemms")`.

    Global, since autograd runs backward in threads of its own. An implementation that can't take the operands raises
    KernelError when the operator runs; so does a name that VARIANTS lacks, here.
    """
    for op, variant in variants.items():
        if variant not in VARIANTS.get(op, ()):
            told = "; ".join(f"{name}: {', '.join(known)}" for name, known in VARIANTS.items())
            raise KernelError(f"force({op}={variant!r}) names nothing; there are {told}")
    before = dict(_forced)
    _forced.update(variants)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def pick(op: str, x: Tensor, device: cost.Device | None, predict: Callable[[cost.Device], cost.Choice]) -> str:
    """The implementation that an operator runs: the forced one, or the cost model's; "gemms" where ours can't run.

    Args:
        op: name that `force` knows.
        x: an operand; "gemms" serves it where it is empty or fp64.
        device: what describe(x.device) gives.
        predict: the cost model.

    Raises:
        KernelError: our kernel was forced on fp64, or where there is no GPU, or no Triton, to run it.
    """
    variant = _forced.get(op)
    if variant is not None and variant != "gemms" and device is None:
        raise KernelError(f"{op}: the {variant!r} implementation needs Triton and a known GPU, not {x.device}")
    if variant is not None and variant != "gemms" and x.dtype == torch.float64:
        raise KernelError(f"{op}: the {variant!r} implementation is not for {x.dtype}; force 'gemms', or cast")
    if device is None or x.numel() == 0 or x.dtype == torch.float64:
        return "gemms"
    return variant or predict(device).variant


def need(tile: Tile | None, op: str, variant: str) -> Tile:
    """The tile, or the error for an implementation that was forced on what it isn't shipped for."""
    if tile is None:
        raise KernelError(f"{op}: the {variant!r} implementation is not for operands of these sizes and this dtype")
    return tile
