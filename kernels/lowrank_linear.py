"""The low-rank linear: y = (x @ weight_aᵀ) @ weight_bᵀ + bias, the dense product never formed."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def reference(
    x: Float[Tensor, "*batch in_features"],
    weight_a: Float[Tensor, "rank in_features"],
    weight_b: Float[Tensor, "out_features rank"],
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """Two thin products in plain torch, the oracle of every kernel of this family.

    Args:
        x: (..., in_features), floating.
        weight_a: (rank, in_features), same dtype.
        weight_b: (out_features, rank), same dtype.
        bias: (out_features,) or None.

    Returns:
        (..., out_features), in x's dtype (or autocast's).
    """
    return F.linear(F.linear(x, weight_a), weight_b, bias)
