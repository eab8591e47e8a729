"""Shuffles that are functions of (seed, epoch) alone: nothing to save, and the same with every version of every library.

Built on the finaliser of SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195), a bijective mixer of 64 bits.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def key(*numbers: int) -> int:
    """64 bits that depend on all of these integers and their order."""
    state = 0
    for n in numbers:
        state = int(mix(np.array([(state + _GOLDEN + (n & _WORD)) & _WORD], np.uint64))[0])
    return state


def mix(x: np.ndarray) -> np.ndarray:
    """The mixer, element by element; uint64 of any shape."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(n: int, key: int) -> np.ndarray:
    """A permutation of range(n) as a whole, int64 (n,): for what is looked up all over anyway, such as documents."""
    # The mixer is bijective, so no two elements tie.
    return np.argsort(mix(np.arange(n, dtype=np.uint64) ^ np.uint64(key)))


def place(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a permutation of range(n) sends these indices, in constant memory.

    A Feistel network over the next even number of bits, walked until it lands below n again (cycle walking: Black and
    Rogaway 2002, doi 10.1007/3-540-45760-7_9): below four steps on average.

    Args:
        index: integers in [0, n), any shape.
        n: at least 1.
        key: which permutation; see `key`.

    Returns:
        int64, the same shape.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) ^ np.uint64(key))

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> shift, x & low
        for k in keys:
            left, right = right, left ^ (mix(right ^ k) & low)
        return (left << shift) | right

    out = encrypt(np.asarray(index).astype(np.uint64).reshape(-1))
    while (outside := out >= n).any():
        out[outside] = encrypt(out[outside])
    return out.astype(np.int64).reshape(np.shape(index))
