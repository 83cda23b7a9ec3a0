import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import random_audio, random_image

from vipolyqwen.data.corpus import CorpusRow, read_corpus
from vipolyqwen.data.units import BadRow, Unit


def read(source: dict[str, Any], **options: Any) -> list[tuple[Unit, list[CorpusRow | BadRow]]]:
    _, units = read_corpus(source, **options)
    return [(unit, unit.read()) for unit in units()]


def texts(found: list[tuple[Unit, list[CorpusRow | BadRow]]]) -> list[list[str]]:
    return [[row.text for row in rows if isinstance(row, CorpusRow)] for _, rows in found]


def test_units_of_parquet_files_lie_in_row_groups(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"text": list("abcdefgh"), "other": range(8)}), tmp_path / "rows.parquet", row_group_size=5
    )
    found = read({"path": str(tmp_path / "rows.parquet")}, unit_rows=3)
    assert texts(found) == [["a", "b", "c"], ["d", "e"], ["f", "g", "h"]]
    assert [unit.rows for unit, _ in found] == [3, 2, 3]
    assert [row.id for _, rows in found for row in rows] == [f"rows.parquet:{number}" for number in range(1, 9)]
    assert len({unit.name for unit, _ in found}) == len({unit.key for unit, _ in found}) == 3


def test_a_unit_may_be_read_again_and_out_of_order(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": list("abcdef")}), tmp_path / "rows.parquet")
    _, units = read_corpus({"path": str(tmp_path / "rows.parquet")}, unit_rows=2)
    first, _, last = units()
    order = [first, last, first, first]
    assert [[row.text for row in unit.read()] for unit in order] == [["a", "b"], ["e", "f"], ["a", "b"], ["a", "b"]]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "arrow", "saved"])
def test_every_kind_of_file_has_the_same_rows(kind: str, tmp_path: Path) -> None:
    records = [{"id": str(number), "text": text} for number, text in enumerate("abcde")]
    path = tmp_path / f"rows.{kind}"
    if kind == "saved":
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    elif kind == "arrow":
        datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
        path = next((tmp_path / "saved").glob("*.arrow"))
    elif kind == "csv":
        path.write_text("id,text\n" + "\n".join(",".join(row.values()) for row in records), encoding="utf-8")
    else:
        lines = [json.dumps(row) for row in records]
        path.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    found = read({"path": str(path)}, unit_rows=2)
    assert texts(found) == [["a", "b"], ["c", "d"], ["e"]]
    assert [row.id for _, rows in found for row in rows] == list("01234")


def test_only_the_key_of_a_changed_unit_changes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in "abcd"), encoding="utf-8")
    before = [unit for unit, _ in read({"path": str(path)}, unit_rows=2)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in "abcx"), encoding="utf-8")
    after = [unit for unit, _ in read({"path": str(path)}, unit_rows=2)]
    assert [unit.name for unit in before] == [unit.name for unit in after]
    assert [one.key == other.key for one, other in zip(before, after, strict=True)] == [True, False]


def test_bad_rows_say_why_and_cost_no_other_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{broken\n{"text": 5}\n{"text": ""}\n{"text": "b", "id": 7}\n', encoding="utf-8")
    ((_, rows),) = read({"path": str(path)})
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.row for row in bad] == [2, 3, 4]
    assert "JSON" in bad[0].error and "'text' is 5" in bad[1].error and "empty" in bad[2].error
    assert [row.id for row in rows] == [f"rows.jsonl:{number}" for number in (1, 2, 3, 4)] + ["7"]


def test_side_b_of_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"task": "instr", "a": "question", "b": "answer"}\n', encoding="utf-8")
    assert texts(read({"path": str(path)})) == [["question"]]
    assert texts(read({"path": str(path)}, side="b")) == [["answer"]]


def test_either_side_of_pairs_may_be_media(tmp_path: Path, rng: np.random.Generator) -> None:
    random_image(rng).save(tmp_path / "0.png")
    audio = random_audio(rng)
    row = {"images": "0.png", "b": "nghe", "audio_b": {**audio, "array": audio["array"].tolist()}}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row), encoding="utf-8")
    kinds = []
    for side in ("a", "b"):
        ((_, (row,)),) = read({"path": str(tmp_path / "pairs.jsonl")}, side=side)
        kinds.append([part["type"] for part in row.message()[0]["content"]])
    assert kinds == [["image"], ["text", "audio"]]


def test_images_stand_at_their_placeholders_and_audio_last(tmp_path: Path, rng: np.random.Generator) -> None:
    random_image(rng).save(tmp_path / "0.png")
    record = {"text": "<image> or <image>?", "images": ["0.png", "0.png"], "audio": random_audio(rng)}
    record["audio"]["array"] = record["audio"]["array"].tolist()
    (tmp_path / "rows.jsonl").write_text(json.dumps(record), encoding="utf-8")
    ((_, (row,)),) = read({"path": str(tmp_path / "rows.jsonl")})
    (message,) = row.message()
    assert [part["type"] for part in message["content"]] == ["image", "text", "image", "text", "audio"]


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ({"columns": {"a": "body"}}, {}, ["body", "text", "columns"]),
        ({"columns": {"a": None}}, {}, ["text", "columns"]),
        ({}, {"side": "b"}, ["text", "b"]),
        ({}, {"side": "c"}, ["side", "'c'"]),
        ({}, {"unit_rows": 0}, ["unit_rows", "0"]),
        ({"colums": {}}, {}, ["colums"]),
    ],
)
def test_wrong_settings_name_value_and_remedy(source: dict, options: dict, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read({"path": str(path), **source}, **options)
    assert all(word in str(error.value) for word in words)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"text")
    with pytest.raises(ValueError, match="rows.parquet"):
        read({"path": str(tmp_path / "rows.parquet")})
