"""Nearest vectors by cosine, with FAISS (an optional library)."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np

LINKS = 32  # of a node of HNSW
EXACT = 200_000  # vectors up to which the search is exact
BATCH = 4096  # queries, or vectors, at a time


def is_faiss_available() -> bool:
    """Returns whether vectors can be indexed."""
    return importlib.util.find_spec("faiss") is not None


def new_index(kind: str, width: int) -> Any:
    """Returns an empty FAISS index of float32 vectors by inner product, `flat` (exact) or `hnsw`."""
    import faiss

    if kind == "hnsw":
        return faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
    return faiss.IndexFlatIP(width)


def index_of(vectors: np.ndarray) -> Any:
    """Returns a FAISS index of unit vectors, (N, D) of any float dtype: exact for up to 200,000 of them.

    Raises:
        ModuleNotFoundError: faiss is not installed.
    """
    if not is_faiss_available():
        raise ModuleNotFoundError(
            "The index needs faiss; install it with: pip install -c constraints.txt -e '.[search]'"
        )
    index = new_index("flat" if len(vectors) <= EXACT else "hnsw", vectors.shape[1])
    for start in range(0, len(vectors), BATCH):
        index.add(np.ascontiguousarray(vectors[start : start + BATCH], np.float32))
    return index


def search(index: Any, queries: np.ndarray, k: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields batches of results: number of the first query, cosines and positions, each (queries, k), best first."""
    for start in range(0, len(queries), BATCH):
        yield start, *index.search(np.ascontiguousarray(queries[start : start + BATCH], np.float32), k)
