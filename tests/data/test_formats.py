"""Data as people have it: the same pairs in many formats and shapes."""

import bz2
import csv
import gzip
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from helpers import random_image

from vipolyqwen.data.cleaning import clean_row
from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import TASKS, RowError, declare_tasks, with_ready_tasks
from vipolyqwen.data.sources import PairDataset, load_pairs


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A folder with images and audio."""
    for number in range(2):
        random_image(rng, 60 + 30 * number).save(tmp_path / f"{number}.png")
    soundfile.write(tmp_path / "word.wav", rng.uniform(-0.5, 0.5, 4000), 8000)
    return tmp_path


def load(path: Path, **config: Any) -> PairDataset:
    source = {"path": str(path), **config}
    return load_pairs([source], declare_tasks(with_ready_tasks({}, [source])), 400)


def write(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path.write_bytes(content.encode(encoding) if isinstance(content, str) else content)
    return path


def write_json(path: Path, rows: list[dict]) -> Path:
    return write(path, "\n".join(json.dumps(row) for row in rows))


def write_csv(path: Path, rows: list[dict], delimiter: str = ",", encoding: str = "utf-8", first: str = "") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        file.write(first)
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def texts(pairs: PairDataset) -> list[tuple[str, str]]:
    return [(row.a, row.b) for row in map(pairs.row, range(len(pairs)))]


# Files


def test_a_hundred_pairs_in_eight_formats_and_more_give_identical_batches(folder: Path, tiny: tuple) -> None:
    kinds = [("text_pair", ""), ("instr", ""), ("ocr", "0.png"), ("vqa_single", "1.png")]
    rows = [
        {
            "id": f"p{number}",
            "task": kinds[number % 4][0],
            "a": f'câu "{number}", dấu; phẩy\tvà tab',
            "b": f"dòng một\ndòng hai {number}",
            "images": kinds[number % 4][1],
            "score": number / 100 if number % 4 == 0 else None,
            "group": number % 7 or None,
        }
        for number in range(100)
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "a.parquet")
    table.save_to_disk(folder / "saved")
    commas = [
        {**row, "score": str(row["score"]).replace(".", ",") if row["score"] is not None else ""} for row in rows
    ]
    array = json.dumps(rows, ensure_ascii=False)
    media = {"media_root": str(folder)}
    formats = [
        load(write_json(folder / "a.jsonl", rows)),
        load(write(folder / "bom.json", array, "utf-8-sig")),
        load(write(folder / "wide.json", json.dumps({"data": rows}), "utf-16")),
        load(write_csv(folder / "a.csv", rows)),
        load(write_csv(folder / "excel.csv", commas, ";", "utf-8-sig")),
        load(write_csv(folder / "sep.csv", commas, ";", "utf-16", "sep=;\n")),
        load(write_csv(folder / "a.tsv", rows, "\t")),
        load(folder / "a.parquet"),
        load(next((folder / "saved").glob("*.arrow")), **media),
        load(folder / "saved", **media),
    ]
    collator = MixedBatchCollator(tiny[1], TASKS)
    first, *others = [collator([pairs[number] for number in (0, 1, 2, 3, 96, 97, 98, 99)]) for pairs in formats]
    assert all(len(pairs) == 100 and texts(pairs) == texts(formats[0]) for pairs in formats)
    assert all(pairs.groups() == formats[0].groups() for pairs in formats)
    for batch in others:
        assert batch.keys() == first.keys()
        for name, value in first.items():
            same = torch.equal(value.nan_to_num(-1), batch[name].nan_to_num(-1)) if torch.is_tensor(value) else None
            assert same if same is not None else value == batch[name], name


def test_a_cell_may_be_longer_than_a_book(folder: Path) -> None:
    path = write_csv(folder / "a.csv", [{"a": "x" * 200_000, "b": "y"}])
    assert len(load(path, task="instr").row(0).a) == 200_000


@pytest.mark.parametrize(
    ("content", "config"),
    [
        ("a|b\nx, y|z\n", {}),
        ('a,b\n"x, y",z\n', {}),
        ("b;a\nz;x, y\n", {}),
        ("a\tb\nx, y\tz\n", {}),
        ("a;b,\nx, y;z\n", {"delimiter": ";", "columns": {"b": "b,"}}),
        ('a\tb\nx, y\tz"\n', {"quotes": False, "columns": {}}),
    ],
)
def test_the_delimiter_is_that_of_the_header_or_of_the_recipe(folder: Path, content: str, config: dict) -> None:
    a, b = texts(load(write(folder / "a.csv", content), task="instr", **config))[0]
    assert (a, b.strip('"')) == ("x, y", "z")


def test_an_encoding_without_mark_is_named(folder: Path) -> None:
    path = write(folder / "a.csv", "a,b\nHà Nội,é\n".replace("ộ", "ô"), "cp1252")
    assert texts(load(path, task="instr", encoding="cp1252")) == [("Hà Nôi", "é")]
    with pytest.raises(RowError, match="a.csv, row 2, column 'a' .*lone surrogate at position 1; encode the file as"):
        load(path, task="instr")
    with pytest.raises(ValueError, match="encoding is 'vni'"):
        load(path, task="instr", encoding="vni")


def test_a_clone_of_a_hub_dataset_is_searched_in_depth(folder: Path) -> None:
    clone = folder / "clone"
    for name in (
        "data/vi/train-00000-of-00002",
        "data/vi/train-00001-of-00002",
        "data/vi/test-00000-of-00001",
        "data/en/train",
    ):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"a": [name], "b": ["y"]}), clone / f"{name}.parquet")
    write(clone / "dataset_infos.json", "{}")
    (clone / ".git").mkdir()
    write(clone / ".git" / "x.json", "{}")
    assert [a[:7] for a, _ in texts(load(clone, task="instr", name="vi"))] == ["data/vi"] * 2
    assert len(load(clone, task="instr")) == 3
    assert texts(load(clone, task="instr", name="vi", split="test"))[0][0].startswith("data/vi/test")
    with pytest.raises(ValueError, match="`name: zh` is neither a folder"):
        load(clone, task="instr", name="zh")


def test_a_dataset_of_the_hub_has_a_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(path: str, name: str | None, **options: Any) -> datasets.Dataset:
        asked.update(path=path, name=name, **options)
        return datasets.Dataset.from_list([{"a": "x", "b": "y"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load(Path("org/name"), task="instr", revision="abc123", name="vi")) == 1
    assert asked == {"path": "org/name", "name": "vi", "split": "train", "revision": "abc123"}
    with pytest.raises(ValueError, match="`revision: abc123` is for Hub datasets"):
        load(write_json(folder / "a.jsonl", [{"a": "x", "b": "y"}]), task="instr", revision="abc123")


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_a_file_name_may_be_spelled_in_another_unicode_form(folder: Path, on_disk: str) -> None:
    name = "ảnh phố/số một.png"
    path = folder / unicodedata.normalize(on_disk, name)
    path.parent.mkdir()
    (folder / "0.png").rename(path)
    for form in ("NFC", "NFD"):
        row = {"a": "x", "b": "y", "images": unicodedata.normalize(form, name)}
        assert len(load(write_json(folder / f"{form}.jsonl", [row]), task="ocr")[0]["images_a"]) == 1


# Columns


def test_lists_give_a_pair_for_each_entry_or_one(folder: Path) -> None:
    rows = [{"id": "i", "a": "x", "captions": ["một", "hai", "ba", ""]}, {"id": "j", "a": "y", "captions": ["bốn"]}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    for path in (write_json(folder / "a.jsonl", rows), folder / "a.parquet"):
        config = {"task": "instr", "columns": {"b": "captions"}}
        every = load(path, lists={"b": "all"}, **config)
        assert texts(every) == [("x", "một"), ("x", "hai"), ("x", "ba"), ("y", "bốn")]
        assert [every.row(number).id for number in range(4)] == ["i", "i#2", "i#3", "j"]
        assert texts(load(path, lists={"b": "first"}, **config)) == [("x", "một"), ("y", "bốn")]
        one = texts(load(path, lists={"b": "random"}, **config))
        assert one[0][1] in rows[0]["captions"][:3] and one[1] == ("y", "bốn")
        with pytest.raises(RowError, match="column 'captions' .*not list; choose with `lists: {b: all}`"):
            load(path, **config)
    with pytest.raises(ValueError, match="lists.b is 'any'; write one of all, first, random"):
        load(path, lists={"b": "any"}, **config)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"negatives": ["u", "v", "w"]}, {}),
        ({"negative_2": "v", "negative_10": "w", "negative_1": "u"}, {}),
        ({"negative": "u", "negative_1": "v", "negative_2": "w"}, {}),
        ({"wrong_2": "v", "wrong_10": "w", "wrong_1": "u", "wrong_11": ""}, {"negatives": "wrong_*"}),
        ({"p": ["u", "v"], "q": "w"}, {"negatives": ["p", "q"]}),
        ({"hard": [{"doc": "u"}, {"doc": "v"}, {"doc": "w"}]}, {"negatives": "hard.doc"}),
    ],
)
def test_negatives_stand_in_one_column_or_several(folder: Path, row: dict, columns: dict) -> None:
    pq.write_table(pa.Table.from_pylist([{"a": "x", "b": "y", **row}]), folder / "a.parquet")
    for path in (write_json(folder / "a.jsonl", [{"a": "x", "b": "y", **row}]), folder / "a.parquet"):
        pairs = load(path, task="instr", columns=columns)
        assert [each.text for each in pairs.row(0).negatives] == ["u", "v", "w"]


def test_columns_lie_inside_others(folder: Path) -> None:
    row = {
        "q": {"text": "x"},
        "answers": {"text": ["y", "z"], "start": [1, 2]},
        "translation": {"vi": "v"},
        "a.b": "dot",
    }
    pq.write_table(pa.Table.from_pylist([row]), folder / "a.parquet")
    for path in (write_json(folder / "a.jsonl", [row]), folder / "a.parquet"):
        columns = {"a": "q.text", "b": "answers.text"}
        assert texts(load(path, task="instr", columns=columns, lists={"b": "first"})) == [("x", "y")]
        assert texts(load(path, task="instr", columns={"a": "answers.text.1", "b": "translation.vi"})) == [("z", "v")]
        assert texts(load(path, task="instr", columns={"a": "a.b", "b": "q.text"})) == [("dot", "x")]
        with pytest.raises(ValueError, match="the column 'reply.text' is missing"):
            load(path, task="instr", columns={"a": "q.text", "b": "reply.text"})


def test_classes_have_their_names(folder: Path) -> None:
    features = datasets.Features(
        {
            "a": datasets.Value("string"),
            "b": datasets.ClassLabel(names=["dương", "âm"]),
            "kind": datasets.ClassLabel(names=["x", "instruct"]),
        }
    )
    table = datasets.Dataset.from_list(
        [{"a": "hay", "b": 0, "kind": 1}, {"a": "dở", "b": 1, "kind": 1}], features=features
    )
    table.to_parquet(folder / "a.parquet")
    table.save_to_disk(folder / "saved")
    for path in (folder / "a.parquet", folder / "saved"):
        pairs = load(path, task_column="kind", map={"instruct": "instr"})
        assert texts(pairs) == [("hay", "dương"), ("dở", "âm")]


def test_audio_that_is_not_decoded_stands_in_the_cell(folder: Path) -> None:
    content = (folder / "word.wav").read_bytes()
    cells = [{"bytes": content, "path": "x.wav"}, {"bytes": None, "path": "word.wav"}]
    pq.write_table(pa.Table.from_pylist([{"audio": cell, "b": "y"} for cell in cells]), folder / "a.parquet")
    rows = list(load(folder / "a.parquet", task="audio"))
    assert [len(row["audio_a"]["array"]) for row in rows] == [4000, 4000]
    assert rows[0]["a_key"] == rows[1]["a_key"]


def test_ready_tasks_need_no_declaration(folder: Path) -> None:
    pairs = load(
        write_json(folder / "a.jsonl", [{"query": "x", "document": "y", "negative_1": "z"}]), task="retrieval"
    )
    assert (texts(pairs), pairs.task_counts()) == ([("x", "y")], {"retrieval": 1})
    shown = load(write_json(folder / "b.jsonl", [{"image": "0.png", "caption": "một"}]), task="image_caption")
    assert (shown[0]["b"], len(shown[0]["images_a"])) == ("một", 1)
    declared = with_ready_tasks({"retrieval": {"loss": {"nce": 2.0}}}, [])
    assert declared["retrieval"] == {"prefix": "<retrieval>", "loss": {"nce": 2.0}}
    assert with_ready_tasks(None, [{"task": "instr"}]) == {}


# Conversations

LLAVA = {
    "id": "c",
    "image": "0.png",
    "conversations": [
        {"from": "system", "value": "Trả lời ngắn."},
        {"from": "human", "value": "<image>\nĐây là gì?"},
        {"from": "gpt", "value": "Một ngôi sao."},
        {"from": "human", "value": "Màu gì?"},
        {"from": "gpt", "value": "Đỏ."},
    ],
}
OPENAI = {
    "id": "c",
    "messages": [
        {"role": "system", "content": "Trả lời ngắn."},
        {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "\nĐây là gì?"}]},
        {"role": "assistant", "content": "Một ngôi sao."},
        {"role": "user", "content": [{"type": "text", "text": "Màu gì?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Đỏ."}]},
    ],
}
HUB = {**OPENAI, "image": ["0.png"]}
HUB = {
    **HUB,
    "messages": [
        HUB["messages"][0],
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nĐây là gì?"}]},
        *HUB["messages"][2:],
    ],
}
CAULDRON = {
    "image": "0.png",
    "texts": [{"user": "<image>\nĐây là gì?", "assistant": "Một ngôi sao."}, {"user": "Màu gì?", "assistant": "Đỏ."}],
}


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (LLAVA, "conversations"),
        (OPENAI, "messages"),
        (HUB, "messages"),
        ({**CAULDRON, "id": "c"}, "texts"),
        ({**LLAVA, "conversations": json.dumps(LLAVA["conversations"])}, "conversations"),
        (
            {
                **LLAVA,
                "conversations": {key: [turn[key] for turn in LLAVA["conversations"]] for key in ("from", "value")},
            },
            "conversations",
        ),
    ],
)
def test_each_answer_of_a_conversation_is_a_pair(folder: Path, row: dict, column: str) -> None:
    path = write_json(folder / "a.jsonl", [row])
    pairs = load(path, conversation=column)
    first, second = "<image>\nĐây là gì?", "<image>\nĐây là gì?\nMột ngôi sao.\nMàu gì?"
    assert texts(pairs) == [(first, "Một ngôi sao."), (second, "Đỏ.")]
    assert pairs.task_counts() == {"vqa_single": 1, "vqa_multi": 1}
    assert [(row.id, len(row.images_a)) for row in map(pairs.row, range(2))] == [("c", 1), ("c#2", 1)]
    assert texts(load(path, conversation={"column": column, "pairs": "first"})) == [(first, "Một ngôi sao.")]
    assert texts(load(path, conversation={"column": column, "pairs": "last"})) == [(second, "Đỏ.")]
    if column != "texts":
        kept = load(path, conversation={"column": column, "system": True})
        assert kept.row(0).a == f"Trả lời ngắn.\n{first}"


def test_several_images_stand_at_their_marks_and_text_alone_is_an_instruction(folder: Path) -> None:
    turns = [("human", "<image> và <image> khác gì?"), ("gpt", "Màu."), ("human", "Còn <image>?"), ("gpt", "Hình.")]
    rows = [
        {"image": ["0.png", "1.png", "0.png"], "conversations": [{"from": who, "value": text} for who, text in turns]},
        {"image": None, "conversations": [{"from": who, "value": text} for who, text in turns[:2]]},
        {
            "image": ["0.png", "1.png"],
            "conversations": [{"from": "human", "value": "Khác gì?"}, {"from": "gpt", "value": "Màu."}],
        },
    ]
    pairs = load(write_json(folder / "a.jsonl", rows), conversation="conversations")
    assert [(row.task, len(row.images_a)) for row in map(pairs.row, range(4))] == [
        ("vqa_single", 2),
        ("vqa_multi", 3),
        ("instr", 0),
        ("vqa_single", 2),
    ]
    assert Path(pairs.row(1).images_a[1]).name == "1.png"


def test_media_of_a_conversation_may_stand_in_the_table(folder: Path) -> None:
    content = (folder / "0.png").read_bytes()
    row = {"images": [{"bytes": content, "path": None}], "conversations": LLAVA["conversations"]}
    datasets.Dataset.from_list([row]).to_parquet(folder / "a.parquet")
    pairs = load(folder / "a.parquet", conversation="conversations")
    file = load(write_json(folder / "a.jsonl", [LLAVA]), conversation="conversations")
    assert [row["a_key"] for row in pairs] == [row["a_key"] for row in file]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": [{"from": "gpt", "value": "x"}]}, "no answer follows a question"),
        ({"turns": [{"from": "human", "value": "x"}]}, "no answer follows a question"),
        (
            {"turns": [{"from": "narrator", "value": "x"}]},
            "'narrator': the role of a turn is unknown; known: user, human",
        ),
        ({"turns": [{"value": "x"}]}, "a turn has `from` and `value`, or `role` and `content`"),
        ({"turns": 3}, "a conversation is a list of turns"),
        ({"turns": "[{"}, "nor its JSON"),
        (
            {"turns": [{"role": "user", "content": [{"type": "video"}]}]},
            "a part of a turn is a text, an image or audio",
        ),
        (
            {"turns": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "y"}]},
            "that the row does not have",
        ),
        (
            {"image": "0.png", "turns": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "y"}]},
            "2 marks <image> for 1 images; write one mark for each image",
        ),
    ],
)
def test_a_conversation_that_gives_no_pair_is_named(folder: Path, row: dict, message: str) -> None:
    with pytest.raises(RowError, match=f"a.jsonl, row 1, column 'turns' is .*{message}"):
        load(write_json(folder / "a.jsonl", [row]), conversation="turns")


def test_a_wrong_conversation_setting_is_named(folder: Path) -> None:
    path = write_json(folder / "a.jsonl", [LLAVA])
    for setting, message in (
        ({"pairs": "all"}, "write the column"),
        ({"column": "conversations", "pairs": "one"}, "all, first, last"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, conversation=setting)
    with pytest.raises(ValueError, match="the column 'turns' is missing; .*`conversation: NAME`"):
        load(path, conversation="turns")


# Once, and again when the content changes


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "saved", "media.parquet"])
def test_a_row_of_any_format_is_cleaned_once(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a": "x", "b": str(number)} for number in range(3)]
    write_json(folder / "a.jsonl", rows)
    write_csv(folder / "a.csv", rows)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "a.parquet")
    table.save_to_disk(folder / "saved")
    image = {"bytes": (folder / "0.png").read_bytes(), "path": None}
    datasets.Dataset.from_list([{**row, "images": [image]} for row in rows]).to_parquet(folder / "media.parquet")
    cleaned = []
    monkeypatch.setattr(
        "vipolyqwen.data.readers.clean_row", lambda *given: cleaned.append(given[0]["b"]) or clean_row(*given)
    )
    pairs = load(folder / name, task="instr")
    assert [pairs[number]["b"] for number in (0, 1, 2, 0, 1, 2)] == ["0", "1", "2"] * 2
    assert texts(load(folder / name, task="instr")) == texts(pairs)
    assert cleaned == ["0", "1", "2"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_file_that_is_rewritten_with_its_size_and_time_is_read_anew(folder: Path, name: str) -> None:
    path, states = folder / name, []
    for answer in ("có", "ko", "có"):
        row = {"a": "x", "b": answer}
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist([row]), path, compression="none")
        else:
            write(path, json.dumps(row) + "\n") if name.endswith("jsonl") else write_csv(path, [row])
        os.utime(path, ns=(10**18, 10**18))
        states.append(path.stat().st_mtime_ns)
        assert texts(load(path, task="instr")) == [("x", answer)]
    assert len(set(states)) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_groups_that_are_missing_are_none_and_whole_numbers_are_one(folder: Path, name: str) -> None:
    groups = ["", "nan", " ", None, "None", "7", "7.0", " 7 ", "x"]
    rows = [{"a": "x", "b": str(number), "group": group} for number, group in enumerate(groups)]
    path = folder / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_json(path, rows) if name.endswith("jsonl") else write_csv(path, rows)
    assert load(path, task="instr").groups() == [None] * 5 + ["7", "7", "7", "x"]


def test_groups_that_are_numbers(folder: Path) -> None:
    for groups in ([7, 7.0, float("nan"), -1.5, True], [7.0, 7.0, float("nan"), None, 0.0]):
        path = write_json(folder / "a.jsonl", [{"a": "x", "b": "y", "group": group} for group in groups])
        found = load(path, task="instr").groups()
        assert found[:3] == ["7", "7", None]
    pq.write_table(
        pa.table({"a": ["x"] * 3, "b": ["y"] * 3, "group": [7.0, float("nan"), 1e20]}), folder / "a.parquet"
    )
    assert load(folder / "a.parquet", task="instr").groups() == ["7", None, str(10**20)]
    with pytest.raises(RowError, match="column 'group' is .*a group is a text or a number"):
        load(write_json(path, [{"a": "x", "b": "y", "group": ["x"]}]), task="instr")


def test_a_batch_knows_that_a_missing_group_is_none(folder: Path, tiny: tuple) -> None:
    rows = [
        {"a": f"x{number}", "b": f"y{number}", "group": group} for number, group in enumerate(["", None, "x", "x"])
    ]
    batch = MixedBatchCollator(tiny[1], TASKS)(list(load(write_json(folder / "a.jsonl", rows), task="instr")))
    groups = batch["groups"].tolist()
    assert groups[:2] == [0, 0] and groups[2] == groups[3] != 0


@pytest.mark.parametrize("name", ["vi/en", "../x", "a\\b", "", ".x", "x\n"])
def test_a_task_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="tasks: the name .*file names and metrics; write letters"):
        declare_tasks({name: {"prefix": "<x>"}})


def test_a_gap_in_the_scores_of_other_tasks_is_none(folder: Path) -> None:
    rows = [
        {"task": "text_pair", "a": "x", "b": "y", "score": 0.5},
        {"task": "instr", "a": "x", "b": "y", "score": float("nan")},
    ]
    pairs = load(write_json(folder / "a.jsonl", rows))
    assert [pairs.row(number).score for number in range(2)] == [0.5, None]
    with pytest.raises(RowError, match="column 'score' is nan"):
        load(write_json(folder / "a.jsonl", rows), columns={}, task="text_pair")


# As other programs write them


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "a,b\rx,y\r"),
        ("a.csv", "\n\na,b\nx,y\n"),
        ("a.csv", "a,b\r\nx,y\n"),
        ("a.csv", "sep=\t\r\na\tb\r\nx\ty\r\n"),
        ("a.csv", '"sep=;"\na;b\nx;y\n'),
        ("a.jsonl", '{"a": "x", "b": "y"}\r'),
    ],
)
def test_line_ends_and_first_lines_of_other_programs(folder: Path, name: str, content: str) -> None:
    assert texts(load(write(folder / name, content), task="instr")) == [("x", "y")]


def test_a_row_is_named_by_its_line_after_those_before_the_header(folder: Path) -> None:
    with pytest.raises(RowError, match="a.csv, row 4, column 'b'"):
        load(write(folder / "a.csv", "sep=;\n\na;b\nx;\n"), task="instr")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_wide_characters_without_a_mark_are_named(folder: Path, name: str) -> None:
    content = {"a.csv": "a;b\nx;y\n"}.get(name, '{"a": "x", "b": "y"}').encode("utf-16-le")
    with pytest.raises(RowError, match="UTF-16 without a byte order mark; name its `encoding`"):
        load(write(folder / name, content), task="instr")
    assert texts(load(folder / name, task="instr", encoding="utf-16-le")) == [("x", "y")]


def test_an_encoding_of_bytes_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="encoding is 'hex'"):
        load(write_json(folder / "a.jsonl", [{"a": "x", "b": "y"}]), task="instr", encoding="hex")


@pytest.mark.parametrize("score", ["0_5", 10**400])
def test_what_only_python_takes_for_a_number_is_no_score(folder: Path, score: Any) -> None:
    with pytest.raises(RowError, match="'score' is .*a number in"):
        load(write_json(folder / "a.jsonl", [{"a": "x", "b": "y", "score": score}]), task="text_pair")


def test_a_cell_may_hold_a_list_as_json(folder: Path) -> None:
    row = {"a": "x", "b": '["y", "z"]', "negatives": '["n", "m"]', "images": '["0.png", "1.png"]'}
    pairs = load(write_csv(folder / "a.csv", [row]), task="ocr", lists={"b": "all"})
    assert texts(pairs) == [("x", "y"), ("x", "z")]
    assert [[negative.text for negative in pairs.row(number).negatives] for number in (0, 1)] == [["n", "m"]] * 2
    assert [Path(image).name for image in pairs.row(0).images_a] == ["0.png", "1.png"]


def test_null_among_negatives_is_none(folder: Path) -> None:
    pairs = load(write_json(folder / "a.jsonl", [{"a": "x", "b": "y", "negatives": ["n", None]}]), task="instr")
    assert [negative.text for negative in pairs.row(0).negatives] == ["n"]


def test_media_without_bytes_and_path_are_none(folder: Path) -> None:
    media = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    empty, image = {"bytes": None, "path": None}, {"bytes": (folder / "0.png").read_bytes(), "path": None}
    audio = {"bytes": (folder / "word.wav").read_bytes(), "path": None}
    columns = {"images": pa.array([empty, image, None], media), "audio": pa.array([audio, empty, audio], media)}
    pq.write_table(pa.table({"a": ["x"] * 3, "b": ["y"] * 3, **columns}), folder / "a.parquet")
    pairs = load(folder / "a.parquet", task="instr")
    found = [(len(pairs[number]["images_a"]), pairs[number]["audio_a"] is not None) for number in range(3)]
    assert found == [(0, True), (1, False), (0, True)]


def test_classes_inside_other_columns_have_their_names_and_unknown_numbers_are_errors(folder: Path) -> None:
    features = {"a": datasets.Value("string"), "q": {"label": datasets.ClassLabel(names=["no", "yes"])}}
    table = datasets.Dataset.from_dict({"a": ["x"], "q": [{"label": 1}]}, features=datasets.Features(features))
    table.to_parquet(folder / "a.parquet")
    assert texts(load(folder / "a.parquet", task="instr", columns={"b": "q.label"})) == [("x", "yes")]
    stored = pq.read_table(folder / "a.parquet")
    wrong = pa.table({"a": ["x"], "q": [{"label": 7}]}, stored.schema)
    pq.write_table(wrong, folder / "b.parquet")
    with pytest.raises(RowError, match="'q.label' is 7: a text is expected"):
        load(folder / "b.parquet", task="instr", columns={"b": "q.label"})


def test_maps_of_arrow_are_nested_columns(folder: Path) -> None:
    maps = pa.array([[("vi", "y"), ("en", "z")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"a": ["x"], "b": maps, "other": maps}), folder / "a.parquet")
    assert texts(load(folder / "a.parquet", task="instr", columns={"b": "b.vi"})) == [("x", "y")]


def test_a_file_inside_a_text_is_named(folder: Path) -> None:
    row = {"a": "x", "b": "y", "images": "data:image/png;base64,AAAA"}
    with pytest.raises(RowError, match="the file stands in the text; write it to the disk"):
        load(write_json(folder / "a.jsonl", [row]), task="ocr")


def test_turns_of_tools_belong_to_the_dialogue(folder: Path) -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
    turns = [{"role": "developer", "content": "rules"}, {"role": "user", "content": "q"}, asked]
    turns += [{"role": "tool", "content": "42"}, {"role": " Assistant ", "content": "it is 42"}]
    pairs = load(write_json(folder / "a.jsonl", [{"turns": turns}]), conversation="turns")
    assert texts(pairs) == [("q\n42", "it is 42")]


def test_parts_with_an_index_take_the_image_of_that_number(folder: Path) -> None:
    parts = [{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "text", "text": "q"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
    rows = [{"images": ["0.png", "1.png"], "turns": turns}, {"images": ["0.png"], "turns": turns}]
    pairs = load(write_json(folder / "a.jsonl", rows[:1]), conversation="turns")
    assert [Path(image).name for image in pairs.row(0).images_a] == ["1.png", "0.png"]
    with pytest.raises(RowError, match="'turns' is 1: a part names this image, of 1"):
        load(write_json(folder / "b.jsonl", rows[1:]), conversation="turns")


COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda text: pa.compress(text, "zstd", asbytes=True)}


@pytest.mark.parametrize("ending", COMPRESSED)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_compressed_text_files_give_the_same_rows(folder: Path, kind: str, ending: str) -> None:
    rows = [{"a": f"câu {number}", "b": f"đáp {number}", "task": "instr"} for number in range(50)]
    (folder / "plain").mkdir()
    plain = folder / "plain" / f"x{kind}"
    write_csv(plain, rows) if kind == ".csv" else write_json(plain, rows)
    packed = write(folder / f"x{kind}{ending}", COMPRESSED[ending](plain.read_bytes()))
    assert [pair["b"] for pair in load(packed)] == [pair["b"] for pair in load(plain)] == [row["b"] for row in rows]


@pytest.mark.parametrize("ending", COMPRESSED)
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"something else"])
def test_a_damaged_compressed_file_is_named(folder: Path, ending: str, damage: Callable[[bytes], bytes]) -> None:
    text = "\n".join(json.dumps({"a": str(number), "b": str(-number), "task": "instr"}) for number in range(20_000))
    packed = write(folder / f"x.jsonl{ending}", damage(COMPRESSED[ending](text.encode())))
    for policy in ("error", "skip"):  # the rest of the file is unknown, so no row is skipped
        with pytest.raises(RowError, match=rf"x.jsonl{ending}.* the file cannot be read: .*Write it again"):
            load_pairs([{"path": str(packed)}], TASKS, 400, on_bad_row=policy, max_bad_rows=1)


def test_an_unknown_format_says_what_to_do(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"x.xlsx: the format is unknown; .*\.gz.*such as a spreadsheet to .csv"):
        load(write(folder / "x.xlsx", b"PK"))
    with pytest.raises(ValueError, match=r"x.parquet.gz: the format is unknown"):
        load(write(folder / "x.parquet.gz", gzip.compress(b"PAR1")))


def test_a_file_beside_its_compressed_form_is_refused(folder: Path) -> None:
    rows = [{"a": "x", "b": "y", "task": "instr"}]
    (folder / "both").mkdir()
    plain = write_json(folder / "both" / "x.jsonl", rows)
    write(folder / "both" / "x.jsonl.gz", gzip.compress(plain.read_bytes()))
    for path in (folder / "both", folder / "both" / "x.jsonl*"):
        with pytest.raises(ValueError, match=r"x.jsonl and .*x.jsonl.gz would give the same rows twice"):
            load(path)
    assert len(load(plain)) == 1
