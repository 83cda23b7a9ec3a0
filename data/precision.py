"""Dimensions and number formats of stored vectors."""

import numpy as np

PRECISIONS = ("float32", "float16", "int8", "binary")


def shorten(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """Keeps the first `dimensions` components and normalises again, so that dot product and cosine agree.

    Args:
        vectors: (rows, width) float32, unit vectors.
        dimensions: components to keep (Matryoshka, see docs/training.md); `None` keeps all.

    Returns:
        (rows, dimensions) float32, unit vectors.

    Raises:
        ValueError: `dimensions` is not in [1, width].
    """
    check_dimensions(dimensions, vectors.shape[1])
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    kept = vectors[:, :dimensions]
    return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def check_dimensions(dimensions: int | None, width: int) -> None:
    """Raises a ValueError unless vectors of `width` can be shortened to `dimensions`."""
    if dimensions is not None and not 1 <= dimensions <= width:
        raise ValueError(f"dimensions is {dimensions}; the model's vectors have {width}, so choose 1 to {width}.")


def check_precision(precision: str, dimensions: int) -> None:
    """Raises a ValueError unless vectors of so many dimensions can be stored in this format."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if precision == "binary" and dimensions % 8:
        raise ValueError(f"dimensions is {dimensions}; binary vectors need a multiple of 8.")


def pack(vectors: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Converts unit vectors for storage.

    Each int8 vector is scaled by its max |x| / 127, so that no calibration depends on other rows. Bits are 1
    for positive components, eight to a byte, the first in the highest bit (as in sentence-transformers' `ubinary`).

    Args:
        vectors: (rows, dimensions) float32.
        precision: one of `PRECISIONS`.

    Returns:
        (rows, dimensions) float32, float16 or int8, or (rows, dimensions / 8) uint8; and for int8 the scales,
        (rows,) float32.
    """
    check_precision(precision, vectors.shape[1])
    if precision == "binary":
        return np.packbits(vectors > 0, axis=1), None
    if precision == "int8":
        scales = np.maximum(np.abs(vectors).max(axis=1, initial=0), np.finfo(np.float32).tiny) / 127
        return np.rint(vectors / scales[:, None]).astype(np.int8), scales.astype(np.float32)
    return vectors.astype(precision, copy=False), None


def unpack(stored: np.ndarray, precision: str) -> np.ndarray:
    """Converts stored vectors back to (rows, dimensions) float32 unit vectors; bits become ± 1 / √dimensions.

    The scales of int8 are not needed, because the result is normalised.
    """
    if precision == "binary":
        signs = np.unpackbits(stored, axis=1).astype(np.float32) * 2 - 1
        return signs / np.float32(np.sqrt(signs.shape[1]))
    vectors = stored.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
