"""The papers' recipes: each published value of each recipe, and the launch that its header gives."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from helpers import assert_same_gradients, build_trainer, gradients_of, train_run

from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.training.arguments import read_arguments, read_recipe
from vipolyqwen.training.build import build_loss, build_tasks
from vipolyqwen.training.losses import COMPONENTS

ROOT = Path(__file__).parents[2]
GPUS = 4
COMMON = {  # STW paper §5.2, bimodal and trimodal papers §4.3, with their setting of prefixes
    "vlm": "Qwen/Qwen2-VL-2B-Instruct",
    "audio": None,
    "pooling": None,  # the configuration's default, attention
    "audio_pooling": None,  # as `pooling`
    "audio_projection": None,
    "audio_fusion": None,
    "max_length": 8192,
    "attn_implementation": "auto",  # FlashAttention-2 where it is installed
    "freeze": [],
    "lora_rank": None,
    "prefix_sides": "both",
    "prefix_dropout": 0.0,
    "tasks_without_prefix": None,
    "without_tasks": None,
    "tasks": {},
    "learnable_temperature": False,
    "false_negative_margin": None,
    "matryoshka_dims": None,
    "task_weighting_options": None,
    "embed_chunk": None,
    "audio_learning_rate": None,
    "head_learning_rate": None,
    "bf16": True,
    "fp16": False,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.001,
    "max_grad_norm": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "max_steps": -1,
}
MIXED = {
    "projection": "linear",
    "loss_table": "mixed",
    "task_weighting": "none",
    "temperature": 0.07,
    "mask_duplicates": True,
    "nce_min_score": 0.5,
    "vision_learning_rate": None,
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 24,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 2,
}
PUBLISHED = {
    "stw": COMMON
    | {
        "projection": "mlp",
        "loss_table": "dle",
        "task_weighting": "table",
        "temperature": 0.2,
        "mask_duplicates": False,
        "nce_min_score": None,
        "learning_rate": 2e-5,
        "vision_learning_rate": 2e-6,
        "warmup_steps": 0,
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": 10,
        "num_train_epochs": 3,
    },
    "bimodal": COMMON | MIXED | {"learning_rate": 1e-4},
    "trimodal": COMMON | MIXED | {"learning_rate": 1e-5, "audio": "facebook/hubert-base-ls960"},
}
PAIRS = {"stw": (480, 48), "bimodal": (768, 96), "trimodal": (768, 96)}  # of an update; that InfoNCE compares
TRIPLET = {"nce": 1.0, "triplet": 1.0, "triplet_margin": 0.2}
WEAK = {"nce": 1.0, "triplet": 1.5, "triplet_margin": 0.3}
LOSSES = {
    "text_pair": {"nce": 1.0, "mse": 1.0},
    "instr": {"nce": 1.0, "cosine": 1.0},
    "ocr": TRIPLET,
    "vqa_single": TRIPLET,
    "vqa_multi": WEAK,
    "audio": {"nce": 1.0, "cosine": 1.0, "triplet": 1.0, "triplet_margin": 0.2},
}
LAUNCH = {  # file of recipes/launch, and the blocks that FSDP2 shards
    "stw": ("ddp", None),
    "bimodal": ("fsdp2", {"Qwen2VLDecoderLayer", "Qwen2VLVisionBlock"}),
    "trimodal": ("fsdp2", {"Qwen2VLDecoderLayer", "Qwen2VLVisionBlock", "HubertEncoderLayer"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_every_published_value(name: str) -> None:
    arguments = read_arguments([str(ROOT / f"recipes/{name}.yaml"), "--use_cpu", "true"])
    values: dict[str, Any] = {}
    for part in arguments:
        values |= vars(part)
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert values["optim"].startswith("adamw")
    assert {task.prefix_sides for task in build_tasks(arguments[1]).values()} == {"both"}
    update = GPUS * values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    assert (update, GPUS * values["per_device_train_batch_size"]) == PAIRS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_loss_of_every_task(name: str) -> None:
    _, data_args, loss_args, _ = read_arguments([str(ROOT / f"recipes/{name}.yaml"), "--use_cpu", "true"])
    loss = build_loss(loss_args, data_args.tasks, list(declare_tasks(data_args.tasks)))
    dle = {"text_pair": {"nce": 1.0, "mse": 20.0, "rank": 7.0, "rank_margin": 0.05}}
    expected = LOSSES | (dle if name == "stw" else {})
    for row, task in enumerate(loss.tasks):
        found = dict(zip(COMPONENTS, loss.weights[row].tolist(), strict=True))
        assert found == {key: expected[task].get(key, 0.0) for key in COMPONENTS}, task
        for margin, values in (("triplet_margin", loss.triplet_margins), ("rank_margin", loss.rank_margins)):
            assert margin not in expected[task] or values[row].item() == pytest.approx(expected[task][margin]), task


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_how_many_pairs_infonce_compares_beside_the_batch(name: str) -> None:
    text = (ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    batch = next(number for number, line in enumerate(lines) if line.startswith("per_device_train_batch_size"))
    comment = " ".join(line.lstrip("# ") for line in lines[batch - 2 : batch])
    update, seen = PAIRS[name]
    assert f"= {update} pairs" in comment and f"= {seen} of one forward pass" in comment
    larger, chunk = re.search(r"(\d+) here, no accumulation, and `embed_chunk: (\d+)`", comment).groups()
    assert (
        int(larger) * GPUS == update
        and int(chunk) == 2 * read_recipe(ROOT / f"recipes/{name}.yaml")["per_device_train_batch_size"]
    )


@pytest.mark.parametrize("name", LAUNCH)
def test_the_header_of_a_recipe_launches_it_as_its_paper_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = ROOT / f"recipes/{name}.yaml"
    header = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    command = " ".join(header[1:]).split(" # ")[0].replace("\\", "").split("An update")[0]
    program, launch, *rest = shlex.split(command)
    assert (program, launch) == ("accelerate", "launch")
    given = launch_command_parser().parse_args(rest)
    file, blocks = LAUNCH[name]
    assert given.config_file == f"recipes/launch/{file}.yaml" and given.num_processes == GPUS
    assert given.training_script_args[0] == f"recipes/{name}.yaml" and given.training_script == "train_vipolyqwen.py"
    config = yaml.safe_load(Path(given.config_file).read_text(encoding="utf-8"))
    assert config["distributed_type"] == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[file]
    if blocks is not None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        resolved = _validate_launch_command(given)[0]
        assert set(resolved.fsdp_transformer_layer_cls_to_wrap.split(",")) == blocks
        assert str(resolved.fsdp_version) == "2"


def test_the_weighting_is_told_the_epoch_of_each_step(world: Path, tmp_path: Path) -> None:
    flags = ["--task_weighting", "table", "--max_steps", "-1", "--num_train_epochs", "2", "--eval_strategy", "no"]
    flags += ["--save_strategy", "no", "--load_best_model_at_end", "false", "--monitor_steps", "0"]
    log = train_run(world, tmp_path / "run", *flags, "--per_device_train_batch_size", "16")
    weights = {}
    for entry in log:
        if "weight/text_pair" in entry:
            weights[entry["step"]] = entry["weight/text_pair"]
    assert len(weights) == 4  # 32 rows an epoch
    assert list(weights.values()) == pytest.approx([0.25, 0.25, 0.22, 0.22])


def test_accumulation_averages_the_gradients_of_its_steps(corpus: Path) -> None:
    flags = ["--loss_table", "mixed", "--monitor_steps", "0"]
    trainer, pairs = build_trainer(corpus, *flags)
    accumulating, _ = build_trainer(corpus, *flags, "--gradient_accumulation_steps", "2")
    batches = [[pairs[row] for row in range(start, start + 12)] for start in (0, 12)]
    alone = []
    for rows in batches:
        trainer.training_step(trainer.model, trainer.data_collator(rows))
        alone.append({name: value.clone() for name, value in gradients_of(trainer).items()})
        trainer.model.zero_grad()
    accumulating.current_gradient_accumulation_steps = 2
    for rows in batches:
        accumulating.training_step(accumulating.model, accumulating.data_collator(rows))
    wanted = {name: (first + alone[1][name]) / 2 for name, first in alone[0].items()}
    assert_same_gradients(gradients_of(accumulating), wanted)
