"""Number formats of frozen weights: one adapter a library behind one protocol; nothing heavy is imported here."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from lrcompile.errors import AdoptError, PlanError, RecipeError
from lrcompile.kernels import decode

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Packed = dict[str, Tensor]


class Spec(NamedTuple):
    """What one packed tensor looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Quantised(NamedTuple):
    """A library's own quantised weight, read without touching its numbers.

    Attributes:
        format: the format it is in.
        packed: its tensors, sharing memory with the library's.
        shape: (out_features, in_features) of the matrix.
        dtype: that of the dense weight it was made from.
    """

    format: Format
    packed: Packed
    shape: tuple[int, int]
    dtype: torch.dtype


@runtime_checkable
class Format(Protocol):
    """How a frozen (out_features, in_features) weight is stored."""

    @property
    def name(self) -> str:
        """What `format_of` takes, such as "nf4" or "int4-64"."""
        ...

    @property
    def layout(self) -> str:
        """The layout's name in `lrcompile.kernels.decode`."""
        ...

    @property
    def keys(self) -> tuple[str, ...]:
        """The packed tensors' names, also in a state dict, in the order the kernels take them: the integer codes first."""
        ...

    @property
    def group(self) -> int:
        """Values along in_features that share a scale; 0 for a whole row."""
        ...

    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Spec]:
        """Shapes and dtypes of the packed tensors, from the weight's alone; raises PlanError where it can't hold them."""
        ...

    def pack(self, weight: Tensor) -> Packed:
        """Quantise a weight that `specs` accepts, with the library's own arithmetic."""
        ...

    def export(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Any:
        """The library's own weight (a Parameter or tensor subclass) around these tensors."""
        ...


def quantise(form: Format, weight: Tensor, name: str = "weight") -> Packed:
    """Quantise a dense weight.

    Args:
        form: the format.
        weight: (out_features, in_features) in fp16, bf16 or fp32.
        name: for the error message.

    Returns:
        the packed tensors by key, on the weight's device; on meta they are meta tensors.

    Raises:
        PlanError: the format can't hold this shape or dtype.
        AdoptError: the weight holds NaN or Inf.
        MissingLibraryError: the format's library is not installed.
    """
    if weight.dim() != 2:
        raise PlanError(f"{name} has {weight.dim()} dimensions; quantise its matrices one by one, or leave it dense")
    shape = (weight.shape[0], weight.shape[1])
    specs = form.specs(shape, weight.dtype)
    if weight.is_meta:
        return {key: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for key, spec in specs.items()}
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise AdoptError(f"{name} holds {bad} NaN or Inf; repair the checkpoint, or leave the weight dense")
    with torch.no_grad():
        return form.pack(weight.detach().contiguous())


def dequantise(form: Format, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The dense (out_features, in_features) weight in this dtype, bit-exact with the library's own dequantisation."""
    return decode.reference([packed[key] for key in form.keys], form.layout, form.group, shape[1], dtype)


def bytes_per_weight(form: Format, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Bytes of the packed tensors, scales included, for each entry of the matrix."""
    total = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in form.specs(shape, dtype).values())
    return total / math.prod(shape)


def format_of(name: str) -> Format:
    """The format of this name: its kind, then options after dashes.

    "nf4", "fp4": bitsandbytes, in blocks of 64 unless a block size follows ("nf4-128"); "-nested" quantises the scales
    too. "int8-bnb": bitsandbytes' row-wise. "int8": torchao, a scale for each row, or for each group ("int8-64").
    "int4": torchao, a scale and zero point for each group of 128 unless a size follows ("int4-32").

    Raises:
        RecipeError: no such format.
    """
    from lrcompile.weights.formats import ao, bnb

    kind, *options = name.split("-")
    sizes = [int(option) for option in options if option.isdigit()]
    words = [option for option in options if not option.isdigit()]
    size = sizes[0] if sizes else None
    if len(sizes) <= 1:
        if kind in ("nf4", "fp4") and words in ([], ["nested"]) and size in (None, *bnb.BLOCKS):
            return bnb.FourBit(kind, size or 64, bool(words))
        if kind == "int8" and words == ["bnb"] and not sizes:
            return bnb.RowWise()
        if kind == "int8" and not words and size in (None, *ao.GROUPS):
            return ao.Int8(size)
        if kind == "int4" and not words and size in (None, *ao.GROUPS):
            return ao.Int4(size or 128)
    raise RecipeError(
        f"there is no number format {name!r}; known: nf4 and fp4 (nf4-128, nf4-nested, nf4-128-nested; block sizes "
        f"{', '.join(map(str, bnb.BLOCKS))}), int8-bnb, int8 (int8-64), int4 (int4-32; group sizes "
        f"{', '.join(map(str, ao.GROUPS))})"
    )


def recognise(weight: Tensor) -> Quantised | None:
    """What a library's quantised weight holds; None for any other tensor.

    Args:
        weight: bitsandbytes' Params4bit or Int8Params, torchao's Int4Tensor or Int8Tensor, or anything else.

    Raises:
        PlanError: quantised by one of these libraries in a way that has no format here.
    """
    from lrcompile.weights.formats import ao, bnb

    home = type(weight).__module__.split(".")[0]
    if home == "bitsandbytes":
        return bnb.read(weight)
    return ao.read(weight) if home == "torchao" else None


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise PlanError where weights of this dtype can't be quantised."""
    if dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise PlanError(f"{name} can't hold a weight in {dtype}; convert it to one of {known} first")
