"""Custom tasks: relevance judgements with numbers derived by hand, and the inputs that reach a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from helpers import random_audio, random_image
from PIL import Image
from sentence_transformers import SentenceTransformer

mteb = pytest.importorskip("mteb")

from mteb.abstasks import AbsTask  # noqa: E402
from mteb.models import ModelMeta  # noqa: E402
from mteb.models.abs_encoder import AbsEncoder  # noqa: E402
from mteb.types import PromptType  # noqa: E402

from vipolyqwen.data.schema import declare_tasks  # noqa: E402
from vipolyqwen.data.sides import SidePrompt  # noqa: E402
from vipolyqwen.evaluation.custom_tasks import custom_tasks  # noqa: E402
from vipolyqwen.evaluation.encoder import (  # noqa: E402
    MeasuredEncoder,
    SentenceEncoder,
    as_input,
    prompt_keys,
)
from vipolyqwen.evaluation.loading import load_encoder  # noqa: E402

TASKS = declare_tasks()


def entry(folder: Path, rows: list[dict[str, Any]], task: str = "retrieval", **more: Any) -> dict[str, Any]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return {"task": task, "name": "Mine", "path": str(path), **more}


class Lookup(AbsEncoder):
    """An encoder whose vectors are given by text."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = vectors
        self.mteb_model_meta = ModelMeta.create_empty({"modalities": ["text"]})

    def encode(self, inputs: Any, **kwargs: Any) -> np.ndarray:
        return np.array([self.vectors[text] for batch in inputs for text in batch["text"]], dtype=np.float32)


def test_scores_and_chance_are_those_of_a_worked_example(tmp_path: Path) -> None:
    # "x" finds A first. "y" (twice, one question) has two answers, B and C, and finds A, then C, then B: rank 2.
    # "z" and its answer A do not belong together (score 0.2), so z is no query.
    pairs = [("x", "A", 1.0), ("y", "B", 0.9), ("y", "C", 0.5), ("z", "A", 0.2), ("z", "D", 0.1)]
    rows = [{"task": "text_pair", "a": a, "b": b, "score": score} for a, b, score in pairs]
    (task,) = custom_tasks(entry(tmp_path, rows), TASKS)
    vectors = {"x": [1, 0], "y": [0.8, 0.6], "A": [1, 0.2], "C": [0.1, 1], "B": [-1, 1], "D": [-1, -1]}
    scores = mteb.evaluate(Lookup(vectors), task, cache=None, co2_tracker=False)[0].scores["test"][0]
    assert scores["candidates"] == 4
    assert scores["chance"] == pytest.approx(3 / 2 / 4)
    assert scores["hit_rate_at_1"] == scores["main_score"] == 0.5
    assert scores["hit_rate_at_5"] == scores["recall_at_5"] == 1
    gain, ideal = 1 / np.log2(3) + 1 / np.log2(4), 1 + 1 / np.log2(3)
    assert scores["ndcg_at_10"] == pytest.approx((1 + gain / ideal) / 2)


def test_one_file_of_many_kinds_of_pairs_gives_a_task_for_each(world: Path) -> None:
    tasks = custom_tasks({"task": "retrieval", "name": "All", "path": str(world / "pairs.jsonl")}, TASKS)
    found = {task.metadata.name: (task.metadata.type, task.metadata.category, task.prompt_names) for task in tasks}
    expected = {
        "text_pair": ("Retrieval", "t2t"),
        "instr": ("Retrieval", "t2t"),
        "ocr": ("VisionCentricQA", "it2t"),
        "vqa_single": ("VisionCentricQA", "it2t"),
        "vqa_multi": ("VisionCentricQA", "it2t"),
        "audio": ("Any2AnyRetrieval", "a2t"),
    }
    assert found == {
        f"All-{name}": (*kind, {"query": SidePrompt(name, "a"), "document": SidePrompt(name, "b")})
        for name, kind in expected.items()
    }


def test_images_with_and_without_a_question_are_two_tasks(world: Path) -> None:
    images = [str(world / f"{number}.png") for number in range(3)]
    rows = [
        {"task": "ocr", "a": text, "b": f"số {number}", "images": image}
        for number, (text, image) in enumerate(zip(("Gì?", "", "Đâu?"), images, strict=True))
    ]
    tasks = custom_tasks(entry(world, rows), TASKS)
    found = {task.metadata.name: (task.metadata.category, len(task.split["queries"])) for task in tasks}
    assert found == {"Mine-ocr-text+image": ("it2t", 2), "Mine-ocr-image": ("i2t", 1)}
    with pytest.raises(ValueError, match="side a of 'rows.jsonl:2' has no text; say `query: b`"):
        custom_tasks(entry(world, rows, "pages"), TASKS)


def test_the_entry_names_the_task_of_rows_without_one(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": "A"}]
    (task,) = custom_tasks(entry(tmp_path, rows, pair_task="instr"), TASKS)
    assert (task.metadata.name, task.prompt_names["query"]) == ("Mine-instr", ("instr", "a"))


def test_other_content_has_another_revision(tmp_path: Path) -> None:
    rows = [{"task": "instr", "a": "x", "b": word} for word in "ABC"]
    first, again, other = (
        custom_tasks(entry(tmp_path, some), TASKS)[0].metadata.revision for some in (rows, rows, rows[1:])
    )
    assert first == again != other


def test_the_text_of_a_page_finds_its_image(world: Path) -> None:
    source = {"path": str(world / "pairs.jsonl"), "only": ["ocr"]}
    (task,) = custom_tasks({"task": "pages", "name": "Signs", "query": "b", **source}, TASKS)
    assert (task.metadata.type, task.metadata.category) == ("DocumentUnderstanding", "t2i")
    assert task.split["queries"]["text"][:] == [f"số {number}" for number in range(4)]
    assert task.split["corpus"][1]["image"].tobytes() == Image.open(world / "1.png").tobytes()
    with pytest.raises(ValueError, match="query is 'c'; it must be a or b"):
        custom_tasks({"task": "pages", "name": "Signs", "query": "c", **source}, TASKS)


def test_either_side_may_be_of_any_modality(world: Path) -> None:
    image, audio = ([str(world / f"{number}.{ending}") for number in range(3)] for ending in ("png", "wav"))
    rows = [{"task": "instr", "images_a": image[n], "audio_b": audio[n]} for n in range(3)]
    rows += [{"task": "instr", "images_a": image[n], "images_b": image[n - 1], "b": "sau"} for n in range(3)]
    rows += [{"task": "ocr", "a": "?", "images_a": image[0], "audio_b": audio[1]}]
    made = {task.metadata.name: task for task in custom_tasks(entry(world, rows, both_directions=True), TASKS)}
    names = ["Mine-instr-to-audio", "Mine-instr-to-text+image", "Mine-ocr"]
    assert list(made) == [name + suffix for name in names for suffix in ("", "-reverse")]
    assert [task.metadata.category for task in made.values()] == ["i2a", "a2i", "i2it", "it2i", "it2a", None]
    found = made["Mine-instr-to-audio"]
    assert found.metadata.type == "Any2AnyRetrieval" and found.metadata.modalities == ["image", "audio"]
    assert found.split["corpus"].cast_column("audio", datasets.Audio(decode=False))[1]["audio"]["path"] == audio[1]
    encoder = load_encoder(str(world / "base"), {"audio": None}, "cpu", None, False)
    for name in ("Mine-instr-to-text+image", "Mine-ocr-reverse"):  # mteb has no category for the latter
        result = mteb.evaluate(encoder, made[name], cache=None, co2_tracker=False).task_results[0]
        assert result.scores["test"][0]["candidates"] == len(made[name].split["corpus"])


def test_the_six_directions_take_each_modality_from_either_side(world: Path) -> None:
    media = [(str(world / f"{number}.png"), str(world / f"{number}.wav")) for number in range(2)]
    usual = [{"task": "audio", "b": f"{n}", "images": image, "audio": audio} for n, (image, audio) in enumerate(media)]
    other = [
        {"task": "audio", "a": f"{n}", "images_b": image, "audio_a": audio} for n, (image, audio) in enumerate(media)
    ]
    found = [custom_tasks(entry(world, rows) | {"task": "trimodal"}, TASKS) for rows in (usual, other)]
    assert [task.metadata.revision for task in found[0]] == [task.metadata.revision for task in found[1]]
    assert len(found[0]) == 6


def test_a_page_may_be_side_b(world: Path) -> None:
    rows = [{"task": "instr", "a": f"số {number}", "images_b": str(world / f"{number}.png")} for number in range(2)]
    (task,) = custom_tasks(entry(world, rows) | {"task": "pages", "pair_task": "instr"}, TASKS)
    assert task.split["queries"]["text"][:] == ["số 0", "số 1"]
    assert task.split["corpus"][1]["image"].tobytes() == Image.open(world / "1.png").tobytes()
    with pytest.raises(ValueError, match="side b of 'rows.jsonl:1' has no text; say `query: a`, or `only`"):
        custom_tasks(entry(world, rows) | {"task": "pages", "pair_task": "instr", "query": "b"}, TASKS)


@pytest.mark.parametrize(
    ("task", "only", "message"),
    [
        ("trimodal", ["audio"], "4 rows have no image, the first being 'pairs-5'; a trimodal row has"),
        ("pages", ["instr"], "4 rows do not have one image"),
        ("sts", ["ocr"], "4 rows are not two texts and a score"),
        ("retrieval", ["nothing"], r"has no rows of \['nothing'\]; it has {'text_pair': 4"),
    ],
)
def test_rows_that_do_not_fit_the_kind_of_task_are_named(
    world: Path, task: str, only: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        custom_tasks({"task": task, "name": "Mine", "path": str(world / "pairs.jsonl"), "only": only}, TASKS)


def test_images_and_audio_reach_the_model_as_they_would_by_hand(world: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(2):
        random_image(rng).save(tmp_path / f"{number}.png")
    soundfile.write(tmp_path / "a.wav", random_audio(rng, 0.3, 8_000)["array"], 8_000)  # another rate than the model's
    images = [str(tmp_path / f"{number}.png") for number in range(2)]
    dialogue = {"task": "vqa_multi", "a": "Một <image> hai <image>?", "b": "có", "images": images}
    single = {"task": "vqa_single", "a": "Gì?", "b": "hình", "images": images[:1]}
    audio = {"task": "audio", "b": "tiếng", "audio": str(tmp_path / "a.wav")}
    encoder = load_encoder(str(world / "base"), {"audio": None}, "cpu", None, False)
    encoder.encoder.table = {"Mine-vqa_multi-query": "vqa_multi", "Mine-vqa_single-query": "vqa_single"}
    made = {}
    for task in custom_tasks(entry(tmp_path, [dialogue, single, audio]), TASKS):
        encoder.start(keep_vectors=True)
        mteb.evaluate(encoder, task, cache=None, co2_tracker=False)
        made[task.metadata.name] = encoder.kept["default", "test"]["query"][0][0]

    model: SentenceTransformer = encoder.encoder.model
    first, second = (Image.open(image) for image in images)
    words = [{"type": "text", "text": text} for text in ("Một ", " hai ", "?")]
    content = [words[0], {"type": "image", "image": first}, words[1], {"type": "image", "image": second}, words[2]]
    by_hand = {
        "Mine-vqa_multi": model.encode([[{"role": "user", "content": content}]], prompt_name="vqa_multi")[0],
        "Mine-vqa_single": model.encode([{"image": first, "text": "Gì?"}], prompt_name="vqa_single")[0],
        "Mine-audio": model.encode([str(tmp_path / "a.wav")])[0],
    }
    for name, vector in by_hand.items():
        np.testing.assert_allclose(made[name], vector, atol=1e-5, err_msg=name)


def test_several_images_without_places_stand_first() -> None:
    assert as_input({"image": [1, 2], "text": "x"}, ["image", "text"])[0]["content"] == [
        {"type": "image", "image": 1},
        {"type": "image", "image": 2},
        {"type": "text", "text": "x"},
    ]


def test_prompts_stand_on_the_sides_of_training_unless_the_suite_names_the_side(world: Path, tmp_path: Path) -> None:
    rows = [{"task": task, "a": "x", "b": "y", "score": 1.0} for task in ("text_pair", "instr")]
    pair, instr = custom_tasks(entry(tmp_path, rows, both_directions=False), TASKS)
    (graded,) = custom_tasks(entry(tmp_path, rows[:1], "sts"), TASKS)
    model = SentenceTransformer(str(world / "base"), device="cpu", trust_remote_code=True)

    def prompts(recorded: dict[str, str], task: AbsTask, **table: str) -> dict[str, str]:
        vars(model[0].processor)["prefix_sides"] = recorded
        prompted = {f"{task.metadata.name}-{side}": prompt for side, prompt in task.prompt_names.items()}
        return MeasuredEncoder(SentenceEncoder(model, "tiny", "0", prompted | table)).prompts(task)

    assert prompts({"text_pair": "both"}, pair) == {"query": "<text_pair>", "document": "<text_pair>"}
    assert prompts({"text_pair": "none"}, pair) == {"query": "", "document": ""}
    assert prompts({}, instr) == {"query": "<instr>", "document": ""}  # saved before sides were recorded
    assert prompts({"text_pair": "both"}, graded, STS="text_pair") == {"all": "<text_pair>"}
    assert prompts({"text_pair": "a"}, graded, STS="text_pair") == {"query": "<text_pair>", "document": ""}
    assert prompts({"text_pair": "none"}, graded, STS="text_pair") == {"all": ""}
    both = {"STS-query": "text_pair", "STS-document": "text_pair"}
    assert prompts({"text_pair": "none"}, graded, **both) == {"query": "<text_pair>", "document": "<text_pair>"}


def test_the_name_of_a_task_is_the_strongest_key_of_a_prompt_and_modalities_the_weakest(tmp_path: Path) -> None:
    rows = [{"task": "instr", "a": "x", "b": "A"}]
    (task,) = custom_tasks(entry(tmp_path, rows), TASKS)
    assert prompt_keys(task.metadata, PromptType.query) == [
        "Mine-instr-query",
        "Mine-instr",
        "Retrieval-query",
        "Retrieval",
        "text-query",
        "text",
    ]
    assert prompt_keys(mteb.get_task("BIOSSES-VN").metadata, None) == ["BIOSSES-VN", "STS", "text"]
    pairs = mteb.get_task("BIOSSES-VN").metadata
    assert pairs.category == "t2c"
    assert prompt_keys(pairs, PromptType.document)[-1] == "text"


def test_other_weights_have_another_revision(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    first, again = (load_encoder(str(folder / "base"), {}, "cpu", None, False) for folder in (world, tmp_path))
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1
    weights.write_bytes(content)
    other = load_encoder(str(tmp_path / "base"), {}, "cpu", None, False)
    assert first.mteb_model_meta.revision == again.mteb_model_meta.revision != other.mteb_model_meta.revision
    assert first.mteb_model_meta.name == "local/base"
    assert set(first.mteb_model_meta.modalities) == {"text", "image", "audio"}
