"""What several tests share: tiny inputs, a tiny base, a world of pairs, runs and gradients.

The training stack is imported where a test needs it, so that tests of the shipped files start fast.
"""

import faulthandler
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from torch import Tensor, multiprocessing, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedConfig

if TYPE_CHECKING:
    from vipolyqwen.data.schema import Task
    from vipolyqwen.data.sources import PairDataset
    from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
    from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
    from vipolyqwen.training.trainer import ViPolyQwenTrainer

TEXTS = [
    "Hai ngôi sao đỏ lớn trên bãi cỏ.",
    "Three small blue circles in the sea.",
    "沙滩上有四个绿色的小方块。",
    "Trên biển ghi gì? Hà Nội, Đà Nẵng, Huế.",
    "What colour are the big stars on the grass?",
]
EVERYTHING = [
    *("--loss_table", "dle", "--matryoshka_dims", "1024", "256", "64", "--learnable_temperature", "true"),
    *("--task_weighting", "gradnorm", "--task_weighting_options", '{"learning_rate": 0.2}', "--monitor_steps", "1"),
]
KEY_BIAS = "audio_tower.encoder.layers.0.attention.k_proj.bias"  # softmax ignores it: gradient 0, but for rounding
PLAIN = ["--eval_strategy", "no", "--load_best_model_at_end", "false"]
QWEN2_VL_2B_PARAMETERS = 2_208_985_600  # half of `total_size` in the Hub's model.safetensors.index.json
HUBERT_BASE_PARAMETERS = 94_371_712


def random_image(rng: np.random.Generator, width: int = 60, height: int = 48) -> Image.Image:
    """An image of noise."""
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_audio(rng: np.random.Generator, seconds: float = 0.5, sampling_rate: int = 16_000) -> dict:
    """A clip of noise, as `{"array", "sampling_rate"}`."""
    samples = rng.uniform(-0.5, 0.5, int(seconds * sampling_rate)).astype(np.float32)
    return {"array": samples, "sampling_rate": sampling_rate}


def speech_config(kind: str = "hubert", norm: str = "group", **fields: Any) -> PreTrainedConfig:
    """A tiny speech encoder, `hubert`, `wav2vec2`, `wavlm`, …, of the base ("group") or the large ("layer") design."""
    from vipolyqwen.demo.tiny_base import tiny_audio_config

    tiny = tiny_audio_config(32, 2).to_diff_dict()
    if norm == "layer":
        tiny.update(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    return AutoConfig.for_model(**{**tiny, **fields, "model_type": kind})


def build_tiny_model(
    processor: "ViPolyQwenProcessor", audio_config: Any = None, *, attn: str | None = None, **fields: Any
) -> "ViPolyQwenModel":
    """A tiny model whose weights are far from their initial values, so that no output is nearly uniform."""
    from vipolyqwen.demo.tiny_base import tiny_vlm_config
    from vipolyqwen.training.build import build_model

    torch.manual_seed(0)
    vlm_config = tiny_vlm_config(processor.tokenizer, 64, 2, 32)
    model = build_model(vlm_config, audio_config, attn_implementation=attn, **fields)
    return shake(model).eval()


def shake(module: nn.Module) -> nn.Module:
    """Adds noise to every parameter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def ids_of(processor: "ViPolyQwenProcessor", **inputs: Any) -> list[list[int]]:
    """The ids of each input, without padding."""
    batch = processor(**inputs)
    return [
        [i for i, real in zip(ids, mask, strict=True) if real]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def user(*parts: str | Image.Image | dict, system: str | None = None) -> list[dict]:
    """A conversation with one message of the user, and a system text."""
    content: list[dict] = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "audio" if isinstance(part, dict) else "image"
        content.append({"type": kind, kind: part})
    messages = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return messages


def chat_ids(processor: "ViPolyQwenProcessor", *conversations: list[dict]) -> list[list[int]]:
    """The ids of each conversation, without padding."""
    batch = processor.apply_chat_template(list(conversations), tokenize=True, return_dict=True)
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]


def save_tiny_model(folder: Path, image_side: int = 56) -> None:
    """Writes the repository of an untrained model of one layer."""
    from vipolyqwen.demo.tiny_base import build_tiny_base
    from vipolyqwen.publishing.repository import save_repository

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "layers": 1, "vision_size": 32, "audio_size": 32, "vocab_size": 400}
    save_repository(*build_tiny_base(TEXTS * 4, image_side=image_side, **sizes), folder)


def write_world(folder: Path) -> Path:
    """Writes that; returns the recipe."""
    save_tiny_model(folder / "base")
    write_pairs(folder)
    recipe = {
        "model": str(folder / "base"),
        "train_data": [
            {"path": str(folder / "pairs.jsonl")},
            {
                "path": str(folder / "captions.jsonl"),
                "task": "caption",
                "columns": {"images": "picture", "b": "said"},
            },
        ],
        "eval_data": [{"path": str(folder / "pairs.jsonl")}],
        "tasks": {"caption": {"prefix": "<caption>", "loss": {"nce": 1.0, "cosine": 0.5}, "needs_image": True}},
        "loss_table": "dle",
        "task_weighting": "table",
        "per_device_train_batch_size": 8,
        "learning_rate": 1.0e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "recall@1",
        "greater_is_better": True,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def write_pairs(folder: Path) -> None:
    """Four rows of each task and eight captions."""
    rng = np.random.default_rng(0)
    rows, captions = [], []
    for number in range(4):
        random_image(rng).save(folder / f"{number}.png")
        soundfile.write(folder / f"{number}.wav", random_audio(rng, 0.2 + 0.1 * number)["array"], 16_000)
        picture = {"images": [f"{number}.png"]}
        rows += [
            {"task": "text_pair", "a": TEXTS[number], "b": TEXTS[number + 1], "score": number / 3},
            {"task": "instr", "a": f"Nói lại: {TEXTS[number]}", "b": f"{number} {TEXTS[number]}"},
            {"task": "ocr", "a": "Biển ghi gì?", "b": f"số {number}", **picture},
            {"task": "vqa_single", "a": "What is it?", "b": f"noise {number}", **picture},
            {"task": "vqa_multi", "a": "User: A?\nAssistant: B.\nUser: C?", "b": f"D {number}", **picture},
            {"task": "audio", "a": "", "b": f"tiếng {number}", "audio": f"{number}.wav"},
        ]
        captions += [{"picture": f"{number}.png", "said": f"{word} {number}"} for word in ("một hình", "a picture")]
    for name, content in (("pairs", rows), ("captions", captions)):
        lines = [json.dumps({"id": f"{name}-{i}", **row}, ensure_ascii=False) for i, row in enumerate(content)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def train_run(world: Path, output: Path, *flags: str) -> list[dict]:
    """Trains in this process and returns the log."""
    from vipolyqwen.train_vipolyqwen import main as train_main

    train_main([str(world / "recipe.yaml"), "--output_dir", str(output), *flags])
    return json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def build_trainer(
    folder: Path, *flags: str, model: "ViPolyQwenModel | None" = None
) -> "tuple[ViPolyQwenTrainer, PairDataset]":
    """A trainer of the corpus's base, or of `model`, and the pairs."""
    from vipolyqwen.data.collator import MixedBatchCollator
    from vipolyqwen.data.schema import declare_tasks
    from vipolyqwen.data.sources import load_pairs
    from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
    from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
    from vipolyqwen.training.arguments import read_arguments
    from vipolyqwen.training.build import build_loss, connect_teacher
    from vipolyqwen.training.trainer import ViPolyQwenTrainer

    base = str(folder / "base")
    given = ["--model", base, "--output_dir", str(folder / "out"), "--use_cpu", "true", "--report_to", "none", *flags]
    _, _, loss_args, args = read_arguments(given)
    model = ViPolyQwenModel.from_pretrained(base) if model is None else model
    processor = ViPolyQwenProcessor.from_pretrained(base, config=model.config)
    tasks = declare_tasks(None)
    source = {"path": str(folder / "pairs.jsonl"), "media_root": str(folder / "media")}
    pairs = load_pairs([source], tasks, processor.min_audio_samples, check_media=False)
    loss = build_loss(loss_args, {}, list(tasks))
    width = connect_teacher(loss, pairs, model, loss_args, args)
    collator = MixedBatchCollator(processor, tasks, prefix_dropout=0.0, teacher_width=width)
    trainer = ViPolyQwenTrainer(model, args, processor, loss, pairs, None, collator, collator)
    trainer.current_gradient_accumulation_steps = 1
    return trainer, pairs


def training_step(
    trainer: "ViPolyQwenTrainer", rows: list[dict[str, Any]], model: nn.Module | None = None
) -> dict[str, Any]:
    """The stock training step, without the update; what it logs."""
    loss = trainer.training_step(trainer.model if model is None else model, trainer.data_collator(rows))
    return {"loss": loss.item(), **trainer.mixed_loss.figures.average(trainer.figures[-1:])}


def gradients_of(trainer: "ViPolyQwenTrainer") -> dict[str, Tensor]:
    """The gradient of every parameter, those of the loss among them."""
    gradients = {f"loss.{name}": value.grad for name, value in trainer.mixed_loss.named_parameters()}
    for name, value in trainer.model.named_parameters():
        if value.requires_grad:
            gradients[name] = value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
    return gradients


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every parameter's gradient, relative to its own norm."""
    assert found.keys() == wanted.keys()
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert whole > 1
    for name, gradient in wanted.items():
        if name == KEY_BIAS:
            assert max(gradient.norm(), found[name].norm()) < 1e-8 * whole
        else:
            assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


def run_on_two_ranks(work: Callable[..., None], folder: Path, *inputs: Any) -> None:
    """Runs `work(rank, *inputs)` in two gloo processes that meet at a file of `folder`; raises their errors."""
    multiprocessing.spawn(run_on_rank, args=(work, folder / f"{work.__name__}.rendezvous", *inputs), nprocs=2)


def run_on_rank(rank: int, work: Callable[..., None], rendezvous: Path, *inputs: Any) -> None:
    """Runs in each process of `run_on_two_ranks`."""
    from vipolyqwen.training.distributed import end_process_group

    faulthandler.enable()  # a rank that crashes says where
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    work(rank, *inputs)
    end_process_group()
    os._exit(0)  # FSDP2 keeps meshes, and so gloo's threads: Python's shutdown would abort where one is at work


def load_with_prefixes(base: Path) -> "tuple[ViPolyQwenModel, ViPolyQwenProcessor, dict[str, Task]]":
    """A repository's model and processor, which know the prefixes of all tasks, and these tasks."""
    from vipolyqwen.data.schema import declare_tasks
    from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
    from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor

    model = ViPolyQwenModel.from_pretrained(base).eval()
    processor = ViPolyQwenProcessor.from_pretrained(base, config=model.config)
    tasks = declare_tasks(None)
    for task in tasks.values():
        processor.add_task(task.name, task.prefix, task.prefix_sides)
    model.resize_token_embeddings(max(len(processor.tokenizer), model.get_input_embeddings().num_embeddings))
    return model, processor, tasks
