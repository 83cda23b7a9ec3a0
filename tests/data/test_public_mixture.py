import re
from collections import Counter
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import yaml
from helpers import random_audio, random_image

from vipolyqwen.data.__main__ import main
from vipolyqwen.data.reachable import OK, reach, shapes_of, table_of
from vipolyqwen.data.recipes import read_data_recipe
from vipolyqwen.data.source_config import SourceConfig
from vipolyqwen.data.sources import load_pairs

RECIPE = Path(__file__).parents[2] / "recipes/public_mixture.yaml"
ENTRIES: list[dict[str, Any]] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["train_data"]
TEXT, IMAGE, IMAGES = datasets.Value("string"), datasets.Image(), datasets.List(datasets.Image())
TURNS = datasets.List({"from": TEXT, "value": TEXT})
MESSAGES = datasets.List({"role": TEXT, "content": TEXT})
BITEXT = {"english": TEXT, "non_english": TEXT}
# Features of each data set as far as they were seen, and the tasks of the pairs of one row.
FEATURES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "chieunq/mMARCO_vietnamese": ({"query": TEXT, "positive": TEXT, "negative": TEXT}, ["retrieval"]),
    "sentence-transformers/parallel-sentences-opensubtitles": (BITEXT, ["text_pair"]),
    "sentence-transformers/parallel-sentences-wikimatrix": (BITEXT, ["text_pair"]),
    "sentence-transformers/parallel-sentences-talks": (BITEXT, ["text_pair"]),
    "BlossomsAI/reduced_vietnamese_instruction_dataset": (
        {"instruction": TEXT, "input": TEXT, "output": TEXT},
        ["instr"],
    ),
    "CohereLabs/aya_collection_language_split": (
        {"id": datasets.Value("int64"), "inputs": TEXT, "targets": TEXT, "dataset_name": TEXT, "task_type": TEXT},
        ["instr"],
    ),
    "ThucPD/coco-qa-vi": (
        {
            "image": IMAGE,
            **dict.fromkeys(("question", "answer", "translated_question", "translated_answer"), TEXT),
            **dict.fromkeys(("image_path", "image_id", "type", "split"), TEXT),
        },
        ["vqa_single"],
    ),
    "LR-AI-Labs/vi-OCR_VQA": ({"image": IMAGE, "question": TEXT, "answer": TEXT}, ["ocr"]),
    "doof-ferb/vlsp2020_vinai_100h": ({"audio": datasets.Audio(decode=False), "transcription": TEXT}, ["audio"]),
    "5CD-AI/Viet-OCR-VQA": ({"image": IMAGE, "description": TEXT, "conversations": MESSAGES}, ["ocr", "ocr"]),
    "5CD-AI/Viet-LAION-Gemini-VQA": (
        {"image": IMAGE, "description": TEXT, "conversations": MESSAGES},
        ["image_caption"],
    ),
    "Vi-VLM/Vista": ({"id": TEXT, "file_name": TEXT, "conversation": MESSAGES}, ["vqa_single", "vqa_multi"]),
    "linhtran92/viet_bud500": ({"audio": datasets.Audio(decode=False), "transcription": TEXT}, ["audio"]),
    "sentence-transformers/stsb": (
        {"sentence1": TEXT, "sentence2": TEXT, "score": datasets.Value("float64")},
        ["text_pair"],
    ),
    "sentence-transformers/all-nli": ({"anchor": TEXT, "positive": TEXT, "negative": TEXT}, ["retrieval"]),
    "sentence-transformers/gooaq": ({"question": TEXT, "answer": TEXT}, ["retrieval"]),
    "sentence-transformers/natural-questions": ({"query": TEXT, "answer": TEXT}, ["retrieval"]),
    "HuggingFaceM4/FineVision": (
        {"images": IMAGES, "texts": datasets.List({"user": TEXT, "assistant": TEXT}), "source": TEXT},
        ["vqa_single", "vqa_multi"],
    ),
    "lmms-lab/LLaVA-OneVision-Data": (
        {"id": TEXT, "image": IMAGE, "conversations": TURNS, "data_source": TEXT},
        ["vqa_single", "vqa_multi"],
    ),
    "vidore/colpali_train_set": (
        {"image": IMAGE, "image_filename": TEXT, "query": TEXT, "answer": TEXT, "source": TEXT},
        ["retrieval"],
    ),
    "openslr/librispeech_asr": (
        {"file": TEXT, "audio": datasets.Audio(decode=False), "text": TEXT, "speaker_id": datasets.Value("int64")},
        ["audio"],
    ),
    "BUAADreamer/llava-en-zh-300k": ({"messages": MESSAGES, "images": IMAGES}, ["vqa_single", "vqa_multi"]),
    "amphion/Emilia-Dataset": (
        {"mp3": datasets.Audio(decode=False), "json": {"text": TEXT, "duration": datasets.Value("float64")}},
        ["audio"],
    ),
}
STORED = {"bytes": datasets.Value("binary"), "path": TEXT}  # of audio
IDS = [f"{number:02d}-{entry['path']}" for number, entry in enumerate(ENTRIES)]


def dialogue(mark: str, *names: str) -> list[dict[str, str]]:
    user, assistant = (("human", "gpt") if names[0] == "from" else ("user", "assistant")) if names[1:] else ("", "")
    said = [(user, f"{mark}Hỏi một?"), (assistant, "Đáp một."), (user, "Hỏi hai?"), (assistant, "Đáp hai.")]
    if names[0] == "user":
        return [{"user": said[place][1], "assistant": said[place + 1][1]} for place in (0, 2)]
    return [dict(zip(names, turn, strict=True)) for turn in said]


def stand_in(features: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A row of these features; a file `0.jpg` lies in the folder."""
    rng = np.random.default_rng(0)
    random_image(rng).save(folder / "0.jpg")
    sound = {"bytes": wav(random_audio(rng)["array"]), "path": None}
    made: dict[str, Any] = {}
    for name, feature in features.items():
        if isinstance(feature, datasets.Value):
            made[name] = {"string": f"chữ của {name}", "int64": 7, "float64": 0.5}[feature.dtype]
        elif isinstance(feature, datasets.Audio):
            made[name] = sound
        elif feature in (IMAGE, IMAGES):
            made[name] = random_image(rng) if feature == IMAGE else [random_image(rng)]
        elif isinstance(feature, datasets.List):
            made[name] = dialogue("<image>\n", *feature.feature)
        else:
            made[name] = stand_in(feature, folder)
    return made | ({"file_name": "0.jpg"} if "file_name" in features else {})


def wav(samples: np.ndarray) -> bytes:
    buffer = BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV")
    return buffer.getvalue()


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_every_mapping_reads_a_row_of_its_features(entry: dict[str, Any], tmp_path: Path) -> None:
    features, tasks = FEATURES[entry["path"]]
    row = stand_in(features, tmp_path)
    is_audio = {name: isinstance(feature, datasets.Audio) for name, feature in features.items()}
    stored = datasets.Features({name: STORED if is_audio[name] else feature for name, feature in features.items()})
    table = datasets.Dataset.from_list([row], features=stored)  # encoding audio needs torchcodec
    for name in features:
        table = table.cast_column(name, features[name]) if is_audio[name] else table
    table.to_parquet(str(tmp_path / "x.parquet"))
    given = {key: value for key, value in entry.items() if key not in ("name", "split", "media_root")}
    given |= {"path": str(tmp_path / "x.parquet"), "enabled": True}
    pairs = load_pairs([given], read_data_recipe(RECIPE).tasks, 400)
    found = [pairs[number] for number in range(len(pairs))]
    assert [pair["task"] for pair in found] == ([entry["task"]] * len(found) if "task" in entry else tasks)
    for pair in found:
        needs_audio, needs_image = pair["task"] == "audio", pair["task"] in ("ocr", "vqa_single", "vqa_multi")
        assert (pair["audio_a"] is not None) == needs_audio
        assert bool(pair["images_a"]) == (needs_image or pair["task"] == "image_caption")
        assert pair["b"] or pair["images_b"]
        assert (pair["score"] is not None) == (pair["task"] == "text_pair")
    negatives = "negative" in features
    assert all(bool(pair["negatives"]) == negatives for pair in found)


def test_the_shape_is_that_of_the_papers() -> None:
    on = [shape.source for shape in shapes_of(read_data_recipe(RECIPE)) if shape.state == "on"]
    total = sum(source.max_visits or 0 for source in on)
    languages: Counter[str] = Counter()
    for source in on:
        languages[source.language or ""] += source.max_visits or 0
    assert total >= 11_000_000
    for language, share in (("vi", 0.6), ("en", 0.3), ("zh", 0.1)):
        assert abs(languages[language] / total - share) < 0.01
    named = {task for source in on for task in ([source.task] if source.task else FEATURES[source.path][1])}
    assert named >= {"text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio"}


def test_gated_and_non_commercial_sources_are_off_and_every_source_names_licence_and_language() -> None:
    for entry in ENTRIES:
        assert entry["licence"] and entry["language"] in ("vi", "en", "zh")
        if entry.get("gated") or re.search(r"\bNC\b|non-commercial", entry["licence"]):
            assert entry["enabled"] is False, entry["path"]


def test_evaluation_data_is_not_in_the_mixture() -> None:
    paths = " ".join(entry["path"].lower() for entry in ENTRIES)
    assert not any(name in paths for name in ("greennode", "xm3600", "crossmodal", "fleurs", "common_voice"))
    assert all(entry.get("split", "train").startswith("train") for entry in ENTRIES)


def test_reach_makes_a_pair_of_the_first_record(tmp_path: Path) -> None:
    recipe = read_data_recipe(RECIPE)
    source = SourceConfig(path="org/name", task="instr", columns={"a": "inputs", "b": "targets"})

    def gone(source: SourceConfig) -> Mapping[str, Any]:
        raise OSError("401 Client Error: the dataset is gated")

    assert reach(source, recipe.tasks, lambda _: {"inputs": "hỏi", "targets": "đáp"}) == OK
    assert "gated" in reach(source, recipe.tasks, gone)
    assert "'targets' is missing" in reach(source, recipe.tasks, lambda _: {"inputs": "hỏi", "output": "đáp"})
    assert "side b" in reach(source, recipe.tasks, lambda _: {"inputs": "hỏi", "targets": ""})


def test_the_command_says_what_cannot_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.jsonl").write_text('{"task": "instr", "a": "x", "b": "y"}', encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"task": "instr", "a": "x", "b": ""}', encoding="utf-8")
    sources = [
        {"path": str(tmp_path / f"{name}.jsonl"), "language": name, "max_visits": 3} for name in ("good", "bad")
    ]
    for kept, code in ((1, 0), (2, 1)):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({"train_data": sources[:kept]}), encoding="utf-8")
        assert main(["check", str(tmp_path / "r.yaml"), "--reachable"]) == code
    assert "side b has no text" in capsys.readouterr().out
    sources[1] |= {"enabled": False}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"train_data": sources}), encoding="utf-8")
    assert main(["check", str(tmp_path / "r.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "off" in printed and "At most 3 rows" in printed and "good 3 (100%)" in printed


def test_the_table_names_every_source() -> None:
    table = table_of(shapes_of(read_data_recipe(RECIPE)))
    assert all(entry["path"] in table for entry in ENTRIES)


def test_sources_that_are_off_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"task": "instr", "a": "x", "b": "y"}\n' * 5, encoding="utf-8")
    on, off = {"path": str(tmp_path / "x.jsonl"), "max_visits": 2}, {"path": "no/such", "enabled": False}
    pairs = load_pairs([on, off], read_data_recipe(RECIPE).tasks, 400)
    assert len(pairs.sources) == 1 and pairs.source_caps == [2]
    with pytest.raises(ValueError, match="enabled"):
        load_pairs([off], read_data_recipe(RECIPE).tasks, 400)


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_visits", 0), ("max_visits", 1.5), ("default_score", 2), ("default_score", True), ("enabled", "no")],
)
def test_wrong_values_name_the_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        SourceConfig.from_dict({"path": "x.jsonl", key: value})


def test_joined_columns_become_one_text(tmp_path: Path) -> None:
    rows = '{"i": "Dịch câu sau.", "x": "Xin chào", "b": "Hello"}\n{"i": "Kể chuyện.", "x": "", "b": "Ngày xưa"}'
    (tmp_path / "x.jsonl").write_text(rows, encoding="utf-8")
    source = {"path": str(tmp_path / "x.jsonl"), "task": "instr", "columns": {"a": ["i", "x"]}, "lists": {"a": "join"}}
    pairs = load_pairs([source], read_data_recipe(RECIPE).tasks, 400)
    assert [pairs[number]["a"] for number in (0, 1)] == ["Dịch câu sau.\nXin chào", "Kể chuyện."]
