"""A model between two: the one that was finetuned, and the one that it was finetuned from."""

from __future__ import annotations

from typing import Any

import torch

from lrcompile.errors import ExportError
from lrcompile.weights.adopt import merge
from lrcompile.weights.layers import AdoptedModule


def check_strength(strength: float) -> None:
    """Raise ExportError for a strength out of range."""
    if not 0 < strength <= 1:
        raise ExportError(f"strength={strength}: must be above 0, and 1 at most, which keeps all that was learned")


@torch.no_grad()
def blend(model: Any, untuned: Any, strength: float) -> Any:
    """Keep a share of what finetuning changed: untuned + strength · (model - untuned), weight by weight.

    That is WiSE-FT (arXiv 2109.01903). A share of about a half often has most of what was learned and loses less of the rest.

    Args:
        model: finetuned; adopted with bases, or dense. It is merged and changed in place.
        untuned: what it was finetuned from, dense, of the same parameters.
        strength: above 0, up to 1; 1 leaves the model as it is.

    Returns:
        the model, each parameter in the wider of both dtypes.

    Raises:
        ExportError: a strength out of range, other parameters, or weights that were replaced by pairs alone.
    """
    check_strength(strength)
    adopted = [(name, m) for name, m in model.named_modules() if isinstance(m, AdoptedModule)]
    alone = [name for name, m in adopted for _, form in m.lr_forms if form.base is None]
    if alone:
        raise ExportError(
            f"{alone[0]} is a pair alone, which a dense weight can't be blended with and stay one: blend the finetuned model "
            "first, and compress what comes out"
        )
    if adopted:
        merge(model)
    theirs = dict(untuned.named_parameters(remove_duplicate=False))
    ours = dict(model.named_parameters(remove_duplicate=False))
    for name in (*ours, *theirs):
        shapes = [tuple(held[name].shape) if name in held else None for held in (ours, theirs)]
        if shapes[0] != shapes[1]:
            told = ["has none" if shape is None else f"has {shape}" for shape in shapes]
            raise ExportError(
                f"{name}: the model {told[0]} and the untuned one {told[1]}: give the model that it was finetuned from"
            )
    for name, p in model.named_parameters():  # tied ones once
        before = theirs[name]
        wide = torch.promote_types(p.dtype, before.dtype)
        p.data = torch.lerp(before.float(), p.float(), strength).to(wide)
    return model
