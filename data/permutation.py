"""Keyed pseudo-random permutations of which any element is computed directly, and keys."""

import numpy as np

ROUNDS = 16  # of the Feistel network; with 8, some orders of five or six elements are too frequent


def permute(index: np.ndarray, length: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns the positions of elements in keyed pseudo-random permutations of [0, length).

    A Feistel network over ⌈√length⌉ × ⌈length / ⌈√length⌉⌉ cells; what falls outside of [0, length) is permuted again
    until it falls inside (Black and Rogaway 2002, generalised Feistel cipher with cycle walking).

    Args:
        index: int64 in [0, length).
        length: int64, size of the permutation; a scalar or one for each index.
        key: uint64, selects the permutation; a scalar or one for each index.

    Returns:
        int64 in [0, length), of the shape of `index`.
    """
    index, length, key = np.broadcast_arrays(index.astype(np.uint64), length.astype(np.uint64), key)
    width = np.ceil(np.sqrt(length)).astype(np.uint64)
    height = (length + width - np.uint64(1)) // width
    placed = index.copy()
    outside = np.ones(index.shape, dtype=bool)
    while outside.any():
        placed[outside] = _feistel(placed[outside], width[outside], height[outside], key[outside])
        outside = placed >= length
    return placed.astype(np.int64)


def _feistel(index: np.ndarray, width: np.ndarray, height: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permutes [0, width · height) by a key, all uint64, shifting both halves in turn."""
    left, right = index % width, index // width
    for number in range(0, ROUNDS, 2):
        left = (left + mix(mix(key + np.uint64(number)) + right) % width) % width
        right = (right + mix(mix(key + np.uint64(number + 1)) + left) % height) % height
    return right * width + left


def mix(x: np.ndarray) -> np.ndarray:
    """Mixes uint64 by SplitMix64 (Steele et al. 2014), a bijection."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*numbers: int) -> np.ndarray:
    """Derives a key from non-negative numbers, (1,) uint64."""
    return np.random.SeedSequence(numbers).generate_state(1, np.uint64)


def draw(key: np.ndarray, count: int) -> np.ndarray:
    """Returns numbers in [0, 1) from a key, (count,) float64."""
    return (mix(key + np.arange(count, dtype=np.uint64)) >> np.uint64(11)) / 2.0**53
