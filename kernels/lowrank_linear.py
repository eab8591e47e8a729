"""The low-rank linear: y = (x @ weight_aᵀ) @ weight_bᵀ + bias, the dense product never formed."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def reference(
    x: torch.Tensor, weight_a: torch.Tensor, weight_b: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
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
