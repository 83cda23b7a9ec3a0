"""Builds the parts of a run from its arguments: model and processor on backbones, loss, pairs, collator."""

import os
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLModel,
    Wav2Vec2FeatureExtractor,
)
from transformers.utils import logging

from ..audio_vipolyqwen import keep_supported_attention, make_padding_invariant, receptive_field
from ..configuration_vipolyqwen import CHOICES, ViPolyQwenConfig
from ..data.augmentation import Augmentation
from ..data.checks import Checker, TokenRoom
from ..data.collator import MixedBatchCollator
from ..data.schema import Task, canonical_task, declare_tasks, with_prefix_sides
from ..data.sources import PairDataset, load_pairs
from ..data.streamed_pairs import StreamedPairs
from ..modeling_vipolyqwen import ViPolyQwenModel, loading_problems
from ..packing_vipolyqwen import choose_attn_implementation
from ..processing_vipolyqwen import ViPolyQwenProcessor
from ..publishing.repository import check_audio_prefix
from .adapters import add_adapter, check_installed, continued, load_in_4bit, untrained_towers, write_base
from .arguments import DataArguments, LossArguments, ModelArguments, ViPolyQwenTrainingArguments, check_pixels
from .distillation import Distillation
from .losses import COMPONENTS, LOSS_TABLES, TaskLoss, check_weight
from .mixed_loss import MixedLoss
from .parts import freeze_towers
from .teacher import teach_pairs
from .weighting import build_weighting

logger = logging.get_logger(__name__)

MAX_LENGTH = 8192  # tokens


def build_model(
    vlm: str | PathLike | PreTrainedConfig,
    audio: str | PathLike | PreTrainedConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    **config_kwargs: Any,
) -> ViPolyQwenModel:
    """Builds a model on pretrained backbones, with newly initialised poolings and projections.

    Args:
        vlm: Qwen2-VL checkpoint (Hub id or folder), or a configuration for random weights.
        audio: checkpoint or configuration of the speech encoder (hubert, wav2vec2, wavlm, …); `None` for a model
            without audio.
        dtype: dtype of all parameters.
        attn_implementation: attention kernel of every tower; `None` leaves the choice to transformers.
        **config_kwargs: fields of `ViPolyQwenConfig` (`pooling`, `projection`, `projection_dim`, …).

    Returns:
        a model whose embeddings are (rows, projection_dim), of norm 1.

    Raises:
        ValueError: `vlm` is not a Qwen2-VL checkpoint, or a checkpoint has missing, unexpected or mismatched weights.
    """
    vlm_config = vlm if isinstance(vlm, PreTrainedConfig) else AutoConfig.from_pretrained(vlm)
    audio_config = audio
    if audio is not None and not isinstance(audio, PreTrainedConfig):
        audio_config = AutoConfig.from_pretrained(audio)
    config = _joint_config(vlm_config, audio_config, **config_kwargs)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation  # of every tower

    towers = {"vlm": _backbone(Qwen2VLModel, vlm, config, dtype)}
    config = towers["vlm"].config  # `from_pretrained` fills in a copy
    if config.audio_config is not None:
        keep_supported_attention(config.audio_config)
        towers["audio_tower"] = make_padding_invariant(_backbone(AutoModel, audio, config.audio_config, dtype))
        config.audio_config = towers["audio_tower"].config
    with torch.device("meta"):  # its backbones are replaced below
        model = ViPolyQwenModel._from_config(config, dtype=dtype)
    for name, module in model.named_children():
        if name in towers:
            setattr(model, name, towers[name])
        else:
            module.to_empty(device=towers["vlm"].device).apply(model._init_weights)
    model.use_faster_layers()
    return model


def _joint_config(vlm: PreTrainedConfig, audio: PreTrainedConfig | None, **config_kwargs: Any) -> ViPolyQwenConfig:
    """Joins the configurations of the backbones.

    SpecAugment and LayerDrop, used to pretrain the speech encoder, are switched off: the former draws from numpy's
    random generator, the latter leaves parameters without gradient, and a step could be neither recomputed nor split
    over ranks.
    """
    if not isinstance(vlm, Qwen2VLConfig):
        raise ValueError(f"`vlm` is a {vlm.model_type} checkpoint; a Qwen2-VL one (qwen2_vl) is needed.")
    fields = {key: value for key, value in vlm.to_dict().items() if key not in ("model_type", "architectures")}
    if audio is not None:
        audio = AutoConfig.for_model(**{**audio.to_dict(), "apply_spec_augment": False, "layerdrop": 0.0})
    return ViPolyQwenConfig(**{**fields, "audio_config": audio, **config_kwargs})


def _backbone(
    auto_class: type, source: str | PathLike | PreTrainedConfig, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Loads a backbone, every weight of it, or builds it with random weights from a configuration."""
    if isinstance(source, PreTrainedConfig):
        build = auto_class.from_config if auto_class is AutoModel else auto_class._from_config
        return build(config, dtype=dtype)
    model, report = auto_class.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, with the other faults
    )
    problems = loading_problems(report)
    if problems:
        raise ValueError(
            f"The checkpoint {str(source)!r} does not fit {type(model).__name__}. {problems}. "
            "No weight is initialised at random: use a complete checkpoint of this architecture."
        )
    return model


def build_processor(
    vlm: str | os.PathLike, audio: str | os.PathLike | None = None, **kwargs: Any
) -> ViPolyQwenProcessor:
    """Builds the processor of `build_model(vlm, audio)`.

    Args:
        vlm: Qwen2-VL checkpoint (Hub id or folder), for the tokenizer and the image processor.
        audio: checkpoint of the speech encoder, for the feature extractor and the shortest audio, one frame of its
            convolutions (in samples); `None`: a stock feature extractor at 16 kHz.
        **kwargs: further arguments of `ViPolyQwenProcessor`.

    Returns:
        a processor for inputs of at most 8192 tokens.

    Raises:
        OSError: a checkpoint lacks a tokenizer, an image processor or a feature extractor.
    """
    tokenizer = AutoTokenizer.from_pretrained(vlm)
    tokenizer.model_max_length = min(tokenizer.model_max_length, MAX_LENGTH)
    feature_extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    if audio is not None:
        feature_extractor = AutoFeatureExtractor.from_pretrained(audio)
        kwargs.setdefault("min_audio_samples", receptive_field(AutoConfig.from_pretrained(audio)))
    return ViPolyQwenProcessor(Qwen2VLImageProcessorPil.from_pretrained(vlm), tokenizer, feature_extractor, **kwargs)


def load_model(
    model_args: ModelArguments, args: ViPolyQwenTrainingArguments, tasks: dict[str, Task]
) -> tuple[ViPolyQwenModel, ViPolyQwenProcessor]:
    """Loads or builds the model of a run, with its task prefixes, frozen towers and adapter.

    Args:
        model_args: the model, its limits, frozen towers and adapter.
        args: device and precision of the run; the output folder, for the base of an adapter.
        tasks: tasks, whose prefixes become tokens and whose sides of the prefix are saved with the processor.

    Returns:
        the model (with an adapter, a `PeftModel`), and its processor.
    """
    check_installed(model_args, args.device)
    attention = model_args.attn_implementation
    if attention == "auto":
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        attention = choose_attn_implementation(dtype, args.device.type)
    origin = model_args if model_args.lora_rank is None else continued(model_args, args)
    options = {name: value for name in CHOICES if (value := getattr(origin, name)) is not None}
    if origin.model is not None:
        model = ViPolyQwenModel.from_pretrained(origin.model, attn_implementation=attention, **options)
        processor = ViPolyQwenProcessor.from_pretrained(origin.model, config=model.config)
        check_audio_prefix(ViPolyQwenConfig.from_pretrained(origin.model), processor)
    else:
        backbones = (origin.vlm, origin.audio)
        model = build_model(*backbones, attn_implementation=attention, **options)
        processor = build_processor(*backbones)
    processor.audio_prefix = model.config.audio_prefix
    _bound_inputs(processor, model_args)
    for task in tasks.values():
        processor.add_task(task.name, task.prefix, task.prefix_sides)
    grows = len(processor.tokenizer) > model.get_input_embeddings().num_embeddings
    if grows:
        model.resize_token_embeddings(len(processor.tokenizer))
    if model_args.lora_rank is None:
        freeze_towers(model, model_args.freeze)
    else:
        is_published = origin.model is not None and not options and not grows
        base = origin.model if is_published else write_base(model, processor, args)
        if model_args.load_in_4bit:
            model = load_in_4bit(base, attention, args)
        freeze_towers(model, untrained_towers(model, model_args))
        model = add_adapter(model, processor, model_args, base, mixed_precision=args.bf16 or args.fp16)
    trained = model.num_parameters(only_trainable=True)
    logger.info(f"{model.num_parameters():,} parameters, {trained:,} of them trained, attention: {attention}")
    return model, processor


def _bound_inputs(processor: ViPolyQwenProcessor, model_args: ModelArguments) -> None:
    """Sets the limits of `model_args` on tokens, pixels, and seconds and windows of audio."""
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, model_args.max_length)
    if model_args.min_pixels is not None:
        processor.image_processor.size["shortest_edge"] = model_args.min_pixels
    if model_args.max_pixels is not None:
        processor.image_processor.size["longest_edge"] = model_args.max_pixels
    pixels = processor.image_processor.size
    check_pixels(pixels["shortest_edge"], pixels["longest_edge"])
    if model_args.max_audio_seconds is not None:
        processor.max_audio_seconds = model_args.max_audio_seconds
    if model_args.max_audio_windows is not None:
        processor.max_audio_windows = model_args.max_audio_windows


def build_loss(loss_args: LossArguments, declared: dict[str, dict[str, Any]], tasks: list[str]) -> MixedLoss:
    """Builds the loss of each task, from the loss table and the tasks that a recipe declares.

    Args:
        loss_args: loss table, temperature, masks and weighting.
        declared: declared task -> its fields, among them `loss`: {component: weight}.
        tasks: all tasks, in the order of their ids.

    Raises:
        ValueError: an unknown loss table, a declared task without `loss`, or settings of a teacher that do not fit.
    """
    if loss_args.loss_table not in LOSS_TABLES:
        raise ValueError(f"`loss_table` is {loss_args.loss_table!r}; it must be one of {', '.join(LOSS_TABLES)}.")
    losses = dict(LOSS_TABLES[loss_args.loss_table])
    for task, fields in declared.items():
        if "loss" not in fields:
            raise ValueError(f"tasks.{task} has no `loss`; declare its components, for example {{nce: 1.0}}.")
        losses[task] = TaskLoss.from_dict(fields["loss"])
    losses = _with_distil({task: losses[task] for task in tasks}, loss_args.distil)
    return MixedLoss(
        losses,
        temperature=loss_args.temperature,
        learnable_temperature=loss_args.learnable_temperature,
        weighting=build_weighting(loss_args.task_weighting, tasks, loss_args.task_weighting_options),
        mask_duplicates=loss_args.mask_duplicates,
        mask_groups=loss_args.mask_groups,
        nce_min_score=loss_args.nce_min_score,
        false_negative_margin=loss_args.false_negative_margin,
        matryoshka_dims=loss_args.matryoshka_dims,
        distillation=_build_distillation(loss_args, losses),
        triplet_negatives=loss_args.triplet_negatives,
        block_rows=loss_args.loss_block_rows,
    )


def build_tasks(data_args: DataArguments) -> dict[str, Task]:
    """Returns the tasks of a run, each with the sides on which its prefix stands in training and evaluation.

    Raises:
        ValueError: an invalid declaration or side, or an unknown task in `tasks_without_prefix`.
    """
    tasks = declare_tasks(data_args.tasks, data_args.prefix_sides)
    never = tasks if data_args.prefix_dropout == 1.0 else data_args.tasks_without_prefix or ()
    for name in never:
        if name not in tasks:
            raise ValueError(f"tasks_without_prefix: unknown task {name!r}; known: {', '.join(tasks)}.")
    return with_prefix_sides(tasks, dict.fromkeys(never, "none"))


def _with_distil(losses: dict[str, TaskLoss], distil: float | Mapping[str, float] | None) -> dict[str, TaskLoss]:
    """Sets the weight of distil: one number for every task, or task -> weight for some."""
    weights = distil if isinstance(distil, Mapping) else {} if distil is None else dict.fromkeys(losses, distil)
    weights = {canonical_task(name): weight for name, weight in weights.items()}
    for name, weight in weights.items():
        if name not in losses:
            raise ValueError(f"distil: unknown task {name!r}; known: {', '.join(losses)}.")
        check_weight(weight, f"distil of {name}")
    return losses | {name: replace(losses[name], distil=weight) for name, weight in weights.items()}


def _build_distillation(loss_args: LossArguments, losses: Mapping[str, TaskLoss]) -> Distillation | None:
    """Builds the loss against a teacher, if a task has a weight of it."""
    if any(loss.distil for loss in losses.values()):
        return Distillation(loss_args.teacher_temperature, loss_args.distil_cosine, loss_args.distil_kl)
    for name in ("teacher", "teacher_prompt"):
        if getattr(loss_args, name) is not None:
            raise ValueError(
                f"`{name}` is {getattr(loss_args, name)!r}, but `distil` gives no task a weight; set it, such as 1.0."
            )
    return None


def connect_teacher(
    mixed_loss: MixedLoss,
    pairs: PairDataset | StreamedPairs | None,
    model: ViPolyQwenModel,
    loss_args: LossArguments,
    args: ViPolyQwenTrainingArguments,
) -> int:
    """Gives the pairs their teacher and the loss its map; returns the width of the teacher's vectors, 0 without one.

    Raises:
        ValueError: a row has no teacher's vector, or one that does not fit; see `teach_pairs`.
    """
    if mixed_loss.distillation is None or pairs is None:
        return 0
    if isinstance(pairs, StreamedPairs):
        raise ValueError("`distil` needs all rows beforehand, but the train_data is streamed; leave `streaming` out.")
    column = COMPONENTS.index("distil")
    taught = [task for task, weights in zip(mixed_loss.tasks, mixed_loss.weights, strict=True) if weights[column] > 0]
    width = teach_pairs(pairs, taught, loss_args.teacher, loss_args.teacher_prompt, args.device)
    mixed_loss.distillation.connect(model.config.projection_dim, width)
    return width


def read_pairs(
    sources: list[dict[str, Any]] | None,
    tasks: dict[str, Task],
    processor: ViPolyQwenProcessor,
    check_media: bool | str,
    without_tasks: list[str] | None = None,
    on_bad_row: str = "error",
    max_bad_rows: float = 0.01,
) -> PairDataset | None:
    """Reads and checks the rows of all sources, except those of `without_tasks`; `None` without sources."""
    if sources is None:
        return None
    longest = processor.max_audio_seconds * processor.max_audio_windows
    return load_pairs(
        sources,
        tasks,
        processor.min_audio_samples,
        check_media,
        without_tasks or (),
        max_audio_seconds=longest,
        room=TokenRoom(processor),
        on_bad_row=on_bad_row,
        max_bad_rows=max_bad_rows,
    )


def read_train_pairs(
    data_args: DataArguments, tasks: dict[str, Task], processor: ViPolyQwenProcessor
) -> PairDataset | StreamedPairs | None:
    """Reads the pairs to train on; of sources that are streamed, the columns alone."""
    bad = {"on_bad_row": data_args.on_bad_row, "max_bad_rows": data_args.max_bad_rows}
    configs = data_args.train_data
    if not any(config.get("streaming") and config.get("enabled", True) for config in configs or ()):
        return read_pairs(configs, tasks, processor, data_args.check_media, data_args.without_tasks, **bad)
    longest = processor.max_audio_seconds * processor.max_audio_windows
    limits = (processor.min_audio_samples, data_args.check_media, longest, TokenRoom(processor))
    checker = Checker(tasks, *limits, data_args.on_bad_row)
    return StreamedPairs.of(configs, tasks, checker, data_args.without_tasks or ())


def build_collator(
    processor: ViPolyQwenProcessor,
    tasks: dict[str, Task],
    data_args: DataArguments,
    args: ViPolyQwenTrainingArguments,
    training: bool,
    teacher_width: int = 0,
) -> MixedBatchCollator:
    """Builds the collator of both sides of pairs.

    Only that for training drops prefixes and adds hard negatives and a teacher's vectors, of `teacher_width`.
    """
    augmentation = Augmentation.of(data_args.augment_vietnamese, data_args.augment_sides, tasks, args.seed)
    return MixedBatchCollator(
        processor,
        tasks,
        prefix_dropout=data_args.prefix_dropout if training else 0.0,
        with_negatives=training,
        teacher_width=teacher_width if training else 0,
        seed=args.seed,
        augmentation=augmentation if training else None,
    )
