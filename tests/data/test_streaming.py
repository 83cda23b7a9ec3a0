"""Sources that are streamed: every row once an epoch over ranks and workers, exact after a resume."""

import gzip
import io
import json
import sys
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.registry import _registry
from helpers import random_image
from torch.utils.data import DataLoader

from vipolyqwen.data.checks import Checker
from vipolyqwen.data.schema import RowError, declare_tasks
from vipolyqwen.data.source_config import SourceConfig
from vipolyqwen.data.sources import BadRow, load_pairs
from vipolyqwen.data.streamed_pairs import StreamedPairs
from vipolyqwen.data.streams import Record, RecordStream, StreamedSource

SHARDS, ROWS = 5, 23
TASKS = declare_tasks()


def a_text(shard: int, row: int) -> str:
    return f"shard {shard} row {row}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    for shard in range(SHARDS):
        rows = [{"a": a_text(shard, row), "b": f"answer {shard} {row}"} for row in range(ROWS)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"part-{shard}.parquet", row_group_size=7)
        (folder / f"part-{shard}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def opened(path: Path | str, **settings: Any) -> StreamedSource:
    return StreamedSource.open(SourceConfig(path=str(path), streaming=True, **settings))


def stream(source: StreamedSource, consumer: int = 0, consumers: int = 1, state: dict | None = None) -> RecordStream:
    return RecordStream(source, lambda record: [record], 0, 3, consumer, consumers, state)


def take(records: RecordStream, count: int) -> list[Record]:
    return [next(records) for _ in range(count)]


def pairs_of(*configs: dict[str, Any], on_bad_row: str = "error", **launch: int) -> StreamedPairs:
    pairs = StreamedPairs.of(
        [{"streaming": True, "task": "instr", **config} for config in configs],
        TASKS,
        Checker(TASKS, 400, on_bad_row=on_bad_row),
        (),
    )
    pairs.launch(**{"batch_size": 4, "rank": 0, "ranks": 1, "workers": 1, "seed": 7, **launch})
    pairs.begin_at(0, 0, None)
    return pairs


# Records


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("consumers", [1, 2, 3, 5, 7])  # with fewer shards than consumers, they share each
def test_every_record_once_an_epoch(folder: Path, kind: str, consumers: int) -> None:
    source = opened(folder / f"part-*.{kind}", shuffle_buffer=10)
    for epoch in (0, 1):
        seen = []
        for consumer in range(consumers):
            records = stream(source, consumer, consumers)
            while (record := next(records)).epoch <= epoch:
                seen += [record.values["a"]] if record.epoch == epoch else []
        assert sorted(seen) == sorted(a_text(shard, row) for shard in range(SHARDS) for row in range(ROWS))


def test_epochs_and_seeds_have_other_orders_and_blocks_are_shuffled(folder: Path) -> None:
    source = opened(folder / "part-*.parquet", shuffle_buffer=10)
    records = take(stream(source), 2 * SHARDS * ROWS)
    orders = [[(each.shard, each.number) for each in records if each.epoch == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0][:10] != sorted(orders[0][:10])
    other = RecordStream(source, lambda record: [record], 0, 4, 0, 1)
    assert [(each.shard, each.number) for each in take(other, 20)] != orders[0][:20]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("consumers", [1, 7])
def test_a_stream_continues_exactly_from_any_record(folder: Path, kind: str, consumers: int) -> None:
    source = opened(folder / f"part-*.{kind}", shuffle_buffer=10)
    records, found, states = stream(source, 0, consumers), [], []
    for _ in range(40):
        found.append(next(records))
        states.append(json.loads(json.dumps(records.state())))
    for taken in range(30):
        resumed = stream(source, 0, consumers, states[taken])
        assert take(resumed, 8) == found[taken + 1 : taken + 9]


def test_a_checkpoint_from_before_lines_were_parsed_continues(folder: Path) -> None:
    records = stream(opened(folder / "part-*.jsonl", shuffle_buffer=10))
    take(records, 13)
    state = json.loads(json.dumps(records.state()))
    read = {"shard_idx": 0, "shard_example_idx": 23, "type": "ArrowExamplesIterable"}
    state["block"]["library"]["examples_iterable"] = {
        "examples_iterable": read,
        "previous_state": {**read, "shard_example_idx": 0},
        "batch_idx": 1,
        "num_chunks_since_previous_state": 1,
        "cropped_chunk_length": 0,
        "type": "RebatchedArrowExamplesIterable",
    }
    resumed = stream(opened(folder / "part-*.jsonl", shuffle_buffer=10), state=state)
    assert take(resumed, 20) == take(records, 20)


def test_webdataset_archives_stream_with_the_bytes_of_their_images(folder: Path, rng: np.random.Generator) -> None:
    members: dict[str, bytes] = {}
    for number in range(3):
        random_image(rng).save(buffer := io.BytesIO(), "png")
        members |= {f"{number}.png": buffer.getvalue(), f"{number}.json": b'{"b": "x", "q": "?"}'}
    (folder / "w.tar").write_bytes(archive_of(members))
    config = {"path": str(folder / "w.tar"), "task": "ocr", "columns": {"images": "png"}}
    config["columns"] |= {"a": "json.q", "b": "json.b"}
    batch = next(iter(pairs_of(config, batch_size=3)))
    assert [row["b"] for row in batch.rows] == ["x"] * 3
    assert all(row["images_a"][0].size == (60, 48) for row in batch.rows)


# Batches


def texts(batches: list) -> list[str]:
    return [row["a"] for batch in batches if batch is not None for row in batch.rows]


def loader(pairs: StreamedPairs, workers: int) -> DataLoader:
    return DataLoader(pairs, batch_size=None, collate_fn=lambda batch: batch, num_workers=workers)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (3, 2)])
def test_ranks_and_workers_share_an_epoch(folder: Path, ranks: int, workers: int) -> None:
    seen = []
    for rank in range(ranks):
        launch = {"rank": rank, "ranks": ranks, "workers": workers, "batch_size": 1}
        pairs = pairs_of({"path": str(folder / "part-*.parquet"), "shuffle_buffer": 6}, **launch)
        rows = [batch.rows[0] for batch in islice(loader(pairs, workers), 300 // ranks)]
        seen += [row["a"] for row in rows if row["epoch"] == 0]
    assert sorted(seen) == sorted(a_text(shard, row) for shard in range(SHARDS) for row in range(ROWS))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("taken", "counted"), [(5, 5), (6, 6), (5, 8)])  # with another accumulation, others count
def test_batches_continue_exactly(folder: Path, workers: int, taken: int, counted: int) -> None:
    sources = [{"path": str(folder / f"part-{shard}.parquet"), "weight": 1 + shard} for shard in range(2)]
    straight = [
        batch for batch, _ in zip(loader(pairs_of(*sources, workers=workers), workers), range(12), strict=False)
    ]
    pairs = pairs_of(*sources, workers=workers)
    states = list(pairs.states)
    for batch in straight[:taken]:
        states[batch.worker] = json.loads(json.dumps(batch.state))
    pairs.begin_at(counted, taken, states)
    resumed = list(islice(loader(pairs, workers), counted + 6))
    assert resumed[:counted] == [None] * counted
    assert texts(resumed) == texts(straight[taken : taken + 6])


def test_sources_are_drawn_by_their_weights(folder: Path) -> None:
    sources = [{"path": str(folder / f"part-{shard}.parquet"), "weight": weight} for shard, weight in ((0, 3), (1, 1))]
    batch = next(iter(pairs_of(*sources, batch_size=2000)))
    assert sum(row["source"] == 0 for row in batch.rows) / 2000 == pytest.approx(0.75, abs=0.03)


def test_a_row_is_that_of_an_indexed_source(folder: Path) -> None:
    config = {"path": str(folder / "part-0.parquet"), "task": "instr", "columns": {"b": "b"}}
    indexed = load_pairs([config], TASKS, 400)[2]
    batch = next(iter(pairs_of(config, batch_size=ROWS)))
    streamed = next(row for row in batch.rows if row["a"] == indexed["a"])
    assert {**streamed, "id": "", "epoch": 0} == {**indexed, "id": "", "epoch": 0}


def test_conversations_and_lists_become_pairs(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} {number}"} for number in range(2) for role in ("user", "assistant")]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": turns}), encoding="utf-8")
    (tmp_path / "l.jsonl").write_text(json.dumps({"a": "x", "b": ["p", "q", "r"]}), encoding="utf-8")
    talk = next(iter(pairs_of({"path": str(tmp_path / "c.jsonl"), "conversation": "messages"}, batch_size=2))).rows
    assert sorted(row["b"] for row in talk) == ["assistant 0", "assistant 1"]
    assert len({row["id"] for row in talk}) == 2
    config = {"path": str(tmp_path / "l.jsonl"), "lists": {"b": "random"}}
    drawn = next(iter(pairs_of(config, batch_size=40))).rows
    assert {row["b"] for row in drawn} == {"p", "q", "r"}  # another in each epoch


# Bad input


def write_bad(folder: Path, good: int = 8) -> str:
    rows = [{"a": f"a {row}", "b": f"b {row}"} for row in range(good)] + [{"a": "", "b": None}]
    (folder / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder / "bad.jsonl")


def test_a_bad_row_ends_the_stream_or_gives_its_place_to_the_next(tmp_path: Path) -> None:
    path = write_bad(tmp_path)
    with pytest.raises(RowError, match=r"bad.jsonl, shard 0, row 9"):
        next(iter(pairs_of({"path": path})))
    rows = next(iter(pairs_of({"path": path}, on_bad_row="skip", batch_size=9))).rows
    replaced = [row["replaces"] for row in rows if row["replaces"] is not None]
    assert [(bad.row, bad.cause) for bad in replaced][:1] == [(9, "invalid a")]
    assert all(isinstance(bad, BadRow) for bad in replaced)


def test_a_source_of_bad_rows_ends(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1000 rows in succession cannot be used"):
        next(iter(pairs_of({"path": write_bad(tmp_path, good=0)}, on_bad_row="skip")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "nothing/here.parquet"}, "nothing/here.parquet.*no such file"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0; write a number of rows >= 1"),
        ({"streaming": "yes"}, "streaming is 'yes'; write true or false"),
        ({"max_visits": 3}, "`max_visits` bounds an epoch"),
        ({"columns": {"a": "question"}}, "the column 'question' is missing"),
        ({"task": "nothing"}, "unknown task 'nothing'"),
    ],
)
def test_wrong_settings_are_named(folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        pairs_of({"path": str(folder / "part-*.parquet"), **change})


def test_other_formats_and_mixtures_with_an_index_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\nx,y\n")
    with pytest.raises(ValueError, match=r"its files are .csv; .* can be streamed.*prepare"):
        pairs_of({"path": str(tmp_path / "a.csv")})
    with pytest.raises(ValueError, match="rows with an index cannot be mixed"):
        pairs_of({"path": str(folder / "part-0.parquet")}, {"path": str(folder / "part-1.jsonl"), "streaming": False})
    with pytest.raises(ValueError, match=r"`streaming: true` is for `train_data`.*prepare"):
        load_pairs([{"path": str(folder / "part-0.parquet"), "task": "instr", "streaming": True}], TASKS, 400)


def test_fewer_rows_than_readers_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"a": "x", "b": "y"}))
    source = opened(tmp_path / "one.jsonl")
    assert next(stream(source, 1, 3)).values == {"a": "x", "b": "y"}  # row 1 is that of reader 1
    with pytest.raises(ValueError, match="fewer than the 3 readers"):
        stream(source, 2, 3)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("sizes", [(0, 1, 7, 0, 12), (3, 0, 0, 0)])  # a reader may draw only empty shards
def test_empty_shards_are_passed(tmp_path: Path, kind: str, sizes: tuple[int, ...]) -> None:
    schema = pa.schema({"a": pa.string(), "b": pa.string()})
    for shard, size in enumerate(sizes):
        rows = [{"a": a_text(shard, row), "b": "x"} for row in range(size)]
        pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / f"{shard}.parquet")
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source, seen = opened(tmp_path / f"*.{kind}", shuffle_buffer=5), []
    for consumer in range(2):
        records = stream(source, consumer, 2)
        while (record := next(records)).epoch < 6:
            seen += [(record.epoch, record.values["a"])]
    wanted = [a_text(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert sorted(seen) == sorted((epoch, text) for epoch in range(6) for text in wanted)


def test_a_source_whose_tasks_are_all_left_out_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"a": "x", "b": "y"}))
    config = {"path": str(tmp_path / "one.jsonl"), "task": "instr", "streaming": True}
    pairs = StreamedPairs.of([config], TASKS, Checker(TASKS, 400), ("instr",))
    pairs.begin_at(0, 0, None)
    with pytest.raises(ValueError, match="has no rows of the tasks that are trained"):
        next(iter(pairs))


def test_every_bad_row_is_reported_with_the_batch_it_came_before(tmp_path: Path) -> None:
    rows = [{"a": f"a {row}" if row % 10 == 0 else "", "b": "x"} for row in range(40)]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    batch = next(iter(pairs_of({"path": str(tmp_path / "bad.jsonl")}, on_bad_row="skip", batch_size=5)))
    bad = [row["replaces"] for row in batch.rows if row["replaces"] is not None] + batch.bad
    assert {each.row for each in bad} >= {row + 1 for row in range(40) if row % 10}  # of a whole epoch


SHAPES = {  # rows of a first and of a second shard
    "another column": ({}, {"extra": 1}),
    "a column less": ({"extra": 1, "id": "i"}, {}),
    "null after a number": ({"score": 0.5}, {"score": None}),
    "a whole number after a fraction": ({"score": 0.5}, {"score": 1}),
    "other order": ({"id": "x"}, {"b": "w", "id": "z", "a": "z"}),
    "a number after null": ({"score": None}, {"score": 0.5}),
    "a fraction after a whole number": ({"score": 1}, {"score": 0.5}),
    "an optional column": ({}, {"score": 0.5}),
    "texts that look like dates": ({"a": "2020-01-01"}, {"a": "2020-01-02 10:00:00"}),
    "a text that looks like a date": ({"a": "x"}, {"a": "2020-01-01"}),
    "a number where texts are": ({}, {"a": 7}),
    "a text where numbers are": ({"group": 7}, {"group": "07"}),
    "a truth where texts are": ({}, {"a": True}),
    "other negatives": ({"negatives": ["n"]}, {"negatives": [{"text": "m"}]}),
}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shards_of_other_columns_give_the_rows_that_they_give_with_an_index(
    tmp_path: Path, kind: str, shape: str
) -> None:
    for number, values in enumerate(SHAPES[shape]):
        row = {"a": "x", "b": "y", **values}
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{number}.parquet")
        else:
            text = json.dumps(row).encode()
            (tmp_path / f"{number}.{kind}").write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    config = {"path": str(tmp_path / f"*.{kind}"), "task": "instr"}

    def values(rows: list[dict[str, Any]]) -> list[tuple]:
        return sorted((str(row["score"]), row["a"], row["b"], row["group"], len(row["negatives"])) for row in rows)

    try:
        wanted = values([*load_pairs([config], TASKS, 400)])
    except RowError:
        wanted = None
    try:
        found = values(next(iter(pairs_of(config, batch_size=2))).rows)
    except ValueError as error:  # by name, never other values
        assert kind == "parquet" or (wanted is None and isinstance(error, RowError))
        assert "shard 1" in str(error) and ("prepare" in str(error) or isinstance(error, RowError))
    else:
        assert found == wanted
    if list(SHAPES).index(shape) < 5:
        assert wanted is not None and found == wanted


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tar"])
def test_a_damaged_shard_is_named(folder: Path, tmp_path: Path, kind: str) -> None:
    good = (folder / f"part-0.{kind}").read_bytes() if kind != "tar" else archive_of({"0.txt": b"x", "0.cls": b"1"})
    (tmp_path / f"0.{kind}").write_bytes(good)
    cut = good[: 700 if kind == "tar" else len(good) // 2] + (b'{"a": ' if kind == "jsonl" else b"")
    (tmp_path / f"1.{kind}").write_bytes(cut)
    columns = {"columns": {"a": "txt", "b": "txt"}} if kind == "tar" else {}
    pairs = pairs_of({"path": str(tmp_path / f"*.{kind}"), **columns}, batch_size=60)
    fault = r"line \d+: invalid JSON" if kind == "jsonl" else r"after record \d+: the stream cannot be read: "
    with pytest.raises(ValueError, match=rf"\*.{kind}, shard 1, {fault}"):
        next(iter(pairs))


def archive_of(members: dict[str, bytes]) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_an_address_whose_file_system_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.implementations.http", None)  # as without aiohttp
    monkeypatch.delitem(_registry, "https", raising=False)
    with pytest.raises(
        ValueError, match=r"https://host.invalid/a.jsonl: .*cannot be streamed: .*aiohttp.* Install it"
    ):
        pairs_of({"path": "https://host.invalid/a.jsonl"})
