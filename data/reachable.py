"""The shape of a recipe's mixture, and whether each of its sources can be reached and read."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from .checks import check_row
from .files import find_files
from .pair_units import read_pair_rows
from .readers import RecordReader
from .recipes import DataRecipe
from .schema import RowError, Task
from .source_config import SourceConfig
from .units import BadRow

FirstRecord = Callable[[SourceConfig], Mapping[str, Any]]
OK = "ok"


@dataclass(frozen=True)
class SourceShape:
    """What a source brings to an epoch.

    Attributes:
        source: the entry.
        state: `on`, or `off` with `enabled: false`.
        reached: `OK`, why its first row cannot be read, or "" if that was not tried.
    """

    source: SourceConfig
    state: str
    reached: str = ""

    @property
    def name(self) -> str:
        """Returns path and configuration."""
        return self.source.path if self.source.name is None else f"{self.source.path} ({self.source.name})"


def shapes_of(recipe: DataRecipe, first_record: FirstRecord | None = None) -> list[SourceShape]:
    """Returns the training sources of a recipe, those that are off last.

    Args:
        recipe: the recipe.
        first_record: reads the first record of a source; `None` does not try.
    """
    sources = [(source, "on") for source in recipe.sources["train"]] + [(source, "off") for source in recipe.disabled]
    return [
        SourceShape(source, state, "" if first_record is None else reach(source, recipe.tasks, first_record))
        for source, state in sources
    ]


def reach(source: SourceConfig, tasks: Mapping[str, Task], first_record: FirstRecord) -> str:
    """Returns `OK` if a pair can be made of the first record of a source, otherwise why not."""
    try:
        if find_files(source):
            row = next(iter(read_pair_rows(source, tasks)))
            return row.error if isinstance(row, BadRow) else OK
        record = dict(first_record(source))
        source.check_columns(record, tasks, source.path)
        reader = RecordReader(source, source.path, "")
        for part, values in enumerate(reader.pairs(record, 1)):
            place = reader.place(1, part, values.get("id"), record)
            check_row(reader.row(values, place), tasks, place, source.image_placeholder)
    except (OSError, ValueError, RowError) as error:  # a repository that is gated or does not exist is an OSError
        return " ".join(str(error).split())
    return OK


def first_of_hub(source: SourceConfig) -> Mapping[str, Any]:
    """Returns the first record of a Hub dataset, its media undecoded.

    Raises:
        OSError: the Hub cannot be reached, the repository does not exist, or it is gated.
        ValueError: the configuration or the split does not exist.
    """
    stream = datasets.load_dataset(
        source.path, source.name, split=source.split, revision=source.revision, streaming=True
    )
    return next(iter(stream.decode(False)))


def table_of(shapes: Sequence[SourceShape]) -> str:
    """Returns the sources and the shares of languages and tasks as text."""
    rows = [("source", "task", "language", "rows", "licence", "state", "reached")]
    rows += [
        (
            shape.name,
            shape.source.task or "by row",
            shape.source.language or "",
            "all" if shape.source.max_visits is None else f"{shape.source.max_visits:,}",
            shape.source.licence or "",
            shape.state + (", gated" if shape.source.gated else ""),
            shape.reached,
        )
        for shape in shapes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    on = [shape.source for shape in shapes if shape.state == "on"]
    total = sum(source.max_visits or 0 for source in on)
    lines += ["", f"At most {total:,} rows an epoch of the sources that are on and have `max_visits`."]
    for title, key in (("language", "language"), ("task", "task")):
        lines.append(
            f"by {title}: " + ", ".join(_shares(((getattr(each, key), each.max_visits) for each in on), total))
        )
    return "\n".join(lines)


def _shares(rows: Iterable[tuple[str | None, int | None]], total: int) -> list[str]:
    counts: Counter[str] = Counter()
    for name, visits in rows:
        counts[name or "by row"] += visits or 0
    return [f"{name} {count:,} ({count / max(1, total):.0%})" for name, count in counts.most_common()]
