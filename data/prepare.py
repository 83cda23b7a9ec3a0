"""Prepares a recipe's pairs once: checked, their media decoded and scaled, in Parquet shards that hold everything.

OUT/train/000/0000000.parquet   a shard: the rows of one unit of source 0, media inside
OUT/dropped/…/0000000.jsonl     the rows of that unit that were left out, and why
OUT/recipe.yaml, OUT/report.json
"""

import hashlib
import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from .atomic import UNFINISHED, write_atomically
from .media_facts import content_hash
from .media_paths import read_media
from .pair_units import PairRow, pair_units
from .prepared_media import prepare_audio, prepare_image
from .recipes import SPLITS, DataRecipe, enabled_entries, read_data_recipe
from .schema import ENCODER_RATE, Content, Place, Row, RowError, show_media
from .units import BadRow, Unit, digest

CODE = hashlib.blake2b(
    b"".join(Path(__file__).with_name(name).read_bytes() for name in ("prepare.py", "prepared_media.py")),
    digest_size=8,
).hexdigest()
KEY = b"vipolyqwen.unit"  # of a shard's metadata: unit and settings
KEPT_KEYS = (
    "weight",
    "max_visits",
    "image_placeholder",
    "augment",
    "language",
    "licence",
)  # of a source, beside its rows
Progress = Callable[[Iterable[Any]], Iterable[Any]]
SHARES = 4  # for each process, so that a slow one is left with little at the end
DROPPED, REPORT = "dropped", "report.json"
IMAGES, VECTOR = pa.list_(pa.binary()), pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "task", "a", "b")),
        *((f"images_{side}", IMAGES) for side in "ab"),
        *((f"audio_{side}", pa.binary()) for side in "ab"),
        ("score", pa.float64()),
        ("group", pa.string()),
        ("negatives", pa.list_(pa.struct([("text", pa.string()), ("images", IMAGES), ("audio", pa.binary())]))),
        *((f"teacher_{side}", VECTOR) for side in "ab"),
        *((f"key_{side}", pa.int64()) for side in "ab"),  # content hash of a side
    ]
)


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare, and how.

    Attributes:
        recipe: file of the recipe.
        out: folder to write.
        max_pixels: pixels of an image; larger ones are scaled down.
        max_seconds: longest audio; rows with longer audio are dropped.
        min_samples: shortest audio, in samples at 16 kHz; likewise.
        unit_rows: rows of a shard at most.
    """

    recipe: str
    out: str
    max_pixels: int = 1280 * 28 * 28
    max_seconds: float = 30.0 * 120
    min_samples: int = 400
    unit_rows: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_seconds", "min_samples", "unit_rows"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")

    def settings(self) -> dict[str, Any]:
        """Returns what the content of a shard depends on."""
        return {name: value for name, value in asdict(self).items() if name not in ("recipe", "out")} | {"code": CODE}


@dataclass(frozen=True)
class Shard:
    """A unit of a source and where its rows go.

    Attributes:
        name: path within the folder, without suffix.
        unit: the rows.
        key: changes with the rows and the settings.
    """

    name: str
    unit: Unit
    key: str


def shards(options: PrepareOptions, recipe: DataRecipe) -> Iterator[Shard]:
    """Yields the shards of a recipe in their order."""
    settings = json.dumps(options.settings(), sort_keys=True)
    for split, sources in recipe.sources.items():
        for number, source in enumerate(sources):
            meaning = repr((settings, source, dict(recipe.tasks)))
            for place, unit in enumerate(pair_units(source, recipe.tasks, options.unit_rows)):
                yield Shard(f"{split}/{number:03d}/{place:07d}", unit, digest(f"{unit.key} {meaning}"))


def prepare_share(
    options: PrepareOptions, share: int = 0, shares_count: int = 1, progress: Progress = iter
) -> list[str]:
    """Writes the shards of one share that are missing; returns the names of all its shards.

    Args:
        options: what to prepare.
        share: takes every `shares_count`-th shard, from this one on.
        shares_count: number of shares.
        progress: wraps the iterator of the shards, see `tqdm`.
    """
    names = []
    for number, shard in enumerate(progress(shards(options, read_data_recipe(Path(options.recipe))))):
        if number % shares_count == share:
            names.append(shard.name)
            if not _is_written(Path(options.out), shard):
                _write_shard(options, shard)
    return names


def prepare(options: PrepareOptions, workers: int = 1, progress: Progress = iter) -> dict[str, Any]:
    """Prepares a recipe; what an earlier run has written is kept.

    Every process reads all text files to find its shards, so more processes pay off where media are decoded.

    Args:
        options: what to prepare.
        workers: processes; 1 works in this one.
        progress: wraps an iterator, see `tqdm`: of shards, or of shares with several processes.

    Returns:
        The report.

    Raises:
        ValueError: a setting is wrong, or no row is left.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1.")
    if workers == 1:
        return finish(options, prepare_share(options, progress=progress))
    count = SHARES * workers
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(prepare_share, options, share, count) for share in range(count)]
        names = [name for future in progress(as_completed(futures)) for name in future.result()]
    return finish(options, names)


def _is_written(out: Path, shard: Shard) -> bool:
    path = out / f"{shard.name}.parquet"
    return path.is_file() and (pq.read_schema(path).metadata or {}).get(KEY) == shard.key.encode()


def _write_shard(options: PrepareOptions, shard: Shard) -> None:
    """Writes the dropped rows, then the shard, so that a shard which is there is complete."""
    rows, dropped = [], []
    for item in shard.unit.read():
        try:
            if isinstance(item, BadRow):
                dropped.append(asdict(item))
            else:
                rows.append(_record(item, options))
        except RowError as error:
            place = item.place
            dropped.append(asdict(BadRow(item.row.id, place.file, place.row, str(error))))
    out, writer = Path(options.out), f"{digest(shard.name)}-"
    if dropped:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped)
        path = out / DROPPED / f"{shard.name}.jsonl"
        write_atomically(path, lambda unfinished: unfinished.write_text(lines, encoding="utf-8"), writer)
    else:
        (out / DROPPED / f"{shard.name}.jsonl").unlink(missing_ok=True)
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({KEY: shard.key.encode()}))
    path = out / f"{shard.name}.parquet"
    write_atomically(path, lambda unfinished: pq.write_table(table, unfinished, compression="zstd"), writer)


def _record(pair: PairRow, options: PrepareOptions) -> dict[str, Any]:
    """Returns a row as `SCHEMA`.

    Raises:
        RowError: a file cannot be read, or audio is too short or too long.
    """
    row, place = pair.row, pair.place
    contents = {side: _content(row.side(side), side, place, options) for side in ("a", "b")}
    return {
        "id": row.id,
        "task": row.task,
        **{side: content["text"] for side, content in contents.items()},
        **{f"images_{side}": content["images"] for side, content in contents.items()},
        **{f"audio_{side}": content["audio"] for side, content in contents.items()},
        "score": row.score,
        "group": row.group,
        "negatives": [_content(negative, "negatives", place, options) for negative in row.negatives],
        **{f"teacher_{side}": _listed(row, side) for side in ("a", "b")},
        **{f"key_{side}": _key(content) for side, content in contents.items()},
    }


def _listed(row: Row, side: str) -> list[float] | None:
    vector = row.teacher_a if side == "a" else row.teacher_b
    return None if vector is None else vector.tolist()


def _content(content: Content, side: str, place: Place, options: PrepareOptions) -> dict[str, Any]:
    images, audio = (f"images_{side}", f"audio_{side}") if side in ("a", "b") else ("negatives", "negatives")
    return {
        "text": unicodedata.normalize("NFC", content.text),
        "images": [_image(images, image, place, options) for image in content.images],
        "audio": None if content.audio is None else _audio(audio, content.audio, place, options),
    }


def _prepared(column: str, source: Any, place: Place, prepare: Callable[[Any], Any]) -> Any:
    """Returns what `prepare` makes of the content of a file."""
    try:
        return prepare(read_media(source) if isinstance(source, str) else source)
    except (ValueError, OSError) as error:
        raise place.error(column, show_media(source), f"{error} Repair it or drop the row.") from error


def _image(column: str, source: Any, place: Place, options: PrepareOptions) -> bytes:
    return _prepared(column, source, place, lambda content: prepare_image(content, options.max_pixels))


def _audio(column: str, source: Any, place: Place, options: PrepareOptions) -> bytes:
    content, seconds = _prepared(column, source, place, prepare_audio)
    if not options.min_samples / ENCODER_RATE <= seconds <= options.max_seconds:
        limits = f"from {options.min_samples / ENCODER_RATE:g} to {options.max_seconds:g} s"
        shown = show_media(source)
        raise place.error(column, shown, f"the audio has {seconds:.2f} s, and {limits} are taken; split or drop it.")
    return content


def _key(content: Mapping[str, Any]) -> int:
    media = [content_hash(image) for image in content["images"]]
    media += [] if content["audio"] is None else [content_hash(content["audio"])]
    return content_hash(repr((content["text"], media)).encode())


def finish(options: PrepareOptions, names: Iterable[str]) -> dict[str, Any]:
    """Deletes shards of former rows and writes recipe and report; returns the report.

    Args:
        options: what was prepared.
        names: all shards.

    Raises:
        ValueError: no row of a source is left.
    """
    out, recipe, wanted = Path(options.out), read_data_recipe(Path(options.recipe)), set(names)
    for split in SPLITS:
        for path in (out / split).glob("*/*.parquet"):
            if f"{split}/{path.parent.name}/{path.stem}" not in wanted:
                path.unlink()
                (out / DROPPED / split / path.parent.name / f"{path.stem}.jsonl").unlink(missing_ok=True)
    for folder in list(out.rglob(UNFINISHED)):
        shutil.rmtree(folder)
    report = {"settings": options.settings(), "sources": list(_source_reports(out, recipe))}
    _write_text(out / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _write_text(out / "recipe.yaml", yaml.safe_dump(_new_recipe(out, recipe), allow_unicode=True, sort_keys=False))
    if empty := [each["path"] for each in report["sources"] if not each["rows"]]:
        raise ValueError(f"No row is left of {', '.join(empty)}; see {out / REPORT} for the reasons.")
    return report


def _source_reports(out: Path, recipe: DataRecipe) -> Iterator[dict[str, Any]]:
    for split, sources in recipe.sources.items():
        for number, source in enumerate(sources):
            yield _source_report(out, f"{split}/{number:03d}", source.path)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
    (path.parent / UNFINISHED).rmdir()


def _source_report(out: Path, folder: str, path: str) -> dict[str, Any]:
    """Returns rows, dropped rows by cause with an example each, and exact duplicates of a source."""
    keys: Counter[tuple[int, int]] = Counter()
    for shard in sorted((out / folder).glob("*.parquet")):
        table = pq.read_table(shard, columns=["key_a", "key_b"])
        keys.update(zip(table["key_a"].to_pylist(), table["key_b"].to_pylist(), strict=True))
    causes: dict[str, dict[str, Any]] = {}
    for file in sorted((out / DROPPED / folder).glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            error = json.loads(line)["error"]
            cause = causes.setdefault(cause_of(error), {"rows": 0, "example": error})
            cause["rows"] += 1
    dropped = sum(cause["rows"] for cause in causes.values())
    counts = {"rows": keys.total(), "dropped": dropped, "duplicates": keys.total() - len(keys)}
    return {"path": path, "folder": folder, **counts, "causes": causes}


def cause_of(error: str) -> str:
    """Returns an error without file, row and value: the same for rows that were dropped for the same reason."""
    found = re.search(r"column '([^']+)' is (?:'[^']*'|\"[^\"]*\"|[^:]*): (.*)", error, re.DOTALL)
    column, problem = found.groups() if found else ("", re.sub(r"^.*?(line|row) \d+: ", "", error, flags=re.DOTALL))
    problem = re.sub(r"'[^']*'|\"[^\"]*\"|/\S+", "…", problem)
    return re.sub(r"\d[\d.,]*", "#", f"{column}: {problem}" if column else problem)[:200]


def _new_recipe(out: Path, recipe: DataRecipe) -> dict[str, Any]:
    """Returns the recipe with the prepared folders as its sources."""
    changed = dict(recipe.settings)
    for split, key in SPLITS.items():
        if recipe.sources[split]:
            changed[key] = [
                {"path": str(out / split / f"{number:03d}")} | {key: entry[key] for key in KEPT_KEYS if key in entry}
                for number, entry in enumerate(enabled_entries(recipe.settings, split))
            ]
    return changed
