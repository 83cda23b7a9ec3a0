import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from helpers import random_image
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BatchFeature

from vipolyqwen.data.cleaning import clean_row
from vipolyqwen.data.collator import MixedBatchCollator, interleave
from vipolyqwen.data.sampler import MixtureSampler
from vipolyqwen.data.schema import TASKS, Place, Row, RowError, Task, declare_tasks
from vipolyqwen.data.sources import PairDataset, SourceConfig, content_key, load_pairs
from vipolyqwen.microbatches_vipolyqwen import take_rows
from vipolyqwen.training.microbatches import row_lengths

CAPTION = {"image_caption": {"prefix": "<image_caption>", "loss": {"nce": 1, "cosine": 1}, "needs_image": True}}
TEXT_PAIR = {"id": "p1", "task": "text_pair", "a": "Hai ngôi sao đỏ.", "b": "Two red stars.", "score": 0.9}
INSTR = {"id": "i1", "task": "instr", "a": "Dịch: cá xanh", "b": "blue fish"}
OCR = {"id": "o1", "task": "ocr", "a": "Trên biển ghi gì?", "b": "Huế", "images": "sign.png"}
VQA = {"id": "v1", "task": "vqa_single", "a": "", "b": "có", "images": ["sign.png"]}
MULTI = {"id": "m1", "task": "vqa_multi", "a": "Is <image> like <image>?", "b": "no", "images": ["sign.png"] * 2}
SOUND = {"id": "s1", "task": "audio", "a": "", "b": "cà phê", "audio": "word.wav"}
MIXED = [TEXT_PAIR, OCR, SOUND, INSTR, MULTI, VQA]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A folder with a picture and a sound."""
    random_image(rng).save(tmp_path / "sign.png")
    soundfile.write(tmp_path / "word.wav", rng.uniform(-0.5, 0.5, 4000), 8000)
    return tmp_path


def write_rows(folder: Path, rows: list[dict], name: str = "pairs.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(folder: Path, rows: list[dict], check_media: bool = True, **config: object) -> PairDataset:
    tasks = declare_tasks(CAPTION)
    return load_pairs([{"path": write_rows(folder, rows), **config}], tasks, 400, check_media)


# Tasks


def test_a_declared_task_comes_after_the_six() -> None:
    tasks = declare_tasks(CAPTION)
    assert list(tasks) == ["text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio", "image_caption"]
    assert tasks["image_caption"] == Task("image_caption", "<image_caption>", needs_image=True)
    assert declare_tasks() == TASKS


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"x": {}}, "has no prefix; add one, such as prefix: '<x>'"),
        ({"x": {"prefix": "x"}}, "the prefix is 'x'; write one word in angle brackets"),
        ({"x": {"prefix": "<|x|>"}}, "one word in angle brackets"),
        ({"x": {"prefix": "<ocr>"}}, "is that of ocr; choose another"),
        ({"x": {"prefix": "<x>", "los": {}}}, r"unknown keys \['los'\]; known: .*'loss'"),
        ({"x": {"prefix": "<x>", "needs_score": "no"}}, "needs_score is 'no'; write true or false"),
        ({"x": {"prefix": "<x>", "prefix_sides": "b"}}, "tasks.x.prefix_sides is 'b'; write one of a, both, none"),
        ({"instruction": {"prefix": "<x>"}}, "choose another name"),
    ],
)
def test_a_wrong_declaration_says_what_to_write(declared: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        declare_tasks(declared)


# Reading


def test_a_row_comes_back_with_its_media_decoded(folder: Path) -> None:
    dataset = load(folder, MIXED)
    assert dataset.task_counts() == dict.fromkeys(TASKS, 1)
    text, ocr, sound = dataset[0], dataset[1], dataset[2]
    assert (text["id"], text["a"], text["b"], text["score"]) == ("p1", "Hai ngôi sao đỏ.", "Two red stars.", 0.9)
    assert (text["images_a"], text["audio_a"], text["group"], text["source"]) == ([], None, None, 0)
    assert (ocr["images_a"][0].mode, ocr["images_a"][0].size, ocr["score"]) == ("RGB", (60, 48), None)
    assert (sound["audio_a"]["array"].dtype, sound["audio_a"]["array"].shape) == (np.float32, (4000,))
    assert sound["audio_a"]["sampling_rate"] == 8000
    assert len(list(dataset)) == len(dataset) == 6


def test_columns_and_values_of_any_name_are_mapped(folder: Path) -> None:
    rows = [
        {"q": "a", "r": "b", "kind": 1, "sim": 0.5, "lang": "vi"},
        {"q": "c", "r": "d", "kind": "instruction", "sim": None, "lang": "en"},
    ]
    columns = {"a": "q", "b": "r", "score": "sim", "group": "lang"}
    dataset = load(folder, rows, columns=columns, task_column="kind", map={1: "contrastive_with_score"})
    assert [dataset[i]["task"] for i in range(2)] == ["text_pair", "instr"]
    assert [dataset[i]["score"] for i in range(2)] == [0.5, None]
    assert dataset.groups() == ["vi", "en"]
    assert [dataset[i]["id"] for i in range(2)] == ["pairs.jsonl:1", "pairs.jsonl:2"]
    assert dataset.task_ids.tolist() == [0, 1]


def test_negatives_are_a_text_or_a_list_of_texts_in_every_format(folder: Path) -> None:
    assert load(folder, [{**TEXT_PAIR, "negatives": "x"}, TEXT_PAIR])[0]["negatives"][0]["text"] == "x"
    rows = [{**TEXT_PAIR, "wrong": ["x", "y"]}, {**TEXT_PAIR, "wrong": None}]
    datasets.Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a.parquet", "a.jsonl"):
        source = {"path": str(folder / name), "columns": {"negatives": "wrong"}}
        dataset = load_pairs([source], TASKS, 400)
        texts = [[negative["text"] for negative in dataset[number]["negatives"]] for number in range(2)]
        assert texts == [["x", "y"], []]


def test_one_column_may_serve_twice_and_null_leaves_one_out(folder: Path) -> None:
    rows = [{"text": "a", "score": 27.5}]
    dataset = load(folder, rows, task="instr", columns={"a": "text", "b": "text", "score": None})
    assert (dataset[0]["a"], dataset[0]["b"], dataset[0]["score"]) == ("a", "a", None)


def test_other_columns_may_be_of_mixed_types_and_lines_blank(folder: Path) -> None:
    path = folder / "pairs.jsonl"
    extras = [{"x": 1}, {"x": "one"}, {"x": [1, {"y": None}]}, {}]
    path.write_text("\n\n".join(json.dumps({**INSTR, **extra}) for extra in extras))
    assert len(load_pairs([{"path": str(path)}], TASKS, 400)) == 4
    path.write_text(path.read_text() + "\n\n" + json.dumps({**INSTR, "b": 3}))
    with pytest.raises(RowError, match="pairs.jsonl, row 9 "):
        load_pairs([{"path": str(path)}], TASKS, 400)


def test_every_format_gives_the_same_rows(folder: Path) -> None:
    table = datasets.Dataset.from_list([TEXT_PAIR, {**TEXT_PAIR, "id": "7", "a": 'NA, "x"', "score": 0.0}])
    (folder / "array.json").write_text(json.dumps(table.to_list()))
    (folder / "lines.json").write_text("\n".join(map(json.dumps, table)))
    table.to_csv(folder / "a.csv")
    table.to_parquet(folder / "a.parquet")
    table.save_to_disk(folder / "saved")
    datasets.DatasetDict({"dev": table}).save_to_disk(folder / "splits")
    sources = [{"path": str(folder / name)} for name in ("array.json", "lines.json", "a.csv", "a.parquet", "saved")]
    arrow = next((folder / "saved").glob("*.arrow"))
    sources += [{"path": str(arrow)}, {"path": str(folder / "splits"), "split": "dev"}]
    dataset = load_pairs(sources, TASKS, 400)
    first = [{**dataset[i], "source": 0} for i in range(2)]
    assert (first[0]["a"], first[1]["a"], first[1]["score"]) == (TEXT_PAIR["a"], 'NA, "x"', 0.0)
    assert [{**dataset[i], "source": 0} for i in range(2, len(dataset))] == first * 6
    assert dataset.source_lengths == [2] * 7


def test_media_inside_a_table_are_decoded_here(folder: Path) -> None:
    picture, sound = (folder / "sign.png").read_bytes(), (folder / "word.wav").read_bytes()
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("task", "a", "b")}
        | {"images": datasets.List(datasets.Image()), "audio": datasets.Audio()}
    )
    rows = [
        {**OCR, "images": [{"bytes": picture, "path": None}], "audio": None},
        {**SOUND, "images": [], "audio": {"bytes": sound, "path": "word.wav"}},
    ]
    rows = [{name: row[name] for name in features} for row in rows]
    table = datasets.Dataset.from_list(rows).cast(features)
    table.to_parquet(folder / "a.parquet")
    table.cast_column("images", datasets.List(datasets.Image())).save_to_disk(folder / "saved")
    embedded = load_pairs([{"path": str(folder / name)} for name in ("a.parquet", "saved")], TASKS, 400)
    files = load(folder, [OCR, SOUND])
    for i in range(4):
        assert embedded[i]["a_key"] == files[i % 2]["a_key"]
    assert np.array_equal(embedded[1]["audio_a"]["array"], files[1]["audio_a"]["array"])
    assert embedded[2]["images_a"] == files[0]["images_a"]


def test_samples_may_stand_in_the_row(folder: Path) -> None:
    samples = [0.0, 0.5] * 400
    audio = load(folder, [{**SOUND, "audio": {"array": samples, "sampling_rate": 16_000}}])[0]["audio_a"]
    assert audio["array"].tolist() == samples
    assert audio["sampling_rate"] == 16_000


def test_a_folder_gives_the_files_of_its_split(folder: Path) -> None:
    for name in ("pairs-train-0.jsonl", "pairs-train-1.jsonl", "pairs_dev.jsonl"):
        write_rows(folder, [{**INSTR, "id": name}], name)
    ids = [load_pairs([{"path": str(folder), "split": split}], TASKS, 400) for split in ("train", "validation")]
    assert [[row["id"] for row in dataset] for dataset in ids] == [
        ["pairs-train-0.jsonl", "pairs-train-1.jsonl"],
        ["pairs_dev.jsonl"],
    ]
    assert len(load_pairs([{"path": str(folder / "*.jsonl")}], TASKS, 400)) == 3
    with pytest.raises(ValueError, match="no file name contains the split 'test'; found .'pairs-train-0"):
        load_pairs([{"path": str(folder), "split": "test"}], TASKS, 400)


def test_media_paths_are_relative_to_the_media_root(folder: Path) -> None:
    (folder / "rows").mkdir()
    path = write_rows(folder / "rows", [OCR])
    with pytest.raises(RowError, match="rows/sign.png.*no such file; correct the path or `media_root`"):
        load_pairs([{"path": path}], TASKS, 400)
    assert load_pairs([{"path": path, "media_root": str(folder)}], TASKS, 400)[0]["images_a"]


def test_markers_are_text_where_a_row_has_no_image(folder: Path) -> None:
    assert load(folder, [{**INSTR, "a": "<image> là gì?"}])[0]["a"] == "<image> là gì?"


def test_a_second_run_checks_nothing_again_and_a_changed_file_is_read_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder, [OCR, SOUND])
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("opened again"))
        assert len(load_pairs([{"path": str(folder / "pairs.jsonl")}], declare_tasks(CAPTION), 400)) == 2
    with pytest.raises(RowError, match="row 2 .*speech encoder needs at least 9000"):
        load_pairs([{"path": str(folder / "pairs.jsonl")}], declare_tasks(CAPTION), 9000)
    assert load(folder, [{**OCR, "b": "Hà Nội"}, SOUND])[0]["b"] == "Hà Nội"


def test_equal_content_has_equal_keys(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "sign.png").read_bytes())
    decomposed = "Trên biển ghi gì?"
    rows = [OCR, {**OCR, "a": decomposed, "images": ["copy.png"]}, {**OCR, "images": []} | {"task": "instr"}]
    dataset = load(folder, rows)
    keys = [dataset[i]["a_key"] for i in range(3)]
    assert keys[0] == keys[1] != keys[2]
    assert {dataset[i]["b_key"] for i in range(3)} == {content_key("Huế")}
    assert content_key("a", [b"bc"]) != content_key("ab", [b"c"])
    assert all(-(2**63) <= key < 2**63 for key in keys)


# Bad input


@pytest.mark.parametrize("name", ["scored.jsonl", "scored.parquet"])
def test_scores_of_another_range_are_mapped_to_0_to_1(folder: Path, name: str) -> None:
    rows = [{**TEXT_PAIR, "id": str(score), "score": score} for score in (1.0, 2.5, 5.0)]
    path = write_rows(folder, rows, "scored.jsonl")
    if name.endswith("parquet"):
        path = str(folder / name)
        datasets.Dataset.from_list(rows).to_parquet(path)
    pairs = load_pairs([{"path": path, "score_range": [1, 5]}], declare_tasks(None), 400)
    assert [pairs[row]["score"] for row in range(3)] == [0.0, 0.375, 1.0]
    with pytest.raises(RowError, match=r"column 'score' is 1.0: it must be in score_range, \[2, 5\]; correct"):
        load_pairs([{"path": path, "score_range": [2, 5]}], declare_tasks(None), 400)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"task": "sts"},
            r"column 'task' is 'sts': the task is unknown; known: text_pair, .*`map`, or decl",
        ),
        ({"task": None}, "column 'task' is '': the task is unknown"),
        ({"score": 1.5}, r"column 'score' is 1.5: a score is in \[0, 1\]; rescale it"),
        ({"score": float("nan")}, r"column 'score' is nan: a score is in \[0, 1\]"),
        ({"score": None}, r"column 'score' is None: text_pair needs a score in \[0, 1\]; fill it in or drop"),
        ({"score": "high"}, r"column 'score' is 'high': a number in \[0, 1\] is expected"),
        ({"a": " ", "b": ""}, "column 'a' is ' ': side a and side b are both empty; fill them in or drop the row"),
        ({"b": ""}, "column 'b' is '': side b has no text, image or audio"),
        ({"a": None}, "column 'a' is '': side a has no text, image or audio"),
        ({"a": 5}, "column 'a' is 5: a text is expected, not int; quote it"),
        ({"b": "\ud800"}, "column 'b' is .*: a lone surrogate at position 0; encode the file as UTF-8"),
        ({"negatives": ["x", " "]}, r"column 'negatives' is \['x', ' '\]: a negative is empty or equals side b"),
        ({"negatives": ["Two red stars."]}, "column 'negatives' .* equals side b; drop it"),
        ({"negatives": [7]}, "column 'negatives' is 7: a text is expected, not int; quote it"),
        ({"task": "ocr"}, r"column 'images_a' is \[\]: ocr needs an image on side a; name one"),
        ({"task": "audio"}, "column 'audio_a' is None: audio needs audio on side a; name a file"),
        ({"a": "<image>", "images": ["sign.png"] * 2}, "column 'a' .*1 placeholders <image> for 2 images; write one"),
        ({"images": "gone.png"}, "column 'images' is '.*gone.png': no such file; correct the path"),
        ({"images": "bad.png"}, "column 'images' is '.*bad.png' cannot be read: .*Repair or drop it"),
        ({"images": "thin.png"}, "column 'images' is '.*thin.png' cannot be read: it is 1×201; .* up to 200: crop it"),
        ({"images": [3]}, "column 'images' is 3: a path or the bytes of a file are expected"),
        ({"audio": "gone.wav"}, "column 'audio' is '.*gone.wav': no such file"),
        ({"audio": "bad.wav"}, "column 'audio' is '.*bad.wav' cannot be read: .*Repair or drop it"),
        ({"audio": "empty.wav"}, "column 'audio' is '.*empty.wav': the audio has 0 samples .*Pad it with silence"),
        ({"audio": "short.wav"}, "'.*short.wav': the audio has 199 samples at 8000 Hz, 398 at 16000 .*at least 400"),
        ({"audio": {"array": [], "sampling_rate": 8000}}, "column 'audio' .*The audio is empty: 0 samples"),
        ({"audio": "half.wav"}, "half.wav' cannot be read: the file is truncated: .* of .* bytes"),
        ({"audio": {"array": [0.1] * 9, "sampling_rate": 8000}}, "the audio has 9 samples .*at least 400"),
        ({"audio": {"array": [0.1] * 900}}, "column 'audio' .*an array without a sampling rate. Pass"),
        ({"audio": [0.1] * 900}, "column 'audio' .*an array without a sampling rate. Pass"),
        ({"audio": {"array": [0.1, float("nan")], "sampling_rate": 8000}}, "'audio' .*1 NaN or infinite samples of 2"),
        ({"audio": {"array": [1, -200], "sampling_rate": 8000}}, "'audio' .*integer samples; scale them"),
    ],
)
def test_a_bad_row_is_named_with_file_row_column_value_and_remedy(folder: Path, row: dict, message: str) -> None:
    (folder / "bad.png").write_text("no picture")
    (folder / "bad.wav").write_text("no sound")
    Image.new("RGB", (1, 201)).save(folder / "thin.png")
    soundfile.write(folder / "empty.wav", np.zeros(0), 8000)
    soundfile.write(folder / "short.wav", np.zeros(199), 8000)
    (folder / "half.wav").write_bytes((folder / "word.wav").read_bytes()[:4000])
    with pytest.raises(RowError, match=rf"^{folder}/pairs.jsonl, row 2 \(id 'bad'\), .*{message}"):
        load(folder, [TEXT_PAIR, {**TEXT_PAIR, "id": "bad", **row}, TEXT_PAIR])


def test_longer_audio_than_the_processor_accepts_is_a_bad_row_before_training(folder: Path) -> None:
    soundfile.write(folder / "call.wav", np.zeros(8001), 8000)
    sources = [{"path": write_rows(folder, [{**TEXT_PAIR, "audio": "call.wav"}])}]
    assert len(load_pairs(sources, TASKS, 400, max_audio_seconds=1.001)) == 1
    with pytest.raises(
        RowError, match=r"row 1.*'audio' is .*call.wav': the audio has 1\.0 s; the limit is 1 s\. Split"
    ):
        load_pairs(sources, TASKS, 400, max_audio_seconds=1.0)


def test_a_bad_row_of_a_table_is_named_with_the_users_column(folder: Path) -> None:
    table = datasets.Dataset.from_list([{"x": "a", "y": "b", "sim": score} for score in (0.1, 4.0)])
    table.to_parquet(folder / "a.parquet")
    source = {"path": str(folder / "a.parquet"), "task": "text_pair"}
    columns = {"a": "x", "b": "y", "score": "sim"}
    with pytest.raises(RowError, match=f"^{folder}/a.parquet, row 2, column 'sim' is 4.0: "):
        load_pairs([{**source, "columns": columns}], TASKS, 400)
    with pytest.raises(ValueError, match=r"a.parquet: the column 'b' is missing; the file has \['sim', 'x', 'y'\]."):
        load_pairs([{**source, "columns": {"a": "x"}}], TASKS, 400)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"columns": {"a": "question"}}, r"the column 'question' is missing; the file has \['a', 'b', .*columns: {a:"),
        ({"task_column": "kind"}, "the column 'kind' is missing; .*`task_column: NAME`"),
        ({"task": "ocr"}, "the column 'images_a' is missing"),
        ({"task": "orc"}, "unknown task 'orc'; known: text_pair"),
        ({"map": {"text_pair": "sts"}}, "unknown task 'sts'; known: text_pair"),
        ({"map": "ocr"}, "`map` is 'ocr'; write {NAME: NAME"),
        ({"task": "ocr", "map": {"x": "ocr"}}, "fixes the task of all rows; drop it, or"),
        ({"colums": {}}, "unknown key 'colums'; known: path, .*Did you mean 'columns'?"),
        ({"columns": {"image": "x"}}, "columns: unknown key 'image'; known: id, .*Did you mean 'images'?"),
        ({"weight": 0}, r"the weight is 0; it must be above 0 \(or drop the source\)"),
        ({"weight": "2"}, "the weight is '2'"),
        ({"split": "dev"}, "`split: dev` is for folders and Hub datasets"),
        ({"name": "vi"}, "`name: vi` is for Hub datasets; drop it"),
        ({"image_placeholder": ""}, "image_placeholder is empty"),
        ({"score_range": [5, 0]}, r"score_range is \[5, 0\]; write \[LOWEST, HIGHEST\]"),
        ({"score_range": 5}, "score_range is 5; write"),
    ],
)
def test_a_wrong_setting_of_a_source_is_named_with_its_file(folder: Path, config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{folder}/pairs.jsonl: .*{message}"):
        load(folder, [TEXT_PAIR], **config)


@pytest.mark.parametrize("name", ["old.jsonl", "old.parquet"])
def test_old_names_of_tasks_in_files_and_sources_keep_working(folder: Path, name: str) -> None:
    rows = [{"data_type": "instruction", "a": "x", "b": "y"}, {"data_type": "sts", "a": "x", "b": "z"}]
    if name.endswith("parquet"):
        datasets.Dataset.from_list(rows).to_parquet(folder / name)
    else:
        write_rows(folder, rows, name)
    path = str(folder / name)
    for source in ({}, {"data_type_column": "data_type"}, {"task_column": "data_type"}):
        with pytest.raises(RowError, match=f"{name}, row 2, column 'data_type' is 'sts': .*known: text_pair"):
            load_pairs([{"path": path, **source}], TASKS, 400)
        pairs = load_pairs([{"path": path, **source, "map": {"sts": "instr"}}], TASKS, 400)
        assert pairs.task_counts() == {"instr": 2}
    assert load_pairs([{"path": path, "data_type": "instr"}], TASKS, 400)[1]["task"] == "instr"
    for old, new in (("data_type", "task"), ("data_type_column", "task_column")):
        with pytest.raises(ValueError, match=f"{name}: `{old}` .* `{new}` .*keep `{new}`"):
            load_pairs([{"path": path, old: "instr", new: "instr"}], TASKS, 400)


@pytest.mark.parametrize("name", ["both.jsonl", "both.parquet"])
def test_two_columns_that_can_hold_the_task_are_an_error_unless_one_is_chosen(folder: Path, name: str) -> None:
    rows = [{"data_type": "instr", "task": "translation", "a": "x", "b": "y"}]
    if name.endswith("parquet"):
        datasets.Dataset.from_list(rows).to_parquet(folder / name)
    else:
        write_rows(folder, rows, name)
    with pytest.raises(ValueError, match=f"{name}: the columns 'task' and 'data_type' .*`task_column: NAME`"):
        load_pairs([{"path": str(folder / name)}], TASKS, 400)
    for setting in ({"task_column": "data_type"}, {"columns": {"group": "task"}}):
        assert load_pairs([{"path": str(folder / name), **setting}], TASKS, 400)[0]["task"] == "instr"


def test_data_that_is_not_there_is_an_error(folder: Path) -> None:
    for content, name in (("", "a.jsonl"), ("[]", "a.json"), ("a,b\n", "a.csv")):
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} has no rows; add rows or drop"):
            load_pairs([{"path": str(folder / name)}], TASKS, 400)
    datasets.Dataset.from_dict({"a": [], "b": [], "task": []}).to_parquet(folder / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has no rows; add rows"):
        load_pairs([{"path": str(folder / "a.parquet")}], TASKS, 400)
    for name in ("broken.parquet", "broken.arrow"):
        (folder / name).write_text("no table")
        with pytest.raises(ValueError, match=f"{name}: not readable as a table"):
            load_pairs([{"path": str(folder / name)}], TASKS, 400)
    (folder / "empty").mkdir()
    for name in ("none.jsonl", "*.arr", "empty"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_pairs([{"path": str(folder / name)}], TASKS, 400)
    with pytest.raises(ValueError, match="No data source; list at least one"):
        load_pairs([], TASKS, 400)
    with pytest.raises(ValueError, match="has no `path`"):
        SourceConfig.from_dict({"task": "ocr"})
    with pytest.raises(ValueError, match="sign.png: the format is unknown; known: .jsonl"):
        load_pairs([{"path": str(folder / "sign.png")}], TASKS, 400)
    with pytest.raises(
        ValueError, match="somebody/pairs: not a local file or folder, and loading from the Hub failed"
    ):
        load_pairs([{"path": "somebody/pairs"}], TASKS, 400)


def test_a_malformed_line_is_named(folder: Path) -> None:
    path = folder / "pairs.jsonl"
    for line, message in ((b'{"a": ', "invalid JSON"), (b"\xff{}", "invalid JSON"), (b"[1]", "not a JSON object")):
        path.write_bytes(json.dumps(INSTR).encode() + b"\n" + line)
        with pytest.raises(RowError, match=f"pairs.jsonl, line 2: .*{message}"):
            load_pairs([{"path": str(path)}], TASKS, 400)
    (folder / "a.csv").write_text("a,b\nx,y\nx,y,z\n")
    with pytest.raises(RowError, match="a.csv, line 3: .*beyond the last column; quote"):
        load_pairs([{"path": str(folder / "a.csv"), "task": "instr"}], TASKS, 400)


def test_headers_are_not_read_unless_asked_but_files_must_exist(folder: Path) -> None:
    (folder / "bad.png").write_text("no picture")
    dataset = load(folder, [{**OCR, "images": "bad.png"}], check_media=False)
    with pytest.raises(RowError, match="pairs.jsonl, row 1 .*bad.png.*cannot be read"):
        dataset[0]
    with pytest.raises(RowError, match="no such file"):
        load(folder, [{**OCR, "images": "gone.png"}], check_media=False)


def test_media_that_break_behind_the_header_are_named_when_they_are_decoded(folder: Path) -> None:
    picture = (folder / "sign.png").read_bytes()
    (folder / "half.png").write_bytes(picture[: len(picture) // 2])
    soundfile.write(folder / "nan.wav", np.array([0.1] * 800 + [np.nan]), 8000, subtype="FLOAT")
    dataset = load(folder, [{**OCR, "images": ["sign.png", "half.png"]}, {**SOUND, "audio": "nan.wav"}, SOUND])
    with pytest.raises(RowError, match="row 1 .id 'o1'., column 'images' is '.*half.png': .*cannot be read"):
        dataset[0]
    with pytest.raises(RowError, match="row 2 .id 's1'., column 'audio' is '.*nan.wav': .*1 NaN or infinite"):
        dataset[1]
    (folder / "word.wav").unlink()
    with pytest.raises(RowError, match="word.wav': it cannot be read: .*Restore it"):
        dataset[2]
    with pytest.raises(RowError, match="half.png"):  # the error keeps its kind on its way out of a worker
        next(iter(DataLoader(dataset, num_workers=1, collate_fn=list)))


# Batches


@pytest.fixture
def collator(tiny: tuple) -> MixedBatchCollator:
    return MixedBatchCollator(tiny[1], TASKS, prefix_dropout=0.0)


def decode(collator: MixedBatchCollator, batch: dict, row: int) -> str:
    """The row's tokens as text, each image as one slot."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    text = collator.processor.tokenizer.decode(ids)
    while "<|image_pad|><|image_pad|>" in text:
        text = text.replace("<|image_pad|><|image_pad|>", "<|image_pad|>")
    return text


def test_a_mixed_batch_holds_both_sides(folder: Path, collator: MixedBatchCollator) -> None:
    batch = collator(list(load(folder, MIXED)))
    image, end = "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>"
    assert [decode(collator, batch, row) for row in range(12)] == [
        "<text_pair>Hai ngôi sao đỏ." + end,
        f"<ocr>{image}Trên biển ghi gì?{end}",
        "",  # a sound alone
        "<instr>Dịch: cá xanh" + end,
        f"<vqa_multi>Is {image} like {image}?{end}",
        f"<vqa_single>{image}{end}",
        *(("<text_pair>" if row is TEXT_PAIR else "") + row["b"] + end for row in MIXED),
    ]
    assert batch["images_per_row"].tolist() == [0, 1, 0, 0, 2, 1] + [0] * 6
    assert batch["has_image"].tolist() == [False, True, False, False, True, True] + [False] * 6
    assert batch["has_audio"].tolist() == [False, False, True] + [False] * 9
    assert batch["audio_features"].shape == batch["audio_attention_mask"].shape == (1, 8000)
    assert len(batch["image_indices"]) == 4
    assert len(batch["pixel_values"]) == batch["image_grid_thw"].prod(-1).sum()
    assert batch["data_type"].tolist() == [0, 2, 5, 1, 4, 3]
    torch.testing.assert_close(batch["similarity_scores"], torch.tensor([0.9] + [torch.nan] * 5), equal_nan=True)
    assert batch["b_keys"].tolist() == [content_key(row["b"]) for row in MIXED]
    assert batch["a_keys"].dtype == torch.int64
    assert batch["ids"] == ["p1", "o1", "s1", "i1", "m1", "v1"]
    assert row_lengths(batch)[2] == 0


def test_an_image_of_several_rows_is_prepared_once(
    folder: Path, collator: MixedBatchCollator, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_image(rng, 90, 30).save(folder / "wide.png")
    rows = list(load(folder, [OCR, {**MULTI, "images": ["wide.png", "sign.png"]}, VQA]))
    prepared: list[Image.Image] = []
    stock = type(collator.processor.image_processor).preprocess

    def preprocess(self: object, images: list[Image.Image], *given: object, **options: object) -> BatchFeature:
        prepared.extend(images)
        return stock(self, images, *given, **options)

    monkeypatch.setattr(type(collator.processor.image_processor), "preprocess", preprocess)
    batch = collator(rows)
    assert [image.size for image in prepared] == [rows[0]["images_a"][0].size, (90, 30)]
    assert batch["image_indices"].tolist() == [0, 1, 0, 0]
    alone = [collator([row]) for row in rows]
    grids = [each["image_grid_thw"][each["image_indices"]] for each in alone]
    assert torch.equal(batch["image_grid_thw"][batch["image_indices"]], torch.cat(grids))
    assert torch.equal(
        batch["pixel_values"],
        torch.cat([alone[0]["pixel_values"], alone[1]["pixel_values"][: alone[1]["image_grid_thw"][0].prod()]]),
    )
    assert [decode(collator, batch, row) for row in range(3)] == [decode(collator, each, 0) for each in alone]


def test_a_row_of_a_text_file_is_cleaned_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[str | None] = []

    def clean(record: dict, place: Place, *given: str) -> Row:
        cleaned.append(place.id)
        return clean_row(record, place, *given)

    monkeypatch.setattr("vipolyqwen.data.readers.clean_row", clean)
    samples = {"array": [0.0, 0.5] * 400, "sampling_rate": 16_000}
    dataset = load(folder, [*MIXED, {**SOUND, "audio": samples}])
    assert [dataset[number]["id"] for number in range(7)] == cleaned == ["p1", "o1", "s1", "i1", "m1", "v1", "s1"]
    assert dataset[6]["audio_a"]["array"].dtype == np.float32


def test_images_stand_at_their_places_or_first() -> None:
    def shown(text: str, count: int) -> list[str]:
        return [part[part["type"]] for part in interleave(text, [f"image {i}" for i in range(count)], "<image>")]

    assert shown("a<image>b<image>", 2) == ["a", "image 0", "b", "image 1"]
    assert shown("<image><image>", 2) == ["image 0", "image 1"]
    assert shown("a", 2) == ["image 0", "image 1", "a"]
    assert shown("a<image>b", 2) == ["image 0", "image 1", "a<image>b"]
    assert shown("a<image>b", 0) == ["a<image>b"]
    assert shown("", 1) == ["image 0"]


def test_negatives_are_rows_after_the_sides_b(folder: Path, collator: MixedBatchCollator) -> None:
    rows = [
        {**OCR, "group": "x"},
        {**INSTR, "negatives": ["một", "hai"]},
        {**TEXT_PAIR, "group": "x", "negatives": "x"},
    ]
    batch = replace(collator, tasks=declare_tasks(None, "both"))(list(load(folder, [*rows, MIXED[2]])))
    expected = ["<instr>một<|im_end|>", "<instr>hai<|im_end|>", "<text_pair>x<|im_end|>"]
    assert [decode(collator, batch, row) for row in range(8, 11)] == expected
    assert batch["negative_owners"].tolist() == [1, 1, 2]
    assert batch["negative_keys"].tolist() == [content_key(text) for text in ("một", "hai", "x")]
    assert batch["groups"].tolist() == [content_key("x"), 0, content_key("x"), 0]
    assert batch["modalities"].tolist() == [1, 0, 0, 2]  # image, text, text, audio
    without = replace(collator, with_negatives=False)(list(load(folder, rows)))
    assert len(without["input_ids"]) == 6 and not len(without["negative_owners"])


@pytest.mark.parametrize(
    ("sides", "prefixes"),
    [
        ("task", ["<text_pair>", "<instr>", "<text_pair>", ""]),  # both sides of the symmetric task, side a of others
        ("a", ["<text_pair>", "<instr>", "", ""]),
        ("both", ["<text_pair>", "<instr>", "<text_pair>", "<instr>"]),
        ("none", ["", "", "", ""]),
    ],
)
def test_prefixes_stand_on_the_sides_of_each_task_or_on_those_of_the_recipe(
    folder: Path, collator: MixedBatchCollator, sides: str, prefixes: list[str]
) -> None:
    rows = list(load(folder, [TEXT_PAIR, INSTR]))
    batch = replace(collator, tasks=declare_tasks(None, sides))(rows)
    texts = [rows[0]["a"], rows[1]["a"], rows[0]["b"], rows[1]["b"]]
    shown = [f"{prefix}{text}<|im_end|>" for prefix, text in zip(prefixes, texts, strict=True)]
    assert [decode(collator, batch, row) for row in range(4)] == shown


def test_a_declared_task_says_its_sides_and_the_recipe_overrides_them() -> None:
    declared = {"x": {"prefix": "<x>", "prefix_sides": "both"}, "y": {"prefix": "<y>"}}
    sides = {name: task.prefix_sides for name, task in declare_tasks(declared).items()}
    assert sides == dict.fromkeys(TASKS, "a") | {"text_pair": "both", "x": "both", "y": "a"}
    assert {task.prefix_sides for task in declare_tasks(declared, "a").values()} == {"a"}


def test_a_declared_task_has_its_prefix_and_task_id(folder: Path, tiny: tuple) -> None:
    processor, tasks = copy.deepcopy(tiny[1]), declare_tasks(CAPTION)
    with pytest.raises(ValueError, match="knows no prefix '<image_caption>' .*call `processor.add_task"):
        MixedBatchCollator(processor, tasks)
    processor.add_task("image_caption", "<image_caption>")
    collator = MixedBatchCollator(processor, tasks, prefix_dropout=0.0)
    batch = collator(list(load(folder, [{"images": "sign.png", "b": "a sign"}], task="image_caption")))
    assert batch["data_type"].tolist() == [6]
    assert decode(collator, batch, 0).startswith("<image_caption><|vision_start|>")


def test_tokens_in_the_text_of_a_row_stay_plain(folder: Path, collator: MixedBatchCollator) -> None:
    forged = "<ocr><|image_pad|><|vision_start|><|im_end|><audio>"
    rows = [{**INSTR, "a": forged, "b": forged}, {**OCR, "a": forged + "<image>" + forged}, TEXT_PAIR]
    batch = collator(list(load(folder, rows)))
    tokenizer = collator.processor.tokenizer
    specials = torch.tensor(tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder)).unique()
    counts = (torch.isin(batch["input_ids"], specials) & batch["attention_mask"].bool()).sum(1)
    slots = batch["image_grid_thw"].prod(-1).item() // 4
    assert counts.tolist() == [2, 4 + slots, 2, 1, 1, 2]  # prefix, end, and the slot of the real image
    assert batch["images_per_row"].tolist() == [0, 1, 0, 0, 0, 0]


def test_prefixes_are_dropped_at_the_rate_asked_for_and_the_same_way_again(collator: MixedBatchCollator) -> None:
    def dropped(collator: MixedBatchCollator, epoch: int) -> list[bool]:
        batches = np.random.default_rng(epoch).permutation(4000).reshape(-1, 8)
        lost = {}
        for ids in batches.tolist():
            prefixes = collator._prefixes([str(i) for i in ids], ["ocr"] * 8)
            lost.update(zip(ids, [prefix is None for prefix in prefixes], strict=True))
        return [lost[i] for i in range(4000)]

    rare = replace(collator, prefix_dropout=0.1)
    first = dropped(rare, 0)
    assert 0.08 < np.mean(first) < 0.12
    assert first == dropped(rare, 0)
    assert first != dropped(replace(rare, seed=1), 0)
    again = np.mean(np.array(first) & np.array(dropped(rare, 1)))
    assert again < 0.02  # 0.01 if an epoch knows nothing of the last
    assert not any(dropped(collator, 0))
    assert all(dropped(replace(collator, prefix_dropout=1.0), 0))


def test_a_dropped_prefix_leaves_the_plain_input(folder: Path, collator: MixedBatchCollator) -> None:
    rows = list(load(folder, [INSTR, OCR]))
    batch = replace(collator, prefix_dropout=1.0, tasks=declare_tasks(None, "both"))(rows)
    assert decode(collator, batch, 0) == "Dịch: cá xanh<|im_end|>"
    assert decode(collator, batch, 3) == "Huế<|im_end|>"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix_dropout": 1.5}, r"prefix_dropout is 1.5; a probability is in \[0, 1\]"),
    ],
)
def test_a_wrong_collator_setting_is_an_error(tiny: tuple, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedBatchCollator(tiny[1], TASKS, **settings)


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_rows_taken_from_a_batch_have_the_embeddings_they_had_in_it(
    folder: Path, tiny: tuple, rng: np.random.Generator, padding_side: str
) -> None:
    model, processor = tiny[0], copy.deepcopy(tiny[1])
    processor.tokenizer.padding_side = padding_side
    random_image(rng, 90, 30).save(folder / "wide.png")
    soundfile.write(folder / "long.wav", rng.uniform(-0.5, 0.5, 20_000), 16_000)
    rows = [*MIXED, {**SOUND, "audio": "long.wav", "a": "nghe"}, {**MULTI, "images": ["wide.png", "sign.png"]}]
    batch = MixedBatchCollator(processor, TASKS)(list(load(folder, rows)))
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "image_indices")
    audio = ("audio_features", "audio_attention_mask", "has_audio")
    whole = model(**{name: batch[name] for name in (*names, *audio)}).embeddings
    order = row_lengths(batch).argsort(descending=True)
    for chosen in [*order.split(4), torch.tensor([2]), torch.tensor([0, 3]), torch.tensor([7, 4, 1, 7])]:
        part = take_rows(batch, chosen)
        torch.testing.assert_close(model(**part).embeddings, whole[chosen], atol=1e-5, rtol=0)
    assert set(take_rows(batch, torch.tensor([2]))) == set(audio)
    assert take_rows(batch, torch.tensor([2]))["audio_features"].shape == (1, 8000)
    assert set(take_rows(batch, torch.tensor([8, 9]))) == {"input_ids", "attention_mask", "position_ids"}
    short = take_rows(batch, order[-4:-2])["input_ids"]
    assert short.shape[1] == row_lengths(batch)[order[-4]]


# Order


def test_an_epoch_visits_each_source_by_its_weight() -> None:
    sampler = MixtureSampler([10, 8, 5], [1, 0.5, 2], seed=3)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    for order in epochs:
        assert len(order) == len(sampler) == 24
        counts = np.bincount(order, minlength=23)
        assert counts[:10].tolist() == [1] * 10
        assert counts[10:18].sum() == 4
        assert counts[18:].tolist() == [2] * 5
    halves = [{row for row in order if 10 <= row < 18} for order in epochs]
    assert halves[0] | halves[1] == set(range(10, 18))
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = MixtureSampler([50, 7], [1, 0.3], seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 4) == order(0, 4)
    assert order(0, 4) != order(1, 4)
    assert order(0, 0) != sorted(order(0, 0))
    assert any(row >= 50 for row in order(0, 0)[:40])  # the sources are mixed, not one after the other
    with pytest.raises(ValueError, match="1 sources and 2 weights"):
        MixtureSampler([1], [1, 1])


def test_workers_give_the_batches_that_one_process_gives(folder: Path, tiny: tuple) -> None:
    dataset = load(folder, [{**row, "id": f"{row['id']}-{copy_}"} for copy_ in range(3) for row in MIXED])
    collator = MixedBatchCollator(tiny[1], TASKS, prefix_dropout=0.5)
    sampler = MixtureSampler(dataset.source_lengths, dataset.source_weights)
    loaders = [
        DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=collator, num_workers=workers)
        for workers in (0, 2)
    ]
    for alone, shared in zip(*loaders, strict=True):
        assert alone.keys() == shared.keys()
        for name, value in alone.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, shared[name], atol=0, rtol=0, equal_nan=True)
            else:
                assert value == shared[name]


def test_a_dataset_pickles(folder: Path) -> None:
    dataset = load(folder, MIXED)
    loaded = pickle.loads(pickle.dumps(dataset))
    assert [row["a_key"] for row in loaded] == [row["a_key"] for row in dataset]
