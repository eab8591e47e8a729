"""What a checkpoint's files hold: which tensors fit, how they are spread over the files, and whether others can be filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lrcompile.errors import TrainError

# DCP builds a whole file in memory, twice; several files a rank bound that.
FILE_BYTES = 256 << 20

# Shape, dtype, and bytes on a rank.
Entry = tuple[tuple[int, ...], str, int]


class CopiesPlanner(DefaultSavePlanner):
    """DCP's plan of the tensors, with the copies written in their place; what has none is copied as it is written."""

    def __init__(self, copies: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        if index.fqn in self.copies:
            return self.copies[index.fqn]
        return local_part(self.state_dict[index.fqn]).to("cpu", copy=True).contiguous()


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def unfit(name: Any, tensor: Any) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"{name} is no tensor but {type(tensor).__name__}; tell it in `told`"
    if tensor.is_meta:
        return f"{name} is on the meta device; give it values first"
    local = local_part(tensor)
    if is_traceable_wrapper_subclass(local) or local.layout != torch.strided or local.is_quantized:
        return f"{name} is a {type(local).__name__} that safetensors can't hold; give the plain tensors it is made of"
    return None


def spread(parts: list[dict[str, Entry]], doing: str) -> dict[str, int]:
    """The number of the file that each tensor goes to, on whichever ranks; files of at most FILE_BYTES, or one tensor.

    Raises:
        TrainError: ranks mean different things by one name.
    """
    entries: dict[str, Entry] = {}
    for rank, part in enumerate(parts):
        for name, (shape, dtype, size) in part.items():
            known = entries.setdefault(name, (shape, dtype, 0))
            if known[:2] != (shape, dtype):
                raise TrainError(
                    f"{doing}: {name} is {dtype} {shape} on rank {rank} and {known[1]} {known[0]} on another; "
                    f"what is of one rank alone needs a name of its own"
                )
            entries[name] = (shape, dtype, max(size, known[2]))
    files, number, filled = {}, 1, 0
    for name, (_, _, size) in entries.items():
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        files[name], filled = number, filled + size
    return files


def mismatches(folder: Path, tensors: dict[str, Tensor], held: set[str]) -> list[str]:
    """What keeps these tensors from being filled from a checkpoint; the names that it holds are added to `held`."""
    # All of tensors: safetensors hold nothing else.
    saved: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    held |= set(saved)
    problems = []
    for name, tensor in tensors.items():
        problem = unfit(name, tensor)
        if problem is not None:
            problems.append(problem)
        elif name not in saved:
            problems.append(f"it holds no {name!r}")
        elif (shape := tuple(saved[name].size)) != tuple(tensor.shape):
            problems.append(f"{name!r} is {shape} there, and {tuple(tensor.shape)} here")
        elif (dtype := saved[name].properties.dtype) != tensor.dtype:
            problems.append(f"{name!r} is {dtype} there, and {tensor.dtype} here")
        elif sum(chunk.sizes.numel() for chunk in saved[name].chunks) != tensor.numel():
            problems.append(f"parts of {name!r} are missing there")
    return problems
