"""Finds near duplicates: images by perceptual hash, texts by MinHash (datasketch, an optional library)."""

import importlib.util
import re
from collections.abc import Iterator, Sequence

import numpy as np

LOOK_BITS = 10  # of 256, in which the hashes of near duplicates differ at most,
LOOK_SHARE = 0.08  # and of the bits set in both on average: a page with one stroke sets few
FEWEST_SET = 24  # bits; an image with fewer shows too little to be compared
BANDS = 16  # of 16 bits: hashes that differ in fewer bits than bands agree on some band
CROWD = 200  # images that agree on a band and are compared with one another
PERMUTATIONS = 64
SIMILAR = 0.8  # estimated Jaccard similarity of the 5-grams of near duplicates
GRAM = 5  # characters
SHORTEST = 20  # characters of a text that is compared; of shorter ones a letter changes the meaning


def is_datasketch_available() -> bool:
    """Returns whether near-duplicate texts can be found."""
    return importlib.util.find_spec("datasketch") is not None


def near_images(looks: np.ndarray) -> list[tuple[int, int]]:
    """Returns the pairs of images that look alike.

    Args:
        looks: (images, 32) uint8, perceptual hashes of distinct files.
    """
    found: set[tuple[int, int]] = set()
    words = np.ascontiguousarray(looks).view(np.uint16)  # (images, 16)
    for band in range(BANDS):
        order = np.argsort(words[:, band], kind="stable")
        edges = np.flatnonzero(np.diff(words[order, band])) + 1
        for crowd in np.split(order, edges):
            if len(crowd) > 1:
                found.update(_close(np.sort(crowd)[:CROWD], looks))
    return sorted(found)


def _close(members: np.ndarray, looks: np.ndarray) -> Iterator[tuple[int, int]]:
    chosen = looks[members]
    differing = np.bitwise_count(chosen[:, None] ^ chosen[None]).sum(axis=2, dtype=np.int32)
    filled = np.bitwise_count(chosen).sum(axis=1, dtype=np.int32)
    limits = np.minimum(LOOK_BITS, LOOK_SHARE * (filled[:, None] + filled[None]) / 2)
    is_near = (differing <= limits) & (np.minimum(filled[:, None], filled[None]) >= FEWEST_SET)
    first, second = np.nonzero(np.triu(is_near, k=1))
    yield from zip(members[first].tolist(), members[second].tolist(), strict=True)


def near_texts(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Returns (earlier, later) positions of texts that nearly agree; each later one is named with its nearest.

    Args:
        texts: distinct texts; those below 20 characters are left out. Only texts without an earlier near one are
            compared with, so that a template of a thousand texts gives a thousand pairs, not a million.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS)
    sketches: dict[int, MinHash] = {}
    found = []
    for number, text in enumerate(texts):
        grams = _grams(text)
        if not grams:
            continue
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([gram.encode() for gram in grams])
        near = [(sketches[other].jaccard(sketch), -other) for other in index.query(sketch)]
        similarity, other = max(near, default=(0.0, 0))
        if similarity >= SIMILAR:
            found.append((-other, number))
        else:
            index.insert(number, sketch, check_duplication=False)
            sketches[number] = sketch
    return found


def _grams(text: str) -> set[str]:
    plain = re.sub(r"\W+", " ", text.casefold()).strip()
    return {plain[start : start + GRAM] for start in range(len(plain) - GRAM + 1)} if len(plain) >= SHORTEST else set()


def clusters(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Returns the connected groups of pairs, each in ascending order, the largest first."""
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for first, second in pairs:
        parent[root(second)] = root(first)
    groups: dict[int, list[int]] = {}
    for node in sorted(parent):
        groups.setdefault(root(node), []).append(node)
    return sorted(groups.values(), key=len, reverse=True)
