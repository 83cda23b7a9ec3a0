"""Files that are not what their name says, are damaged in places, or would fill the memory."""

import bz2
import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import random_image

from vipolyqwen.data import json_arrays, records
from vipolyqwen.data.json_arrays import array_entries
from vipolyqwen.data.records import TEXT_READERS
from vipolyqwen.data.schema import RowError, declare_tasks
from vipolyqwen.data.sources import PairDataset, load_pairs

TASKS = declare_tasks({})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def load(file: Path, **keys: Any) -> PairDataset:
    return load_pairs([{"path": str(file), "task": "instr"}], TASKS, 400, **keys)


def texts(pairs: PairDataset) -> list[tuple[str, str]]:
    return list(pairs.texts())


# What would fill the memory


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(records, "LONGEST", 1000)
    monkeypatch.setattr(records, "WHOLE", 3000)
    monkeypatch.setattr(json_arrays, "PIECE", 100)
    before = csv.field_size_limit(1000)
    yield
    csv.field_size_limit(before)


LONG = b"x" * 5000
TOO_LONG = {
    "line": (
        "x.jsonl.gz",
        b'{"a": "' + LONG + b'", "b": "y"}\n',
        "line 1: it has more than 1000 characters, the limit",
    ),
    "entry": (
        "x.json.gz",
        b'[{"a": "x", "b": "y"}, {"a": "' + LONG + b'"}]',
        "row 2: invalid JSON: .*within 1000 char",
    ),
    "object": ("x.json", b'{"data": [\n' + b'{"a": "x"},\n' * 999, "one JSON object of more than 3000 characters"),
    "line of CSV": ("x.csv.gz", b"a,b\n" + LONG + b",y\n", "line 2: it has more than 1000 characters"),
    "quote": ("x.csv", b'a,b\n"x,y\n' + b"x,y\n" * 999, r"invalid CSV: field larger than field limit \(1000\)"),
}


@pytest.mark.parametrize(("name", "content", "message"), TOO_LONG.values(), ids=TOO_LONG)
def test_what_is_longer_than_a_limit_is_an_error_of_the_file(
    tmp_path: Path, short_limits: None, name: str, content: bytes, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    with pytest.raises(RowError, match=f"(?s){name}.*{message}"):
        load(file, on_bad_row="skip", max_bad_rows=1)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_memory_does_not_grow_with_a_file(tmp_path: Path, ending: str) -> None:
    row = {"a": "x" * 2000, "b": "y"}
    content = {
        ".jsonl": "\n".join([json.dumps(row)] * 8000),
        ".json": json.dumps([row] * 8000),
        ".csv": "a,b\n" + f"{row['a']},y\n" * 8000,
    }[ending]
    (tmp_path / f"x{ending}.gz").write_bytes(gzip.compress(content.encode(), 1))
    tracemalloc.start()
    try:
        found = sum(record == row for _, record in TEXT_READERS[ending](str(tmp_path / f"x{ending}.gz"), None))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == 8000
    assert most < len(content) / 2  # 16 MB; a piece is 1 MB


ARRAYS = [
    *(
        '[{"a": "x\\n\\"]", "b": [1, {"c": "]"}]} ,\n {"a": 12.5e3}]',
        "[]",
        " [ ] ",
        "[12, 345, -0.5, 1e+7, 2.5e-3, null, NaN]",
    ),
    *('["\\ud83d\\ude00", "ế", {}]\r\n', "[[[1], 2], 3]"),
    *('[{"a": 1}', "[1 2]", "[1,]", "[,1]", "[1] 2", "[1]]", '["x', "[1,", "[", '[{"a": }]', "[tru, 1]"),
]


@pytest.mark.parametrize("text", ARRAYS)
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_an_array_is_parsed_in_pieces_as_at_once(monkeypatch: pytest.MonkeyPatch, text: str, piece: int) -> None:
    monkeypatch.setattr(json_arrays, "PIECE", piece)
    content = io.StringIO(text)
    while content.read(1) != "[":
        pass
    try:
        wanted = json.loads(text)
    except ValueError:
        with pytest.raises(RowError, match="x.json, row .: invalid JSON"):
            list(array_entries(content, "x.json", 100))
    else:
        assert repr(list(array_entries(content, "x.json", 100))) == repr(wanted)


# What is not what its name says


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (gzip.compress(b"{}"), "end its name with .gz"),
        (bz2.compress(b"{}"), "end its name with .bz2"),
        (pa.compress(b"{}", "zstd", asbytes=True), "end its name with .zst"),
        (b"PAR1\0\0", "end its name with .parquet"),
        (b"ARROW1\0\0", "end its name with .arrow"),
        (b"PK\x03\x04\0", "export it as .csv"),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_a_text_file_of_another_content_says_what_it_is(
    tmp_path: Path, content: bytes, remedy: str, ending: str
) -> None:
    (tmp_path / f"x{ending}").write_bytes(content)
    with pytest.raises(RowError, match=rf"x{ending}: its content is .*{remedy}"):
        load(tmp_path / f"x{ending}")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x\udcff.jsonl").write_bytes(b'{"a": "x", "b": "y"}')
    with pytest.raises(ValueError, match=r"udcff.jsonl': the name is not UTF-8; rename"):
        load(tmp_path)


# Tables


def write_parquet(file: Path, table: pa.Table) -> None:
    pq.write_table(table, file)


def write_stream(file: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)


def write_indexed(file: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(str(file), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS: dict[str, tuple[str, Callable]] = {
    "parquet": ("x.parquet", write_parquet),
    "stream": ("x.arrow", write_stream),
    "indexed": ("x.arrow", write_indexed),
}
PNG = io.BytesIO()
random_image(np.random.default_rng(0)).save(PNG, "PNG")
BOTH = pa.array(["u", "v", "w"])


@pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)
def test_dictionaries_hold_texts_and_media(tmp_path: Path, name: str, write: Callable) -> None:
    images = pa.array([PNG.getvalue()] * 3).dictionary_encode()
    write(
        tmp_path / name, pa.table({"a": pa.array(["x", "y", "x"]).dictionary_encode(), "b": BOTH, "images_a": images})
    )
    pairs = load(tmp_path / name)
    assert texts(pairs) == [("x", "u"), ("y", "v"), ("x", "w")]
    assert [pairs[row]["images_a"][0].size for row in range(3)] == [(60, 48)] * 3


@pytest.mark.parametrize(("name", "write"), list(WRITERS.values())[:2], ids=list(WRITERS)[:2])
def test_a_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path, name: str, write: Callable) -> None:
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    damaged = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"x\xffz")])
    write(tmp_path / name, pa.table({"a": damaged, "b": BOTH}))
    pairs = load(tmp_path / name, on_bad_row="skip", max_bad_rows=1)
    assert texts(pairs) == [("x", "u"), ("z", "w")]
    assert [(bad.row, bad.cause) for bad in pairs.bad_rows] == [(2, "invalid value")]
    with pytest.raises(RowError, match=f"{name}, row 2: a value cannot be read: .*can't decode byte 0xff"):
        load(tmp_path / name)


@pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str, write: Callable) -> None:
    write(tmp_path / name, pa.Table.from_arrays([BOTH, BOTH, BOTH], names=["a", "b", "b"]))
    with pytest.raises(ValueError, match=rf"{name}: the columns \['b'\] occur twice; rename them"):
        load(tmp_path / name)


@pytest.mark.parametrize("write", [write_stream, write_indexed])
def test_a_column_of_an_unknown_type_is_an_error_of_its_file(tmp_path: Path, write: Callable) -> None:
    odd = pa.array([[("k", "v")]] * 3, pa.map_(pa.string(), pa.string()))
    write(tmp_path / "x.arrow", pa.table({"a": BOTH, "b": BOTH, "odd": odd}))
    with pytest.raises(ValueError, match="x.arrow: .*map<string, string>.* Leave that column out"):
        load(tmp_path / "x.arrow")


def test_a_damaged_arrow_file_with_an_index_is_named(tmp_path: Path) -> None:
    write_indexed(tmp_path / "x.arrow", pa.table({"a": BOTH, "b": BOTH}))
    content = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "x.arrow").write_bytes(content[:-9])
    with pytest.raises(ValueError, match="x.arrow: not readable as a table: "):
        load(tmp_path / "x.arrow")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher_a": [10**400, 1]}, "position 0 of the vector is not a finite float32"),
        ({"audio_a": {"array": [10**400, 0.5], "sampling_rate": 16_000}}, "column 'audio_a' is "),
        ({"audio_a": {"array": [0.1] * 800, "sampling_rate": 10**400}}, "column 'audio_a' is "),
        ({"score": 10**400}, "column 'score' is 1000"),
    ],
)
def test_integers_beyond_floating_point_are_errors_of_their_row(tmp_path: Path, values: dict, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"a": "x", "b": "y", **values}), encoding="utf-8")
    with pytest.raises(RowError, match=f"x.jsonl, row 1, .*{message}"):
        load(tmp_path / "x.jsonl")
