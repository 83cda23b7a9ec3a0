"""Vectors on disk: one Parquet file a unit, a manifest that says which model made them, and the bad rows.

DIR/manifest.json            the model's fingerprint, prompt, dtype, precision, dimensions, versions
DIR/vectors/NAME.parquet     id, vector, for int8 also scale
DIR/errors.parquet/          id, file, row, error of the rows without vector: a folder that readers take for a file
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.atomic import write_atomically
from ..data.precision import unpack
from ..data.units import digest

MANIFEST = "manifest.json"
VECTORS, ERRORS = "vectors", "errors.parquet"
FOREIGN = ("config.json", "adapter_config.json", "*.safetensors", "checkpoint-*", "trainer_state.json")
KEY = b"vipolyqwen.unit"  # of a file's metadata: the unit's key
MARK = b"vipolyqwen.vectors"  # of a file's metadata: mark of the manifest that its vectors were made by
NEEDED = ("fingerprint", "dimensions", "precision")  # of a manifest
# Components do not compress, and nobody asks for their smallest and largest.
FORMAT: dict[str, Any] = {"use_dictionary": False, "compression": {"id": "snappy"}, "write_statistics": ["id"]}
ERROR_SCHEMA = pa.schema([("id", pa.string()), ("file", pa.string()), ("row", pa.int64()), ("error", pa.string())])


class AnotherModelError(ValueError):
    """Vectors on disk and those to be added, or compared with them, are not of one kind."""


def open_folder(folder: Path, manifest: Mapping[str, Any], writer: str = "") -> None:
    """Writes the manifest of a new folder, or compares it with that of an existing one.

    Args:
        folder: where the vectors go.
        manifest: `versions` may differ between runs, everything else may not.
        writer: see `write_atomically`.

    Raises:
        AnotherModelError: the folder holds other vectors; names what differs.
    """
    path = folder / MANIFEST
    if not path.exists():
        if (folder / VECTORS).exists():
            raise AnotherModelError(f"{folder} holds vectors but no {MANIFEST}; choose another folder.")
        if foreign := sorted(found.name for name in FOREIGN for found in folder.glob(name)):
            raise AnotherModelError(f"{folder} holds a model or a run ({foreign[0]}); choose another folder.")
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"), writer)
    written = read_manifest(folder)
    changes = [
        f"{name} is {written.get(name)!r} there and {manifest.get(name)!r} now"
        for name in dict.fromkeys([*manifest, *written])
        if name != "versions" and written.get(name) != manifest.get(name)
    ]
    if changes:
        raise AnotherModelError(f"{folder} holds other vectors: {'; '.join(changes)}. Choose another folder.")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a folder.

    Raises:
        ValueError: the folder has none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {MANIFEST}; name a folder that embed_vipolyqwen.py wrote.") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Restore it, or embed again into another folder.") from error
    if not isinstance(manifest, dict) or (missing := [name for name in NEEDED if name not in manifest]):
        lacks = f"lacks {', '.join(missing)}" if isinstance(manifest, dict) else "is no object"
        raise ValueError(f"{path} {lacks}, so it is damaged. Restore it, or embed again into another folder.")
    return manifest


def mark_of(manifest: Mapping[str, Any]) -> str:
    """Returns a hash of everything in a manifest on which a vector depends: all but the versions of libraries."""
    kept = {name: value for name, value in manifest.items() if name != "versions"}
    return digest(json.dumps(kept, sort_keys=True))


def write_shard(
    folder: Path, name: str, key: str, ids: list[str], vectors: np.ndarray, scales: np.ndarray | None
) -> None:
    """Writes the vectors of a unit, atomically, with the mark of the folder's manifest.

    Args:
        folder: folder of the manifest.
        name: name of the unit.
        key: key of the unit.
        ids: ids of the rows.
        vectors: (rows, components) float32, float16, int8, or bits as uint8.
        scales: (rows,) float32 of int8 vectors.
    """
    values = pa.array(np.ascontiguousarray(vectors).ravel())
    columns = {"id": pa.array(ids, pa.string()), "vector": pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])}
    if scales is not None:
        columns["scale"] = pa.array(scales)
    marks = {KEY: key.encode(), MARK: mark_of(read_manifest(folder)).encode()}
    table = pa.table(columns).replace_schema_metadata(marks)
    write_atomically(shard_path(folder, name), lambda path: pq.write_table(table, path, **FORMAT))


def shard_path(folder: Path, name: str) -> Path:
    """Returns the file of a unit's vectors."""
    return folder / VECTORS / f"{name}.parquet"


def write_errors(folder: Path, name: str, errors: list[dict[str, Any]]) -> None:
    """Writes the bad rows of a unit, atomically; without any, removes those of an earlier run."""
    path = folder / ERRORS / f"{name}.parquet"
    if errors:
        table = pa.Table.from_pylist(errors, schema=ERROR_SCHEMA)
        write_atomically(path, lambda unfinished: pq.write_table(table, unfinished))
    else:
        path.unlink(missing_ok=True)


def shard_key(folder: Path, name: str) -> str | None:
    """Returns the key with which a unit was written; `None` if it was not, or its file is damaged.

    Raises:
        AnotherModelError: the file was written by other settings than those of the manifest.
    """
    path = shard_path(folder, name)
    try:
        schema = pq.read_schema(path)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    _check_mark(path, schema.metadata)
    return schema.metadata[KEY].decode()


def _check_mark(path: Path, metadata: Mapping[bytes, bytes] | None) -> None:
    """Raises an AnotherModelError unless a shard was written with the manifest of its folder."""
    found, expected = (metadata or {}).get(MARK), mark_of(read_manifest(path.parent.parent))
    if found != expected.encode() or KEY not in (metadata or {}):
        of = "no mark" if found is None else f"the mark {found.decode(errors='replace')}"
        raise AnotherModelError(
            f"{path} has {of}, but the {MANIFEST} of its folder {expected}: its vectors were made by another model or "
            "with other settings. Remove the file, or restore the manifest."
        )


def shard_names(folder: Path) -> list[str]:
    """Returns the units that were written, in order."""
    return sorted(path.stem for path in (folder / VECTORS).glob("*.parquet"))


def count_rows(folder: Path, names: Sequence[str] | None = None) -> int:
    """Returns the number of vectors of shards, by default of all, by their metadata."""
    names = shard_names(folder) if names is None else names
    return sum(_opened(shard_path(folder, name), pq.read_metadata).num_rows for name in names)


def read_shards(folder: Path, names: Sequence[str] | None = None) -> Iterator[tuple[list[str], np.ndarray]]:
    """Returns ids and stored vectors, (rows, components), of one shard after the other, in order of their names.

    Args:
        folder: folder of the manifest.
        names: shards to read; `None` for all.

    Raises:
        AnotherModelError: a shard was written by other settings than those of the manifest.
        ValueError: a shard is damaged.
    """
    for name in shard_names(folder) if names is None else names:
        path = shard_path(folder, name)
        table = _opened(path, pq.read_table)
        _check_mark(path, table.schema.metadata)
        vectors = table["vector"].combine_chunks()
        width = vectors.type.list_size
        yield table["id"].to_pylist(), vectors.values.to_numpy(zero_copy_only=False).reshape(-1, width)


def _opened(path: Path, read: Callable[[Path], Any]) -> Any:
    """Reads a shard; a damaged one is a ValueError that names it."""
    try:
        return read(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. Run embed_vipolyqwen.py again, which writes it anew."
        ) from error


def read_vectors(folder: str | Path) -> tuple[list[str], np.ndarray]:
    """Returns all ids and (rows, dimensions) float32 unit vectors of a folder."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    ids: list[str] = []
    parts = [np.zeros((0, manifest["dimensions"]), np.float32)]
    for of_shard, stored in read_shards(folder):
        ids.extend(of_shard)
        parts.append(unpack(stored, manifest["precision"]))
    return ids, np.concatenate(parts)
