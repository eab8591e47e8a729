"""What the kernel bench sets side by side: for each case, ours, what Inductor does, and other libraries' own kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lrcompile.cost import Device
from lrcompile.kernels import lowrank_epilogue as epilogue
from lrcompile.kernels import lowrank_group as group
from lrcompile.kernels import lowrank_linear as pair
from lrcompile.kernels import quant_linear as quant
from lrcompile.kernels import quant_lowrank_linear as both
from lrcompile.weights.formats import format_of, quantise

# (in_features, out_features) of the block matrices that differ, the widest first.
LAYERS = {
    "gpt2-1.5b": [(1600, 6400), (6400, 1600), (1600, 4800), (1600, 1600)],
    "llama-3-8b": [(4096, 14336), (14336, 4096), (4096, 4096), (4096, 1024)],
    "qwen3-0.6b": [(1024, 3072), (3072, 1024), (1024, 2048), (2048, 1024), (1024, 1024)],
}
TOKENS = (16384, 1, 4096, 256, 16)
RANKS = (64, 128, 256, None)  # None: a quarter of min(in, out)
GROUPED = 3  # pairs over one input: q, k, v
FORMATS = ("nf4", "int4", "int8")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """Where contenders meet.

    Attributes:
        family: the kernel family.
        model: whose layer it is.
        tokens, in_features, out_features: of the product.
        rank: of the pair; 0 without one.
        form: number format of the weight; "" for a pair alone.
    """

    family: str
    model: str
    tokens: int
    in_features: int
    out_features: int
    rank: int = 0
    form: str = ""

    def work(self, backward: bool) -> tuple[float, float]:
        """FLOPs, and bytes that have to move: operands, results, and gradients of x and the pair once each."""
        m, k, n, r, size = self.tokens, self.in_features, self.out_features, self.rank, DTYPE.itemsize
        if self.family == "lowrank_group":  # x is read, and its gradient written, once
            each, read = (
                Case("lowrank_linear", self.model, m, k, n, r).work(backward),
                size * m * k * (3 if backward else 1),
            )
            return GROUPED * each[0], GROUPED * (each[1] - read) + read
        stored = {"nf4": 0.5 + 4 / 64, "int4": 0.5 + 4 / 128, "int8": 1.0}.get(self.form, 0.0) * k * n
        flops, moved = (
            2.0 * m * (r * (k + n) + (k * n if self.form else 0)),
            size * (m * (k + n) + r * (k + n)) + stored,
        )
        if not backward:
            return flops, moved
        of_pair = 4.0 * m * r * (k + n)  # two products for each of the forward's two
        return flops + of_pair + (2.0 * m * k * n if self.form else 0.0), moved + size * (
            m * (2 * k + n) + 2 * r * (k + n)
        ) + stored


def cases() -> Iterator[Case]:
    """All of them, in an order that a run cut short has seen something of each family and size."""
    for i in range(max(map(len, LAYERS.values()))):
        for tokens in TOKENS:
            for model, layers in LAYERS.items():
                if i >= len(layers):
                    continue
                k, n = layers[i]
                for rank in dict.fromkeys(rank or min(k, n) // 4 for rank in RANKS):
                    yield Case("lowrank_linear", model, tokens, k, n, rank)
                yield Case("lowrank_group", model, tokens, k, n, 128)
                yield Case("lowrank_epilogue", model, tokens, k, n, 128)
                for form in FORMATS:
                    yield Case("quant_linear", model, tokens, k, n, 0, form)
                    yield Case("quant_lowrank_linear", model, tokens, k, n, 64, form)


def expected(case: Case, device: Device) -> dict[str, tuple[float, float]]:
    """Contender -> seconds that the cost model predicts of forward, and of forward and backward."""
    m, k, n = case.tokens, case.in_features, case.out_features
    shape = pair.Shape(m, k, n, case.rank)
    if case.family == "lowrank_linear":
        forward, backward = pair.predict_forward(shape, DTYPE, device), pair.predict_backward(shape, DTYPE, device)
    elif case.family == "lowrank_group":
        shapes = (shape,) * GROUPED
        forward, backward = group.predict_forward(shapes, DTYPE, device), group.predict_backward(shapes, DTYPE, device)
    elif case.family == "lowrank_epilogue":
        forward = epilogue.predict_forward(shape, "gelu", DTYPE, device)
        backward = epilogue.predict_backward(shape, "gelu", DTYPE, device)
    else:
        form = format_of(case.form)
        stored = quant.Shape(m, k, n, form.layout, form.group, rank=case.rank)
        forward, backward = (p(stored, DTYPE, device) for p in (quant.predict_forward, quant.predict_backward))
    told = {"ours": (forward.seconds, forward.seconds + backward.seconds)}
    if case.family == "lowrank_linear":
        kept = pair.predict_backward(shape, DTYPE, device, kept=True)
        told["ours, keeping"] = (forward.seconds, forward.seconds + kept.seconds)
    return told | {"library": (forward.gemms, forward.gemms + backward.gemms)}


# A forward, and the tensors that backward gives gradients of.
Contender = tuple[Callable[[], torch.Tensor], tuple[torch.Tensor, ...]]


def contenders(case: Case, compiled: bool, device: str = "cuda") -> Iterator[tuple[str, Callable[[], Contender]]]:
    """(name, what makes it) for each; making one may fail, where a library is missing or can't take the case.

    Args:
        case: where.
        compiled: with torch.compile's max-autotune, which takes half a minute to compile.
        device: where; the peers other than bitsandbytes need "cuda".
    """
    m, k, n, r = case.tokens, case.in_features, case.out_features, case.rank

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(DTYPE).requires_grad_()

    x, w = random(m, k), random(n, k)

    def thin(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, a), b)

    a, b = random(max(1, r), k), random(n, max(1, r))
    if case.family == "lowrank_group":
        many_a, many_b = [random(r, k) for _ in range(GROUPED)], [random(n, r) for _ in range(GROUPED)]
        every = (x, *many_a, *many_b)

        def ours() -> torch.Tensor:
            return torch.cat(group.lowrank_group(x, many_a, many_b, []), -1)

        def library() -> torch.Tensor:
            return torch.cat([thin(x, a, b) for a, b in zip(many_a, many_b, strict=True)], -1)

        yield "library", lambda: (library, every)
        yield "ours", lambda: (ours, every)
        return
    if case.family == "lowrank_epilogue":
        yield "library", lambda: (lambda: F.gelu(thin(x, a, b)), (x, a, b))
        yield "ours", lambda: (lambda: epilogue.lowrank_epilogue(x, a, b, None, "gelu", None), (x, a, b))
        return
    yield "dense", lambda: (lambda: F.linear(x, w), (x, w) if case.family == "lowrank_linear" else (x,))
    if case.family == "lowrank_linear":
        yield "library", lambda: (lambda: thin(x, a, b), (x, a, b))
        yield "ours", lambda: (lambda: pair.lowrank_linear(x, a, b, None), (x, a, b))
        yield "ours, keeping", lambda: (lambda: pair.lowrank_linear_keep(x, a, b, None)[0], (x, a, b))
        if compiled:
            torch._dynamo.reset()
            fast = torch.compile(thin, mode="max-autotune-no-cudagraphs", dynamic=False)
            yield "max-autotune", lambda: (lambda: fast(x, a, b), (x, a, b))
        return
    form = format_of(case.form)
    stored = quantise(form, w.detach())
    packed = [stored[key] for key in form.keys]
    if case.family == "quant_lowrank_linear":
        yield "ours, no pair", lambda: (lambda: quant.quant_linear(x, packed, form.layout, form.group, None), (x,))
        yield (
            "ours",
            lambda: (
                lambda: both.quant_lowrank_linear(x, packed, form.layout, form.group, a, b, 1.0, None),
                (x, a, b),
            ),
        )
        yield (
            "library",
            lambda: (lambda: F.linear(x, _dense(packed, form, k)) + F.linear(F.linear(x, a), b), (x, a, b)),
        )
        return
    yield "ours", lambda: (lambda: quant.quant_linear(x, packed, form.layout, form.group, None), (x,))
    yield "library", lambda: (lambda: F.linear(x, _dense(packed, form, k)), (x,))
    if case.form == "nf4":
        yield "bitsandbytes", lambda: (_bitsandbytes(x, form.export(stored, (n, k), DTYPE)), (x,))
    else:
        yield "torchao", lambda: (_torchao(x, w.detach(), case.form), ())
    if importlib.util.find_spec("gemlite") is not None and case.form != "nf4":
        yield "gemlite", lambda: (_gemlite(x, w.detach(), 4 if case.form == "int4" else 8), ())


def _dense(packed: list[torch.Tensor], form: Any, in_features: int) -> torch.Tensor:
    return quant.dense(packed, form.layout, form.group, in_features, DTYPE)


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=DTYPE)
    linear.weight.data = weight
    return linear


def _bitsandbytes(x: torch.Tensor, weight: Any) -> Callable[[], torch.Tensor]:
    import bitsandbytes

    return lambda: bitsandbytes.matmul_4bit(x, weight.t(), quant_state=weight.quant_state)


def _torchao(x: torch.Tensor, weight: torch.Tensor, form: str) -> Callable[[], torch.Tensor]:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    linear = _linear(weight)
    int4 = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")  # its kernel for CUDA
    quantize_(linear, int4 if form == "int4" else Int8WeightOnlyConfig())
    return lambda: linear(x)


def _gemlite(x: torch.Tensor, weight: torch.Tensor, bits: int) -> Callable[[], torch.Tensor]:
    from gemlite.helper import A16W4, A16W8  # type: ignore[import-not-found]

    made = (A16W4 if bits == 4 else A16W8)().from_linear(_linear(weight))
    return lambda: made(x)
