"""Pairs of any source in units, bad rows among them: for tools that look at every row and stop at none."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .checks import NONE, Checker
from .readers import RecordReader
from .schema import Place, Row, RowError, Task, row_id
from .source_config import SourceConfig
from .tables import class_names, name_classes
from .units import UNIT_ROWS, BadRow, Unit, UnitReader, source_files


@dataclass(frozen=True)
class PairRow:
    """A pair whose columns are checked; its media are not opened.

    Attributes:
        row: the pair.
        place: where it was read.
        placeholder: marks the place of an image in the text of a side.
        extra: the further columns that were asked for.
    """

    row: Row
    place: Place
    placeholder: str
    extra: dict[str, Any]


@dataclass(frozen=True)
class PairReader(UnitReader):
    """Reads the records of one file as pairs.

    Attributes:
        tasks: the tasks in the order of their task ids.
        extra: columns outside of the schema that a row keeps where the file has them.
    """

    tasks: Mapping[str, Task] = field(default_factory=dict)
    extra: Sequence[str] = ()

    def columns(self, existing: Sequence[str]) -> dict[str, str]:
        """Returns the columns of the file that are read, under their names."""
        used = {*self.source.used_columns(existing), *self.extra}
        return {name: name for name in existing if name in used}

    def rows(self, records: Iterable[tuple[int, Any]], columns: Mapping[str, str]) -> list[PairRow | BadRow]:
        """Returns the checked pairs of numbered records, an unusable one as a `BadRow`."""
        reader = RecordReader(self.source, self.file, self.media_root)
        labels = class_names(self.file, self.source)
        return [pair for number, record in records for pair in self._pairs(reader, number, record, labels)]

    def _pairs(
        self, reader: RecordReader, number: int, record: Any, labels: Mapping[str, list[str]]
    ) -> Iterator[PairRow | BadRow]:
        checker = Checker(self.tasks, media=NONE)  # files are opened later
        place = reader.place(number, 0, None, ())
        if isinstance(record, RowError):
            yield BadRow(row_id(place), self.file, number, str(record))
            return
        record = name_classes(record, labels)
        try:
            found = reader.pairs(record, number)
        except RowError as error:
            yield BadRow(error.id or row_id(place), self.file, number, str(error))
            return
        for part, values in enumerate(found):
            place = reader.place(number, part, values.get("id"), record)
            try:
                row = reader.row(values, place)
                checker.check(row, place, self.source, reader.root)
            except RowError as error:
                yield BadRow(row_id(place), self.file, number, str(error))
                continue
            extra = {name: record[name] for name in self.extra if name in record}
            yield PairRow(row, place, self.source.image_placeholder, extra)


def pair_units(
    source: SourceConfig, tasks: Mapping[str, Task], unit_rows: int = UNIT_ROWS, extra: Sequence[str] = ()
) -> Iterator[Unit]:
    """Yields the units of a source in their order; their rows are `PairRow` or `BadRow`.

    Args:
        source: an entry of a recipe.
        tasks: the tasks in the order of their task ids.
        unit_rows: rows of a unit at most.
        extra: columns outside of the schema to keep.
    """
    for file, label in source_files(source, unit_rows).items():
        yield from PairReader(source, file, label, unit_rows, tasks, extra).units()


def read_pair_rows(
    source: SourceConfig, tasks: Mapping[str, Task], extra: Sequence[str] = ()
) -> Iterator[PairRow | BadRow]:
    """Yields every row of a source, good or bad, in their order.

    Raises:
        ValueError: a setting is wrong, or no row of a file can be read.
    """
    for unit in pair_units(source, tasks, extra=extra):
        yield from unit.read()
