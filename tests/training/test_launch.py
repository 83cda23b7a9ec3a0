"""The launcher configurations: two processes on the CPU train, save, evaluate and resume as one process does."""

import inspect
import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import assert_same_gradients, train_run
from killing import same_weights
from packaging import version
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Qwen2VLConfig

from vipolyqwen.data.sampler import MixtureBatches, MixtureSampler
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel, loading_problems
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.publishing.checks import refuse_checkpoint
from vipolyqwen.train_vipolyqwen import main as train_main
from vipolyqwen.training.checkpoints import find_faults
from vipolyqwen.training.trainer import ViPolyQwenTrainer

CONFIGS = Path(__file__).parents[2] / "recipes" / "launch"
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
NO_INDEXED_CPU = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="this transformers restores the optimizer to `cpu:0`, which torch does not know (on GPUs it can resume)",
)
ZERO_KINDS = [pytest.param(name, marks=NEEDS_DEEPSPEED) for name in ("zero2", "zero3")]
KINDS = [pytest.param("ddp", marks=NO_INDEXED_CPU), "fsdp2", *ZERO_KINDS]
LAUNCHES = {f"zero{stage}": f"DeepSpeed ZeRO-{stage} with 2 processes" for stage in (2, 3)}
LAUNCHES["fsdp2"] = "FSDP with any number of processes"
COUNT, SIZE, SEED = 11, 2, 3  # rows, rows of a process, an order in which its shares are as the tests need them
FLAGS = ["--prefix_dropout", "0", "--seed", str(SEED), "--max_steps", "3", "--save_steps", "1", "--eval_steps", "1"]
LEARNED = ["--learnable_temperature", "true", "--task_weighting", "uncertainty", "--loss_learning_rate", "0.1"]
STANDING = ["--learning_rate", "0", "--max_grad_norm", "0"]  # so that the gradients of later steps are comparable too
STANDING += ["--eval_strategy", "no", "--load_best_model_at_end", "false"]
ADAPTER = ["--lora_rank", "4", "--adam_epsilon", "1e-3"]  # else gradients of 0 but for rounding move weights by it
IN_CHUNKS = ["--embed_chunk", "2"]
IGNORED = "audio_tower.encoder.layers.0.attention.k_proj.bias"  # its gradient is 0 but for rounding: Adam moves it


@pytest.fixture(scope="module")
def rows(world: Path) -> list[dict]:
    """Texts, images and audio in turn, all of them in every batch of both ranks.

    Otherwise one rank would have no gradient for a tower in a step, and two would move it by momentum.
    """
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["task"] in ("instr", "ocr", "audio")][:COUNT]
    (world / "few.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return rows


@pytest.fixture(scope="module")
def one_process(world: Path, rows: list[dict]) -> Path:
    """The run of one process on the joined batches."""
    output = world / "one_process"
    train_run(world, output, *FLAGS, *LEARNED, *data(world), "--per_device_train_batch_size", str(2 * SIZE))
    return output


@pytest.fixture(scope="module")
def adapter_of_one_process(world: Path, rows: list[dict]) -> Path:
    """The run of one process with an adapter, without micro-batches and gradient checkpointing."""
    output = world / "adapter_of_one_process"
    flags = [*FLAGS, *LEARNED, *ADAPTER, *data(world)]
    train_run(world, output, *flags, "--per_device_train_batch_size", str(2 * SIZE))
    return output


@pytest.fixture(scope="module")
def backbones(world: Path) -> list[str]:
    """The base's towers as two checkpoints, and a recipe that begins with them: flags of a run of two steps.

    The first step has two batches, the second one, whose loss depends on the first.
    """
    model = ViPolyQwenModel.from_pretrained(world / "base")
    processor = ViPolyQwenProcessor.from_pretrained(world / "base", config=model.config)
    config, names = model.config.to_dict(), inspect.signature(Qwen2VLConfig).parameters
    vlm = {our_name.replace("language_model.", "model."): value for our_name, value in model.vlm.state_dict().items()}
    parts = {
        "vlm": (Qwen2VLConfig(**{name: config[name] for name in names if name in config}), vlm),
        "audio": (model.config.audio_config, model.audio_tower.state_dict()),
    }
    for name, (part, weights) in parts.items():
        part.save_pretrained(world / name)
        save_file({key: value.contiguous() for key, value in weights.items()}, world / name / "model.safetensors")
    processor.tokenizer.save_pretrained(world / "vlm")
    processor.image_processor.save_pretrained(world / "vlm")
    processor.feature_extractor.save_pretrained(world / "audio")
    recipe = yaml.safe_load((world / "recipe.yaml").read_text(encoding="utf-8"))
    recipe |= {"vlm": str(world / "vlm"), "audio": str(world / "audio"), "max_steps": 2, "eval_data": None}
    recipe["gradient_accumulation_steps"] = 2
    recipe |= {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "prefix_dropout": 0}
    del recipe["model"]
    (world / "backbones.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    flags = ["--seed", str(SEED), *LEARNED, *data(world)]
    own = ["--output_dir", str(world / "of_backbones"), "--per_device_train_batch_size", str(2 * SIZE)]
    train_main([str(world / "backbones.yaml"), *flags, *own])
    return [str(world / "backbones.yaml"), *flags]


def data(world: Path) -> list[str]:
    return ["--train_data", json.dumps([{"path": str(world / "few.jsonl")}])]


def launch(kind: str, runs: list[list[str]], folder: Path, *others: Path, processes: int = 2) -> None:
    """Takes runs one after another in the processes of a launcher configuration; `others` go to launching.py."""
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{kind}.yaml"]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command += [Path(__file__).parent / "launching.py", folder / "runs.json", *others]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]


def test_one_of_two_processes_gets_no_image_and_no_sound_and_fewer_rows(rows: list[dict]) -> None:
    shares = [list(MixtureBatches(MixtureSampler([COUNT], [1.0], SEED), SIZE, rank, 2)) for rank in range(2)]
    kinds = [[{rows[row]["task"] for row in batch} for batch in share] for share in shares]
    assert [first for first, _ in zip(*kinds, strict=True)][1:] == [{"instr"}, {"instr"}]
    assert [second for _, second in zip(*kinds, strict=True)][1:] == [{"ocr", "audio"}, {"ocr", "audio"}]
    assert [[len(batch) for batch in share] for share in shares] == [[2, 2, 1], [2, 2, 2]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_where_one_ends_and_resume_bit_by_bit(
    kind: str, world: Path, one_process: Path, adapter_of_one_process: Path, backbones: list[str], tmp_path: Path
) -> None:
    common = ["--per_device_train_batch_size", str(SIZE), "--use_cpu", str(kind == "ddp")]
    flags = [str(world / "recipe.yaml"), *FLAGS, *LEARNED, *data(world), *common]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    resume = ["--resume_from_checkpoint", str(straight / "checkpoint-1")]
    runs = [[*flags, "--output_dir", str(straight)], [*flags, "--output_dir", str(resumed), *resume]]
    runs.append([*backbones, *common, "--output_dir", str(tmp_path / "of_backbones")])
    sparing = [*IN_CHUNKS, "--gradient_checkpointing", "true"]
    runs.append([*flags, *ADAPTER, *sparing, "--output_dir", str(tmp_path / "adapter")])
    launch(kind, runs, tmp_path)

    first, last = straight / "checkpoint-1", straight / "checkpoint-3"
    assert find_faults(first) == [] and find_faults(last) == []
    assert same_weights(last, resumed / "checkpoint-3")
    assert_one_process_resumes_or_is_refused(kind, world, straight, tmp_path / "alone")
    best = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"]
    assert same_weights(straight, Path(best))

    assert_a_repository(last)
    assert_same_weights(last, one_process / "checkpoint-3", world / "base")
    found, again, wanted = (learned(folder / "checkpoint-3") for folder in (straight, resumed, one_process))
    torch.testing.assert_close(again, found, rtol=0, atol=0)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert_same_weights(tmp_path / "of_backbones", world / "of_backbones", world / "base")
    assert_same_weights(tmp_path / "adapter", adapter_of_one_process, world / "base")
    logs = [read_log(folder) for folder in (straight, one_process)]
    for name in ("loss", "grad_norm", "drift/pooling", "drift/audio_projection", "eval_recall@1"):
        values = [[entry[name] for entry in log if name in entry] for log in logs]
        assert values[0] == pytest.approx(values[1], rel=1e-3) and any(values[0]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ZERO_KINDS)
@pytest.mark.parametrize("batches", [1, 3], ids=["one_batch", "accumulated"])
@pytest.mark.parametrize("chunk", [[], IN_CHUNKS], ids=["full", "in_chunks"])
def test_deepspeed_has_the_gradients_of_one_process(
    kind: str, chunk: list[str], batches: int, world: Path, rows: list[dict], tmp_path: Path
) -> None:
    flags = [*FLAGS, *STANDING, *LEARNED, *data(world), "--gradient_accumulation_steps", str(batches)]
    wanted = gradients_of_one_process(world, tmp_path / "one", *flags)
    found = tmp_path / "gradients"
    found.mkdir()
    flags += [*chunk, "--per_device_train_batch_size", str(SIZE), "--use_cpu", "false"]
    launch(kind, [[str(world / "recipe.yaml"), *flags, "--output_dir", str(tmp_path / "two")]], tmp_path, found)
    assert len(list(found.iterdir())) == len(wanted) == 3
    for number, gradients in enumerate(wanted):
        assert_same_gradients(torch.load(found / f"{number}.pt"), gradients)


def gradients_of_one_process(world: Path, output: Path, *flags: str) -> list[dict[str, torch.Tensor]]:
    """The gradient of every parameter before each step, with the joined batches."""
    kept, names = [], {}
    create_optimizer = ViPolyQwenTrainer.create_optimizer

    def name_and_create(trainer: ViPolyQwenTrainer, *args: object) -> torch.optim.Optimizer:
        names.update({value: name for name, value in trainer.model.named_parameters()})
        return create_optimizer(trainer, *args)

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if parameters[0] in names:  # not the optimizer of the learnable loss parameters
            kept.append({names[parameter]: parameter.grad.clone() for parameter in parameters})

    hook = register_optimizer_step_pre_hook(keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ViPolyQwenTrainer, "create_optimizer", name_and_create)
        train_run(world, output, *flags, "--per_device_train_batch_size", str(2 * SIZE))
    hook.remove()
    return kept


def assert_one_process_resumes_or_is_refused(kind: str, world: Path, straight: Path, output: Path) -> None:
    """Checks resuming on one rank from two: with DDP and FSDP2 by joined batches, without a launcher from DDP only."""
    flags = [*FLAGS, *LEARNED, *data(world), "--per_device_train_batch_size", str(2 * SIZE)]
    flags += ["--resume_from_checkpoint", str(straight / "checkpoint-1")]
    if kind == "fsdp2":
        own = ["--use_cpu", "false", "--output_dir", str(output)]
        launch(kind, [[str(world / "recipe.yaml"), *flags, *own]], straight, processes=1)
    if kind == "ddp":
        train_run(world, output, *flags)
    else:
        with pytest.raises(ValueError, match=f"checkpoint-1 was written by {LAUNCHES[kind]}, and this run is one"):
            train_run(world, output.with_name("refused"), *flags)
    if kind in ("ddp", "fsdp2"):
        assert_same_weights(output / "checkpoint-3", straight / "checkpoint-3", world / "base")


def assert_a_repository(folder: Path) -> None:
    """Checks that a folder has the code and all tensors of the model and can be published."""
    refuse_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoModel"] == "modeling_vipolyqwen.ViPolyQwenModel"
    assert {path.name for path in folder.glob("*.py")} >= {"modeling_vipolyqwen.py"}
    assert not list(folder.glob("_fsdp*.py"))


def assert_same_weights(folder: Path, other: Path, base: Path) -> None:
    """Compares all weights, relative to their distance from the base."""
    found, wanted, start = (state_dict(path) for path in (folder, other, base))
    assert found.keys() == wanted.keys()
    names = [name for name in wanted if name != IGNORED]
    kept = [name for name in names if start[name].shape == wanted[name].shape]  # the embedding has grown
    moved = torch.stack([(wanted[name] - start[name]).norm() for name in kept])
    apart = torch.stack([(wanted[name] - found[name]).norm() for name in names])
    assert apart.norm() <= 1e-4 * moved.norm()


def learned(folder: Path) -> dict[str, torch.Tensor]:
    """Returns temperature and log-variances after three steps, and the moments of their optimizer."""
    state = load_file(folder / "loss_state.safetensors")
    names = ("log_temperatures", "weighting.log_variances")
    state = {key: value for key, value in state.items() if key.endswith(names) or key.startswith("optimizer.")}
    assert (state["loss.log_temperatures"] - math.log(0.07)).abs() > 0.05
    assert (state["loss.weighting.log_variances"].abs() > 0.01).sum() == 3  # of the tasks that have rows
    assert {f"optimizer.{name}.exp_avg_sq" for name in names} < state.keys()
    return state


def state_dict(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors by the names of the model; loading translates the older ones of DeepSpeed checkpoints."""
    model, report = ViPolyQwenModel.from_pretrained(folder, output_loading_info=True)
    assert loading_problems(report) == ""
    return model.state_dict()


def read_log(output: Path) -> list[dict]:
    return json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_has_no_unknown_key_and_says_how_to_start(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.num_processes == 4
    text = path.read_text(encoding="utf-8")
    assert f"accelerate launch --config_file recipes/launch/{path.name} " in text


def test_fsdp2_wraps_every_block_of_the_model(tiny: tuple) -> None:
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    classes = set(config["fsdp_transformer_layer_cls_to_wrap"].split(","))
    model = tiny[0]
    assert classes == {type(module).__name__ for module in model.modules()} & set(type(model)._no_split_modules)
    with_blocks = {id(p) for m in model.modules() if type(m).__name__ in classes for p in m.parameters()}
    in_layers = [p for name, p in model.named_parameters() if ".layers." in name or ".blocks." in name]
    assert in_layers and all(id(parameter) in with_blocks for parameter in in_layers)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_knows_every_setting(stage: int) -> None:
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.runtime.config import DeepSpeedConfig  # pyright: ignore[reportMissingImports]

    given = yaml.safe_load((CONFIGS / f"zero{stage}.yaml").read_text(encoding="utf-8"))["deepspeed_config"]
    assert given["zero_stage"] == stage
    plugin = DeepSpeedPlugin(
        zero_stage=stage,
        zero3_init_flag=False,  # it would reach into every model that is built after this
        zero3_save_16bit_model=given.get("zero3_save_16bit_model"),
        gradient_accumulation_steps=1,
        gradient_clipping=1.0,
        offload_optimizer_device=given["offload_optimizer_device"],
        offload_param_device=given.get("offload_param_device"),
    )
    parsed = DeepSpeedConfig({**plugin.deepspeed_config, "train_micro_batch_size_per_gpu": 1, "train_batch_size": 1})
    assert parsed.zero_config.stage == stage
    assert parsed.zero_config.gather_16bit_weights_on_model_save == (stage == 3)
