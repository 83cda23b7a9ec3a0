"""Pairs of any source in units, bad rows among them: for tools that look at every row and stop at none."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .readers import RowReader, SourceConfig
from .schema import Place, Row, Task, check_row
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
        """Returns the columns that are read, those outside of the schema under `+NAME`."""
        names = self.source.column_names(existing)
        further = {f"+{name}": name for name in self.extra}
        return {name: column for name, column in (names | further).items() if column in existing}

    def convert(self, values: Mapping[str, Any], place: Place) -> PairRow:
        """Returns the checked pair of a record; see `UnitReader.convert`."""
        columns = {name: column for name, column in place.columns.items() if not name.startswith("+")}
        record = {column: values[name] for name, column in columns.items()}
        row, place = RowReader(self.source, self.file, columns, self.media_root()).read(record, place.row - 1)
        check_row(row, self.tasks, place, self.source.image_placeholder)
        extra = {name[1:]: value for name, value in values.items() if name.startswith("+")}
        return PairRow(row, place, self.source.image_placeholder, extra)


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
