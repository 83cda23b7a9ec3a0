"""A resumed run is compared with the one that wrote the checkpoint: every changed setting is found, and applies."""

import json
import shutil
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PLAIN, train_run
from safetensors.torch import load_file, save_file

from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.data.sources import PairDataset, load_pairs
from vipolyqwen.training.arguments import read_arguments
from vipolyqwen.training.build import build_tasks, load_model
from vipolyqwen.training.checkpoints import SUPERSEDED, list_checkpoints, step_of
from vipolyqwen.training.run_settings import (
    APPLIED,
    SETTINGS_FILE,
    check_differences,
    check_names,
    describe_settings,
    find_differences,
)

Settings = Callable[..., dict]
PAIR = {"a": "một", "b": "one", "task": "text_pair", "score": 1.0}
CHANGES: dict[str, Any] = {  # of single arguments
    "learning_rate": 1e-06,
    "vision_learning_rate": 1e-06,
    "audio_learning_rate": 1e-06,
    "head_learning_rate": 1e-06,
    "loss_learning_rate": 1e-06,
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.001,
    "max_grad_norm": 9,
    "optim": "sgd",
    "optim_args": "x=1",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "max_steps": 9,
    "num_train_epochs": 9,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "seed": 7,
    "data_seed": 7,
    "batching": "stratified",
    "mixture_temperature": 2,
    "dataloader_drop_last": True,
    "bf16": True,
    "freeze": ["vision"],
    "neftune_noise_alpha": 5,
    "on_nan": "skip",
    "loss_table": "nce",
    "temperature": 0.2,
    "learnable_temperature": True,
    "mask_duplicates": False,
    "mask_groups": False,
    "nce_min_score": None,
    "false_negative_margin": 0.1,
    "matryoshka_dims": [1024, 64],
    "distil": 1.0,
    "teacher_temperature": 0.1,
    "task_weighting": "gradnorm",
    "task_weighting_options": {"baseline": "ema"},
    "prefix_sides": "both",
    "prefix_dropout": 0.5,
    "tasks_without_prefix": ["ocr"],
    "metric_for_best_model": "mrr",
    "load_best_model_at_end": False,
    "tasks": {"caption": {"prefix": "<caption>", "loss": {"nce": 1.0}}},
}
MODEL_CHANGES = {  # flags -> the settings that differ
    "--max_length 64": {"max_length"},
    "--max_pixels 12544": {"max_pixels"},
    "--max_audio_seconds 10": {"max_audio_seconds"},
    "--max_audio_windows 1": {"max_audio_windows"},
    "--pooling mean": {"pooling", "model"},
    "--audio_pooling mean": {"audio_pooling", "model"},
    "--projection mlp": {"projection", "model"},
    "--audio_fusion attention": {"audio_fusion", "model"},
    "--audio_prefix fuse": {"audio_prefix"},
    "--lora_rank 2": {"lora_rank"},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PairDataset]:
    """Loads three rows, which may be changed or lie elsewhere."""
    folder = tmp_path_factory.mktemp("rows")

    def load(name: str = "rows", last: str = "one 2", reverse: bool = False, **source: object) -> PairDataset:
        given = [{**PAIR, "b": text, "task": "text_pair"} for text in ("one 0", "one 1", last)]
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, given[::-1] if reverse else given)), encoding="utf-8")
        return load_pairs([{"path": str(path), **source}], declare_tasks(None), 400)

    return load


@pytest.fixture(scope="module")
def settings_of(world: Path, rows: Callable[..., PairDataset]) -> Settings:
    """Describes a run with some flags, data or model; the base is loaded once."""
    recipe = [str(world / "recipe.yaml"), "--output_dir", str(world / "unused")]
    before = read_arguments(recipe)
    loaded, three = load_model(before[0], before[3], build_tasks(before[1])), rows()

    def settings(*flags: str, train: PairDataset = three, held_out: PairDataset = three, **changes: object) -> dict:
        arguments, of_model = before, loaded
        if flags:
            arguments = read_arguments([*recipe, *flags])
            of_model = load_model(arguments[0], arguments[3], build_tasks(arguments[1]))
        arguments = tuple(copy(part) for part in arguments)
        for name, value in changes.items():
            setattr(next(part for part in arguments if hasattr(part, name)), name, value)
        return describe_settings(arguments, *of_model, train, held_out)

    return settings


def test_every_changed_setting_is_found_and_no_other(settings_of: Settings) -> None:
    before = settings_of()
    found = {name: set(find_differences(before, settings_of(**{name: value}))) for name, value in CHANGES.items()}
    assert len(found) >= 25 and found == {name: {name} for name in CHANGES} | {"seed": {"seed", "data_seed"}}


def test_a_model_of_another_shape_or_with_other_limits_is_found(settings_of: Settings) -> None:
    before = settings_of()
    found = {flags: set(find_differences(before, settings_of(*flags.split()))) for flags in MODEL_CHANGES}
    assert found == MODEL_CHANGES


def test_other_rows_of_the_same_count_are_found(settings_of: Settings, rows: Callable[..., PairDataset]) -> None:
    before = settings_of()
    for changed in (rows(last="another"), rows(reverse=True), rows(weight=2.0), rows(image_placeholder="<i>")):
        assert set(find_differences(before, settings_of(train=changed))) == {"train_data"}
        assert set(find_differences(before, settings_of(held_out=changed))) == {"eval_data"}
    assert find_differences(before, settings_of(train=rows("moved/rows"))) == {}


def test_another_model_of_the_same_shape_is_found(world: Path, tmp_path: Path, settings_of: Settings) -> None:
    before = settings_of()
    for name, change in (("moved", 0.0), ("other", 1.0)):
        shutil.copytree(world / "base", tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        weights["projection.norm.bias"] += change
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
        found = find_differences(before, settings_of("--model", str(tmp_path / name)))
        assert set(found) == ({"model"} if change else set())


def test_free_settings_and_an_effective_value_that_is_named_do_not_differ(settings_of: Settings) -> None:
    free = {"logging_steps": 7, "save_steps": 9, "run_name": "x", "dataloader_num_workers": 1, "pooling": "attention"}
    assert find_differences(settings_of(), settings_of(**free)) == {}


def test_a_setting_of_another_version_differs_unless_it_has_its_default() -> None:
    assert find_differences({"adam_beta1": 0.9}, {}) == find_differences({}, {"adam_beta1": 0.9}) == {}
    assert find_differences({"adam_beta1": 0.8}, {}) == {"adam_beta1": (0.8, 0.9)}
    assert find_differences({"gone": 1}, {}) == {"gone": (1, None)}


@pytest.mark.parametrize(
    ("name", "accepted", "sharded", "message"),
    [
        ("learning_rate", [], None, "learning_rate +0.1 +0.2\n.*--resume_with learning_rate"),
        ("learning_rate", ["learning_rate"], None, ""),
        ("learning_rate", ["learning_rate"], "FSDP", ""),
        ("learning_rate", ["learning_rate"], "DeepSpeed", "DeepSpeed restores its optimizer.*`learning_rate`"),
        ("freeze", ["freeze"], "FSDP", "FSDP restores its optimizer.*`freeze`"),
        ("max_steps", [], None, ""),
        ("pooling", ["pooling"], None, "`pooling` cannot change.*--model run/checkpoint-2"),
        ("temperature", ["learning_rate"], None, "--resume_with temperature"),
    ],
)
def test_differences_are_refused_unless_accepted_by_name(
    name: str, accepted: list[str], sharded: str | None, message: str
) -> None:
    differences = {name: (0.1, 0.2)}
    if not message:
        check_differences(Path("run/checkpoint-2"), differences, accepted, sharded)
        return
    with pytest.raises(ValueError, match=rf"(?s)run/checkpoint-2 was written with other settings.*{message}"):
        check_differences(Path("run/checkpoint-2"), differences, accepted, sharded)


def test_an_unknown_name_to_accept_is_an_error() -> None:
    check_names([*APPLIED - {"processes"}, "learning_rate", "train_data"])
    with pytest.raises(ValueError, match="`resume_with` names 'learning_rat'.*learning_rate"):
        check_names(["learning_rat"])


# Runs


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """A run of three steps with a checkpoint at each."""
    train_run(world, world / "settled", *PLAIN, *STEPS)
    return world / "settled"


STEPS = ["--max_steps", "3", "--save_steps", "1", "--lr_scheduler_type", "constant", "--monitor_steps", "0"]
STEPS += ["--learnable_temperature", "true"]


def resume(world: Path, run: Path, output: Path, *flags: str) -> list[dict]:
    return train_run(world, output, *PLAIN, *STEPS, *flags, "--resume_from_checkpoint", str(run / "checkpoint-1"))


def test_a_changed_rate_is_refused_in_a_table_and_the_run_is_left_alone(
    world: Path, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"(?s)learning_rate +0.001 +1e-06\n.*temperature +0.07 +0.2\n.*resume_with"):
        resume(world, run, tmp_path, "--learning_rate", "1e-6", "--temperature", "0.2")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_accepted_changes_apply_from_there_on_and_the_record_tells(world: Path, run: Path, tmp_path: Path) -> None:
    flags = ["--learning_rate", "1e-6", "--head_learning_rate", "5e-6", "--freeze", "vision", "--weight_decay", "0.5"]
    flags += ["--temperature", "0.2", "--lr_scheduler_type", "linear"]
    names = [flag.removeprefix("--") for flag in flags[::2]]
    log = resume(world, run, tmp_path, *flags, "--resume_with", ",".join(names))
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    assert rates == {1: 1e-3, 2: pytest.approx(1e-6 * 2 / 3), 3: pytest.approx(1e-6 / 3)}
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    groups = json.loads((tmp_path / "checkpoint-3" / SETTINGS_FILE).read_text())["optimizer_groups"]
    named = {name: group for group, names in zip(saved["param_groups"], groups, strict=True) for name in names}
    assert not any(name.startswith("vlm.visual.") for name in named)
    assert named["pooling.query"]["initial_lr"] == 5e-6
    assert {group["weight_decay"] for group in saved["param_groups"]} == {0.0, 0.5}
    assert max(int(state["step"]) for state in saved["state"].values()) == 3  # the moments continue
    first, last = (load_file(folder / "model.safetensors") for folder in (run / "checkpoint-1", tmp_path))
    assert first["vlm.visual.merger.mlp.0.weight"].equal(last["vlm.visual.merger.mlp.0.weight"])
    moved = (first["pooling.query"] - last["pooling.query"]).abs().max()
    assert 0 < moved < 2e-5
    assert log[-2]["temperature"] == pytest.approx(0.2, abs=0.01)
    record = json.loads((tmp_path / "training.json").read_text())
    [entry] = record["resumed"]
    assert entry["step"] == 1 and entry["changed"]["learning_rate"] == [1e-3, 1e-6]
    assert set(entry["changed"]) == set(names) and str(world) not in json.dumps(record)
    again = train_run(
        world, tmp_path, *PLAIN, *STEPS, *flags, "--resume_with", ",".join(names), "--resume_from_checkpoint", "true"
    )
    assert again[-1]["step"] == 3
    assert json.loads((tmp_path / "training.json").read_text())["resumed"] == record["resumed"]


def test_a_course_that_a_run_leaves_is_set_aside(world: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    resume(world, tmp_path / "run", tmp_path / "run")  # no change: the same course
    assert not (tmp_path / "run" / SUPERSEDED).exists()
    resume(world, tmp_path / "run", tmp_path / "run", "--temperature", "0.2", "--resume_with", "temperature")
    aside = tmp_path / "run" / SUPERSEDED
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert (aside / "checkpoint-3" / "model.safetensors").read_bytes() == (
        (run / "checkpoint-3" / "model.safetensors").read_bytes()
    )
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [1, 2, 3]


def test_another_kind_of_loss_and_optimizer_starts_its_state_anew(world: Path, run: Path, tmp_path: Path) -> None:
    flags = ["--task_weighting", "uncertainty", "--optim", "sgd", "--seed", "7", "--learnable_temperature", "false"]
    names = "task_weighting,optim,data_seed,learnable_temperature"
    with pytest.raises(ValueError, match="(?s)'seed': 42.*'seed': 7.*task_weighting +table +uncertainty"):
        resume(world, run, tmp_path, *flags)
    log = resume(world, run, tmp_path, *flags, "--resume_with", names)
    assert log[-1]["step"] == 3
    assert torch.load(run / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"][0]["exp_avg"].any()
    assert not torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
