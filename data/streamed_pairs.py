"""Batches of pairs from sources that are streamed: mixed by weight, checked row by row, resumable exactly."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import fsspec.asyn
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .checks import Checker
from .collator import MixedBatchCollator
from .permutation import draw, key_of
from .readers import RecordReader
from .sampler import CHOICE, STREAM
from .schema import Place, Row, RowError, Task, row_id
from .source_config import SourceConfig
from .sources import BadRow, check_left_out, check_task_names, decoded_row, enabled_sources, refuse_audio
from .streams import Record, RecordStream, StreamedSource

IN_SUCCESSION = 1000  # unusable rows after which a stream ends


@dataclass
class StreamedBatch:
    """The pairs of a batch, and where the streams stand after it.

    Attributes:
        rows: as `PairDataset.__getitem__` returns them.
        worker: number of the worker that read them.
        state: of its streams, in values of JSON.
        bad: unusable rows before the last of `rows`, beyond those whose place `rows` take.
    """

    rows: list[dict[str, Any]]
    worker: int
    state: dict[str, Any]
    bad: list[BadRow]


@dataclass
class StreamedPairs(IterableDataset):
    """Batches of one rank from streamed sources, without end.

    Each row of a batch is of a source drawn by the weights. `begin_at` says how to continue a run; the batches before
    come as `None`, which the stock loop counts and discards. Batch i is read by worker i modulo their number.

    Attributes:
        sources: the recipe's entries.
        tasks: the tasks in the order of their task ids.
        checker: checks each row as it comes.
        without_tasks: tasks whose rows are left out.
        batch_size: rows of this rank.
        rank: number of this rank.
        ranks: number of ranks.
        workers: number of data workers of a rank; 1 without any.
        seed: seed of all shuffling and drawing.
        with_audio: whether the model takes audio.
        before: batches of the run that were taken before.
        states: at which each worker begins.
    """

    sources: list[SourceConfig]
    tasks: Mapping[str, Task]
    checker: Checker
    without_tasks: Sequence[str] = ()
    batch_size: int = 1
    rank: int = 0
    ranks: int = 1
    workers: int = 1
    seed: int = 0
    with_audio: bool = True
    before: int = 0
    states: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls, configs: Sequence[Mapping[str, Any]], tasks: Mapping[str, Task], checker: Checker, without: Sequence[str]
    ) -> "StreamedPairs":
        """Opens the sources of a recipe, all of which are streamed.

        Raises:
            ValueError: a setting is wrong, or a source cannot be streamed.
        """
        sources = enabled_sources(configs)
        for task in without:
            check_left_out(task, tasks)
        for source in sources:
            check_task_names(source, tasks)
            if not source.streaming:
                raise ValueError(
                    f"{source.path}: the other sources have `streaming: true`, and rows with an index cannot be mixed "
                    "with rows without. Stream this source too, or write the others to shards with "
                    "`python -m vipolyqwen.data prepare`."
                )
            if source.max_visits is not None:
                raise ValueError(f"{source.path}: `max_visits` bounds an epoch, which `streaming` does not have.")
        pairs = cls(sources, tasks, checker, without)
        for opened, source in zip(pairs.opened, sources, strict=True):
            source.check_columns(opened.columns, tasks, source.path)
        return pairs

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "opened"}

    @cached_property
    def opened(self) -> list[StreamedSource]:
        """Returns the sources with their columns known."""
        return [StreamedSource.open(source) for source in self.sources]

    def refused(self, error: RowError, file: str) -> BadRow:
        """Returns the bad row of an error; raises the error unless such rows are skipped."""
        self.checker.refuse(error)
        return BadRow(file, error.row, error.id, error.cause, str(error))

    @property
    def on_bad_row(self) -> str:
        """Returns error, or skip."""
        return self.checker.on_bad_row

    def refuse_audio(self) -> None:
        """Makes rows with audio unusable: a model without a speech encoder cannot embed them."""
        self.with_audio = False

    def identity(self) -> dict[str, Any]:
        """Returns what determines the rows and their order."""
        return {
            "streams": [[each.path, each.name, each.split, each.revision, each.weight] for each in self.sources],
            "shuffle_buffers": [each.shuffle_buffer for each in self.sources],
            "seed": self.seed,
            "ranks": self.ranks,
            "workers": self.workers,
        }

    def launch(self, batch_size: int, rank: int, ranks: int, workers: int, seed: int) -> None:
        """Says for which rank these pairs are, how many there are, and of which size the batches."""
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.ranks, self.workers = rank, ranks, max(1, workers)

    def begin_at(self, batches: int, taken: int, states: Sequence[dict[str, Any]] | None) -> None:
        """Says where a run begins.

        Args:
            batches: batches that come as `None`, since they count as taken.
            taken: batches that the run before had taken or counted, as many unless its accumulation was another.
            states: of its workers; `None` for a new run.
        """
        if states is None:
            states = [{"worker": worker, "drawn": 0, "streams": None} for worker in range(self.workers)]
        self.before = batches
        self.states = [states[(worker + taken - batches) % self.workers] for worker in range(self.workers)]

    def __iter__(self) -> Iterator[StreamedBatch | None]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if info is not None:
            fsspec.asyn.reset_lock()  # that of the parent process, which a fork copies
        for batch in range(self.before):
            if batch % self.workers == worker:
                yield None
        reader = _Reader(self, self.states[worker])
        while True:
            rows = [reader.row() for _ in range(self.batch_size)]
            yield StreamedBatch(rows, worker, reader.state(), reader.bad)
            reader.bad = []


class _Reader:
    """Reads the rows of one worker of a rank."""

    def __init__(self, pairs: StreamedPairs, state: dict[str, Any]) -> None:
        self.pairs, self.worker = pairs, state["worker"]
        self.consumer = pairs.rank * pairs.workers + self.worker
        shared = (pairs.seed, self.consumer, pairs.ranks * pairs.workers)
        states = state["streams"] or [None] * len(pairs.sources)
        self.streams = [
            RecordStream(opened, _Converter(pairs, number), number, *shared, given)
            for number, (opened, given) in enumerate(zip(pairs.opened, states, strict=True))
        ]
        self.drawn = state["drawn"]
        weights = np.array([source.weight for source in pairs.sources], np.float64)
        self.ends = np.cumsum(weights / weights.sum())[:-1]
        self.bad: list[BadRow] = []  # whose place the next rows take

    def state(self) -> dict[str, Any]:
        """Returns where the streams stand, in values of JSON."""
        return {"worker": self.worker, "drawn": self.drawn, "streams": [stream.state() for stream in self.streams]}

    def row(self) -> dict[str, Any]:
        """Returns the next row of a source that is drawn, with decoded media.

        Raises:
            RowError: a row is unusable, and such rows are not skipped.
            ValueError: too many rows in succession are unusable.
        """
        key = key_of(self.pairs.seed, STREAM, self.consumer, self.drawn)
        number = int(np.searchsorted(self.ends, draw(key, 1)[0], side="right"))
        self.drawn += 1
        for _ in range(IN_SUCCESSION):
            item = next(self.streams[number])
            if isinstance(item, BadRow):
                self.bad.append(item)
                continue
            row, place, epoch = item
            try:
                decoded = decoded_row(row, place, self.pairs.sources[number], number)
            except RowError as error:
                self.bad.append(self.pairs.refused(error, place.file))
                continue
            return {**decoded, "epoch": epoch, "replaces": self.bad.pop(0) if self.bad else None}
        raise ValueError(
            f"{self.pairs.sources[number].path}: {IN_SUCCESSION} rows in succession cannot be used; the last: "
            f"{self.bad[-1].problem}"
        )


class _Converter:
    """Turns the records of a source into checked rows."""

    def __init__(self, pairs: StreamedPairs, number: int) -> None:
        self.pairs, self.number = pairs, number
        source = pairs.sources[number]
        root = os.path.abspath(os.path.expanduser(source.media_root or ""))
        self.reader_of = lru_cache(maxsize=1)(  # shards come one after the other
            lambda shard: RecordReader(source, f"{source.path}, shard {shard}", root)
        )

    def __call__(self, record: Record) -> list[tuple[Row, Place, int] | BadRow]:
        reader = self.reader_of(record.shard)
        try:
            if isinstance(record.values, RowError):
                raise record.values
            pairs = reader.choices(record.values, record.number)
        except RowError as error:
            return [self.pairs.refused(error, reader.file)]
        found = [self._row(reader, record, pair, choices) for pair, choices in enumerate(pairs)]
        return [each for each in found if each is not None]

    def _row(
        self, reader: RecordReader, record: Record, pair: int, choices: Sequence[Mapping[str, Any]]
    ) -> tuple[Row, Place, int] | BadRow | None:
        """Returns a row, of several choices one that the epoch draws; `None` for one of a task that is left out."""
        values = choices[0]
        if len(choices) > 1:
            drawn = key_of(self.pairs.seed, CHOICE, record.epoch, self.number, record.shard, record.number, pair)
            values = choices[int(drawn[0] % np.uint64(len(choices)))]
        place = reader.place(record.number, pair, values.get("id"), record.values)
        try:
            row = reader.row(values, place)
            self.pairs.checker.check(row, place, reader.source, reader.root)
            if not self.pairs.with_audio:
                refuse_audio(row, place)
        except RowError as error:
            return self.pairs.refused(error, reader.file)
        return None if row.task in self.pairs.without_tasks else (replace(row, id=row_id(place)), place, record.epoch)


@dataclass(frozen=True)
class StreamCollator:
    """Collates the rows of a `StreamedBatch`, and keeps where its streams stand as `stream`.

    Attributes:
        collator: of the rows.
    """

    collator: MixedBatchCollator

    def __call__(self, batch: StreamedBatch | None) -> dict[str, Any]:
        """Returns the collated batch; an empty one for a batch that was taken before."""
        if batch is None:
            return {}
        collated = self.collator(batch.rows)
        replaced = [*collated["replaced"], *batch.bad]
        return {**collated, "replaced": replaced, "stream": (batch.worker, batch.state)}
