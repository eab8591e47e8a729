"""Low-rank mathematics: the truncated SVD behind every pair. Computed in float64, on the weight's device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lrcompile.errors import AdoptError

_SKETCH_FROM = 1024  # below, the full decomposition takes under a second
_POWER_ITERATIONS = 4
_OVERSAMPLING = 32


@dataclass
class Pair:
    """W ≈ weight_b @ weight_a.

    Attributes:
        weight_a: (rank, in_features), dtype and device of the weight.
        weight_b: (out_features, rank), likewise.
        error: ‖W - weight_b @ weight_a‖ / ‖W‖ in the Frobenius norm, before rounding to the dtype.
    """

    weight_a: Float[Tensor, "rank in_features"]
    weight_b: Float[Tensor, "out_features rank"]
    error: float


@torch.no_grad()
def svd_pair(
    weight: Float[Tensor, "out_features in_features"], rank: int, method: str = "auto", name: str = "weight"
) -> Pair:
    """The best pair of this rank, with √Σ on each side (spectral initialisation, 2105.01029).

    Args:
        weight: (out_features, in_features), floating.
        rank: 1 to min(out_features, in_features).
        method: "full": eigenvectors of the smaller Gram matrix in float64, exact to about 1e-8 of the largest singular
            value. "randomized": subspace iteration (0909.4061) in float32, with a rank + 32 wide sketch and four
            iterations; its error is within 1% of the optimal. "auto": randomized where the matrix is large and the
            rank at most a quarter of it.
        name: for the error message.

    Returns:
        the pair and its relative error.

    Raises:
        AdoptError: the weight holds NaN or Inf.
    """
    check_finite(weight, name)
    limit = min(weight.shape)
    if method == "auto":
        method = "randomized" if limit >= _SKETCH_FROM and rank <= limit // 4 else "full"
    work = weight.detach().double() if method == "full" else weight.detach().float()
    # Powers of two keep the mantissas: singular values neither overflow nor vanish when squared.
    largest = work.abs().max().double()
    scale = torch.exp2(torch.floor(torch.log2(largest))) if largest > 0 else torch.ones_like(largest)
    work = work / scale.to(work.dtype)
    tall = work.shape[0] > work.shape[1]
    work = work.T if tall else work  # now the short side is the rows
    basis = _leading_basis(work, rank) if method == "full" else _sketched_basis(work, rank)
    small = basis.T @ work  # rank x long; rows are σᵢ vᵢᵀ
    sigma = torch.linalg.vector_norm(small.double(), dim=1)
    total = torch.linalg.vector_norm(work, dtype=torch.float64)
    # Not from total - Σσ²: the sketch's float32 would drown a small error in that difference.
    lost = torch.linalg.vector_norm(torch.addmm(work, basis, small, alpha=-1), dtype=torch.float64)
    # A singular value of zero keeps one live side, else neither factor would ever get a gradient.
    root = sigma.clamp_min(1e-4 * float(sigma.max()) if float(sigma.max()) > 0 else 1.0).sqrt()
    short, long = basis.double() * root, small.double() / root[:, None]
    a, b = (short.T, long.T) if tall else (long, short)
    half = scale.sqrt()
    return Pair(
        (a * half).to(weight.dtype).contiguous(),
        (b * half).to(weight.dtype).contiguous(),
        float(lost / total) if float(total) > 0 else 0.0,
    )


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Raise AdoptError, naming the weight, where it holds NaN or Inf."""
    if not weight.is_meta and not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise AdoptError(
            f"{name} holds {bad} NaN or Inf; repair the checkpoint, or leave the weight out with exclude=[{name!r}]"
        )


@torch.no_grad()
def singular_values(weight: Float[Tensor, "out_features in_features"]) -> Float[Tensor, " min"]:
    """All singular values of a matrix, largest first: (min(out, in),) in float64."""
    work = weight.detach().double()
    gram = work @ work.T if work.shape[0] <= work.shape[1] else work.T @ work
    return torch.linalg.eigvalsh(gram).clamp_min(0).flip(0).sqrt()


def _leading_basis(work: torch.Tensor, rank: int) -> torch.Tensor:
    """The `rank` leading left singular vectors of a wide matrix, as columns."""
    return _eigenvectors(work @ work.T).flip(1)[:, :rank]


def _eigenvectors(gram: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a symmetric matrix as columns, by ascending eigenvalue.

    Of a small one by one thread: LAPACK's own gain a third of the time at best, and where others use the cores too they
    spin at every step, waiting for each other (forty times as long, seen).
    """
    threads = torch.get_num_threads()
    alone = gram.device.type == "cpu" and len(gram) <= _SKETCH_FROM and threads > 1
    if alone:
        torch.set_num_threads(1)
    try:
        return torch.linalg.eigh(gram).eigenvectors
    finally:
        if alone:
            torch.set_num_threads(threads)


def _sketched_basis(work: torch.Tensor, rank: int) -> torch.Tensor:
    rows, columns = work.shape
    width = min(rows, rank + _OVERSAMPLING)
    # A generator of its own: the user's random stream stays as it is, and every process draws the same.
    generator = torch.Generator(device=work.device).manual_seed(0)
    sketch = work @ torch.randn(columns, width, generator=generator, device=work.device, dtype=work.dtype)
    basis, _ = torch.linalg.qr(sketch)
    for _ in range(_POWER_ITERATIONS):
        basis, _ = torch.linalg.qr(work @ (work.T @ basis))
    small = (basis.T @ work).double()
    rotation = _eigenvectors(small @ small.T).flip(1)[:, :rank]
    return basis @ rotation.to(basis.dtype)
