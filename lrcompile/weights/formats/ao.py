"""torchao: int8 with a scale a row or a group, and int4 with a scale and zero point a group, in its plain layouts."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcompile.errors import MissingLibraryError, PlanError
from lrcompile.weights.formats import Packed, Quantised, Spec, check_dtype

GROUPS = (32, 64, 128, 256)
_INT4_LEAST_SCALE = 1e-6  # what torchao's own int4 weights use


@dataclass(frozen=True)
class Int8:
    """Symmetric int8, the format of Int8WeightOnlyConfig.

    Attributes:
        size: values a group, one of GROUPS; None for a scale a row.
    """

    size: int | None = None
    layout: str = "int8"
    keys: tuple[str, ...] = ("qdata", "scale")

    @property
    def name(self) -> str:
        return "int8" if self.size is None else f"int8-{self.size}"

    @property
    def group(self) -> int:
        return self.size or 0

    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Spec]:
        check_dtype(self.name, dtype)
        groups = _groups(self.name, shape, self.size)
        return {"qdata": Spec(shape, torch.int8), "scale": Spec((shape[0], groups), torch.float32)}

    def pack(self, weight: Tensor) -> Packed:
        quantization = _library("quantization")
        granularity = quantization.PerRow() if self.size is None else quantization.PerGroup(self.size)
        made = quantization.Int8Tensor.from_hp(weight, granularity)
        return {"qdata": made.qdata, "scale": made.scale}

    def export(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Any:
        return _library("quantization").Int8Tensor(
            packed["qdata"],
            packed["scale"],
            [1, self.size or shape[1]],
            dtype,
            zero_point=torch.zeros_like(packed["scale"], dtype=torch.int8),
        )


@dataclass(frozen=True)
class Int4:
    """int4 with a floating zero point a group, in Int4Tensor's layout, the plain one of Int4WeightOnlyConfig.

    Scales and codes are chosen by torchao's tinygemm primitives, as for its tile-packed and CPU weights. For the plain
    layout torchao itself needs the mslk library, on a GPU, which rounds a little differently; what it made is read as is.

    Attributes:
        size: values a group, one of GROUPS.
    """

    size: int = 128
    layout: str = "int4"
    keys: tuple[str, ...] = ("qdata", "scale", "zero_point")

    @property
    def name(self) -> str:
        return "int4" if self.size == 128 else f"int4-{self.size}"

    @property
    def group(self) -> int:
        return self.size

    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Spec]:
        check_dtype(self.name, dtype)
        grid = (_groups(self.name, shape, self.size), shape[0])
        codes = Spec((shape[0], shape[1] // 2), torch.int8)
        return {"qdata": codes, "scale": Spec(grid, dtype), "zero_point": Spec(grid, dtype)}

    def pack(self, weight: Tensor) -> Packed:
        primitives = _library("quantization.quant_primitives")
        block, bounds = [1, self.size], (0, 15)
        scale, zero = primitives._choose_qparams_affine_tinygemm(
            weight,
            primitives.MappingType.ASYMMETRIC,
            block,
            torch.int32,
            *bounds,
            _INT4_LEAST_SCALE,
            None,
            weight.dtype,
        )
        codes = primitives._quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, *bounds) - 8
        return {
            "qdata": ((codes[:, ::2] & 15) | (codes[:, 1::2] << 4)).to(torch.int8),
            "scale": scale.view(len(weight), -1).t().contiguous(),
            "zero_point": zero.view(len(weight), -1).t().contiguous(),
        }

    def export(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Any:
        return _library("quantization").Int4Tensor(
            packed["qdata"], packed["scale"], packed["zero_point"], [1, self.size], torch.Size(shape)
        )


def read(weight: Any) -> Quantised | None:
    """An Int8Tensor or Int4Tensor as it stands; None for torchao's other tensors that are no quantised weight."""
    quantization = _library("quantization")
    form: Int8 | Int4
    if isinstance(weight, quantization.Int8Tensor):
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        zero = weight.zero_point
        if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None or (zero is not None and zero.any()):
            raise PlanError(
                "this Int8Tensor quantises activations too, or has zero points; only weight-only int8 is known"
            )
        rows, size = weight.block_size
        if rows != 1 or (size != shape[1] and size not in GROUPS):
            raise PlanError(f"this Int8Tensor has blocks of {rows} x {size}; known are rows, and groups of {GROUPS}")
        form = Int8(None if size == shape[1] else size)
        return Quantised(form, {"qdata": weight.qdata, "scale": weight.scale}, shape, weight.dtype)
    if isinstance(weight, quantization.Int4Tensor):
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        if weight.act_pre_scale is not None or weight.block_size[-1] not in GROUPS or weight.dim() != 2:
            raise PlanError(
                f"this Int4Tensor scales its inputs, is no matrix, or has groups of {weight.block_size[-1]}; known are "
                f"matrices in groups of {GROUPS}"
            )
        form = Int4(weight.block_size[-1])
        packed = {"qdata": weight.qdata, "scale": weight.scale, "zero_point": weight.zero_point}
        return Quantised(form, packed, shape, weight.dtype)
    raise PlanError(
        f"a weight is torchao's {type(weight).__name__}, which has no format here; quantise it with Int8WeightOnlyConfig "
        "or Int4WeightOnlyConfig in the plain packing format"
    )


def _groups(name: str, shape: tuple[int, int], size: int | None) -> int:
    if 0 in shape:
        raise PlanError(f"{name} can't hold an empty weight of shape {shape}; leave it dense with exclude")
    if size is None:
        if shape[1] == 1:  # where a row is one value, torchao takes the scales' two dimensions for one
            raise PlanError(f"{name} can't hold a weight of one column, {shape}; leave it dense with exclude")
        return 1
    if shape[1] % size:
        fitting = [group for group in GROUPS if shape[1] % group == 0]
        kind = name.split("-")[0]
        fix = f"choose {kind}-{fitting[-1]}" if fitting else "leave it dense with exclude, or choose int8"
        raise PlanError(f"{name} has groups of {size}, which don't divide the {shape[1]} in_features of {shape}; {fix}")
    return shape[1] // size


def _library(module: str) -> Any:
    try:
        return importlib.import_module(f"torchao.{module}")
    except ImportError as error:
        raise MissingLibraryError("the int8 and int4 formats need torchao: pip install 'lrcompile[quant]'") from error
