"""What a training run can be told: a recipe (YAML or JSON) and flags, read into dataclasses."""

import argparse
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..data.names import did_you_mean, rename_old_keys
from .parts import TOWERS


@dataclass
class ModelArguments:
    """Where the model comes from: a viPolyQwen repository, or the backbones to build a new one on."""

    model: str | None = field(
        default=None, metadata={"help": "viPolyQwen repository (Hub id or folder) to go on from"}
    )
    vlm: str | None = field(default=None, metadata={"help": "Qwen2-VL checkpoint, without `model`"})
    audio: str | None = field(default=None, metadata={"help": "speech encoder's checkpoint; none: bimodal"})
    pooling: str | None = field(default=None, metadata={"help": "attention, mean or last"})
    projection: str | None = field(default=None, metadata={"help": "linear or mlp"})
    audio_fusion: str | None = field(default=None, metadata={"help": "mean or audio"})
    attn_implementation: str = field(default="auto", metadata={"help": "auto: the fastest that is installed"})
    max_length: int = field(default=8192, metadata={"help": "most tokens of an input"})
    min_pixels: int | None = field(default=None, metadata={"help": "fewest pixels of an image"})
    max_pixels: int | None = field(default=None, metadata={"help": "most pixels of an image"})
    max_audio_seconds: float | None = field(default=None, metadata={"help": "longest sound"})
    freeze: list[str] | None = field(
        default=None, metadata={"help": f"towers that are not trained: {','.join(TOWERS)}, or some of these"}
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "train an adapter of this rank, poolings and projections; none: everything"}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "scale · rank of the adapter; none: 2 · rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapter"})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": f"what gets an adapter: attention and MLP of {','.join(TOWERS)}, or layers by the last part of "
            "their name, such as q_proj,v_proj; none: language"
        },
    )
    use_dora: bool = field(default=False, metadata={"help": "DoRA: train the length of the weights' columns apart"})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the language model in 4 bits (CUDA)"})

    def __post_init__(self) -> None:
        """Refuses two origins, or none, towers that there are not, and adapters that would never learn."""
        self.freeze = _split_names(self.freeze)
        for name in self.freeze:
            if name not in TOWERS:
                raise ValueError(
                    f"`freeze` names {name!r}; the towers are {', '.join(TOWERS)}. Poolings and projections are "
                    "always trained."
                )
        if (self.model is None) == (self.vlm is None):
            raise ValueError(
                f"`model` is {self.model!r} and `vlm` is {self.vlm!r}: give exactly one of them, a viPolyQwen "
                "repository to go on from or a Qwen2-VL checkpoint to build on."
            )
        if self.model is not None and (Path(self.model) / "adapter_config.json").is_file():
            raise ValueError(
                f"`model` is {self.model!r}, an adapter. Go on from it with `resume_from_checkpoint`, or from the "
                f"whole model that `python publish_vipolyqwen.py {self.model} --out FOLDER` makes of it."
            )
        self._check_adapter()

    def _check_adapter(self) -> None:
        given = self.lora_targets is not None
        self.lora_targets = _split_names(self.lora_targets) or ["language"]
        if self.lora_rank is None:
            options = {"lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout, "use_dora": self.use_dora}
            options |= {"load_in_4bit": self.load_in_4bit, "lora_targets": self.lora_targets if given else None}
            for name, value in options.items():
                if value:
                    raise ValueError(f"`{name}` is {value!r}, but there is no adapter; give `lora_rank` too.")
            return
        if self.lora_rank < 1:
            raise ValueError(f"`lora_rank` is {self.lora_rank}; give a whole number >= 1, or leave it out.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` is {self.lora_dropout}; it must lie in [0, 1).")
        for name in self.lora_targets:
            if name in self.freeze:
                raise ValueError(
                    f"`freeze` and `lora_targets` (by default: language) both name {name!r}, but an adapter in a "
                    "frozen tower would never learn. Drop it from `freeze`, or name others of "
                    f"{', '.join(TOWERS)} in `lora_targets`."
                )


def _split_names(names: list[str] | str | None) -> list[str]:
    """["a,b", "c"] or "a, b, c" -> ["a", "b", "c"]."""
    joined = names if isinstance(names, str) else ",".join(names or [])
    return [name.strip() for name in joined.split(",") if name.strip()]


@dataclass
class DataArguments:
    """Which pairs the model learns from, and how their task reaches it."""

    train_data: Any = field(default=None, metadata={"help": "list of sources, see README"})
    eval_data: Any = field(default=None, metadata={"help": "held-out pairs, as `train_data`"})
    tasks: Any = field(default_factory=dict, metadata={"help": "further tasks: prefix and loss of each"})
    prefix_sides: str = field(default="a", metadata={"help": "which side carries the task prefix: a or both"})
    prefix_dropout: float = field(default=0.1, metadata={"help": "share of rows trained without prefix"})
    tasks_without_prefix: list[str] | None = field(default=None, metadata={"help": "tasks that never get one"})
    without_tasks: list[str] | None = field(default=None, metadata={"help": "tasks whose training rows are left out"})
    check_media: bool = field(default=True, metadata={"help": "read every file's header before training"})


@dataclass
class LossArguments:
    """The loss of each task and the weights between tasks."""

    loss_table: str = field(default="mixed", metadata={"help": "mixed, dle, nce or sum"})
    temperature: Any = field(
        default=0.07, metadata={"help": "T of InfoNCE and Triplet; or {text-text: T, image-text: T, audio-text: T}"}
    )
    learnable_temperature: bool = field(default=False, metadata={"help": "learn T from there on"})
    mask_duplicates: bool = field(default=True, metadata={"help": "equal content is no negative"})
    mask_groups: bool = field(default=True, metadata={"help": "rows of one `group` are no negatives"})
    nce_min_score: float | None = field(default=0.5, metadata={"help": "pairs scored lower are no positives"})
    false_negative_margin: float | None = field(
        default=None, metadata={"help": "leave out negatives more similar than the positive by more than this"}
    )
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "lengths at which the vector's beginning is trained too, such as 1024 512 256"}
    )
    task_weighting: str = field(
        default="none", metadata={"help": "none, table, inverse_loss, uncertainty or gradnorm"}
    )
    task_weighting_options: Any = field(
        default=None, metadata={"help": "options of that weighting, such as {baseline: ema} (weighting_vipolyqwen.py)"}
    )


@dataclass
class ViPolyQwenTrainingArguments(TrainingArguments):
    """Stock training arguments plus a learning rate for each part of the model."""

    vision_learning_rate: float | None = field(default=None, metadata={"help": "vision tower; none: learning_rate"})
    audio_learning_rate: float | None = field(default=None, metadata={"help": "speech encoder; none: learning_rate"})
    head_learning_rate: float | None = field(default=None, metadata={"help": "poolings and projections"})
    loss_learning_rate: float | None = field(
        default=None, metadata={"help": "learned temperature and log-variances, by AdamW; none: learning_rate"}
    )
    embed_chunk: int | None = field(
        default=None,
        metadata={"help": "most rows of one forward, by cached gradients: memory of so many, any batch; none: all"},
    )
    embed_chunk_tokens: int | None = field(
        default=None,
        metadata={"help": "likewise, most tokens and frames of sound of one forward, padding included; none: all"},
    )
    packing: str = field(
        default="auto",
        metadata={"help": "texts without padding, as one sequence: true, false or auto (where attention profits)"},
    )
    monitor_steps: int = field(
        default=10, metadata={"help": "measure the tasks' gradients every so many steps; 0: never"}
    )
    on_nan: str = field(default="error", metadata={"help": "a loss that is not finite: error, or skip the update"})
    remove_unused_columns: bool = False  # the collator needs all of a row
    logging_nan_inf_filter: bool = False  # a NaN must be seen, not logged as 0

    def __post_init__(self) -> None:
        """Checks what the stock arguments do not know."""
        if self.on_nan not in ("error", "skip"):
            raise ValueError(f"`on_nan` is {self.on_nan!r}; it must be error or skip.")
        for name, unit in (("embed_chunk", "rows"), ("embed_chunk_tokens", "tokens")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; give a number of {unit} >= 1, or leave it out.")
        self.packing = str(self.packing).lower()  # a recipe's true is no string
        if self.packing not in ("auto", "true", "false"):
            raise ValueError(f"`packing` is {self.packing!r}; it must be auto, true or false.")
        if self.monitor_steps < 0:
            raise ValueError(f"`monitor_steps` is {self.monitor_steps}; give a number of steps, or 0 for never.")
        if self.on_nan == "skip":
            self.logging_nan_inf_filter = True  # the mean loss is then that of the steps that count
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch would warn of it


JSON_ARGUMENTS = (
    "train_data",
    "eval_data",
    "tasks",
    "temperature",
    "task_weighting_options",
)  # nested, so JSON as a flag
ARGUMENT_CLASSES = (ModelArguments, DataArguments, LossArguments, ViPolyQwenTrainingArguments)
Arguments = tuple[ModelArguments, DataArguments, LossArguments, ViPolyQwenTrainingArguments]


def read_arguments(argv: list[str]) -> Arguments:
    """Reads `[RECIPE.yaml …] [--argument value …]`; a later recipe wins over an earlier one, a flag over all."""
    recipe = {}
    while argv and not argv[0].startswith("--"):
        recipe, argv = recipe | read_recipe(argv[0]), argv[1:]
    parser = HfArgumentParser(ARGUMENT_CLASSES)
    parser.add_argument("--data_types", dest="data_types", type=json.loads, help="old name of `--tasks`")
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # so that only what was given comes back
        action.required = False
        if action.dest in JSON_ARGUMENTS:
            action.type = json.loads
    flags = rename_old_keys(vars(parser.parse_args(argv)), "The flags")
    resume = flags.get("resume_from_checkpoint")
    if resume is not None and resume.lower() in ("true", "false"):
        flags["resume_from_checkpoint"] = resume.lower() == "true"
    return parser.parse_dict({**recipe, **flags})


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Reads a YAML or JSON recipe; an unknown key is an error that suggests the nearest known one."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no recipe at {str(path)!r}; see recipes/ for examples.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds {type(recipe).__name__}, not `key: value` lines.")
    recipe = rename_old_keys(recipe, str(path))
    known = [item.name for cls in ARGUMENT_CLASSES for item in fields(cls) if item.init]
    for key in recipe:
        if key not in known:
            hint = did_you_mean(key, known) or " See docs/training.md, or --help, for the keys."
            raise ValueError(f"{path}: unknown recipe key {key!r} (value {recipe[key]!r}).{hint}")
    return recipe
