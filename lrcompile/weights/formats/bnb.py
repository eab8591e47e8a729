"""bitsandbytes: NF4 and FP4 (2305.14314) in blocks, scales nested or not, and row-wise int8 (2208.07339)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcompile.errors import AdoptError, MissingLibraryError, PlanError
from lrcompile.kernels.decode import NESTED_GROUP
from lrcompile.weights.formats import Packed, Quantised, Spec, check_dtype

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class FourBit:
    """NF4 or FP4: blocks of the flattened matrix share their largest magnitude as the scale.

    Attributes:
        kind: "nf4" or "fp4".
        block: values a block, one of BLOCKS.
        nested: whether the scales are quantised too, to 8 bits.
    """

    kind: str
    block: int
    nested: bool

    @property
    def name(self) -> str:
        return self.kind + (f"-{self.block}" if self.block != 64 else "") + ("-nested" if self.nested else "")

    @property
    def layout(self) -> str:
        return self.kind

    @property
    def keys(self) -> tuple[str, ...]:
        more = ("nested_absmax", "nested_quant_map", "nested_offset") if self.nested else ()
        return ("weight", "absmax", *more)

    @property
    def group(self) -> int:
        return self.block

    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Spec]:
        check_dtype(self.name, dtype)
        entries = shape[0] * shape[1]
        if shape[1] % 2 or not entries:
            raise PlanError(
                f"{self.name} packs two neighbours of a row into a byte and can't hold a weight of shape {shape}: "
                "in_features must be even; leave it dense with exclude, or choose int8"
            )
        blocks = -(-entries // self.block)
        specs = {"weight": Spec((entries // 2, 1), torch.uint8)}
        if not self.nested:
            return specs | {"absmax": Spec((blocks,), torch.float32)}
        return specs | {
            "absmax": Spec((blocks,), torch.uint8),
            "nested_absmax": Spec((-(-blocks // NESTED_GROUP),), torch.float32),
            "nested_quant_map": Spec((256,), torch.float32),
            "nested_offset": Spec((), torch.float32),
        }

    def pack(self, weight: Tensor) -> Packed:
        codes, state = _library().functional.quantize_4bit(
            weight, blocksize=self.block, compress_statistics=self.nested, quant_type=self.kind
        )
        return _read_state(codes, state)

    def export(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Any:
        bnb = _library()
        state_of = bnb.functional.QuantState
        inner = offset = None
        if self.nested:
            inner = state_of(
                absmax=packed["nested_absmax"],
                code=packed["nested_quant_map"],
                blocksize=NESTED_GROUP,
                dtype=torch.float32,
            )
            offset = packed["nested_offset"]
        state = state_of(
            absmax=packed["absmax"],
            shape=torch.Size(shape),
            code=bnb.functional.get_4bit_type(self.kind, device=packed["weight"].device),
            blocksize=self.block,
            quant_type=self.kind,
            dtype=dtype,
            offset=offset,
            state2=inner,
        )
        return bnb.nn.Params4bit(
            packed["weight"],
            quant_state=state,
            blocksize=self.block,
            compress_statistics=self.nested,
            quant_type=self.kind,
            bnb_quantized=True,
        )

    def module(self, in_features: int, out_features: int, bias: bool, weight: Any, dtype: torch.dtype) -> Any:
        """A Linear4bit around an exported weight; the caller gives it its bias."""
        with torch.device("meta"):
            made = _library().nn.Linear4bit(
                in_features, out_features, bias, dtype, self.nested, self.kind, weight.quant_storage
            )
        made.weight = weight
        weight.module = made
        made.quant_state = weight.quant_state
        return made


@dataclass(frozen=True)
class RowWise:
    """int8, each row scaled by its largest magnitude; the weight goes through fp16 first, as bitsandbytes has it."""

    name: str = "int8-bnb"
    layout: str = "int8_row"
    group: int = 0
    keys: tuple[str, ...] = ("weight", "SCB")

    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Spec]:
        check_dtype(self.name, dtype)
        return {"weight": Spec(shape, torch.int8), "SCB": Spec((shape[0],), torch.float32)}

    def pack(self, weight: Tensor) -> Packed:
        half = weight.half()
        if not torch.isfinite(half).all():
            raise AdoptError(
                f"{self.name} rounds weights to fp16 first, and one of {float(weight.abs().max()):.3g} overflows it; "
                "choose int8"
            )
        codes, scale, _ = _library().functional.int8_vectorwise_quant(half)
        codes = codes.masked_fill(scale[:, None] == 0, 0)  # a row of zeros was divided by zero
        return {"weight": codes, "SCB": scale}

    def export(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Any:
        codes = packed["weight"]
        return _library().nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=packed["SCB"])

    def module(self, in_features: int, out_features: int, bias: bool, weight: Any, dtype: torch.dtype) -> Any:
        """A Linear8bitLt around an exported weight; the caller gives it its bias."""
        with torch.device("meta"):
            made = _library().nn.Linear8bitLt(in_features, out_features, bias, has_fp16_weights=False)
        made.weight = weight
        return made


def read(weight: Any) -> Quantised | None:
    """A Params4bit or Int8Params as it stands; None for one that isn't quantised yet."""
    bnb = _library()
    if isinstance(weight, bnb.nn.Params4bit):
        state, codes = weight.quant_state, weight.data
        if state is None:
            return None
        if getattr(state, "packing_format_for_cpu", False):
            raise PlanError(
                "bitsandbytes has repacked this Params4bit for the CPU it ran on and rounded its scales; "
                "load the model anew and take it before its first forward"
            )
        codes = codes.view(torch.uint8)  # whatever it is stored as: FSDP users choose a float
        form = FourBit(state.quant_type, state.blocksize, state.nested)
        shape = (int(state.shape[0]), int(state.shape[1]))
        form.specs(shape, state.dtype)
        return Quantised(form, _read_state(codes, state), shape, state.dtype)
    if isinstance(weight, bnb.nn.Int8Params) and weight.dtype == torch.int8:
        scale = weight.SCB
        if scale is None:
            raise PlanError(
                "this Int8Params has handed its scales to its module; read the model before its first forward"
            )
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        return Quantised(RowWise(), {"weight": weight.data, "SCB": scale}, shape, torch.float16)
    return None


def _read_state(codes: Tensor, state: Any) -> Packed:
    packed = {"weight": codes.view(-1, 1), "absmax": state.absmax}
    if state.nested:
        packed |= {
            "nested_absmax": state.state2.absmax,
            "nested_quant_map": state.state2.code,
            "nested_offset": state.offset,
        }
    return packed


def _library() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingLibraryError(
            "the nf4, fp4 and int8-bnb formats need bitsandbytes: pip install 'lrcompile[quant]'"
        ) from error
    return bitsandbytes
