"""What all kernel families share when they launch: the device, the shipped tiles, the shape of the operands."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
from collections.abc import Iterator
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


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(device: torch.device) -> bool:
    """Whether our Triton kernels run on tensors of this device."""
    if not _has_triton():
        return False
    return interpreted() if device.type == "cpu" else device.type == "cuda" and describe(device) is not None


@functools.cache
def _describe(index: int) -> cost.Device | None:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return cost.find_device(properties.name, arch)


def describe(device: torch.device) -> cost.Device | None:
    """The table's entry for a CUDA or ROCm device; None where our kernels don't run."""
    return _describe(torch.cuda.current_device() if device.index is None else device.index)


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


_forced: dict[str, str] = {}


@contextmanager
def force(**variants: str) -> Iterator[None]:
    """Make ops use one implementation whatever the cost model says: `force(lowrank_linear="gemms")`.

    Global, since autograd runs backward in threads of its own. An implementation that can't take the operands raises
    KernelError when the op runs.
    """
    before = dict(_forced)
    _forced.update(variants)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def forced(op: str) -> str | None:
    """The implementation asked for by `force`."""
    return _forced.get(op)


def need(tile: Tile | None, op: str, variant: str, why: str) -> Tile:
    """The tile, or the error for an implementation that was forced on what it can't take."""
    if tile is None:
        raise KernelError(f"{op}: the {variant!r} implementation can't take {why}; force another one, or none")
    return tile
