"""The two pieces of matrix arithmetic in the orthogonalised optimizers: Newton-Schulz, and the largest singular value."""

from __future__ import annotations

import torch

# The quintic of Muon (https://kellerjordan.github.io/posts/muon/): steep at zero, so five steps lift small singular values
# to about one; what it leaves is spread over a band around one, not at one.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5
# A norm below this isn't blown up to a full step: what is left of a momentum whose gradients have ended fades out.
FLOOR = 1e-7


def orthogonalise(matrix: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """U S' Vᵀ for a matrix U S Vᵀ, with S' in a band around one (0.68 to 1.2025 for singular values above 3e-3 of ‖matrix‖_F).

    Five Newton-Schulz steps X <- aX + b(XXᵀ)X + c(XXᵀ)²X from X = matrix / ‖matrix‖_F. A zero matrix stays zero, and
    non-finite numbers come out as such.

    Args:
        matrix: (m, n), float32.
        dtype: that the products are computed in.

    Returns:
        (m, n) in float32.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix  # the Gram matrix of the short side
    x = (x / torch.linalg.vector_norm(x).clamp(min=FLOOR)).to(dtype)
    a, b, c = QUINTIC
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def fixed_vector(first: int, last: int, total: int, device: torch.device) -> torch.Tensor:
    """Rows first..last of a fixed vector of `total` numbers and norm about one: where a power iteration starts.

    cos(i²) has no pattern that a weight could share, needs no random state, and any rank can make its own rows.
    """
    i = torch.arange(first + 1, last + 1, dtype=torch.float64)
    return (torch.cos(i * i) * (2 / total) ** 0.5).to(device, torch.float32)


def largest_singular_value(matrix: torch.Tensor, u: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """‖matrix‖₂ by power iteration from a guess: never above it but for rounding, and from below as near as the steps get.

    The guess is mixed with a little of the fixed vector: one that had lost a direction wholly would never find it again.

    Args:
        matrix: (m, n), float32.
        u: (m,) unit vector, the guess of the left singular vector; an earlier call's result (warm start).
        steps: at least one.

    Returns:
        The value, a tensor without dimensions, and the new vector. Of a zero matrix: zero, and the vector it was given.
    """
    tiny = 1e-20  # its square can be told from zero, nearly
    given = u
    u = u + 0.01 * fixed_vector(0, len(u), len(u), u.device)
    for _ in range(steps):
        v = matrix.mT @ u
        u = matrix @ (v / torch.linalg.vector_norm(v).clamp(min=tiny))
        value = torch.linalg.vector_norm(u)
        u = torch.where(value > 0, u / value.clamp(min=tiny), given)
    return value, u
