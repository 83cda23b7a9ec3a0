"""A run that embeds the units of a corpus which are not there yet; any number of ranks share the work."""

import hashlib
import multiprocessing
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from .. import __version__
from ..data.corpus import CorpusRow, read_corpus
from ..data.folder_lock import lock_folder
from ..data.precision import check_precision, pack
from ..data.units import UNIT_ROWS, BadRow, Unit
from .embedding import PLAIN_TEXT, Embedder, Prepared, prompt_of, without_direction
from .loading import LoadedModel
from .shards import AnotherModelError, open_folder, shard_key, shard_names, write_errors, write_shard

LIBRARIES = ("torch", "transformers", "sentence-transformers", "numpy", "pillow", "pyarrow")
PREFETCHED = 4  # batches that each worker prepares ahead of the model
PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class CorpusOptions:
    """What to embed, and how.

    Attributes:
        source: keys of an entry of a recipe's data, see `read_corpus`.
        out: folder of the vectors.
        side: side of pairs that is embedded.
        prompt_name: prompt, such as a task's name.
        dimensions: components to keep; `None` for all.
        precision: one of `PRECISIONS`.
        batch_size: rows that pass the model together.
        unit_rows: rows of a unit at most.
        workers: processes that decode and resize while the model runs; 0 prepares batches in this process.
        rank: this process's number among those that share the work.
        ranks: number of these processes.
    """

    source: Mapping[str, Any]
    out: Path
    side: str = "a"
    prompt_name: str | None = None
    dimensions: int | None = None
    precision: str = "float32"
    batch_size: int = 32
    unit_rows: int = UNIT_ROWS
    workers: int = 0
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank is {self.rank} of {self.ranks} ranks; choose one from 0 to {self.ranks - 1}.")
        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(
                f"batch_size is {self.batch_size} and workers is {self.workers}; they must be at least 1 and 0."
            )


@dataclass(frozen=True)
class Summary:
    """Result of a run.

    Attributes:
        embedded: rows embedded by this run.
        skipped: rows of this rank's units that an earlier run embedded.
        bad: rows without vector in this run; `errors.parquet` says why.
        seconds: duration.
    """

    embedded: int
    skipped: int
    bad: int
    seconds: float


@dataclass(frozen=True)
class Batch:
    """Rows of one unit that pass the model together: `positions` among the good rows of the unit."""

    unit: int
    rows: list[CorpusRow]
    positions: list[int]


class PreparedBatches(Dataset):
    """Maps a batch of rows to its tensors, in a worker of the loader."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def __getitem__(self, batch: Batch) -> tuple[Batch, Prepared]:
        prepared = self.embedder.prepare([row.message for row in batch.rows])
        positions = Batch(batch.unit, [], batch.positions)  # rows may hold the bytes of media
        return positions, prepared


def embed_corpus(model: LoadedModel, options: CorpusOptions, report: Callable[[str], None] | None = None) -> Summary:
    """Embeds all rows of a source that are not in `options.out` yet.

    A unit is written when all its rows are embedded: under a temporary name, flushed, renamed. A run that is killed
    loses at most the unit in progress. Rank r of n takes the units whose hash is r modulo n.

    Args:
        model: the model.
        options: what to embed.
        report: receives lines about the progress; default: they are printed to standard error.

    Returns:
        Counts of rows of this rank.

    Raises:
        AnotherModelError: the folder holds vectors of another model, prompt, precision or input, or a model.
        FolderInUseError: another process of this machine embeds the same share.
        ValueError: an option or a file is wrong.
        OSError: a file cannot be read or written.
    """
    prompt = prompt_of(model.encoder, options.prompt_name)
    embedder = Embedder(model.encoder, prompt, options.dimensions, PLAIN_TEXT)
    check_precision(options.precision, embedder.width)
    _, units = read_corpus(options.source, options.side, options.unit_rows)
    manifest = describe(model, options, prompt, embedder.width)
    lock = f"_rank{options.rank}-{socket.gethostname()}.lock"  # a share may move to another machine
    with lock_folder(options.out, "embed_vipolyqwen.py", lock):
        open_folder(options.out, manifest, writer=f"rank{options.rank}-")
        wanted, skipped = find_work(options, units)
        progress = Progress(sum(wanted.values()), report or _print)
        run = _Run(options, embedder, progress)
        run.embed(unit for unit in units() if unit.name in wanted)
    return Summary(progress.done - progress.bad, skipped, progress.bad, time.monotonic() - progress.start)


def describe(model: LoadedModel, options: CorpusOptions, prompt: str | None, dimensions: int) -> dict[str, Any]:
    """Returns the manifest: everything on which a vector depends, and the versions of the libraries."""
    source = {name: value for name, value in options.source.items() if name in ("columns", "image_placeholder")}
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "dtype": model.dtype,
        "prompt_name": options.prompt_name,
        "prompt": prompt,
        "dimensions": dimensions,
        "precision": options.precision,
        "side": options.side,
        "unit_rows": options.unit_rows,
        "source": source,
        "versions": {"vipolyqwen": __version__, **{library: version(library) for library in LIBRARIES}},
    }


def find_work(options: CorpusOptions, units: Callable[[], Iterator[Unit]]) -> tuple[dict[str, int], int]:
    """Returns name -> rows of this rank's units that are to be embedded, and the rows of those that are done.

    Raises:
        AnotherModelError: the folder holds units that the source lacks.
    """
    wanted, skipped, known = {}, 0, set()
    for unit in units():
        known.add(unit.name)
        if not is_of_rank(unit.name, options.rank, options.ranks):
            continue
        written = shard_key(options.out, unit.name)
        if written is not None and written == unit.key:
            skipped += unit.rows
        else:
            wanted[unit.name] = unit.rows
    if foreign := sorted(set(shard_names(options.out)) - known):
        raise AnotherModelError(
            f"{options.out} holds {len(foreign)} shards of another input, such as {foreign[0]!r}; {options.source} "
            "lacks them. Delete them or choose another folder."
        )
    return wanted, skipped


def is_of_rank(name: str, rank: int, ranks: int) -> bool:
    """Returns whether a unit belongs to a rank: by a hash of its name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % ranks == rank


class Progress:
    """Counts rows and reports speed and time left."""

    def __init__(self, total: int, report: Callable[[str], None]) -> None:
        self.total, self.report = total, report
        self.done = self.bad = 0
        self.start = self.reported = time.monotonic()

    def add(self, rows: int, bad: int) -> None:
        """Counts rows that are embedded or bad."""
        self.done += rows
        self.bad += bad
        now = time.monotonic()
        if now - self.reported >= PROGRESS_SECONDS or self.done == self.total:
            self.reported = now
            rate = self.done / max(now - self.start, 1e-9)
            left = (self.total - self.done) / rate if rate else 0.0
            self.report(
                f"{self.done:,} of {self.total:,} rows, {rate:,.1f} rows/s, "
                f"{time.strftime('%H:%M:%S', time.gmtime(left))} left, {self.bad:,} bad"
            )


class _Run:
    """The state of a run: the units whose rows are on their way through workers and model."""

    def __init__(self, options: CorpusOptions, embedder: Embedder, progress: Progress) -> None:
        self.options, self.embedder, self.progress = options, embedder, progress
        self.open: dict[int, _OpenUnit] = {}
        self.writer = ThreadPoolExecutor(1)  # the disk is waited for while the model runs
        self.written: Future[None] | None = None

    def embed(self, units: Iterator[Unit]) -> None:
        """Embeds and writes units."""
        with self.writer:
            for batch, prepared in self._loader(self._batches(units)):
                unit = self.open[batch.unit]
                bad = unit.add(batch, prepared, self.embedder.vectors(prepared.features))
                self.progress.add(len(batch.positions), bad)
                self._write_if_complete(batch.unit)
            self._wait()

    def _loader(self, batches: Iterator[Batch]) -> DataLoader:
        """Returns the loader; its sampler yields batches of rows, so that only their order is decided here."""
        workers = self.options.workers
        fork = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
        return DataLoader(
            PreparedBatches(self.embedder),
            batch_size=None,
            sampler=batches,
            num_workers=workers,
            collate_fn=_unchanged,
            prefetch_factor=PREFETCHED if workers else None,
            multiprocessing_context="fork" if fork else None,  # workers share the memory of the weights
        )

    def _batches(self, units: Iterator[Unit]) -> Iterator[Batch]:
        for number, unit in enumerate(units):
            read = unit.read()
            rows = [row for row in read if isinstance(row, CorpusRow)]
            errors = [vars(row) for row in read if isinstance(row, BadRow)]
            self.open[number] = _OpenUnit(unit, rows, errors, self.embedder.width)
            self.progress.add(len(errors), len(errors))
            self._write_if_complete(number)
            order = sorted(range(len(rows)), key=lambda position: rows[position].cost(), reverse=True)
            for first in range(0, len(order), self.options.batch_size):
                positions = order[first : first + self.options.batch_size]
                yield Batch(number, [rows[position] for position in positions], positions)

    def _write_if_complete(self, number: int) -> None:
        if self.open[number].missing == 0:
            self._wait()  # at most one unit is being written, so that memory stays bounded
            self.written = self.writer.submit(self.open.pop(number).write, self.options)

    def _wait(self) -> None:
        """Waits for the unit that is being written, and raises its error."""
        if self.written is not None:
            self.written.result()


class _OpenUnit:
    """The vectors and errors of a unit so far."""

    def __init__(self, unit: Unit, rows: Sequence[CorpusRow], errors: list[dict[str, Any]], width: int) -> None:
        self.unit, self.errors = unit, errors
        self.ids = [row.id for row in rows]
        self.places = [(row.place.file, row.place.row) for row in rows]
        self.vectors = np.zeros((len(rows), width), np.float32)
        self.ok = np.zeros(len(rows), bool)
        self.missing = len(rows)

    def add(self, batch: Batch, prepared: Prepared, vectors: np.ndarray) -> int:
        """Takes the vectors of a batch's good rows and the reasons of the others; returns the number of these."""
        reasons = dict(prepared.reasons)
        faults = without_direction(vectors)
        good = [row for row in range(len(prepared.kept)) if row not in faults]
        positions = [batch.positions[prepared.kept[row]] for row in good]
        self.vectors[positions], self.ok[positions] = vectors[good], True
        reasons |= {prepared.kept[row]: reason for row, reason in faults.items()}
        for place, reason in reasons.items():
            position = batch.positions[place]
            file, row = self.places[position]
            self.errors.append(vars(BadRow(self.ids[position], file, row, reason)))
        self.missing -= len(batch.positions)
        return len(reasons)

    def write(self, options: CorpusOptions) -> None:
        """Writes errors, then vectors, so that a unit with vectors is complete."""
        write_errors(options.out, self.unit.name, sorted(self.errors, key=lambda error: error["row"]))
        good = self.vectors if self.ok.all() else self.vectors[self.ok]
        vectors, scales = pack(good, options.precision)
        ids = [row_id for row_id, ok in zip(self.ids, self.ok, strict=True) if ok]
        write_shard(options.out, self.unit.name, self.unit.key, ids, vectors, scales)


def _unchanged(item: Any) -> Any:
    return item


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
