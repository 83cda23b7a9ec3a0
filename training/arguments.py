"""Arguments of a training run: recipes (YAML or JSON) and flags, read into dataclasses."""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from .. import __version__
from ..configuration_vipolyqwen import CHOICES
from ..data.mixing import BATCHING
from ..data.names import did_you_mean, rename_old_keys
from ..data.schema import SIDES_OF_TASKS, declare_tasks, with_ready_tasks
from ..data.yaml_files import read_yaml
from .argument_checks import refuse_loader_options, refuse_without_effect, typed
from .parts import TOWERS


@dataclass
class ModelArguments:
    """The model to train: a viPolyQwen repository, or backbones to build a new model on; its adapter."""

    model: str | None = field(
        default=None, metadata={"help": "viPolyQwen repository (Hub id or folder) to continue from"}
    )
    vlm: str | None = field(
        default=None, metadata={"help": "Qwen2-VL checkpoint to build a new model on, in place of `model`"}
    )
    audio: str | None = field(
        default=None, metadata={"help": "checkpoint of the speech encoder; none: a model without audio"}
    )
    pooling: str | None = field(default=None, metadata={"help": "pooling of text and images: attention, mean or last"})
    projection: str | None = field(default=None, metadata={"help": "projection to the embedding: linear or mlp"})
    audio_pooling: str | None = field(default=None, metadata={"help": "pooling of audio; none: as `pooling`"})
    audio_projection: str | None = field(default=None, metadata={"help": "projection of audio; none: as `projection`"})
    audio_fusion: str | None = field(
        default=None,
        metadata={"help": "embedding of an input that has audio and text or images: mean, audio or attention"},
    )
    audio_prefix: str | None = field(
        default=None, metadata={"help": "effect of a task prefix on audio alone: none, or fuse with its vector"}
    )
    attn_implementation: str = field(
        default="auto", metadata={"help": "attention kernel, such as sdpa; auto: the fastest installed"}
    )
    max_length: int = field(default=8192, metadata={"help": "maximum tokens of an input"})
    min_pixels: int | None = field(default=None, metadata={"help": "minimum pixels of an image after resizing"})
    max_pixels: int | None = field(default=None, metadata={"help": "maximum pixels of an image after resizing"})
    max_audio_seconds: float | None = field(
        default=None, metadata={"help": "length of a window of audio, in seconds; longer audio has several"}
    )
    max_audio_windows: int | None = field(
        default=None, metadata={"help": "maximum windows of an audio input; longer audio is an error"}
    )
    freeze: list[str] | None = field(default=None, metadata={"help": f"towers to freeze, out of {','.join(TOWERS)}"})
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "rank of the LoRA adapter to train; none: train all weights"},
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "alpha of the adapter, whose scale is alpha / rank; none: 2 · rank"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the input of the adapter"})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": f"layers with an adapter: attention and MLP of the towers {','.join(TOWERS)}, or linear layers by "
            "the last part of their name, such as q_proj,v_proj; none: language"
        },
    )
    use_dora: bool = field(
        default=False, metadata={"help": "DoRA: train the magnitude of each weight column separately"}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: load the language model in 4 bits (CUDA)"})

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown tower, an ambiguous or missing model, and an adapter that cannot learn."""
        self.freeze = _split_names(self.freeze)
        for name in self.freeze:
            if name not in TOWERS:
                raise ValueError(
                    f"`freeze` names {name!r}; it must name towers out of {', '.join(TOWERS)}. Poolings and "
                    "projections are always trained."
                )
        if (self.model is None) == (self.vlm is None):
            raise ValueError(
                f"`model` is {self.model!r} and `vlm` is {self.vlm!r}: give exactly one of them, a viPolyQwen "
                "repository to continue from or a Qwen2-VL checkpoint to build on."
            )
        from ..publishing.repository import ADAPTER_CONFIG  # loads the model, which `--help` need not

        if self.model is not None and (Path(self.model) / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"`model` is {self.model!r}, an adapter. Resume it with `resume_from_checkpoint`, or merge it with "
                f"`python publish_vipolyqwen.py {self.model} --out FOLDER` and continue from FOLDER."
            )
        self._check_choices()
        self._check_adapter()

    def _check_choices(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(known)}.")
        for name in ("max_length", "min_pixels", "max_pixels", "max_audio_seconds", "max_audio_windows"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` is {value}; it must be above 0.")
        check_pixels(self.min_pixels, self.max_pixels)

    def _check_adapter(self) -> None:
        given = self.lora_targets is not None
        self.lora_targets = _split_names(self.lora_targets) or ["language"]
        if self.lora_rank is None:
            options = {"lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout, "use_dora": self.use_dora}
            options |= {"load_in_4bit": self.load_in_4bit, "lora_targets": self.lora_targets if given else None}
            for name, value in options.items():
                if value:
                    raise ValueError(f"`{name}` is {value!r}, but `lora_rank` is not set; set it to train an adapter.")
            return
        if self.lora_rank < 1:
            raise ValueError(f"`lora_rank` is {self.lora_rank}; give an integer >= 1, or leave it out.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` is {self.lora_dropout}; it must lie in [0, 1).")
        for name in self.lora_targets:
            if name in self.freeze:
                raise ValueError(
                    f"`freeze` and `lora_targets` (by default: language) both name {name!r}, but an adapter in a "
                    "frozen tower would never learn. Drop it from `freeze`, or name others of "
                    f"{', '.join(TOWERS)} in `lora_targets`."
                )


def check_pixels(lowest: int | None, highest: int | None) -> None:
    """Raises ValueError if no number of pixels is allowed."""
    if lowest is not None and highest is not None and lowest > highest:
        raise ValueError(
            f"`max_pixels` is {highest}, below `min_pixels`, which is {lowest}; raise `max_pixels` or lower "
            "`min_pixels`."
        )


def _split_names(names: list[str] | str | None) -> list[str]:
    """Splits lists and strings at commas: `["a,b", "c"]` and `"a, b, c"` both give `["a", "b", "c"]`."""
    joined = names if isinstance(names, str) else ",".join(names or [])
    return [name.strip() for name in joined.split(",") if name.strip()]


@dataclass
class DataArguments:
    """The pairs to train and evaluate on, and the task prefixes of their inputs."""

    train_data: Any = field(
        default=None, metadata={"help": "sources of training pairs, a list of mappings (docs/data.md)"}
    )
    eval_data: Any = field(default=None, metadata={"help": "sources of held-out pairs, as in `train_data`"})
    tasks: Any = field(default_factory=dict, metadata={"help": "further tasks: prefix and loss of each"})
    prefix_sides: str = field(
        default="task",
        metadata={"help": "sides that get the task prefix: a, both or none for all tasks; task: those of each task"},
    )
    prefix_dropout: float = field(default=0.1, metadata={"help": "fraction of training rows without task prefix"})
    tasks_without_prefix: list[str] | None = field(default=None, metadata={"help": "tasks that never get a prefix"})
    without_tasks: list[str] | None = field(default=None, metadata={"help": "tasks to leave out of training"})
    augment_vietnamese: Any = field(
        default=None,
        metadata={"help": "Vietnamese spellings to train on: {TASK or all: {RULE: probability}} (docs/data.md)"},
    )
    augment_sides: str = field(default="a", metadata={"help": "sides that augment_vietnamese respells: a, b or both"})
    check_media: str = field(
        default="header",
        metadata={
            "help": "before training, read of image and audio files: header (or true), full, or none (or false)"
        },
    )
    on_bad_row: str = field(
        default="error", metadata={"help": "policy for a row that cannot be used: error, or skip (and count)"}
    )
    max_bad_rows: float = field(default=0.01, metadata={"help": "largest share of rows to skip"})

    def __post_init__(self) -> None:
        """Adds the ready tasks that the data name.

        Raises:
            ValueError: an option is unknown.
        """
        from ..data.checks import HEADER, NONE, Checker  # load the processor and datasets, which `--help` need not
        from ..data.sources import check_bad_rows

        choice = str(self.check_media).lower()  # YAML reads true as a boolean
        self.check_media = {"true": HEADER, "false": NONE}.get(choice, choice)
        Checker({}, media=self.check_media, on_bad_row=self.on_bad_row)
        check_bad_rows([], 0, self.max_bad_rows)
        sources = [each for each in (self.train_data or []) + (self.eval_data or []) if isinstance(each, Mapping)]
        self.tasks = with_ready_tasks(self.tasks, sources)


@dataclass
class LossArguments:
    """The loss of each task and the weights between tasks."""

    loss_table: str = field(default="mixed", metadata={"help": "loss of each task: mixed, dle, nce or sum"})
    temperature: Any = field(
        default=0.07,
        metadata={
            "help": "temperature of InfoNCE and Triplet: T, or {text-text: T, image-text: T, audio-text: T}, and "
            "optionally image-image, audio-image and audio-audio"
        },
    )
    learnable_temperature: bool = field(
        default=False, metadata={"help": "train the temperature, from `temperature` on"}
    )
    mask_duplicates: bool = field(default=True, metadata={"help": "exclude copies of the positive from the negatives"})
    mask_groups: bool = field(default=True, metadata={"help": "exclude rows of the same `group` from the negatives"})
    nce_min_score: float | None = field(default=0.5, metadata={"help": "minimum score of a positive pair in InfoNCE"})
    false_negative_margin: float | None = field(
        default=None,
        metadata={"help": "exclude negatives whose similarity exceeds the positive's by more than this margin"},
    )
    triplet_negatives: str = field(
        default="hardest",
        metadata={"help": "negative of the triplet: hardest, or semi_hard (less similar than the positive)"},
    )
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Matryoshka dimensions to train, such as 1024 512 256"}
    )
    loss_block_rows: int | None = field(
        default=None,
        metadata={"help": "rows whose similarities are held at once; none: all of a small batch, else by its size"},
    )
    distil: Any = field(
        default=None,
        metadata={"help": "weight of the distillation loss: one number for every task, or {TASK: weight}"},
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "teacher of texts: a sentence-transformers model (name or path) or module:function; none: the "
            "columns teacher_a, teacher_b only"
        },
    )
    teacher_prompt: str | None = field(
        default=None, metadata={"help": "prompt before every text of a sentence-transformers teacher"}
    )
    teacher_temperature: float = field(
        default=0.05, metadata={"help": "temperature of the similarities that KL compares"}
    )
    distil_cosine: float = field(
        default=1.0, metadata={"help": "weight of the cosine to the teacher, through a learned map"}
    )
    distil_kl: float = field(default=1.0, metadata={"help": "weight of KL of the in-batch similarities"})
    task_weighting: str = field(
        default="none",
        metadata={"help": "weighting between tasks: none, table, inverse_loss, uncertainty or gradnorm"},
    )
    task_weighting_options: Any = field(
        default=None, metadata={"help": "options of the weighting, such as {baseline: ema} (training/weighting.py)"}
    )


# Bounds of what is computed together, and their units.
LIMITS = {"embed_chunk": "rows", "embed_chunk_tokens": "tokens", "batch_tokens": "tokens", "batch_pixels": "pixels"}


@dataclass
class ViPolyQwenTrainingArguments(TrainingArguments):
    """The stock training arguments; learning rates by part, micro-batches, packing, monitoring."""

    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of the vision tower; none: learning_rate"}
    )
    audio_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of the speech encoder; none: learning_rate"}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of poolings and projections; none: learning_rate"}
    )
    loss_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of temperature and log-variances (AdamW); none: learning_rate"}
    )
    embed_chunk: int | None = field(
        default=None,
        metadata={"help": "maximum rows of a micro-batch (cached gradients); none: no limit"},
    )
    embed_chunk_tokens: int | None = field(
        default=None,
        metadata={"help": "maximum tokens and audio frames of a micro-batch, padding included; none: no limit"},
    )
    packing: str = field(
        default="auto",
        metadata={"help": "pack texts into one sequence without padding: true, false or auto (if attention profits)"},
    )
    batching: str = field(
        default="mixed",
        metadata={"help": "rows of a batch: mixed, homogeneous (of one source) or stratified (each source's share)"},
    )
    batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "most tokens and audio frames of a rank's batch, which then has as many rows as fit, at most "
            "per_device_train_batch_size; none: that many rows"
        },
    )
    batch_pixels: int | None = field(
        default=None, metadata={"help": "likewise most pixels of the images of a rank's batch"}
    )
    mixture_temperature: float = field(
        default=1.0, metadata={"help": "flattens the sizes of the sources, share ∝ rows^(1 / temperature)"}
    )
    monitor_steps: int = field(
        default=10, metadata={"help": "steps between measurements of the gradient of each task; 0: never"}
    )
    on_nan: str = field(
        default="error", metadata={"help": "policy for a loss that is not finite: error, or skip (the update)"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "delete the run or repository that the output folder holds, and start anew"}
    )
    resume_with: list[str] | None = field(
        default=None,
        metadata={"help": "settings that may differ from those of the checkpoint to resume from, by name"},
    )
    remove_unused_columns: bool = False  # the collator needs every column
    logging_nan_inf_filter: bool = False  # log a NaN as NaN, not as 0

    def __post_init__(self) -> None:
        """Raises ValueError for invalid values of the arguments above."""
        self.resume_with = _split_names(self.resume_with)
        if self.on_nan not in ("error", "skip"):
            raise ValueError(f"`on_nan` is {self.on_nan!r}; it must be error or skip.")
        for name, unit in LIMITS.items():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; give a number of {unit} >= 1, or leave it out.")
        self.packing = str(self.packing).lower()  # YAML reads true as a boolean
        if self.packing not in ("auto", "true", "false"):
            raise ValueError(f"`packing` is {self.packing!r}; it must be auto, true or false.")
        if self.batching not in BATCHING:
            raise ValueError(f"`batching` is {self.batching!r}; choose one of {', '.join(BATCHING)}.")
        if not self.mixture_temperature >= 1:
            raise ValueError(f"`mixture_temperature` is {self.mixture_temperature}; give a number >= 1.")
        if self.monitor_steps < 0:
            raise ValueError(f"`monitor_steps` is {self.monitor_steps}; give a number of steps, or 0 for never.")
        if self.on_nan == "skip":
            self.logging_nan_inf_filter = True  # average the loss over the steps that were not skipped
        refuse_without_effect(self)
        self.use_cpu = self.use_cpu or launched_on_cpu()
        super().__post_init__()
        refuse_loader_options(self)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # it needs an accelerator; torch would warn


def launched_on_cpu() -> bool:
    """Returns whether `torchrun` started several ranks on a machine without accelerator.

    Without `use_cpu` each would take itself for the only one, train on every row and overwrite the others' files.
    `accelerate launch` tells its ranks by environment variables how they are joined.
    """
    told = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("CPU", "FSDP", "DEEPSPEED"))
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not told and not torch.accelerator.is_available()


JSON_ARGUMENTS = (
    "train_data",
    "eval_data",
    "tasks",
    "temperature",
    "distil",
    "task_weighting_options",
    "augment_vietnamese",
)  # nested, so JSON as a flag
ARGUMENT_CLASSES = (ModelArguments, DataArguments, LossArguments, ViPolyQwenTrainingArguments)
Arguments = tuple[ModelArguments, DataArguments, LossArguments, ViPolyQwenTrainingArguments]


def read_arguments(argv: list[str]) -> Arguments:
    """Reads `[RECIPE.yaml …] [--argument value …]`; later recipes override earlier ones, flags override recipes."""
    recipe = {}
    while argv and not argv[0].startswith("--"):
        recipe, argv = recipe | read_recipe(argv[0]), argv[1:]
    parser = HfArgumentParser(ARGUMENT_CLASSES)
    parser.add_argument("--data_types", dest="data_types", type=json.loads, help="old name of `--tasks`")
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # return given flags only, to not override the recipe
        action.required = False
        if action.dest in JSON_ARGUMENTS:
            action.type = json.loads
    parser.add_argument("--version", action="version", version=f"vipolyqwen {__version__}")
    flags = rename_old_keys(vars(parser.parse_args(argv)), "The flags")
    resume = flags.get("resume_from_checkpoint")
    if resume is not None and resume.lower() in ("true", "false"):
        flags["resume_from_checkpoint"] = resume.lower() == "true"
    return parser.parse_dict({**recipe, **flags})


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Reads a YAML or JSON recipe.

    Raises:
        ValueError: the file is missing or malformed, or has an unknown key; names the nearest known one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The recipe {str(path)!r} does not exist; see recipes/ for examples.")
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds {type(recipe).__name__}; a recipe is a mapping of `key: value` lines.")
    recipe = rename_old_keys(recipe, str(path))
    known = [item.name for cls in ARGUMENT_CLASSES for item in fields(cls) if item.init]
    for key in recipe:
        if key not in known:
            hint = did_you_mean(key, known) or " See docs/training.md, or --help, for the keys."
            raise ValueError(f"{path}: unknown recipe key {key!r} (value {recipe[key]!r}).{hint}")
    recipe = typed(recipe, ARGUMENT_CLASSES, str(path))
    try:
        declare_tasks(with_ready_tasks(recipe.get("tasks"), []), recipe.get("prefix_sides", SIDES_OF_TASKS))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return recipe


def read_paths(arguments: Arguments) -> list[str]:
    """Returns the names of all that a run reads: model or backbones, and the sources of pairs."""
    model_args, data_args, _, _ = arguments
    sources = [*(data_args.train_data or []), *(data_args.eval_data or [])]
    names = [model_args.model, model_args.vlm, model_args.audio]
    paths = [source["path"] for source in sources if isinstance(source, Mapping) and "path" in source]
    return [str(name) for name in (*names, *paths) if name is not None]
