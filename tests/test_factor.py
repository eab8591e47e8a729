"""The truncated SVD behind every pair, against torch.linalg.svd in float64."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrcompile.errors import AdoptError
from lrcompile.kernels import lowrank_linear
from lrcompile.weights.factor import singular_values
from lrcompile.weights.initialise import Start

from .helpers import svd_pair

METHODS = ["full", "randomized"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum(out: int, into: int, values: Tensor) -> Tensor:
    """A random (out, into) matrix with these singular values, float64."""
    n = min(out, into)
    u = torch.linalg.qr(torch.randn(out, n, generator=seeded(1), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(into, n, generator=seeded(2), dtype=torch.float64)).Q
    return (u * values.double()) @ v.T


def flat(out: int = 192, into: int = 256) -> Tensor:
    return torch.randn(out, into, generator=seeded(), dtype=torch.float64)


def power_law(out: int = 192, into: int = 256) -> Tensor:
    return spectrum(out, into, torch.arange(1, min(out, into) + 1) ** -0.8)


def low_rank(out: int = 192, into: int = 256) -> Tensor:
    """Sixteen large directions over a floor of noise."""
    values = torch.full((min(out, into),), 0.01)
    values[:16] = torch.linspace(10, 1, 16)
    return spectrum(out, into, values)


def optimal_error(w: Tensor, rank: int) -> float:
    s = torch.linalg.svdvals(w.double())
    return float(s[rank:].norm() / s.norm())


def true_error(w: Tensor, pair: Start) -> float:
    w = w.double()
    return float((w - pair.weight_b.double() @ pair.weight_a.double()).norm() / w.norm())


@pytest.mark.parametrize("make", [flat, power_law, low_rank])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64)])
@pytest.mark.parametrize("rank", [1, 20, 48])
def test_full_is_optimal(make, shape, rank):
    w = make(*shape).float()
    pair = svd_pair(w, rank, "full")
    assert pair.weight_a.shape == (rank, shape[1]) and pair.weight_b.shape == (shape[0], rank)
    assert pair.weight_a.dtype == pair.weight_b.dtype == torch.float32
    best = optimal_error(w, rank)
    # The factors are stored in float32, whose rounding is all that is left at full rank.
    assert true_error(w, pair) <= best * (1 + 1e-6) + 2e-7
    assert pair.error == pytest.approx(best, rel=1e-6, abs=2e-7)


@pytest.mark.parametrize("make", [flat, power_law, low_rank])
@pytest.mark.parametrize("shape", [(192, 256), (256, 192)])
@pytest.mark.parametrize("rank", [4, 16, 48])
def test_randomized_is_within_one_percent(make, shape, rank):
    w = make(*shape).float()
    pair = svd_pair(w, rank, "randomized")
    assert true_error(w, pair) <= 1.01 * optimal_error(w, rank) + 1e-6
    assert pair.error == pytest.approx(true_error(w, pair), rel=1e-5, abs=1e-6)


def test_auto_picks_the_sketch_for_a_small_rank_of_a_large_matrix_only():
    large = torch.randn(1024, 1100, generator=seeded())
    assert torch.equal(svd_pair(large, 32).weight_a, svd_pair(large, 32, "randomized").weight_a)
    small = large[:200, :300].contiguous()
    assert torch.equal(svd_pair(small, 32).weight_a, svd_pair(small, 32, "full").weight_a)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_both_sides_carry_the_root_of_sigma(method, shape):
    w = power_law(*shape)
    pair = svd_pair(w, 12, method)
    sigma = torch.linalg.svdvals(w)[:12]
    for gram in (pair.weight_a @ pair.weight_a.T, pair.weight_b.T @ pair.weight_b):
        torch.testing.assert_close(gram.double(), torch.diag(sigma), rtol=1e-3, atol=1e-4 * float(sigma[0]))


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_of_low_rank_is_reproduced_and_has_no_dead_pair(method):
    w = spectrum(40, 60, torch.cat([torch.linspace(5, 1, 6), torch.zeros(34)])).float()
    pair = svd_pair(w, 20, method)
    assert true_error(w, pair) < 1e-5 and pair.error < 1e-5
    _no_dead_pair(pair)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (5, 5), (1, 7)])
def test_zero_stays_zero_and_can_learn(method, shape):
    pair = svd_pair(torch.zeros(shape), min(shape), method)
    assert torch.equal(pair.weight_b @ pair.weight_a, torch.zeros(shape)) and pair.error == 0
    _no_dead_pair(pair)


def _no_dead_pair(pair: Start) -> None:
    """For each of the rank directions at least one side is alive, so that the other gets a gradient."""
    assert torch.isfinite(pair.weight_a).all() and torch.isfinite(pair.weight_b).all()
    assert bool(((pair.weight_a != 0).any(1) | (pair.weight_b != 0).any(0)).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_huge_and_tiny_numbers(method, scale, dtype):
    w = (power_law(64, 80) * scale).to(dtype)
    pair = svd_pair(w, 16, method)
    assert pair.weight_a.dtype == dtype
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
    # Measured after taking the scale out: the square of 1e30 is no float32, but it is a float64.
    assert true_error(w, pair) == pytest.approx(optimal_error(w, 16), abs=rounding)
    assert pair.error == pytest.approx(optimal_error(w, 16), rel=1e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("magnitude", [6e4, 1e-6])
def test_float16_at_the_ends_of_its_range(method, magnitude):
    w = power_law(64, 80)
    w = (w / w.abs().max() * magnitude).half()
    pair = svd_pair(w, 16, method)
    assert torch.isfinite(pair.weight_a).all() and torch.isfinite(pair.weight_b).all()
    assert true_error(w, pair) == pytest.approx(optimal_error(w, 16), abs=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_weights(method, dtype):
    w = flat(96, 128).to(dtype)
    pair = svd_pair(w, 24, method)
    assert pair.weight_a.dtype == pair.weight_b.dtype == dtype
    assert true_error(w, pair) <= 1.02 * optimal_error(w, 24)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_rank_reproduces_an_ill_conditioned_matrix_to_rounding(condition, dtype):
    n = 48
    w = spectrum(n, 64, torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64))
    w = w.to(dtype)
    pair = svd_pair(w, n, "full")
    gap = (w.double() - pair.weight_b.double() @ pair.weight_a.double()).norm() / w.double().norm()
    assert float(gap) < {torch.float32: 3e-7, torch.float64: 1e-13}[dtype]


def test_rank_one_of_a_vector():
    w = torch.randn(1, 9, generator=seeded())
    assert true_error(w, svd_pair(w, 1)) < 1e-6
    assert true_error(w.T, svd_pair(w.T, 1)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_no_alias_and_the_weight_untouched(method):
    w = torch.randn(8, 6, generator=seeded()).requires_grad_()
    before = w.detach().clone()
    pair = svd_pair(w, 6, method)
    assert not pair.weight_a.requires_grad and pair.weight_a.is_contiguous() and pair.weight_b.is_contiguous()
    assert torch.equal(w.detach(), before)


@pytest.mark.parametrize("method", METHODS)
def test_the_random_stream_of_the_user_is_untouched_and_the_result_repeats(method):
    w = flat(64, 96).float()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = svd_pair(w, 8, method)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert torch.equal(svd_pair(w, 8, method).weight_a, first.weight_a)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_are_refused_by_name(bad, dtype):
    w = torch.ones(4, 5, dtype=dtype)
    w[1, 2] = bad
    with pytest.raises(AdoptError, match=r"blocks\.3\.up\.weight holds 1 NaN or Inf.*exclude"):
        svd_pair(w, 2, name="blocks.3.up.weight")


def test_singular_values():
    for w in (power_law(40, 60), power_law(60, 40), low_rank(30, 30)):
        torch.testing.assert_close(singular_values(w), torch.linalg.svdvals(w), rtol=1e-6, atol=1e-7)
    assert singular_values(torch.zeros(3, 4)).tolist() == [0, 0, 0]
    assert torch.isfinite(singular_values(flat(8, 9).float() * 1e30)).all()


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 40),
    into=st.integers(1, 40),
    share=st.floats(0, 1),
    kind=st.sampled_from(["flat", "zero rows", "repeated", "scaled"]),
    seed=st.integers(0, 1000),
    method=st.sampled_from(METHODS),
)
def test_any_shape(out, into, share, kind, seed, method):
    w = torch.randn(out, into, generator=seeded(seed))
    if kind == "zero rows":
        w[: out // 2] = 0
    elif kind == "repeated":
        w[:] = w[:1].clone()
    elif kind == "scaled":
        w *= torch.logspace(-3, 3, out)[:, None]
    rank = max(1, round(share * min(out, into)))
    pair = svd_pair(w, rank, method)
    assert pair.weight_a.shape == (rank, into) and pair.weight_b.shape == (out, rank)
    total = float(w.double().norm())
    if total:
        # The sketch is taken wider than such small matrices: it is as good as the full decomposition, to float32.
        assert true_error(w, pair) <= optimal_error(w, rank) * (1 + 1e-3) + 2e-6
    _no_dead_pair(pair)


# --- shapes are checked at run time -----------------------------------------------------------------------------------


def test_a_wrong_shape_is_caught():
    with pytest.raises(jaxtyping.TypeCheckError, match="weight"):
        svd_pair(torch.randn(2, 3, 4), 1)
    with pytest.raises(jaxtyping.TypeCheckError):
        singular_values(torch.randn(5))
    with pytest.raises(jaxtyping.TypeCheckError):
        svd_pair(torch.ones(3, 4, dtype=torch.int64), 1)
    with pytest.raises(jaxtyping.TypeCheckError):  # the two sides of a pair share a rank
        Start(torch.zeros(3, 8), torch.zeros(8, 2), None, None, 0.0, None)


def test_the_kernels_reference_is_checked_too():
    # Dynamo traces this function, so the import hook leaves it alone; here it is wrapped by hand.
    from beartype import beartype

    checked = jaxtyping.jaxtyped(typechecker=beartype)(lowrank_linear.reference)
    x, a, b, bias = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(6, 3), torch.randn(6)
    torch.testing.assert_close(checked(x, a, b, bias), x @ (b @ a).T + bias)
    assert checked(x[0, 0], a, b).shape == (6,)
    for wrong in ((x, a, b.T, bias), (x[..., :7], a, b, bias), (x, a, b, bias[:5]), (x.long(), a, b, bias)):
        with pytest.raises(jaxtyping.TypeCheckError):
            checked(*wrong)
