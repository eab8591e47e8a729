"""Number formats: packed data and decoded values are the libraries' own, bit for bit."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from lrcompile.errors import AdoptError, MissingLibraryError, PlanError, RecipeError
from lrcompile.weights import formats
from lrcompile.weights.formats import bytes_per_weight, dequantise, format_of, quantise, recognise

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ["nf4", "nf4-128", "nf4-nested", "fp4", "fp4-32-nested", "int8-bnb", "int8", "int8-64", "int4", "int4-32"]


def weight_of(out: int, inner: int, dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
    """Gaussian rows of very different sizes, one of them zero."""
    rows = torch.logspace(-3, 1, out).unsqueeze(1) * spread
    rows[out // 2] = 0
    return (torch.randn(out, inner) * rows).to(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype and one.shape == other.shape
    assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("block", "shape"), [(64, (48, 128)), (32, (17, 96)), (512, (20, 128)), (64, (7, 50))])
def test_four_bits_are_bitsandbytes_own(kind, nested, block, shape, dtype):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = weight_of(*shape, dtype)
    form = format_of(f"{kind}-{block}" + ("-nested" if nested else ""))
    packed = quantise(form, weight)
    codes, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
    same(packed["weight"], codes)
    same(packed["absmax"], state.absmax)
    if nested:
        same(packed["nested_absmax"], state.state2.absmax)
    dense = dequantise(form, packed, shape, dtype)
    if block > shape[1]:  # bitsandbytes 0.50 on AVX-512 mixes up blocks that span rows, but not those of one long row
        state.shape = torch.Size((1, weight.numel()))
    assert dense.dtype == dtype  # equal, not the same bits: bitsandbytes' own kernels differ in the sign of FP4's zero
    assert torch.equal(dense, functional.dequantize_4bit(codes, state).view(shape))
    if block > shape[1]:
        return
    # And back: their function reads what we export, and what they hold reads as ours.
    theirs = form.export(packed, shape, dtype)
    assert torch.equal(functional.dequantize_4bit(theirs.data, theirs.quant_state), dense)
    seen = recognise(theirs)
    assert seen.format == form and seen.shape == shape and seen.dtype == dtype
    assert all(seen.packed[key] is packed[key] or torch.equal(seen.packed[key], packed[key]) for key in form.keys)


@pytest.mark.parametrize("nested", [False, True])
def test_a_linear4bit_is_adopted_and_exported(nested):
    bnb = pytest.importorskip("bitsandbytes")
    dense = nn.Linear(128, 64, bias=False)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compress_statistics=nested, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    assert recognise(layer.weight) is None, "not quantised yet"
    layer = layer.to("cpu")
    seen = recognise(layer.weight)
    assert seen.packed["weight"].data_ptr() == layer.weight.data_ptr(), "adopted as it is"
    ours = quantise(seen.format, dense.weight)
    for key in seen.format.keys:
        same(seen.packed[key], ours[key])
    # The state dict of a layer that holds our export is the original's, tensor for tensor.
    other = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    other.weight = seen.format.export(ours, seen.shape, seen.dtype)
    expected, state = layer.state_dict(), other.state_dict()
    assert expected.keys() == state.keys()
    for key in expected:
        same(state[key].data, expected[key].data)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_bytes_stored_as_another_dtype_are_read_as_bytes(storage):
    bnb = pytest.importorskip("bitsandbytes")
    weight = weight_of(8, 64, torch.float32)
    stored = bnb.nn.Params4bit(weight, quant_type="nf4", quant_storage=storage, compress_statistics=False).to("cpu")
    seen = recognise(stored)
    assert stored.dtype == storage and seen.packed["weight"].data_ptr() == stored.data_ptr()
    same(seen.packed["weight"], quantise(format_of("nf4"), weight)["weight"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows_are_bitsandbytes_own(dtype):
    bnb = pytest.importorskip("bitsandbytes")
    weight = weight_of(24, 100, dtype)
    form = format_of("int8-bnb")
    packed = quantise(form, weight)
    layer = bnb.nn.Linear8bitLt(100, 24, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")
    same(packed["weight"], layer.weight.data)
    same(packed["SCB"], layer.weight.SCB)
    same(
        dequantise(form, packed, (24, 100), torch.float32),
        bnb.functional.int8_vectorwise_dequant(packed["weight"], packed["SCB"]),
    )
    seen = recognise(form.export(packed, (24, 100), dtype))
    assert seen.format == form and seen.packed["weight"].data_ptr() == packed["weight"].data_ptr()
    assert recognise(layer.weight).packed["SCB"] is layer.weight.SCB


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [None, 32, 64])
def test_int8_is_torchaos_own(dtype, size):
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(128, 40, bias=False, dtype=dtype)
    layer.weight.data = weight_of(40, 128, dtype)
    form = format_of("int8" if size is None else f"int8-{size}")
    packed = quantise(form, layer.weight)
    granularity = quantization.PerRow() if size is None else quantization.PerGroup(size)
    config = quantization.Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    quantization.quantize_(layer, config)
    same(packed["qdata"], layer.weight.qdata)
    same(packed["scale"], layer.weight.scale)
    dense = dequantise(form, packed, (40, 128), dtype)
    same(dense, layer.weight.dequantize())
    theirs = form.export(packed, (40, 128), dtype)
    same(theirs.dequantize(), dense)
    x = torch.randn(3, 128, dtype=dtype)
    same(nn.functional.linear(x, theirs), layer(x).detach())
    for seen in (recognise(layer.weight), recognise(theirs)):
        assert seen.format == form and seen.dtype == dtype
    assert recognise(layer.weight.data).packed["qdata"].data_ptr() == layer.weight.qdata.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 128])
def test_int4_is_torchaos_own(dtype, size):
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm

    weight = weight_of(32, 256, dtype)
    form = format_of(f"int4-{size}")
    packed = quantise(form, weight)
    # torchao's weight for the CPU holds the same numbers, shuffled for its product.
    theirs = Int4OpaqueTensor.from_hp(weight, [1, size])
    same(torch.stack((packed["scale"], packed["zero_point"]), dim=-1), theirs.scale_and_zero)
    codes = torch.stack(((packed["qdata"] << 4) >> 4, packed["qdata"] >> 4), dim=-1).flatten(1).int() + 8
    same(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), theirs.qdata)
    scale, zero = (packed[key].t().contiguous() for key in ("scale", "zero_point"))
    dense = dequantise(form, packed, (32, 256), dtype)
    same(dense, _dequantize_affine_tinygemm(codes, [1, size], scale, zero, torch.int32, 0, 15, output_dtype=dtype))
    plain = form.export(packed, (32, 256), dtype)
    assert isinstance(plain, quantization.Int4Tensor)
    seen = recognise(nn.Parameter(plain, requires_grad=False))
    assert seen.format == form and seen.shape == (32, 256) and seen.dtype == dtype
    for key in form.keys:
        same(seen.packed[key], packed[key])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_specs_say_what_quantise_makes(name, dtype):
    form = format_of(name)
    assert form.name == name and format_of(form.name) == form
    weight = weight_of(30, 256, dtype)
    packed = quantise(form, weight)
    specs = form.specs((30, 256), dtype)
    assert list(specs) == list(form.keys) == list(packed)
    for key, tensor in packed.items():
        assert specs[key] == (tuple(tensor.shape), tensor.dtype)
        assert tensor.is_contiguous() and not tensor.requires_grad
    assert packed[form.keys[0]].dtype in (torch.uint8, torch.int8)
    size = sum(t.numel() * t.element_size() for t in packed.values())
    assert bytes_per_weight(form, (30, 256), dtype) == size / weight.numel()
    meta = quantise(form, weight.to("meta"))
    assert all(t.is_meta and specs[key] == (tuple(t.shape), t.dtype) for key, t in meta.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e3])
def test_rounding_stays_within_the_format(name, spread):
    """A value is off by at most its format's widest half step, relative to the largest of its row."""
    weight = weight_of(30, 256, torch.float32, spread)
    form = format_of(name)
    error = (dequantise(form, quantise(form, weight), (30, 256), torch.float32) - weight).abs()
    half_step = {"nf4": 0.16, "fp4": 0.17, "int4": 1 / 14, "int8": 1 / 254}[name.split("-")[0]]
    half_step += 2**-11 if name == "int8-bnb" else 0  # its weights pass through fp16
    largest = weight.abs().amax(dim=1, keepdim=True)
    floor = 1e-6 if name.startswith("int") else 0.02 * weight.abs().max() if "nested" in name else 0.0
    assert (error <= half_step * largest * 1.01 + floor).all()


def test_what_a_format_cannot_hold_is_refused():
    with pytest.raises(PlanError, match="in_features must be even"):
        quantise(format_of("nf4"), torch.randn(4, 7))
    with pytest.raises(PlanError, match="choose int4-64"):
        quantise(format_of("int4"), torch.randn(4, 192))
    with pytest.raises(PlanError, match="leave it dense"):
        quantise(format_of("int8-32"), torch.randn(4, 40))
    with pytest.raises(PlanError, match="empty weight"):
        quantise(format_of("int8"), torch.randn(0, 40))
    with pytest.raises(PlanError, match="one by one"):
        quantise(format_of("int8"), torch.randn(2, 4, 40))
    for name in NAMES:
        with pytest.raises(PlanError, match="float64"):
            quantise(format_of(name), torch.randn(4, 256, dtype=torch.float64))
        for bad in (float("nan"), float("inf")):
            weight = torch.randn(4, 256)
            weight[1, 5] = bad
            with pytest.raises(AdoptError, match="up_proj holds 1 NaN or Inf"):
                quantise(format_of(name), weight, "up_proj")
    with pytest.raises(AdoptError, match="overflows"):
        quantise(format_of("int8-bnb"), torch.full((4, 8), 1e5))


@pytest.mark.parametrize(
    "name", ["nf3", "nf4-65", "nf4-64-64", "int8-bnb-64", "int4-nested", "int4-7", "nested", "", "nf4-"]
)
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(RecipeError, match="known: nf4 and fp4"):
        format_of(name)


def test_libraries_quantised_otherwise_are_refused_by_name():
    quantization = pytest.importorskip("torchao.quantization")
    tensor = quantization.Int8Tensor.from_hp(torch.randn(8, 64), quantization.PerTensor())
    with pytest.raises(PlanError, match="blocks of 8 x 64"):
        recognise(tensor)
    layer = nn.Sequential(nn.Linear(64, 8))
    quantization.quantize_(layer, quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4))
    with pytest.raises(PlanError, match="IntxUnpackedToInt8Tensor"):
        recognise(layer[0].weight)
    bnb = pytest.importorskip("bitsandbytes")
    repacked = bnb.nn.Params4bit(torch.randn(8, 64), quant_type="nf4").to("cpu")
    repacked.quant_state.packing_format_for_cpu = True
    with pytest.raises(PlanError, match="before its first forward"):
        recognise(repacked)
    assert recognise(torch.randn(3, 3)) is None


def test_a_missing_library_names_the_extra(monkeypatch):
    for name in ("bitsandbytes", "torchao", "torchao.quantization", "torchao.quantization.quant_primitives"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in NAMES:
        with pytest.raises(MissingLibraryError, match=r"pip install 'lrcompile\[quant\]'"):
            quantise(format_of(name), torch.randn(8, 256))


def test_a_packed_weight_is_read_without_its_library():
    """Deciding, and reading what was packed, need neither library; nor does importing the formats load them."""
    code = """
import sys, torch
from lrcompile.weights.formats import dequantise, format_of, quantise
form = format_of("nf4")
packed = {"weight": torch.randint(0, 256, (64, 1), dtype=torch.uint8), "absmax": torch.ones(2)}
dense = dequantise(form, packed, (2, 64), torch.bfloat16)
quantise(form, torch.empty(2, 64, device="meta"))
print(tuple(dense.shape), [name for name in ("bitsandbytes", "torchao") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 64) []"
    assert formats.DTYPES == (torch.float16, torch.bfloat16, torch.float32)
