"""Reads the records of text files: JSON lines, JSON arrays, CSV and TSV in any encoding."""

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, BinaryIO, TextIO

from .files import open_binary, suffix_of
from .json_arrays import array_entries
from .schema import RowError
from .source_config import SourceConfig

LONGEST = 2**26  # characters of a line, a cell or an entry; more is a damaged file, which must not fill the memory
WHOLE = 2**29  # characters of JSON that is neither an array nor lines, and is parsed at once
csv.field_size_limit(LONGEST)  # the default, 131072, is less than a long document
BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DELIMITERS = ",;\t|"
UNENDED = ("unexpected end", "field limit")  # errors of a quote that is never closed
SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # the first line, as Excel writes it
HEAD = 2**16  # bytes by which encoding and line ends are known
OTHERS = {  # first bytes of binary files -> what they are, and the remedy
    b"\x1f\x8b\x08": "compressed; end its name with .gz",
    b"\x28\xb5\x2f\xfd": "compressed; end its name with .zst",
    b"BZh91AY&SY": "compressed; end its name with .bz2",
    b"PAR1": "a table; end its name with .parquet",
    b"ARROW1": "a table; end its name with .arrow",
    b"PK\x03\x04": "an archive or a spreadsheet; unpack it, or export it as .csv",
}
WRAPPERS = ("data", "rows", "train", "validation", "test")  # keys of an object around the rows of a JSON file
Numbered = Iterator[
    tuple[int, dict[str, Any] | RowError]
]  # number of the row, or its line, and the record or its fault


def encoding_of(head: bytes, given: str | None = None) -> str:
    """Returns the encoding of a text file by its byte order mark; without one `given`, by default UTF-8."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), given or "utf-8")


def _open(file: str, source: SourceConfig | None, opener: Callable[[str], BinaryIO] = open_binary) -> TextIO:
    """Opens a text file; bytes that are not UTF-8 become lone surrogates, so that they spoil their row alone.

    Lines end with a line feed; those of a file that begins with carriage returns alone, with a carriage return.

    Raises:
        RowError: it is UTF-16 or UTF-32 without a byte order mark.
    """
    given = None if source is None else source.encoding
    with opener(file) as binary:
        try:
            head = binary.read(HEAD)
        except OSError as error:
            raise _unreadable(file, error) from error
    encoding = encoding_of(head, given)
    _refuse_others(head, encoding, given, file)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    newline = "\n" if b"\n" in head or b"\r" not in head else "\r"
    return io.TextIOWrapper(opener(file), encoding=encoding, errors=errors, newline=newline)


def _unreadable(place: str, error: UnicodeError | OSError, row: int | None = None) -> RowError:
    """Returns the error of a file in another encoding, or whose compressed content is damaged."""
    if isinstance(error, UnicodeError):
        problem = f"{place}: {error}; name its `encoding` or write the file as UTF-8."
        return RowError(problem, "invalid encoding", row=row)
    remedy = "Write it again; a file that is not compressed does not end with .gz, .zst or .bz2."
    return RowError(f"{place}: the file cannot be read: {error}. {remedy}", "invalid file")


def _refuse_others(head: bytes, encoding: str, given: str | None, file: str) -> None:
    """Refuses binary files by their first bytes, and text of two or four bytes a character without a mark."""
    for magic, what in OTHERS.items():
        if head.startswith(magic):
            raise RowError(f"{file}: its content is {what}.", "invalid file")
    if given is None and encoding == "utf-8" and b"\0" in head[:4]:
        problem = f"{file}: it begins with NUL bytes, as UTF-16 without a byte order mark; name its `encoding`."
        raise RowError(problem, "invalid encoding")


def parse_object(line: str | bytes, file: str, number: int) -> dict[str, Any]:
    """Parses a line of JSON; anything but an object is a `RowError` that names file and line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = f"{file}, line {number}: invalid JSON: {error}. Repair or drop the line."
        raise RowError(problem, "invalid JSON", row=number) from error
    if not isinstance(record, dict):
        raise _not_an_object(f"{file}, line {number}", record, number)
    return record


def _not_an_object(place: str, record: Any, number: int) -> RowError:
    problem = f"{place}: {record!r:.100} is not a JSON object; write {{column: value, …}}."
    return RowError(problem, "invalid JSON", row=number)


def json_lines(file: str, source: SourceConfig | None = None) -> Numbered:
    """Yields line numbers and objects; a line that cannot be parsed is an error of that row."""
    with _open(file, source) as lines:
        yield from _parsed(lines, file)


def text_lines(file: str, source: SourceConfig, opener: Callable[[str], BinaryIO]) -> Iterator[tuple[int, str]]:
    """Yields the lines of a file that are not blank, with their numbers; `opener` opens it, as `open_binary`."""
    with _open(file, source, opener) as lines:
        yield from _written(lines, file)


def _parsed(lines: TextIO, file: str) -> Numbered:
    yield from ((number, record_of(line, file, number)) for number, line in _written(lines, file))


def record_of(line: str, file: str, number: int) -> dict[str, Any] | RowError:
    """Returns the record of a line of JSON, or its fault."""
    try:
        return parse_object(line, file, number)
    except RowError as error:
        return error


def _written(lines: TextIO, file: str) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank, with their numbers."""
    yield from ((number, line) for number, line in _decoded(lines, file) if line.strip())


def _decoded(lines: TextIO, file: str) -> Iterator[tuple[int, str]]:
    """Yields the lines with their numbers; an encoding that does not fit is an error of the file.

    Raises:
        RowError: the file is not in the encoding that its byte order mark or the source names, damaged, or has a line
            of more than `LONGEST` characters.
    """
    for number in itertools.count(1):
        try:
            line = lines.readline(LONGEST + 1)
        except (UnicodeError, OSError) as error:
            raise _unreadable(f"{file}, line {number}", error, number) from error
        if not line:
            return
        if len(line) > LONGEST:
            problem = f"{file}, line {number}: it has more than {LONGEST} characters, the limit; split the line."
            raise RowError(problem, "too long line", row=number)
        yield number, line


def json_records(file: str, source: SourceConfig | None = None) -> Numbered:
    """Yields the objects of a JSON array, of an array inside an object (`{"data": […]}`), or of JSON lines.

    Raises:
        RowError: an array cannot be parsed, or an object is larger than `WHOLE`.
    """
    try:
        with _open(file, source) as text:
            begins = _first_character(text)
            if begins == "[":
                yield from _numbered(array_entries(text, file, LONGEST), file)
                return
        with _open(file, source) as text:
            are_lines = _are_lines(text)
        with _open(file, source) as text:
            yield from _parsed(text, file) if are_lines else _parsed_whole(text, file)
    except (UnicodeError, OSError) as error:
        raise _unreadable(file, error) from error


def _first_character(text: TextIO) -> str:
    """Reads up to the first character that is not a space, and returns it."""
    while (character := text.read(1)).isspace():
        pass
    return character


def _are_lines(text: TextIO) -> bool:
    """Returns whether a text has several lines of which the first is a JSON object."""
    lines = (line for line in iter(partial(text.readline, LONGEST), "") if line.strip())
    first, second = next(lines, ""), next(lines, None)
    try:
        return second is not None and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _parsed_whole(text: TextIO, file: str) -> Numbered:
    """Yields the records of an object, or of lines of which the first is none."""
    content = text.read(WHOLE + 1)
    if len(content) > WHOLE:
        problem = f"{file}: it is one JSON object of more than {WHOLE} characters, the limit; write lines or an array."
        raise RowError(problem, "invalid JSON")
    try:
        records = json.loads(content)
    except (ValueError, RecursionError):
        yield from _parsed(io.StringIO(content, newline="\n"), file)
        return
    if isinstance(records, dict):
        wrapped = [records[key] for key in WRAPPERS if isinstance(records.get(key), list)]
        records = wrapped[0] if wrapped else [records]
    if not isinstance(records, list):
        raise _not_an_object(f"{file}, row 1", records, 1)
    yield from _numbered(records, file)


def _numbered(records: Iterable[Any], file: str) -> Numbered:
    for number, record in enumerate(records, start=1):
        is_object = isinstance(record, dict)
        yield number, record if is_object else _not_an_object(f"{file}, row {number}", record, number)


def csv_records(file: str, source: SourceConfig | None = None) -> Numbered:
    """Yields the rows of a CSV or TSV file by its header; a row that cannot be read is an error of that row.

    Raises:
        RowError: a quote is never closed, or the file is in another encoding.
        ValueError: two columns have one name.
    """
    delimiter = None if source is None else source.delimiter
    with _open(file, source) as opened:
        lines = (line for _, line in _decoded(opened, file))
        head, before = next(lines, ""), 0
        if separator := SEPARATOR.fullmatch(head.rstrip("\r\n")):
            delimiter, head, before = delimiter or separator[1], next(lines, ""), 1
        while head and not head.strip():
            head, before = next(lines, ""), before + 1
        delimiter = delimiter or _delimiter(head, file)
        quoting = csv.QUOTE_MINIMAL if source is None or source.quotes else csv.QUOTE_NONE
        reader = csv.reader(itertools.chain([head], lines), delimiter=delimiter, quoting=quoting, strict=True)
        yield from _csv_rows(reader, file, before)


def _csv_rows(reader: Any, file: str, before: int) -> Numbered:
    """Yields the rows of an open file; `before` counts the lines before those of the reader."""
    names: list[str] | None = None
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = _csv_error(file, before + reader.line_num, str(error))
            if names is None or any(each in str(error) for each in UNENDED):  # the rest may be inside the quotes
                raise fault from error
            yield before + reader.line_num, fault
            continue
        if names is None:
            names = [name.strip() for name in fields]
            check_names(names, file)
        elif len(fields) > len(names) and any(fields[len(names) :]):
            problem = f"{fields[len(names) :]!r:.100} is beyond the last column; quote fields that hold commas"
            yield before + reader.line_num, _csv_error(file, before + reader.line_num, problem)
        elif fields:
            padded = [*fields, *[None] * (len(names) - len(fields))]
            yield before + reader.line_num, dict(zip(names, padded, strict=False))


def _csv_error(file: str, line: int, problem: str) -> RowError:
    return RowError(
        f"{file}, line {line}: invalid CSV: {problem}. Repair it, or set `delimiter` or `quotes: false`.",
        "invalid CSV",
        row=line,
    )


def check_names(names: list[str], file: str) -> None:
    """Raises ValueError if two columns have one name."""
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"{file}: the columns {twice} occur twice; rename them.")


def _delimiter(head: str, file: str) -> str:
    """Returns the delimiter of a header: the most frequent one outside quotes; a tab in a .tsv file."""
    if suffix_of(file) == ".tsv":
        return "\t"
    outside = "".join(head.split('"')[::2])
    return max(DELIMITERS, key=outside.count)


TEXT_READERS = {".jsonl": json_lines, ".json": json_records, ".csv": csv_records, ".tsv": csv_records}
