"""Mines hard negatives: wrong answers that a model finds close to side a, of any modality.

OUT/mined/train/000/0000000.arrow   vectors of one unit of source 0, and its sides b: kept for the next run
OUT/train/000/0000000.parquet       the pairs of that unit with `negatives`
OUT/recipe.yaml
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import yaml

from .atomic import write_atomically
from .mining_options import MiningOptions
from .nearest import index_of, search
from .pair_units import PairRow, pair_units
from .prepare import KEPT_KEYS, KEY
from .recipes import SPLITS, DataRecipe, enabled_entries
from .schema import Content
from .sides import Side, side_of
from .units import Unit, digest

Encode = Callable[[Sequence[Side], str, str], np.ndarray]  # sides, task, "a" or "b" -> (N, D) unit vectors
Progress = Callable[[Iterable[Any]], Iterable[Any]]
MINED = "mined"
MEDIA = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CONTENT = [("text", pa.string()), ("images", pa.list_(MEDIA)), ("audio", MEDIA)]
VECTOR = pa.list_(pa.float32())
PAIRS = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "task", "a", "b")),
        *((f"images_{side}", pa.list_(MEDIA)) for side in "ab"),
        *((f"audio_{side}", MEDIA) for side in "ab"),
        ("score", pa.float64()),
        ("group", pa.string()),
        ("negatives", pa.list_(pa.struct(CONTENT))),
        *((f"teacher_{side}", VECTOR) for side in "ab"),
    ]
)
ROOT = os.sep  # paths in the shards are relative to it, so that `media_root` covers all of them


@dataclass
class Pool:
    """The rows of one task of all sources.

    Attributes:
        task: its name.
        rows: (rows,) int64, numbers of the rows in the table of all.
        keys: (rows, 2) int64, content of sides a and b.
        vectors_a: (rows, D) float16.
        vectors_b: likewise.
        groups: of each row, `None` for none.
        scores: likewise.
    """

    task: str
    rows: np.ndarray
    keys: np.ndarray
    vectors_a: np.ndarray
    vectors_b: np.ndarray
    groups: list[str | None]
    scores: list[float | None]


def mine(
    recipe: DataRecipe, out: Path, model: str, encode: Encode, options: MiningOptions, progress: Progress = iter
) -> dict[str, int]:
    """Writes the training pairs of a recipe with hard negatives.

    A unit whose vectors are there is not encoded again. A candidate of a row is any side b of its task, of any source;
    left out are those of rows of its group, or with the same side a or the same side b.

    Args:
        recipe: the recipe; negatives that its rows have are kept, before the mined ones.
        out: folder to write.
        model: name of the model and its state; vectors of another are made again.
        encode: embeds sides.
        options: which candidates become negatives.
        progress: wraps an iterator of units.

    Returns:
        `rows`, `mined` (rows with a mined negative) and `negatives` (mined).

    Raises:
        ValueError: the recipe has no training pairs.
    """
    units = [
        (f"train/{number:03d}/{place:07d}", unit)
        for number, source in enumerate(recipe.sources["train"])
        for place, unit in enumerate(pair_units(source, recipe.tasks, options.unit_rows))
    ]
    if not units:
        raise ValueError("The recipe has no `train_data` to mine negatives for.")
    for name, unit in progress(units):
        _encode_unit(out / MINED / f"{name}.arrow", unit, model, encode)
    table = pa.concat_tables(_mapped(out / MINED / f"{name}.arrow") for name, _ in units)
    chosen: dict[int, list[int]] = {}
    for pool in _pools(table):
        chosen |= mine_pool(pool, options)
    first = 0
    for name, unit in progress(units):
        first = _write_pairs(out / f"{name}.parquet", unit, table, chosen, first)
    _delete_former(out, {name for name, _ in units})
    _write_recipe(out, recipe)
    counts = [len(numbers) for numbers in chosen.values()]
    return {"rows": first, "mined": sum(map(bool, counts)), "negatives": sum(counts)}


def mine_pool(pool: Pool, options: MiningOptions) -> dict[int, list[int]]:
    """Returns row number -> row numbers whose side b is a hard negative of it, nearest first."""
    _, distinct, of_row = np.unique(pool.keys[:, 1], return_index=True, return_inverse=True)
    candidates = pool.vectors_b[distinct]
    excluded = _Exclusions(pool, of_row)
    positives = np.einsum("nd,nd->n", pool.vectors_a.astype(np.float32), pool.vectors_b.astype(np.float32))
    chosen: dict[int, list[int]] = {}
    for first, cosines, found in search(index_of(candidates), pool.vectors_a, min(options.within, len(candidates))):
        for place, (near, scores) in enumerate(zip(found, cosines, strict=True), start=first):
            score = pool.scores[place]
            if score is not None and score < options.min_score:
                continue
            near, scores = near[options.skip :], scores[options.skip :]
            kept = near[(near >= 0) & (scores <= positives[place] - options.margin)]
            kept = np.array([each for each in kept.tolist() if each not in excluded.of(place)], np.int64)
            alike = candidates[kept].astype(np.float32) @ pool.vectors_b[place].astype(np.float32)
            numbers = kept[alike < options.same][: options.count]
            chosen[int(pool.rows[place])] = pool.rows[distinct[numbers]].tolist()
    return chosen


class _Exclusions:
    """The candidates that may be right answers of a row: of its group, or with its side a."""

    def __init__(self, pool: Pool, of_row: np.ndarray) -> None:
        self.pool, self.of_row = pool, of_row.reshape(-1).tolist()
        self.of_group: dict[str, set[int]] = defaultdict(set)
        self.of_question: dict[int, set[int]] = defaultdict(set)
        for candidate, group, key in zip(self.of_row, pool.groups, pool.keys[:, 0].tolist(), strict=True):
            self.of_question[key].add(candidate)
            if group is not None:
                self.of_group[group].add(candidate)

    def of(self, place: int) -> set[int]:
        """Returns the candidates to leave out for a row of the pool."""
        group = self.pool.groups[place]
        return self.of_question[int(self.pool.keys[place, 0])] | (set() if group is None else self.of_group[group])


def _encode_unit(path: Path, unit: Unit, model: str, encode: Encode) -> None:
    """Writes the vectors of a unit, unless they are there."""
    key = digest(f"{unit.key} {model}").encode()
    if path.is_file() and (_mapped(path).schema.metadata or {}).get(KEY) == key:
        return
    pairs = [row for row in unit.read() if isinstance(row, PairRow)]
    sides = {name: [side_of(pair.row.side(name), pair.placeholder) for pair in pairs] for name in ("a", "b")}
    keys = {name: [side.key() for side in of_name] for name, of_name in sides.items()}
    vectors = {name: _encode_sides(pairs, sides[name], keys[name], name, encode) for name in ("a", "b")}
    columns: dict[str, Any] = {
        "task": pa.array([pair.row.task for pair in pairs], pa.string()),
        "group": pa.array([pair.row.group for pair in pairs], pa.string()),
        "score": pa.array([pair.row.score for pair in pairs], pa.float64()),
        "content": pa.array([stored_content(pair.row.side("b")) for pair in pairs], pa.struct(CONTENT)),
    }
    for name in ("a", "b"):
        columns[f"key_{name}"] = pa.array(keys[name], pa.int64())
        width = vectors[name].shape[1]
        columns[f"vector_{name}"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors[name].reshape(-1)), width)
    table = pa.table(columns).replace_schema_metadata({KEY: key})
    write_atomically(path, lambda unfinished: _write_arrow(table, unfinished))


def _write_arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _encode_sides(
    pairs: Sequence[PairRow], sides: Sequence[Side], keys: Sequence[int], name: str, encode: Encode
) -> np.ndarray:
    """Returns the vectors of one side of all pairs, (rows, D) float16; equal sides of a task are encoded once."""
    tasks: dict[str, dict[int, int]] = defaultdict(dict)  # task -> key -> row
    for number, (pair, key) in enumerate(zip(pairs, keys, strict=True)):
        tasks[pair.row.task].setdefault(key, number)
    found: dict[tuple[str, int], np.ndarray] = {}
    for task, rows in tasks.items():
        vectors = np.asarray(encode([sides[row] for row in rows.values()], task, name), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        found |= {(task, key): vector for key, vector in zip(rows, vectors.astype(np.float16), strict=True)}
    of_rows = [found[pair.row.task, key] for pair, key in zip(pairs, keys, strict=True)]
    return np.stack(of_rows) if of_rows else np.zeros((0, 1), np.float16)


def _mapped(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _pools(table: pa.Table) -> Iterator[Pool]:
    tasks = np.array(table["task"].to_pylist(), object)
    for task in dict.fromkeys(tasks.tolist()):
        rows = np.flatnonzero(tasks == task)
        part = table.select(["key_a", "key_b", "vector_a", "vector_b", "group", "score"]).take(rows)
        keys = np.stack([part[f"key_{side}"].to_numpy() for side in "ab"], axis=1)
        vectors = [_matrix(part[f"vector_{side}"]) for side in "ab"]
        yield Pool(task, rows, keys, *vectors, part["group"].to_pylist(), part["score"].to_pylist())


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    joined = column.combine_chunks()
    return np.asarray(joined.flatten()).reshape(len(joined), -1)


def stored_content(content: Content) -> dict[str, Any]:
    """Returns a side or a negative as `CONTENT`: files by their path below `ROOT`, contents of files as they are."""
    audio = None if content.audio is None else stored_media(content.audio)
    return {"text": content.text, "images": [stored_media(image) for image in content.images], "audio": audio}


def stored_media(source: str | bytes | Mapping[str, Any]) -> dict[str, Any]:
    """Returns an image or audio as `MEDIA`; samples as the content of a WAV file of floats."""
    if isinstance(source, str):
        return {"bytes": None, "path": os.path.relpath(os.path.abspath(source), ROOT)}
    if isinstance(source, Mapping):
        buffer = BytesIO()
        soundfile.write(buffer, source["array"], source["sampling_rate"], format="WAV", subtype="FLOAT")
        source = buffer.getvalue()
    return {"bytes": bytes(source), "path": None}


def _write_pairs(path: Path, unit: Unit, table: pa.Table, chosen: Mapping[int, list[int]], first: int) -> int:
    """Writes the pairs of a unit, whose first is row `first` of the table; returns the number after its last."""
    records = []
    for pair in unit.read():
        if isinstance(pair, PairRow):
            mined = [table["content"][number].as_py() for number in chosen.get(first + len(records), [])]
            records.append(_record(pair, mined))
    written = pa.Table.from_pylist(records, schema=PAIRS)
    write_atomically(path, lambda unfinished: pq.write_table(written, unfinished, compression="zstd"))
    return first + len(records)


def _record(pair: PairRow, mined: list[dict[str, Any]]) -> dict[str, Any]:
    row = pair.row
    sides = {side: stored_content(row.side(side)) for side in ("a", "b")}
    vectors = {f"teacher_{side}": getattr(row, f"teacher_{side}") for side in ("a", "b")}
    return {
        **{name: getattr(row, name) for name in ("id", "task", "a", "b", "score", "group")},
        **{f"images_{side}": content["images"] for side, content in sides.items()},
        **{f"audio_{side}": content["audio"] for side, content in sides.items()},
        "negatives": [*(stored_content(negative) for negative in row.negatives), *mined],
        **{name: None if vector is None else vector.tolist() for name, vector in vectors.items()},
    }


def _delete_former(out: Path, names: set[str]) -> None:
    """Deletes shards of an earlier run that had more rows."""
    for path in (out / "train").glob("*/*.parquet"):
        if f"train/{path.parent.name}/{path.stem}" not in names:
            path.unlink()


def _write_recipe(out: Path, recipe: DataRecipe) -> None:
    """Writes the recipe with the mined pairs as its training data."""
    entries = enabled_entries(recipe.settings, "train")
    sources = [
        {"path": str(out / f"train/{number:03d}"), "media_root": ROOT}
        | {key: entry[key] for key in KEPT_KEYS if key in entry}
        for number, entry in enumerate(entries)
    ]
    settings = {**recipe.settings, SPLITS["train"]: sources}
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    write_atomically(out / "recipe.yaml", lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
