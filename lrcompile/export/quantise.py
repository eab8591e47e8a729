"""A plain model's linears and embeddings in a phone's number formats, through torchao's tensors for ExecuTorch.

======  =====================================================  ============================================
format  linears                                                embedding of the vocabulary
======  =====================================================  ============================================
8da4w   int4, a scale for 32 inputs; activations int8, a       int4, a scale for 32 numbers
        scale and zero point a token, as they come
int8    int8, a scale a row; activations likewise              int8, a scale a row
none    fp32                                                   fp32
======  =====================================================  ============================================

Other embeddings (positions) are int8. A head tied to the embedding stays tied: both read the head's codes. XNNPACK rounds
the scales of groups to bfloat16, so they are rounded here first: codes are then the best ones for the scales that are used. A
group's scale is the one that leaves the least squared error, which clamps its largest numbers a little.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lrcompile.errors import ExportError
from lrcompile.export.unfold import Pair

_INT4 = getattr(torch, "int4")  # noqa: B009 (torch's stubs leave it out)

FORMATS = ("8da4w", "int8", "none")
GROUP = 32
# Above 1 the largest positive number is 7 scales, where torchao's 7.5 is clamped.
_SHARES = [1.0, *(share / 50 for share in range(30, 56))]  # a group of zeros keeps torchao's
_INTS = {"8da4w": _INT4, "int8": torch.int8}


class Table(nn.Module):
    """An embedding that is stored in codes: a row is decoded when it is looked up.

    Args:
        codes: (rows, width) int8 within the format's range.
        scales: (rows, groups) fp32.
        bits: 4 or 8.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bits: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits = *codes.shape, bits
        if bits == 4:
            # The order of XNNPACK's 4-bit weights, the other way round than the lookup's: so that a tied head's bytes are
            # these bytes. Looked up, neighbours have changed places.
            shifted = (codes + 8).view(torch.uint8)
            codes = shifted[:, 1::2] << 4 | shifted[:, ::2]
            half = scales.half()
            scales = half if torch.equal(half.float(), scales) else scales
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scales", scales if scales.shape[1] > 1 else scales[:, 0].contiguous())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., width) fp32."""
        ops, stored = torch.ops.quantized_decomposed, (self.codes, self.scales, None)
        if self.bits == 8:
            return ops.embedding_byte.dtype(*stored, -128, 127, tokens, dtype=torch.float32)
        swapped = ops.embedding_4bit.dtype(*stored, -8, 7, tokens, dtype=torch.float32)
        return swapped.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def quantise(model: Any, form: str) -> Any:
    """Quantise a plain model in place, weight by weight; returns it.

    Args:
        model: of transformers, fp32, nothing adopted (`unfold` first, with ranks in multiples of GROUP).
        form: of FORMATS.

    Raises:
        ExportError: linears that the format can't hold (named, with the fix).
    """
    if form == "none":
        return model
    refuse_widths(model, form)
    embedding, head = model.get_input_embeddings(), head_of(model)
    tied = head is not None and head.weight is embedding.weight
    done: dict[int, nn.Parameter] = {}
    for _, module in linears(model):
        key = id(module.weight)
        if key not in done:
            weight = _encode(module.weight, _INTS[form], activations=True)
            done[key] = nn.Parameter(weight, requires_grad=False)
        module.weight = done[key]
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Embedding:
            continue
        kind = _INTS[form] if module is embedding else torch.int8
        if kind is _INT4 and module.embedding_dim % GROUP:
            kind = torch.int8
        coded: Any = head.weight if module is embedding and tied else _encode(module.weight, kind, activations=False)
        owner, _, last = name.rpartition(".")
        table = Table(coded.qdata, coded.scale, 4 if coded.target_dtype is _INT4 else 8)
        setattr(model.get_submodule(owner), last, table)
    return model


def head_of(model: Any) -> Any:
    """The output head where it is one linear; None where there is none, or a pair, whose linears are like all others."""
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Linear) else None


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """(name, module) of every nn.Linear."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def odd_widths(model: nn.Module, form: str) -> list[str]:
    """The linears, with their inputs, that the format can't hold; not a pair's second one, whose rank can be filled up."""
    if form != "8da4w":
        return []
    ranks = {id(pair.up) for pair in model.modules() if isinstance(pair, Pair)}
    odd = [(name, m.in_features) for name, m in linears(model) if m.in_features % GROUP and id(m) not in ranks]
    return [f"{name} ({inputs} inputs)" for name, inputs in odd]


def refuse_widths(model: nn.Module, form: str) -> None:
    """Refuse a model with linears that the format can't hold.

    Raises:
        ExportError: naming them, and the format that can.
    """
    if odd := odd_widths(model, form):
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ExportError(
            f"8da4w has groups of {GROUP} inputs, which don't divide those of {', '.join(odd[:3])}{more}; "
            "export with --quantise int8"
        )


def _encode(weight: torch.Tensor, kind: torch.dtype, *, activations: bool) -> Any:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    weight = weight.detach()
    block = (1, GROUP if kind is _INT4 else weight.shape[1])
    more = {"activation_quantization": "int8_asym_per_token" if activations else None}
    made = IntxUnpackedToInt8Tensor.from_hp(weight, block, kind, **more)
    if kind is torch.int8:
        return made
    scale = best_scales(weight, made.scale)
    return IntxUnpackedToInt8Tensor.from_hp(
        weight,
        block,
        kind,
        intx_choose_qparams_algorithm=None,
        custom_scale=scale,
        custom_zero_point=made.zero_point,
        **more,
    )


def best_scales(weight: torch.Tensor, widest: torch.Tensor) -> torch.Tensor:
    """Scales of least squared error, in bfloat16's numbers: of shares of torchao's, the best for each group.

    torchao has its own search (hqq_scale_only), for another norm and without the rounding; it leaves a little more error.

    Args:
        weight: (rows, columns).
        widest: (rows, columns / GROUP), torchao's scales: the largest number is 7.5 of them.
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    best, least = torch.empty_like(widest, dtype=torch.float32), torch.full_like(widest, torch.inf, dtype=torch.float32)
    for share in _SHARES:
        scale = (widest * share).bfloat16().float()
        wide = scale.unsqueeze(-1)
        error = (groups - (groups / wide).round_().clamp_(-8, 7).mul_(wide)).square_().sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best
