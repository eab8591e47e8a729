"""Spectron: its two pieces of arithmetic, its bound, its steps against a plain statement in float64, its state."""

import copy
import math

import pytest
import torch
from torch import nn

from lrcompile.errors import TrainError
from lrcompile.train.optimizers import Spectron, schedule, spectron
from lrcompile.train.optimizers.orthogonal import QUINTIC, fixed_vector, largest_singular_value, orthogonalise


def band(x: torch.Tensor) -> torch.Tensor:
    """What five Newton-Schulz steps make of singular values."""
    a, b, c = QUINTIC
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5
    return x


TOP = float(band(torch.linspace(0, 1, 200_001, dtype=torch.float64)).max())


def pair(
    rank: int = 6, inner: int = 40, out: int = 24, size: float = 0.3, dtype=torch.float32
) -> tuple[nn.Parameter, ...]:
    return tuple(nn.Parameter((torch.randn(shape) * size).to(dtype)) for shape in ((rank, inner), (out, rank)))


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (1, 9), (9, 1), (16, 16)])
def test_orthogonalise(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = orthogonalise(matrix)
    assert found.dtype == torch.float32
    # Rounding in float32: 1e-6 is seen.
    torch.testing.assert_close(found.double(), u * band(s / s.norm()) @ vh, rtol=0, atol=1e-5)
    values = torch.linalg.svdvals(found.double())
    assert values.max() <= TOP + 1e-5
    assert values[s / s.norm() > 3e-3].min() > 0.68
    torch.testing.assert_close(orthogonalise(matrix * 1e-4), found, rtol=0, atol=1e-5)  # whatever its size
    # Fifteen products in bfloat16, of eight bits each; 3% is the most that was seen.
    assert orthogonalise(matrix, torch.bfloat16).sub(found).norm() < 0.05 * found.norm()


def test_orthogonalise_at_the_edges() -> None:
    assert TOP == pytest.approx(1.2024, abs=1e-3)
    assert torch.equal(orthogonalise(torch.zeros(3, 5)), torch.zeros(3, 5))
    assert orthogonalise(torch.full((3, 5), 1e-22)).abs().max() < 1e-12  # fades, isn't blown up
    assert orthogonalise(torch.tensor([[1.0, math.nan], [0.0, 1.0]])).isnan().any()


@pytest.mark.parametrize("shape", [(8, 100), (100, 8), (1, 5), (30, 30)])
def test_largest_singular_value(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    exact = torch.linalg.svdvals(matrix.double()).max().item()
    # Thirty steps come within 1% of these; of 50 other draws of (8, 100), 5% below is the worst.
    cold, u = largest_singular_value(matrix, fixed_vector(0, shape[0], shape[0], matrix.device), 30)
    assert 0.99 * exact <= cold <= exact * (1 + 1e-6)
    warm, u = largest_singular_value(matrix * 1.01, u, 3)  # as the matrix moves
    assert 0.99 * exact * 1.01 <= warm <= exact * 1.01 * (1 + 1e-6)
    assert u.norm().item() == pytest.approx(1, abs=1e-5)


def test_largest_singular_value_at_the_edges() -> None:
    u = fixed_vector(0, 4, 4, torch.device("cpu"))
    value, kept = largest_singular_value(torch.zeros(4, 3), u, 3)
    assert value == 0 and torch.equal(kept, u)
    # A direction that the vector has none of is found all the same, once it has become the largest.
    u = torch.tensor([1.0, 0.0, 0.0, 0.0])
    for _ in range(4):
        value, u = largest_singular_value(torch.diag(torch.tensor([1.0, 0.0, 0.0, 5.0])), u, 3)
    assert value == pytest.approx(5, rel=1e-4)
    pieces = [fixed_vector(0, 3, 7, u.device), fixed_vector(3, 7, 7, u.device)]
    assert torch.equal(torch.cat(pieces), fixed_vector(0, 7, 7, u.device))


@pytest.mark.parametrize("scale", [1.0, 0.05, -4.0])
@pytest.mark.parametrize("size", [0.0, 1e-3, 0.3, 20.0])
def test_a_step_changes_the_product_by_no_more_than_the_rate(size: float, scale: float) -> None:
    for lr in (1e-3, 0.3, 3.0):
        a, b = pair(size=size)
        optimizer = Spectron([{"params": [a, b], "scales": [scale]}], lr=lr)
        for _ in range(4):
            before = scale * b.detach().double() @ a.detach().double()
            sigma = sum(torch.linalg.matrix_norm(p.detach().double(), 2).item() for p in (a, b))
            a.grad, b.grad = torch.randn_like(a) * 7, torch.randn_like(b) * 1e-3
            optimizer.step()
            change = torch.linalg.matrix_norm(scale * b.detach().double() @ a.detach().double() - before, 2).item()
            # The bound; beyond it the band of Newton-Schulz, and the 1% that power iteration lacks of these matrices.
            rho = min(1.0, 1.01 * lr / (abs(scale) * (sigma + 1)))
            assert change <= abs(scale) * (rho * TOP * sigma + rho**2 * TOP**2) * (1 + 1e-4)
            assert change <= lr * TOP**2 * 1.02
            assert change > 1e-3 * min(lr, abs(scale)) * (size > 0)


def plain_step(a, b, grads, momenta, lr, beta, scale, nesterov):
    """The algorithm in float64, with exact singular values."""
    sigma = sum(torch.linalg.matrix_norm(p, 2) for p in (a, b))
    rho = min(1.0, lr / (abs(scale) * (sigma.item() + 1)))
    out = []
    for p, g, m in zip((a, b), grads, momenta, strict=True):
        m.mul_(beta).add_(g, alpha=1 - beta)
        u, s, vh = torch.linalg.svd(beta * m + (1 - beta) * g if nesterov else m, full_matrices=False)
        out.append(p - rho * (u * band(s / s.norm()) @ vh))
    return out


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_against_a_plain_statement(scale: float, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLD", "WARM"):
        monkeypatch.setattr(
            spectron, name, 1000
        )  # the singular values to the last digit, as the plain statement has them
    a, b = pair()
    optimizer = Spectron([{"params": [a, b], "scales": [scale]}], lr=0.05, momentum=0.9, nesterov=nesterov)
    x, y = a.detach().double(), b.detach().double()
    momenta = [torch.zeros_like(x), torch.zeros_like(y)]
    for _ in range(8):
        grads = [torch.randn_like(x), torch.randn_like(y)]
        a.grad, b.grad = grads[0].float(), grads[1].float()
        optimizer.step()
        x, y = plain_step(x, y, grads, momenta, 0.05, 0.9, scale, nesterov)
    # Rounding of numbers about one in float32, over eight steps; 2e-7 is seen.
    torch.testing.assert_close(a.detach().double(), x, rtol=0, atol=2e-6)
    torch.testing.assert_close(b.detach().double(), y, rtol=0, atol=2e-6)


def worst_of_two(make, steps: int = 100) -> float:
    """Two regressions at one learning rate, the gradients of one 400 times the other's: the larger share of loss left."""
    torch.manual_seed(1)
    sides = [pair(size=0.1), pair(size=0.1)]
    x = torch.randn(200, 40) * torch.logspace(0, -1.5, 40)  # inputs of unequal size, as a model's are
    ys = [x @ torch.randn(40, 6) @ torch.randn(6, 24) for _ in sides]
    optimizer = make([p for ab in sides for p in ab])
    rate, at = optimizer.param_groups[0]["lr"], schedule("linear", steps=steps, final=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * at(step)
        optimizer.zero_grad()
        losses = [(x @ a.T @ b.T - y).square().mean() / y.square().mean() for (a, b), y in zip(sides, ys, strict=True)]
        (losses[0] + losses[1] / 400).backward()
        optimizer.step()
    worst = max(loss.item() for loss in losses)
    return worst if math.isfinite(worst) else math.inf


def test_it_learns_what_no_rate_of_sgd_does() -> None:
    ours = min(worst_of_two(lambda p, lr=lr: Spectron(p, lr=lr)) for lr in (0.3, 1.0, 3.0))
    sgd = [
        worst_of_two(lambda p, lr=lr: torch.optim.SGD(p, lr=lr, momentum=0.95))
        for lr in (0.01, 0.03, 0.1, 0.3, 1, 3, 10)
    ]
    assert ours < 0.02
    assert ours < 0.2 * min(sgd)


def test_sides_without_gradients_and_zeros() -> None:
    a, b = pair()
    optimizer = Spectron([a, b], lr=0.1)
    optimizer.step()
    assert not optimizer.state  # no gradient at all: nothing done
    before = b.detach().clone()
    a.grad = torch.randn_like(a)
    optimizer.step()
    assert torch.equal(b, before) and optimizer.state[a]["momentum"].any()
    a, b = pair()
    nn.init.zeros_(b)  # LoRA's start: no gradient reaches a
    a.grad, b.grad = torch.zeros_like(a), torch.randn_like(b)
    before = a.detach().clone()
    Spectron([a, b], lr=0.1).step()
    assert torch.equal(a, before) and b.isfinite().all() and b.any()
    a.grad[0, 0] = math.nan  # the driver's guard is there to stop these, not the optimizer to hide them
    Spectron([a, b], lr=0.1).step()
    assert a.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    a, b = pair(dtype=dtype)
    optimizer = Spectron([{"params": [a, b], "scales": [0.5]}], lr=0.05)
    grads = [(torch.randn_like(a), torch.randn_like(b)) for _ in range(6)]

    def steps(optimizer: Spectron, sides: tuple[nn.Parameter, ...], grads: list) -> None:
        for g in grads:
            sides[0].grad, sides[1].grad = (t.clone() for t in g)
            optimizer.step()

    steps(optimizer, (a, b), grads[:3])
    state = copy.deepcopy(optimizer.state_dict())
    assert all(v.dtype == torch.float32 for s in state["state"].values() for v in s.values())
    assert {k: set(s) for k, s in state["state"].items()} == {0: {"momentum", "vector"}, 1: {"momentum", "vector"}}
    kept = copy.deepcopy(state)
    c, d = (nn.Parameter(p.detach().clone()) for p in (a, b))
    other = Spectron([{"params": [c, d], "scales": [1.0]}], lr=1.0)
    other.load_state_dict(state)
    torch.manual_seed(99)  # no random numbers are used
    steps(other, (c, d), grads[3:])
    for k, saved in kept["state"].items():  # what was given isn't written to
        assert all(torch.equal(v, state["state"][k][name]) for name, v in saved.items())
    torch.manual_seed(5)
    steps(optimizer, (a, b), grads[3:])
    assert torch.equal(a, c) and torch.equal(b, d) and a.dtype == dtype
    for p, q in ((a, c), (b, d)):
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[q][name]) and value.dtype == torch.float32


def test_what_is_no_pair_is_refused() -> None:
    a, b = pair()
    with pytest.raises(TrainError, match=r"in turn, and got \[\(6, 40\)\]"):
        Spectron([a])
    with pytest.raises(TrainError, match="in turn"):
        Spectron([b, a])
    with pytest.raises(TrainError, match="2 scales for 1 pairs"):
        Spectron([{"params": [a, b], "scales": [1.0, 1.0]}])


def test_a_closure_is_evaluated_with_gradients() -> None:
    a, b = pair()

    def closure() -> torch.Tensor:
        loss = (b @ a).square().sum()
        loss.backward()
        return loss

    before = a.detach().clone()
    assert Spectron([a, b], lr=0.1).step(closure).requires_grad
    assert not torch.equal(a, before)
