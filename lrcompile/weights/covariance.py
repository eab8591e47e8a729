"""Truncation by what it does to the outputs: the covariance C of a weight's inputs says which errors are seen.

‖(W - Ŵ) C^½‖ is the error of the outputs. Of all products B A of rank r the one with the least ‖(R - B A) C^½‖ is
U Uᵀ R, U the leading eigenvectors of R C Rᵀ: with R = W the data-aware truncation of 2604.01609, with R = W - Q the
solution of QERA (2410.06040), there written ((W - Q) C^½)_r C^-½. Both are the same on the inputs that C has seen;
U Uᵀ R needs no inverse, and is the nearest to R on those it hasn't.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lrcompile.errors import AdoptError
from lrcompile.weights.factor import OVERSAMPLING, POWER_ITERATIONS, balanced, eigh, leading_basis, unit_of


@dataclass
class Inputs:
    """A covariance to compute with.

    Attributes:
        c: (in_features, in_features) float64, symmetric, with a mean diagonal of 1 (or all zeros).
        ridge: added to it where a pair is fitted, so that directions which no input has gone in count by their plain
            size; not above what C's own dtype rounds away, so that the others stay where they are.
    """

    c: Tensor
    ridge: float

    def root(self, ridge: float) -> Tensor:
        """A matrix L with L Lᵀ = C + ridge."""
        values, vectors = eigh(self.c)
        return vectors * (values.clamp_min(0) + ridge).sqrt()


def inputs_of(covariance: Tensor, weight: Tensor, name: str) -> Inputs:
    """The covariance of a weight's inputs, checked and in float64 on the weight's device.

    Raises:
        AdoptError: it has another shape, holds NaN or Inf, or can't be a sum of x xᵀ.
    """
    columns = weight.shape[1]
    where = f"the covariance of {name}'s inputs"
    if tuple(covariance.shape) != (columns, columns) or not covariance.is_floating_point():
        kind = str(covariance.dtype).removeprefix("torch.")
        raise AdoptError(
            f"{where} is {tuple(covariance.shape)} {kind}: give it as ({columns}, {columns}) float32 or float64, the sum "
            "of x xᵀ over the inputs x of this very weight"
        )
    if not torch.isfinite(covariance).all():
        bad = int((~torch.isfinite(covariance)).sum())
        raise AdoptError(f"{where} holds {bad} NaN or Inf: leave out the calibration batches that cause it")
    c = covariance.detach().to(weight.device).double()
    c = c / unit_of(c)
    diagonal = c.diagonal()
    # What no sum of x xᵀ can be, as far as that is told without eigenvalues.
    bound = 1.01 * torch.outer(diagonal, diagonal).clamp_min(0) + 1e-6 * diagonal.max().square()
    if bool((diagonal < 0).any()) or bool(((c - c.T).abs() > 1e-3).any()) or bool((c.square() > bound).any()):
        raise AdoptError(
            f"{where} is not symmetric positive semi-definite: give it as the sum of x xᵀ over the inputs x"
        )
    c = (c + c.T) / 2
    mean = float(diagonal.mean())
    return Inputs(c / mean if mean > 0 else c, max(1e-9, 8 * torch.finfo(covariance.dtype).eps))


def energy_of(matrix: Tensor, c: Tensor) -> float:
    """‖matrix C^½‖²: the trace of matrix C matrixᵀ."""
    return max(0.0, float(((matrix @ c) * matrix).sum()))


def truncate_outputs(
    rest: Float[Tensor, "out_features in_features"], inputs: Inputs, rank: int, method: str
) -> tuple[Float[Tensor, "out_features rank"], Float[Tensor, "rank in_features"]]:
    """The sides (b, a) of the best product of this rank for the outputs of R, float64: U Uᵀ R, √σ on each side.

    Args:
        rest: R in units of `unit_of` the weight it is left of, float64.
        inputs: of the weight.
        rank: 1 to min(out_features, in_features).
        method: "full" or "randomized".
    """
    basis = _output_basis(rest / unit_of(rest), inputs, rank, method)
    small = basis.T @ rest
    rotation = eigh(small @ small.T)[1].flip(1)
    return balanced(basis @ rotation, rotation.T @ small)


def _output_basis(rest: Tensor, inputs: Inputs, rank: int, method: str) -> Tensor:
    """The `rank` leading eigenvectors of R (C + ridge) Rᵀ as columns: (out_features, rank)."""
    c, ridge = inputs.c, inputs.ridge
    if method == "randomized":  # subspace iteration (0909.4061), as in factor.py: only thin products
        width = min(rest.shape[0], rank + OVERSAMPLING)
        generator = torch.Generator(device=rest.device).manual_seed(0)
        basis = torch.randn(rest.shape[0], width, generator=generator, device=rest.device, dtype=rest.dtype)
        for _ in range(POWER_ITERATIONS + 1):
            thin = rest.T @ basis
            basis, _ = torch.linalg.qr(rest @ (c @ thin + ridge * thin))
        thin = rest.T @ basis
        return basis @ eigh(thin.T @ (c @ thin + ridge * thin))[1].flip(1)[:, :rank]
    if rest.shape[0] <= rest.shape[1]:
        return eigh(rest @ c @ rest.T + ridge * (rest @ rest.T))[1].flip(1)[:, :rank]
    seen = rest @ inputs.root(ridge)
    return torch.linalg.qr(seen @ leading_basis(seen.T, rank))[0]
