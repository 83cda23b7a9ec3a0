"""Reads a source as it comes, without an index: shard by shard, shuffled in blocks, resumable at any row."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
from datasets.table import CastError

from ..download_vipolyqwen import show_url
from .files import find_files, open_binary, suffix_of
from .permutation import key_of, permute
from .records import record_of, text_lines
from .remote import explain, is_unreadable, open_remote, patiently, storage_options, without_their_retries
from .schema import RowError
from .source_config import SourceConfig
from .tables import cast_shard, class_labels, name_classes

BUILDERS = {".parquet": "parquet", ".jsonl": "text", ".arrow": "arrow", ".tar": "webdataset"}  # of `datasets`
Loaded = tuple[datasets.IterableDataset, list[str], list[str] | None]
LINES = "ExamplesIterable"  # in the library's state of lines
FIRST = 100  # lines whose columns are those of a source
BATCH = 32  # records read at once
PARQUET_BATCH = 1000  # records decoded at once; by default the rows of the first row group, which may be none
LASTING = (FileNotFoundError, ValueError, StopIteration)  # when a source is opened: an address, its settings, no rows
SHARDS, BLOCK = 3, 4  # purpose of a key


@dataclass(frozen=True)
class Record:
    """A record of a source.

    Attributes:
        shard: number of its shard.
        number: its number in the shard, from 1.
        epoch: of the source.
        values: column -> value, classes by their names; the fault of a line that is not a record.
    """

    shard: int
    number: int
    epoch: int
    values: dict[str, Any] | RowError


@dataclass(frozen=True)
class StreamedSource:
    """A source whose shards are read one after the other.

    Attributes:
        source: the entry of the recipe.
        dataset: all shards; media are not decoded.
        labels: column -> names of its classes.
        files: addresses of the shards; empty if they are not known.
        of_lines: columns of the first lines, if the shards are JSON lines, whose records may have others.
    """

    source: SourceConfig
    dataset: datasets.IterableDataset
    labels: dict[str, Any]
    files: list[str]
    of_lines: list[str] | None = None

    @classmethod
    def open(cls, source: SourceConfig) -> "StreamedSource":
        """Opens the first shard for its columns; nothing else is read.

        Raises:
            ValueError: the source cannot be streamed.
        """
        try:
            dataset, files, columns = _load(source)
        except ImportError as error:  # of the file system that the address names
            raise ValueError(
                f"{source.path}: the source cannot be streamed: {error}. Install it, or download the files."
            ) from error
        except Exception as error:
            if not is_unreadable(error):
                raise
            raise ValueError(f"{source.path}: the source cannot be streamed: {explain(error)}") from error
        names = list(dataset.features) if columns is None else columns
        files = files if len(files) == dataset.num_shards else []
        labels = {} if columns is not None else class_labels(dataset.features, source.used_columns(names))
        return cls(source, dataset, labels, files, columns)

    @property
    def columns(self) -> list[str]:
        """Returns the names of the columns."""
        return list(self.dataset.features) if self.of_lines is None else self.of_lines

    @property
    def is_remote(self) -> bool:
        """Returns whether the shards are read over a network."""
        return not self.files or "://" in self.files[0]

    def shard(self, number: int) -> datasets.IterableDataset:
        """Returns one shard."""
        return self.dataset.shard(num_shards=self.dataset.num_shards, index=number)


def _load(source: SourceConfig) -> Loaded:
    """Returns the data set of a source, the addresses of its files as far as they are known, and see `of_lines`."""
    remote = "://" in source.path
    files = [source.path] if remote else find_files(source)
    kinds = {suffix_of(file.partition("?")[0]) for file in files}
    if len(kinds) > 1 or not kinds <= set(BUILDERS):
        raise ValueError(
            f"its files are {', '.join(sorted(kinds))}; files of one of {', '.join(BUILDERS)} can be streamed. Leave "
            "`streaming` out, or write the rows to shards with `python -m vipolyqwen.data prepare`."
        )
    kind = BUILDERS[kinds.pop()] if files else None
    if kind is not None and not remote:
        return _opened(source, kind, files)
    return patiently(lambda: _opened(source, kind, files), source.path, lasting=LASTING)


def _opened(source: SourceConfig, kind: str | None, files: list[str]) -> Loaded:
    """Returns the same of files of a kind; `None`: of a data set of the Hub."""
    split = "train" if kind is not None else source.split
    if kind is None:
        builder = datasets.load_dataset_builder(source.path, source.name, revision=source.revision)
    else:
        options: dict[str, Any] = {"batch_size": PARQUET_BATCH} if kind == "parquet" else {}
        options |= {"storage_options": storage_options()} if "://" in source.path else {}
        builder = datasets.load_dataset_builder(kind, data_files={split: files}, **options)
    found = (builder.config.data_files or {}).get(split, [])
    if kind == "text":  # each line is parsed as without `streaming`: no type is inferred from those before it
        dataset = datasets.IterableDataset.from_generator(
            _lines, gen_kwargs={"files": [str(file) for file in found], "source": source}
        )
        records = (record_of(line["line"], source.path, line["number"]) for line in dataset.take(FIRST))
        columns = dict.fromkeys(name for record in records if isinstance(record, dict) for name in record)
        if not columns:
            raise ValueError("its first lines have no JSON object")
        return dataset, found, list(columns)
    with without_their_retries():
        dataset = builder.as_streaming_dataset(split=split)
        if dataset.features is None:
            dataset = dataset._resolve_features()
    if kind in ("parquet", "arrow"):
        builder._cast_table = partial(cast_shard, source, dataset.features)
    return dataset.decode(False), found, None


def _lines(files: list[str], source: SourceConfig) -> Iterator[dict[str, Any]]:
    """Yields the lines of files that are not blank."""
    for file in files:
        for number, line in text_lines(file, source, open_remote if "://" in file else open_binary):
            yield {"number": number, "line": line}


class RecordStream:
    """Yields what the records of a source become, without end, each record once an epoch over all consumers.

    The shards of an epoch come in an order drawn for it. With as many shards as consumers or more, each consumer reads
    every n-th shard, otherwise every n-th record of all. What `shuffle_buffer` records become is shuffled as one
    block: a state is the place of the library at the beginning of a block and what was taken of it since, so a resumed
    stream reads the block again and continues exactly. The buffer of the library's own shuffling would be lost.

    Args:
        opened: the source.
        convert: returns what a record becomes.
        number: its number in the recipe, by which the order is drawn.
        seed: seed of all shuffling.
        consumer: number of this consumer, a rank's worker.
        consumers: number of consumers.
        state: of another stream with the same arguments, at which to continue.
    """

    def __init__(
        self,
        opened: StreamedSource,
        convert: Callable[[Record], Sequence[Any]],
        number: int,
        seed: int,
        consumer: int,
        consumers: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.opened, self.convert, self.number, self.seed = opened, convert, number, seed
        self.consumer, self.consumers = consumer, consumers
        place = {"epoch": 0, "shard": 0, "row": 0, "library": None} if state is None else state["block"]
        self._epoch, self._shard, self._row = place["epoch"], place["shard"], place["row"]
        self._shards = self._drawn_shards()
        self._barren: set[int] = set()  # shards read in succession that had nothing for this consumer
        self._open_shard(place["library"])
        self._fill()
        self._taken = 0 if state is None else state["taken"]

    def state(self) -> dict[str, Any]:
        """Returns where the stream stands, in values of JSON."""
        return {"block": self._start, "taken": self._taken}

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while self._taken == len(self._block):
            self._fill()
        self._taken += 1
        return self._block[self._taken - 1]

    def _drawn_shards(self) -> list[int]:
        """Returns the shards that this consumer reads in the epoch, in their order."""
        count = self.opened.dataset.num_shards
        order = permute(np.arange(count), np.int64(count), key_of(self.seed, SHARDS, self.number, self._epoch))
        return (order if count < self.consumers else order[self.consumer :: self.consumers]).tolist()

    def _open_shard(self, library: dict[str, Any] | None) -> None:
        self._opened = self.opened.shard(self._shards[self._shard])
        if library is not None:
            fresh = self._opened.state_dict()
            if self.opened.of_lines is not None and library["examples_iterable"].get("type") != LINES:
                fresh["examples_iterable"]["shard_example_idx"] = self._row  # of a checkpoint before lines were parsed
                library = fresh
            self._opened.load_state_dict(library)
        self._library = library
        self._is_barren = library is None  # whether nothing of the whole shard came so far
        self._batches = self._opened.iter(min(BATCH, self.opened.source.shuffle_buffer))

    def _fill(self) -> None:
        """Reads and shuffles the next block; blocks end with the epoch."""
        self._start = {"epoch": self._epoch, "shard": self._shard, "row": self._row, "library": self._library}
        items: list[Any] = []
        count = 0
        while count < self.opened.source.shuffle_buffer:
            batch = self._next_batch()
            if batch is not None:
                for record in self._of_batch(batch):
                    found, count = self.convert(record), count + 1
                    items += found
                    self._is_barren = self._is_barren and not found
                self._library = self._opened.state_dict()
            elif self._next_shard() and count:
                break
        key = key_of(self.seed, BLOCK, self.number, self._start["epoch"], self._start["shard"], self._start["row"])
        order = permute(np.arange(len(items)), np.int64(len(items)), key)
        self._block, self._taken = [items[place] for place in order.tolist()], 0

    def _next_batch(self) -> dict[str, list[Any]] | None:
        """Returns the next records, `None` at the end of the shard; if the network breaks, reads the shard again."""
        try:
            with without_their_retries():
                if not self.opened.is_remote:
                    return next(self._batches, None)
                return patiently(lambda: next(self._batches, None), self._place(), self._reopen)
        except Exception as error:
            if not is_unreadable(error):
                raise
            remedy = "Repair the shard, or resume the run when it can be reached; no row is lost."
            if not self.opened.is_remote or isinstance(error, CastError):
                remedy += (
                    " If its columns or their types are not those of the first shard, write all rows to shards with "
                    "`python -m vipolyqwen.data prepare`."
                )
            raise ValueError(f"{self._place()}: the stream cannot be read: {explain(error)}. {remedy}") from error

    def _place(self) -> str:
        """Returns the shard and the record where the stream stands, for messages."""
        number = self._shards[self._shard]
        files = self.opened.files
        named = f" ({show_url(files[number])})" if self.opened.is_remote and files else ""
        return f"{self.opened.source.path}, shard {number}{named}, after record {self._row}"

    def _reopen(self) -> None:
        """Opens the shard once more where the stream stands."""
        barren = self._is_barren
        self._open_shard(self._library)
        self._is_barren = barren

    def _next_shard(self) -> bool:
        """Opens the next shard; returns whether it is the first of the next epoch.

        Raises:
            ValueError: no shard has a row for this consumer.
        """
        self._barren = self._barren | {self._shards[self._shard]} if self._is_barren else set()
        if len(self._barren) == self.opened.dataset.num_shards:
            raise ValueError(
                f"{self.opened.source.path} has no rows of the tasks that are trained, or fewer than the "
                f"{self.consumers} readers (ranks × data workers) that share them; add rows, or leave the source out."
            )
        self._shard, self._row = self._shard + 1, 0
        is_new = self._shard == len(self._shards)
        if is_new:
            self._epoch, self._shard = self._epoch + 1, 0
            self._shards = self._drawn_shards()
        self._open_shard(None)
        return is_new

    def _of_batch(self, batch: dict[str, list[Any]]) -> Iterator[Record]:
        """Yields the records of a batch that are this consumer's."""
        shard, shares_shards = self._shards[self._shard], self.opened.dataset.num_shards < self.consumers
        for values in zip(*batch.values(), strict=True):
            self._row += 1
            if not shares_shards or self._row % self.consumers == self.consumer:
                record = dict(zip(batch, values, strict=True))
                if self.opened.of_lines is None:
                    yield Record(shard, self._row, self._epoch, name_classes(record, self.opened.labels))
                else:
                    parsed = record_of(record["line"], f"{self.opened.source.path}, shard {shard}", record["number"])
                    yield Record(shard, record["number"], self._epoch, parsed)
