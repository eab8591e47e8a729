"""Models that bitsandbytes or torchao have quantised: taken as they are, bit for bit, and given back.

While such a model is captured, its quantised linears stand as plain ones (`as_dense`): what the libraries' own modules put
into a graph differs from one to the next. Adopting then puts their packed tensors, unchanged, where they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from lrcompile.errors import AdoptError
from lrcompile.weights.formats import Quantised, dequantise, recognise
from lrcompile.weights.layers import AdoptedModule, remove

M = TypeVar("M", bound=nn.Module)
_STAND_IN = "lr_quantised"
# What bitsandbytes' modules have beside nn.Linear's attributes.
_EXTRAS = (
    "compute_dtype",
    "compute_type_is_set",
    "quant_state",
    "quant_storage",
    "support_avx512bf16_for_cpu",
    "state",
)


def held(weight: torch.Tensor) -> Quantised | None:
    """What a library's quantised weight, or what stands for it, holds; None for any other tensor.

    Raises:
        PlanError: quantised in a way that has no format here.
    """
    known: Quantised | None = getattr(weight, _STAND_IN, None)
    return known if known is not None else recognise(weight)


@contextmanager
def as_dense(model: nn.Module, *, numbers: bool) -> Iterator[None]:
    """Let every quantised weight of a library stand as a dense, frozen one, and its module as an nn.Linear.

    Args:
        model: as it was before, afterwards.
        numbers: the dense weights have their values, at the cost of their memory; else they are zeros of no memory.

    Raises:
        PlanError: a weight quantised in a way that has no format here.
    """
    before: list[tuple[nn.Module, type[nn.Module], str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}
    floats = (p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point())
    usual = next(floats, torch.get_default_dtype())
    try:
        for module in model.modules():
            for name, p in module._parameters.items():
                quantised = recognise(p) if p is not None else None
                if p is None or quantised is None:
                    continue
                if id(p) not in made:
                    if quantised.format.layout == "int8_row":  # bitsandbytes' computes in what comes in
                        quantised = quantised._replace(dtype=usual)
                    made[id(p)] = _dense(quantised, numbers)
                before.append((module, type(module), name, p))
        for module, _, name, p in before:
            module._parameters[name] = made[id(p)]
            if _of_bitsandbytes(module):
                object.__setattr__(module, "__class__", nn.Linear)
        yield
    finally:
        for module, kind, name, p in before:
            object.__setattr__(module, "__class__", kind)
            module._parameters[name] = p


def _dense(quantised: Quantised, numbers: bool) -> nn.Parameter:
    form, packed, shape, dtype = quantised
    with torch.no_grad():
        device = packed[form.keys[0]].device
        values = (
            dequantise(form, packed, shape, dtype)
            if numbers
            else torch.zeros((), dtype=dtype, device=device).expand(shape)
        )
    parameter = nn.Parameter(values, requires_grad=False)
    setattr(parameter, _STAND_IN, quantised)
    return parameter


def _of_bitsandbytes(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == "bitsandbytes"


def to_plain_linear(module: nn.Module) -> None:
    """Make a bitsandbytes module the nn.Linear that it is derived from, before its weight is adopted."""
    if _of_bitsandbytes(module):
        object.__setattr__(module, "__class__", nn.Linear)
        for name in _EXTRAS:
            module.__dict__.pop(name, None)


def export_quantised(model: M) -> M:
    """Give every adopted linear with a quantised base and no pair back to the library of its format, in place.

    nf4, fp4 and int8-bnb become bitsandbytes' Linear4bit and Linear8bitLt, int4 and int8 stay nn.Linear with torchao's
    tensors. The packed data are the same, bit for bit.

    Raises:
        AdoptError: there is none, a pair beside a base, or a quantised weight outside a Linear (each named, with the fix).
        MissingLibraryError: the format's library is not installed.
    """
    wanted: list[tuple[str, AdoptedModule]] = []
    for name, module in model.named_modules():
        if not isinstance(module, AdoptedModule):
            continue
        for weight, form in module.lr_forms:
            full = f"{name}.{weight}" if name else weight
            if form.base in (None, "dense") or form.rank is not None:
                raise AdoptError(
                    f"{full} is {form}, which no library holds: lrcompile.merge(model, weights='nf4') gives bases alone"
                )
            if module.lr_base is not nn.Linear or weight != "weight" or not name:
                raise AdoptError(
                    f"{full} is not the weight of an nn.Linear inside the model; the libraries have only those"
                )
        wanted.append((name, module))
    if not wanted:
        raise AdoptError("nothing of the model is adopted; there is no quantised weight to export")
    made: dict[int, nn.Module] = {}
    for name, module in wanted:
        made.setdefault(id(module), _library_module(module))
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, made[id(module)])
    return model


def _library_module(adopted: Any) -> nn.Module:
    form = dict(adopted.lr_forms)["weight"]
    number_format = form.format_of("base")
    packed = dict(zip(number_format.keys, form.packed("base", adopted.lr_parts("weight")), strict=True))
    dtype = adopted.lr_dtypes["weight"]
    shape = (form.out_features, form.in_features)
    weight = number_format.export({k: t.detach() for k, t in packed.items()}, shape, dtype)
    if type(weight).__module__.split(".")[0] == "bitsandbytes":
        module = number_format.module(shape[1], shape[0], adopted.bias is not None, weight, dtype)
        module.bias = adopted.bias
        module.train(adopted.training)
        return module
    remove(adopted, {"weight": nn.Parameter(weight, requires_grad=False)})
    return adopted
