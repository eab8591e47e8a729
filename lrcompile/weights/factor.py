"""Low-rank mathematics: the truncated SVD behind every pair. Computed in float64, on the weight's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lrcompile.errors import AdoptError

_SKETCH_FROM = 1024  # below, the full decomposition takes under a second
POWER_ITERATIONS = 4
OVERSAMPLING = 32


def method_for(shape: Sequence[int], rank: int, method: str) -> str:
    """What a Recipe's `svd` means for a matrix; "auto" is "randomized" where it is large and the rank at most a quarter of it."""
    limit = min(shape)
    if method != "auto":
        return method
    return "randomized" if limit >= _SKETCH_FROM and rank <= limit // 4 else "full"


def unit_of(matrix: Tensor) -> Float[Tensor, ""]:
    """The power of two below the largest magnitude, float64; 1 for zeros.

    Divided by it a matrix keeps its mantissas, and its singular values neither overflow nor vanish when squared.
    """
    largest = matrix.abs().max().double()
    return torch.exp2(torch.floor(torch.log2(largest))) if largest > 0 else torch.ones_like(largest)


def truncate(
    work: Float[Tensor, "out_features in_features"], rank: int, method: str
) -> tuple[Float[Tensor, "out_features rank"], Float[Tensor, "rank in_features"]]:
    """The two sides (b, a) of the best product of this rank, float64, with √Σ on each (spectral init, 2105.01029).

    Args:
        work: a matrix in units of `unit_of`.
        rank: 1 to min(out_features, in_features).
        method: "full": eigenvectors of the smaller Gram matrix in float64, exact to about 1e-8 of the largest singular
            value. "randomized": subspace iteration (0909.4061) in float32, with a rank + 32 wide sketch and four
            iterations; its error is within 1% of the optimal.
    """
    work = work.double() if method == "full" else work.float()
    tall = work.shape[0] > work.shape[1]
    work = work.T if tall else work  # now the short side is the rows
    basis = leading_basis(work, rank) if method == "full" else _sketched_basis(work, rank)
    short, long = balanced(basis, basis.T @ work)
    return (long.T, short.T) if tall else (short, long)


def balanced(
    basis: Float[Tensor, "rows rank"], small: Float[Tensor, "rank columns"]
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]:
    """basis @ small with √Σ on each side, float64, for orthonormal columns uᵢ and rows σᵢ vᵢᵀ.

    A singular value of zero keeps one live side, else neither factor would ever get a gradient.
    """
    sigma = torch.linalg.vector_norm(small.double(), dim=1)
    largest = float(sigma.max())
    root = sigma.clamp_min(1e-4 * largest if largest > 0 else 1.0).sqrt()
    return basis.double() * root, small.double() / root[:, None]


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


def leading_basis(work: torch.Tensor, rank: int) -> torch.Tensor:
    """The `rank` leading left singular vectors of a wide matrix, as columns."""
    return eigh(work @ work.T)[1].flip(1)[:, :rank]


def eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of a symmetric matrix, ascending, and its eigenvectors as columns.

    Of a small one by one thread: LAPACK's own gain a third of the time at best, and where others use the cores too they
    spin at every step, waiting for each other (forty times as long, seen).
    """
    threads = torch.get_num_threads()
    alone = gram.device.type == "cpu" and len(gram) <= _SKETCH_FROM and threads > 1
    if alone:
        torch.set_num_threads(1)
    try:
        values, vectors = torch.linalg.eigh(gram)
        return values, vectors
    finally:
        if alone:
            torch.set_num_threads(threads)


def _sketched_basis(work: torch.Tensor, rank: int) -> torch.Tensor:
    rows, columns = work.shape
    width = min(rows, rank + OVERSAMPLING)
    # A generator of its own: the user's random stream stays as it is, and every process draws the same.
    generator = torch.Generator(device=work.device).manual_seed(0)
    sketch = work @ torch.randn(columns, width, generator=generator, device=work.device, dtype=work.dtype)
    basis, _ = torch.linalg.qr(sketch)
    for _ in range(POWER_ITERATIONS):
        basis, _ = torch.linalg.qr(work @ (work.T @ basis))
    small = (basis.T @ work).double()
    rotation = eigh(small @ small.T)[1].flip(1)[:, :rank]
    return basis @ rotation.to(basis.dtype)
