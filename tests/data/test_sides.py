"""Images and audio on either side of a pair and in hard negatives: columns, checks, keys, batches."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
from helpers import random_image
from transformers import PreTrainedTokenizerBase

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import MODALITY_PAIRS, TASKS, RowError, declare_tasks, modality_pair
from vipolyqwen.data.sources import PairDataset, content_key, load_pairs
from vipolyqwen.microbatches_vipolyqwen import take_rows

DECLARED = {
    "spoken": {"prefix": "<spoken>", "needs_image": True, "needs_audio_b": True},
    "drawn": {"prefix": "<drawn>", "text_only_a": True, "needs_image_b": True},
    "said": {"prefix": "<said>", "needs_audio": True, "text_only_b": True},
}
SHOWN = {"id": "s1", "task": "spoken", "images_a": ["0.png"], "audio_b": "word.wav"}
FOUND = {"id": "f1", "task": "drawn", "a": "một ngôi sao", "b": "<image> và <image>", "images_b": ["0.png", "1.png"]}
MIXED = {"id": "m1", "task": "instr", "a": "x", "audio_a": "word.wav", "images_b": ["1.png"], "audio_b": "long.wav"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A folder with images and audio."""
    for number in range(3):
        random_image(rng, 60 + 30 * number).save(tmp_path / f"{number}.png")
    soundfile.write(tmp_path / "word.wav", rng.uniform(-0.5, 0.5, 4000), 8000)
    soundfile.write(tmp_path / "long.wav", rng.uniform(-0.5, 0.5, 20_000), 16_000)
    return tmp_path


def load(folder: Path, rows: list[dict], name: str = "pairs.jsonl", **config: Any) -> PairDataset:
    path = folder / name
    if name.endswith("parquet"):
        columns = {name: None for row in rows for name in row}
        datasets.Dataset.from_list([columns | row for row in rows]).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_pairs([{"path": str(path), "media_root": str(folder), **config}], declare_tasks(DECLARED), 400)


# Columns


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_each_side_has_its_images_and_audio(folder: Path, name: str) -> None:
    pairs = load(folder, [SHOWN, FOUND, MIXED], name)
    shown, found, mixed = pairs
    assert [len(row["images_a"]) for row in pairs] == [1, 0, 0] and [len(row["images_b"]) for row in pairs] == [
        0,
        2,
        1,
    ]
    assert (shown["a"], shown["b"], shown["audio_a"]) == ("", "", None)
    assert shown["audio_b"]["array"].shape == (4000,) and found["audio_b"] is None
    assert (mixed["audio_a"]["sampling_rate"], mixed["audio_b"]["sampling_rate"]) == (8000, 16_000)
    assert pairs.modality_counts() == {"image – audio": 1, "text – image + text": 1, "audio + text – image + audio": 1}


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_the_old_columns_are_those_of_side_a(folder: Path, name: str) -> None:
    old = load(folder, [{"a": "x", "b": "y", "images": ["0.png"], "audio": "word.wav"}], name, task="instr")
    row = old[0]
    assert (len(row["images_a"]), row["images_b"], row["audio_b"]) == (1, [], None) and row["audio_a"] is not None
    mapped = {"images": "images", "audio": "audio"}
    for columns in (mapped, {f"{name}_a": column for name, column in mapped.items()}):
        again = load(folder, [{"a": "x", "b": "y", "images": ["0.png"], "audio": "word.wav"}], name, task="instr",
                     columns=columns)  # fmt: skip
        assert again[0]["a_key"] == row["a_key"]
    with pytest.raises(RowError, match="column 'images' is .*gone.png"):
        load(folder, [{"a": "x", "b": "y", "images": ["gone.png"]}], name, task="instr")


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_old_and_new_column_of_side_a_together_are_an_error(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="columns: `images` .'x'. and `images_a` .'y'.*keep `images_a`"):
        load(folder, [FOUND], name, columns={"images": "x", "images_a": "y"})
    both = {"task": "instr", "a": "x", "b": "y", "audio": "word.wav", "audio_a": "long.wav"}
    with pytest.raises(ValueError, match="'audio_a' and 'audio' can both hold audio_a; .*`columns: {audio_a: NAME}`"):
        load(folder, [both], name)
    assert load(folder, [both], name, columns={"audio_a": "audio"})[0]["audio_a"]["sampling_rate"] == 8000
    assert load(folder, [both], name, columns={"audio_b": "audio"})[0]["audio_b"]["sampling_rate"] == 8000


def test_media_of_side_b_may_stand_in_a_table(folder: Path) -> None:
    features = datasets.Features(
        {"images_a": datasets.Image(), "audio_b": datasets.Audio(), "negative_audio": datasets.List(datasets.Audio())}
    )
    image, audio = ({"bytes": (folder / name).read_bytes(), "path": None} for name in ("0.png", "word.wav"))
    other = {"bytes": (folder / "long.wav").read_bytes(), "path": None}
    table = datasets.Dataset.from_list([{"images_a": image, "audio_b": audio, "negative_audio": [other]}])
    table.cast(features).to_parquet(folder / "media.parquet")
    row = load_pairs([{"path": str(folder / "media.parquet"), "task": "spoken"}], declare_tasks(DECLARED), 400)[0]
    file = load(folder, [{**SHOWN, "negative_audio": "long.wav"}])[0]
    assert (row["a_key"], row["b_key"]) == (file["a_key"], file["b_key"])
    assert row["negatives"][0]["key"] == file["negatives"][0]["key"]


# Bad input


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**SHOWN, "audio_b": None}, "column 'audio_b' is None: spoken needs audio on side b; name a file or change"),
        ({**SHOWN, "images_a": []}, r"column 'images_a' is \[\]: spoken needs an image on side a; name one or change"),
        ({**FOUND, "images_b": None}, r"column 'images_b' is \[\]: drawn needs an image on side b; name one or"),
        ({**FOUND, "audio_a": "word.wav"}, "column 'audio_a' is '.*word.wav': side a of drawn is text only .*move it"),
        (
            {"task": "said", "audio_a": "word.wav", "b": "x", "images_b": "0.png"},
            "column 'images_b' is .*0.png.*: side b of said is text only .*leave the column out, move it",
        ),
        (
            {"task": "said", "audio_a": "word.wav", "b": "x", "negatives": [{"text": "y", "images": "0.png"}]},
            "column 'negatives' is .*: said has text_only_b, so its negatives are texts; write texts or drop",
        ),
        ({"task": "instr", "a": "", "b": " "}, "column 'a' is '': side a and side b are both empty; fill them in"),
        ({"task": "instr", "images_a": "0.png", "b": ""}, "column 'b' is '': side b has no text, image or audio"),
        ({"task": "instr", "images_b": "0.png", "a": ""}, "column 'a' is '': side a has no text, image or audio"),
        (
            {**FOUND, "b": "<image>"},
            "column 'b' is '<image>': 1 placeholders <image> for 2 images; write one for each",
        ),
        ({**FOUND, "images_b": "gone.png", "b": ""}, "column 'images_b' is '.*gone.png': no such file; correct"),
        ({**SHOWN, "audio_b": "short.wav"}, "column 'audio_b' is '.*short.wav': the audio has 199 .*Pad it"),
        ({**SHOWN, "audio_b": "0.png"}, "column 'audio_b' is '.*0.png' cannot be read: .*Repair or drop"),
        ({**FOUND, "images_b": "word.wav", "b": ""}, "column 'images_b' is '.*word.wav' cannot be read"),
        ({**FOUND, "negative_images": "gone.png"}, "column 'negatives' is '.*gone.png': no such file; correct"),
        ({**FOUND, "negative_images": [7]}, "column 'negative_images' is 7: a path or the bytes"),
        ({**SHOWN, "negative_audio": ["word.wav"]}, "column 'negatives' is .*audio.*equals side b; drop it"),
        ({**SHOWN, "negatives": [{"text": " "}]}, "column 'negatives' .*is empty or equals side b; drop it"),
        ({**SHOWN, "negatives": [{"image": "0.png"}]}, r"unknown keys \['image'\]; .*\['text', 'images', 'audio'\]"),
        (
            {**SHOWN, "negatives": [{"text": "<image>", "images": ["0.png", "1.png"]}]},
            "column 'negatives' is '<image>': 1 placeholders <image> for 2 images",
        ),
    ],
)
def test_a_bad_side_is_named_with_file_row_column_value_and_remedy(folder: Path, row: dict, message: str) -> None:
    soundfile.write(folder / "short.wav", np.zeros(199), 8000)
    with pytest.raises(RowError, match=rf"^{folder}/pairs.jsonl, row 2 \(id 'bad'\), .*{message}"):
        load(folder, [SHOWN, {**row, "id": "bad"}])


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"needs_image_b": 1}, "tasks.x.needs_image_b is 1; write true or false"),
        ({"text_only_b": "yes"}, "tasks.x.text_only_b is 'yes'; write true or false"),
        ({"text_only_b": True, "needs_audio_b": True}, "text_only_b and needs_audio_b are both true; drop one"),
        ({"text_only_a": True, "needs_image": True}, "text_only_a and needs_image are both true; drop one"),
    ],
)
def test_a_task_that_contradicts_itself_is_an_error(declared: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        declare_tasks({"x": {"prefix": "<x>", **declared}})


def test_a_column_that_a_task_needs_on_side_b_is_missed_before_its_rows(folder: Path) -> None:
    rows = [{"images_a": "0.png", "said": "word.wav"}]
    with pytest.raises(ValueError, match="the column 'audio_b' is missing; .*`columns: {audio_b: NAME}`"):
        load(folder, rows, "pairs.parquet", task="spoken")
    assert load(folder, rows, "pairs.parquet", task="spoken", columns={"audio_b": "said"})[0]["audio_b"]


def test_media_of_side_b_that_break_behind_the_header_are_named_when_they_are_decoded(folder: Path) -> None:
    content = (folder / "0.png").read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    pairs = load(folder, [{**FOUND, "images_b": ["1.png", "half.png"]}, {**SHOWN, "negative_images": "half.png"}])
    with pytest.raises(RowError, match="row 1 .id 'f1'., column 'images_b' is '.*half.png': .*cannot be read"):
        pairs[0]
    with pytest.raises(RowError, match="row 2 .id 's1'., column 'negatives' is '.*half.png': .*cannot be read"):
        pairs[1]


@pytest.mark.parametrize(
    ("audio", "named"),
    [
        ({"audio": "word.wav"}, "column 'audio' is '.*word.wav'"),
        ({"audio_b": "word.wav"}, "column 'audio_b' is '.*word.wav'"),
        ({"negative_audio": "word.wav"}, "column 'negatives' is '.*word.wav'"),
    ],
)
def test_the_first_audio_is_named_for_a_model_that_cannot_hear(folder: Path, audio: dict, named: str) -> None:
    row = {"task": "instr", "a": "x", "b": "y"}
    silent = load(folder, [row, {**row, "images_b": "0.png", "negative_images": "1.png"}])
    silent.refuse_audio()
    assert silent.modality_counts() == {"text – text": 1, "text – image + text": 1}
    pairs = load(folder, [row, {**row, **audio}, {**row, **audio, "id": "later"}])
    with pytest.raises(RowError, match=f"row 2, {named}: the model has no speech encoder. Leave .* out, or build"):
        pairs.refuse_audio()


# Keys


def test_keys_cover_every_part_of_each_side_and_of_negatives(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    variants = [{}, {"images_b": ["0.png", "copy.png"]}, {"images_b": ["1.png", "0.png"]}, {"audio_b": "word.wav"}]
    variants += [{"b": "<image> hay <image>"}, {"images_b": ["0.png", "2.png"]}]
    rows = [{**FOUND, **variant} for variant in variants]
    wrong = [{"text": "<image> và <image>", "images": ["0.png", "1.png"]}, "y", {"text": "y"}, {"audio": "word.wav"}]
    pairs = load(folder, [*rows, {**SHOWN, "images_a": "2.png", "audio_b": "long.wav", "negatives": wrong}])
    keys = [pairs[number]["b_key"] for number in range(len(rows))]
    assert keys[0] == keys[1] and len(set(keys)) == len(keys) - 1
    assert len({pairs[number]["a_key"] for number in range(len(rows))}) == 1
    negatives = [negative["key"] for negative in pairs[len(rows)]["negatives"]]
    assert negatives == [keys[0], content_key("y"), content_key("y"), load(folder, [SHOWN])[0]["b_key"]]


# Batches


def decoded(tokenizer: PreTrainedTokenizerBase, batch: dict, row: int) -> str:
    """The row's tokens as text, each image as <image>."""
    text = tokenizer.decode(batch["input_ids"][row][batch["attention_mask"][row].bool()])
    text = text.replace("<|vision_start|>", "<image>").replace("<|vision_end|>", "")
    return text.replace("<|image_pad|>", "").replace("<|im_end|>", "")


@pytest.fixture
def collator(tiny: tuple) -> MixedBatchCollator:
    return MixedBatchCollator(tiny[1], TASKS, prefix_dropout=0.0)


ROWS = [
    {**SHOWN, "task": "instr"},
    {**FOUND, "task": "instr"},
    {**MIXED, "negatives": ["không", {"text": "a<image>", "images": "2.png"}], "negative_audio": "word.wav"},
]


def test_a_batch_holds_the_media_of_both_sides_and_of_negatives(folder: Path, collator: MixedBatchCollator) -> None:
    rows = list(load(folder, ROWS))
    batch = collator(rows)
    texts = [decoded(collator.processor.tokenizer, batch, row) for row in range(9)]
    sides = ["<instr><image>", "<instr>một ngôi sao", "<instr>x", "", "<image> và <image>", "<image>"]
    assert texts == [*sides, "không", "a<image>", ""]
    assert batch["images_per_row"].tolist() == [1, 0, 0, 0, 2, 1, 0, 1, 0]
    assert batch["has_image"].tolist() == [count > 0 for count in batch["images_per_row"].tolist()]
    assert batch["has_audio"].tolist() == [False, False, True, True, False, True, False, False, True]
    assert len(batch["audio_features"]) == 4
    assert batch["image_indices"].tolist() == [0, 0, 1, 1, 2]  # 0.png, on both sides, is prepared once
    assert [MODALITY_PAIRS[pair] for pair in batch["modalities"]] == ["audio-image", "image-text", "audio-audio"]
    assert batch["negative_owners"].tolist() == [2, 2, 2]
    assert batch["negative_keys"].tolist() == [negative["key"] for negative in rows[2]["negatives"]]
    assert batch["b_keys"].tolist() == [row["b_key"] for row in rows]


@torch.no_grad()
def test_a_side_b_has_the_embedding_that_it_has_as_side_a(
    folder: Path, tiny: tuple, collator: MixedBatchCollator
) -> None:
    swapped = [
        {"id": row["id"], "task": "instr"}
        | {name: row[other] for name, other in (("a", "b"), ("b", "a")) if other in row}
        | {f"{kind}_{side}": row[f"{kind}_{other}"] for kind in ("images", "audio") for side, other in ("ab", "ba")
           if f"{kind}_{other}" in row}
        for row in ROWS
    ]  # fmt: skip
    plain = replace(collator, prefix_dropout=1.0, with_negatives=False)
    vectors = [tiny[0](**take_rows(batch, torch.arange(6))).embeddings for batch in (
        plain(list(load(folder, rows))) for rows in (ROWS, swapped))]  # fmt: skip
    torch.testing.assert_close(vectors[0], vectors[1].roll(3, dims=0), atol=1e-5, rtol=0)
    assert (vectors[0][:3] - vectors[0][3:]).abs().amax(dim=1).min() > 1e-2


def test_every_combination_of_modalities_has_one_unordered_pair() -> None:
    sides = {"text": ["text"], "image": ["image"], "audio": ["audio"]}
    found = {modality_pair(a, b) for a in sides.values() for b in sides.values()}
    assert found == set(MODALITY_PAIRS) and len(MODALITY_PAIRS) == 6
    assert all(modality_pair(a, b) == modality_pair(b, a) for a in sides.values() for b in sides.values())
    assert modality_pair(["text", "image"], ["text"]) == "image-text"
    assert modality_pair(["text", "image", "audio"], ["image", "text"]) == "audio-image"
