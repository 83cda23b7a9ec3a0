"""A cache on disk of vectors of texts, by the content of the text; grows in parts, so that a killed run resumes."""

import bisect
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .atomic import write_atomically


class VectorCache:
    """Vectors of one width by 64-bit content key, read from disk as they are needed.

    Each part is two files, `vectors-NAME.npy`, (n, W) float32, and then `keys-NAME.npy`, (n,) int64, which completes
    it. Several ranks may add parts at the same time; `reload` shows a rank those of the others.

    Args:
        folder: folder of the parts; created when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reload()

    def reload(self) -> None:
        """Opens all complete parts."""
        files = sorted(self.folder.glob("keys-*.npy"))
        keys = [np.load(file) for file in files]
        self._parts = [np.load(file.with_name(file.name.replace("keys-", "vectors-", 1)), "r") for file in files]
        self._ends = np.cumsum([len(part) for part in keys]).tolist()
        joined = np.concatenate(keys) if keys else np.empty(0, np.int64)
        self._order = np.argsort(joined, kind="stable")
        self._keys = joined[self._order]

    @property
    def width(self) -> int:
        """W; 0 while the cache is empty."""
        return self._parts[0].shape[1] if self._parts else 0

    def lacks(self, keys: np.ndarray) -> np.ndarray:
        """Returns which of (n,) int64 keys have no vector, (n,) bool."""
        return ~np.isin(keys, self._keys)

    def add(self, keys: Iterable[int], vectors: np.ndarray) -> None:
        """Writes (n, W) float32 vectors as one part; `reload` makes them readable."""
        stored = np.array(list(keys), np.int64)
        name = hashlib.blake2b(stored.tobytes(), digest_size=16).hexdigest()
        for kind, values in (("vectors", vectors.astype(np.float32)), ("keys", stored)):
            write_atomically(self.folder / f"{kind}-{name}.npy", lambda path, values=values: np.save(path, values))

    def find(self, key: int) -> np.ndarray | None:
        """Returns the vector of a key, (W,) float32, or `None` if the cache has none."""
        position = int(np.searchsorted(self._keys, key))
        if position == len(self._keys) or self._keys[position] != key:
            return None
        index = int(self._order[position])
        part = bisect.bisect_right(self._ends, index)
        return np.array(self._parts[part][index - (self._ends[part] - len(self._parts[part]))])

    def __getstate__(self) -> Path:
        """Pickles the folder, not the vectors, for workers of a data loader."""
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        """Opens the parts again."""
        self.__init__(folder)
