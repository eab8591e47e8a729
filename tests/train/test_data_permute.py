"""Permutations that are a function of a key."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lrcompile.train.data.permute import key, place, shuffled


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_both_are_bijections(n: int, k: int) -> None:
    everything = np.arange(n)
    assert np.array_equal(np.sort(place(everything, n, k)), everything)
    assert np.array_equal(np.sort(shuffled(n, k)), everything)


@given(st.integers(2**33, 2**60), st.integers(0, 2**64 - 1))
def test_a_place_among_very_many_is_found_without_listing_them(n: int, k: int) -> None:
    some = np.array([0, 1, n // 2, n - 1])
    found = place(some, n, k)
    assert len(set(found.tolist())) == 4 and (found >= 0).all() and (found < n).all()


def test_orders_are_what_they_were() -> None:
    """A run that goes on after an upgrade must see the same batches."""
    assert key(0) == 0xE220A8397B1DCDAF  # SplitMix64 started at 0, its first number
    assert place(np.arange(8), 8, key(1, 2, 3)).tolist() == [0, 6, 1, 5, 7, 3, 2, 4]
    assert shuffled(8, key(1, 2, 3)).tolist() == [0, 6, 7, 3, 2, 4, 1, 5]


def test_keys_and_neighbours_give_unlike_orders() -> None:
    n = 10_000
    orders = [place(np.arange(n), n, key(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    orders += [shuffled(n, key(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.05  # 5 standard deviations of a random order
        # One fixed point is expected of a random pair; 10 or more have a probability of 1e-7.
        assert all((a == b).sum() < 10 for b in orders[:i])
    assert key(1, 2) != key(2, 1)
