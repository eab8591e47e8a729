"""What an exported file will weigh, and what would fit: known before the minutes that exporting takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from lrcompile.export.quantise import FORMATS, GROUP, head_of, linears, odd_widths
from lrcompile.export.unfold import Pair
from lrcompile.words import size


class Weight(NamedTuple):
    """Bytes of a file: of the linears of its blocks, and of everything else (embeddings, head, biases, norms)."""

    linears: int
    rest: int

    @property
    def total(self) -> int:
        return self.linears + self.rest


def weigh(model: Any, form: str) -> Weight:
    """Bytes of a plain model's numbers in a format, before it is quantised; the program around them is not counted.

    In 8da4w ranks are counted as they will be, in whole groups, for whatever format the model was unfolded.
    """
    head, embedding = head_of(model), model.get_input_embeddings()
    inside = {id(m.weight): m.weight for _, m in linears(model) if m is not head}
    sizes = {key: weight.shape for key, weight in inside.items()}
    for pair in model.modules():
        if isinstance(pair, Pair) and form == "8da4w":
            rank = -(-pair.down.out_features // GROUP) * GROUP
            sizes[id(pair.down.weight)] = torch.Size((rank, pair.in_features))
            sizes[id(pair.up.weight)] = torch.Size((pair.out_features, rank))
    blocks = sum(_bytes(shape, form, scale=2) for shape in sizes.values())
    rest, seen = 0, set(inside)
    lookups = {id(m.weight): m is embedding for m in model.modules() if type(m) is nn.Embedding}
    for p in model.parameters():
        if id(p) in seen:
            continue
        seen.add(id(p))
        if id(p) in lookups:
            small = form if lookups[id(p)] or form == "none" else "int8"
            rest += _bytes(p.shape, small, scale=2)
            if head is not None and head.weight is p and form == "8da4w":
                rest += _bytes(p.shape, form, scale=2) - p.numel() // 2  # the head's own scales, in bfloat16
        elif head is not None and p is head.weight:
            rest += _bytes(p.shape, form, scale=2)
        else:
            rest += p.numel() * 4
    return Weight(blocks, rest)


def _bytes(shape: torch.Size, form: str, scale: int) -> int:
    numbers = shape.numel()
    if form == "none":
        return numbers * 4
    if form == "int8" or shape[1] % GROUP:
        return numbers + 4 * shape[0]
    return numbers // 2 + scale * (numbers // GROUP)


def too_large(model: Any, form: str, limit: int, have: int) -> str:
    """What to say of a file of `have` bytes, more than `limit`: by how much, and which format or compression fits.

    Formats that the model's widths don't go with aren't named.
    """
    told = f"{size(have)} in {form}, {size(have - limit)} over --max-bytes {limit} ({size(limit)})"
    possible = [other for other in FORMATS if other == form or not odd_widths(model, other)]
    weights = {other: weigh(model, other) for other in possible}
    overhead = max(0, have - weights[form].total)
    order = [other for other in possible if weights[other].total < weights[form].total]
    fixes = [f"--quantise {o} makes it {size(weights[o].total)}" for o in order if weights[o].total + overhead <= limit]
    smallest = min(possible, key=lambda other: weights[other].total)
    for other in dict.fromkeys([form, smallest]):
        left = limit - overhead - weights[other].rest
        if left > 0 and weights[other].linears > left:
            fixes.append(f"in {other}, linears compressed {weights[other].linears / left:.2f}x more than now fit")
    if not fixes:
        rest = weights[smallest].rest
        return f"{told}; even without its linears it has {size(rest)} (embedding, norms) in {smallest}: choose a smaller model"
    return f"{told}: " + "; ".join(fixes)
