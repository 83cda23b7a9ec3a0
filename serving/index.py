"""Builds a FAISS index of embedded vectors.

    python -m vipolyqwen.serving.index DIR [--kind flat|hnsw|binary]

DIR is what embed_vipolyqwen.py wrote; the index goes to DIR/index. `flat` is exact; `hnsw` is approximate and fast
beyond some 100,000 rows; `binary` searches one bit a dimension and scores the best candidates again with int8 vectors
from the disk. Needs the extra `search`: pip install -c constraints.txt -e '.[search]'
"""

import argparse
import json
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.atomic import UNFINISHED, flush_file, flush_folder
from ..data.command_line import run_command
from ..data.folder_lock import lock_folder
from ..data.nearest import new_index
from ..data.precision import pack, unpack
from ..data.units import digest
from .shards import AnotherModelError, count_rows, mark_of, read_manifest, read_shards, shard_key, shard_names

try:
    import faiss
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The index needs faiss; install it with: pip install -c constraints.txt -e '.[search]'"
    ) from error

KINDS = ("flat", "hnsw", "binary")
INDEX, SETTINGS, FAISS_FILE, IDS_FILE, RESCORE_FILE = "index", "index.json", "vectors.faiss", "ids.parquet", "int8.npy"
UNIT = 1e-3  # limit of |length - 1| of a query; its scores would be no cosines
CANDIDATES = 10  # times k, that are scored again or visited


@dataclass(frozen=True)
class VectorIndex:
    """An index that was read.

    Attributes:
        settings: fingerprint, kind, dimensions, precision and prompt of its vectors.
        faiss_index: the index.
        ids: id of each row.
        rescore: (rows, dimensions) int8 on disk, for `binary` where the shards hold more than bits; else `None`.
    """

    settings: dict[str, Any]
    faiss_index: Any
    ids: pa.ChunkedArray
    rescore: np.ndarray | None

    def search(self, queries: np.ndarray, k: int = 10) -> tuple[np.ndarray, list[list[str]]]:
        """Finds the nearest rows.

        Args:
            queries: (queries, dimensions) float32, unit vectors.
            k: rows for each query; fewer if the index has fewer.

        Returns:
            Cosines, (queries, k) float32 in descending order, and the ids.

        Raises:
            ValueError: the queries have another number of dimensions or are no unit vectors, or k is below 1.
        """
        width = self.settings["dimensions"]
        if queries.ndim != 2 or queries.shape[1] != width:
            raise ValueError(f"The queries have shape {queries.shape}; the index needs (queries, {width}).")
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1.")
        norms = np.linalg.norm(queries, axis=1)
        if not np.all(np.abs(norms - 1) < UNIT):
            worst = float(norms[np.argmax(np.where(np.isfinite(norms), np.abs(norms - 1), np.inf))])
            raise ValueError(f"A query has length {worst:g}; it must be 1: normalise, also after truncation.")
        k = min(k, len(self.ids))
        queries = np.ascontiguousarray(queries, np.float32)
        scores, rows = self._search_bits(queries, k) if self.settings["kind"] == "binary" else self._search(queries, k)
        return scores, [[self.ids[int(row)].as_py() for row in of_query if row >= 0] for of_query in rows]

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self.settings["kind"] == "hnsw":
            self.faiss_index.hnsw.efSearch = max(64, CANDIDATES * k)
        return self.faiss_index.search(queries, k)

    def _search_bits(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds candidates by Hamming distance and scores them again with the queries in float32."""
        count = min(CANDIDATES * k, len(self.ids))
        _, candidates = self.faiss_index.search(pack(queries, "binary")[0], count)
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        for number, (query, of_query) in enumerate(zip(queries, candidates, strict=True)):
            found = self._stored(np.sort(of_query)) @ query
            best = np.argsort(-found, kind="stable")[:k]
            scores[number], rows[number] = found[best], np.sort(of_query)[best]
        return scores, rows

    def _stored(self, rows: np.ndarray) -> np.ndarray:
        if self.rescore is not None:
            return unpack(self.rescore[rows], "int8")
        bits = np.stack([self.faiss_index.reconstruct(int(row)) for row in rows])
        return unpack(bits, "binary")


def build_index(folder: Path, kind: str = "flat") -> dict[str, Any]:
    """Builds the index of a folder's vectors in `folder/index`, in place of an earlier one.

    Shards that a run adds meanwhile are left out, and the index is then refused as older than its vectors.

    Returns:
        The settings of the index.

    Raises:
        ValueError: the folder has no vectors, a shard is damaged or of other settings, or the kind does not fit.
        FolderInUseError: another process of this machine builds the index.
        OSError: the index cannot be written; an earlier one stays as it was.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}.")
    manifest = read_manifest(folder)
    with lock_folder(folder, "vipolyqwen.serving.index", f"_index-{socket.gethostname()}.lock"):
        return _build(folder, kind, manifest, shard_names(folder))


def _build(folder: Path, kind: str, manifest: dict[str, Any], names: list[str]) -> dict[str, Any]:
    rows = count_rows(folder, names)
    if rows == 0:
        raise ValueError(f"{folder} has no vectors; embed some with embed_vipolyqwen.py first.")
    if manifest["precision"] == "binary" and kind != "binary":
        raise ValueError(f"{folder} holds binary vectors, so kind must be binary, not {kind!r}.")
    if kind == "binary" and manifest["dimensions"] % 8:
        width = manifest["dimensions"]
        raise ValueError(f"{folder} has vectors of {width} dimensions; binary needs a multiple of 8: choose flat.")
    written = folder / UNFINISHED / INDEX
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    kept = ("model", "fingerprint", "dimensions", "precision", "prompt_name", "prompt")
    settings = {"kind": kind, "rows": rows, "shards": shards_mark(folder, names)}
    settings |= {name: manifest.get(name) for name in kept}
    try:
        _write_vectors(folder, written, settings, names)
        (written / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for path in written.iterdir():
            flush_file(path)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)  # a disk that is full would stay so
        raise
    shutil.rmtree(folder / INDEX, ignore_errors=True)
    written.rename(folder / INDEX)
    flush_folder(folder)
    return settings


def shards_mark(folder: Path, names: Sequence[str]) -> str:
    """Returns a hash of the manifest and of the names and keys of shards: whether an index is of these vectors."""
    keys = "\n".join(f"{name} {shard_key(folder, name)}" for name in names)
    return digest(f"{mark_of(read_manifest(folder))}\n{keys}")


def _write_vectors(folder: Path, written: Path, settings: dict[str, Any], names: list[str]) -> None:
    """Writes FAISS's file, the ids and the int8 vectors, one shard after the other."""
    width, precision, is_binary = settings["dimensions"], settings["precision"], settings["kind"] == "binary"
    index = _new_index(settings["kind"], width)
    rescore = None
    if is_binary and precision != "binary":
        shape = (settings["rows"], width)
        rescore = np.lib.format.open_memmap(written / RESCORE_FILE, mode="w+", dtype=np.int8, shape=shape)
    with pq.ParquetWriter(written / IDS_FILE, pa.schema([("id", pa.string())])) as ids_file:
        for ids, stored in read_shards(folder, names):
            vectors = unpack(stored, precision)
            if rescore is not None:
                rescore[index.ntotal : index.ntotal + len(ids)] = pack(vectors, "int8")[0]
            index.add(pack(vectors, "binary")[0] if is_binary else vectors)
            ids_file.write_table(pa.table({"id": pa.array(ids, pa.string())}))
    if rescore is not None:
        rescore.flush()
    write = faiss.write_index_binary if is_binary else faiss.write_index
    try:
        write(index, str(written / FAISS_FILE))
    except RuntimeError as error:
        raise OSError(f"{written / FAISS_FILE} cannot be written: {error}. Is the disk full?") from error


def _new_index(kind: str, width: int) -> Any:
    if kind == "binary":
        return faiss.IndexBinaryFlat(width)
    return new_index(kind, width)


def read_index(folder: str | Path, fingerprint: str | None = None) -> VectorIndex:
    """Reads the index of a folder.

    Args:
        folder: the folder of the vectors.
        fingerprint: that of the model which embeds the queries; `None` does not compare.

    Raises:
        AnotherModelError: the index is of another model.
        ValueError: the folder has no index, or the vectors changed since it was built.
    """
    folder = Path(folder)
    path = folder / INDEX
    remedy = f"build it with: python -m vipolyqwen.serving.index {folder}"
    if not (path / SETTINGS).is_file():
        raise ValueError(f"{folder} has no index; {remedy}")
    settings = _opened(path / SETTINGS, lambda file: json.loads(file.read_text(encoding="utf-8")), remedy)
    if fingerprint is not None and settings["fingerprint"] != fingerprint:
        raise AnotherModelError(
            f"The vectors in {folder} are of the model {settings['model']!r} with fingerprint "
            f"{settings['fingerprint']}; the queries' model has {fingerprint}. Use that model, or embed again."
        )
    if settings["shards"] != shards_mark(folder, shard_names(folder)):
        raise ValueError(f"The vectors in {folder} changed since the index was built; {remedy}")
    read = faiss.read_index_binary if settings["kind"] == "binary" else faiss.read_index
    rescore = None
    if settings["kind"] == "binary" and settings["precision"] != "binary":
        rescore = _opened(path / RESCORE_FILE, lambda file: np.load(file, mmap_mode="r"), remedy)
    return VectorIndex(
        settings,
        _opened(path / FAISS_FILE, lambda file: read(str(file)), remedy),
        _opened(path / IDS_FILE, pq.read_table, remedy)["id"],
        rescore,
    )


def _opened(path: Path, read: Callable[[Path], Any], remedy: str) -> Any:
    """Reads a file of an index; a damaged or missing one is a ValueError that names it."""
    try:
        return read(path)
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {str(error)[:200]}; {remedy}") from error


def main(argv: list[str] | None = None) -> int:
    """Builds the index; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vipolyqwen.serving.index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="folder that embed_vipolyqwen.py wrote")
    parser.add_argument("--kind", choices=KINDS, default="flat", help="default: flat")
    options = parser.parse_args(argv)
    settings = build_index(options.folder, options.kind)
    size = f"{settings['rows']:,} vectors of {settings['dimensions']} dimensions"
    print(f"{options.folder / INDEX}: {size}, {options.kind}")
    return 0


if __name__ == "__main__":
    run_command(main)
