"""Trains a model, also under `accelerate launch`.

python train_vipolyqwen.py RECIPE.yaml [MORE.yaml …] [--any_argument value]
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import DataType, declare_data_types
from vipolyqwen.data.sources import PairDataset, load_pairs
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.packing_vipolyqwen import choose_attn_implementation
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.training.adapters import (
    add_adapter,
    check_installed,
    continued,
    load_in_4bit,
    untrained_towers,
    write_base,
)
from vipolyqwen.training.arguments import (
    TOWERS,
    DataArguments,
    LossArguments,
    ModelArguments,
    ViPolyQwenTrainingArguments,
    read_arguments,
)
from vipolyqwen.training.callbacks import CompactProgressCallback
from vipolyqwen.training.distributed import loading_whole
from vipolyqwen.training.losses import LOSS_TABLES, TaskLoss
from vipolyqwen.training.mixed_loss import MixedLoss
from vipolyqwen.training.run_record import write_record
from vipolyqwen.training.trainer import ViPolyQwenTrainer
from vipolyqwen.training.weighting import build_weighting

logger = logging.get_logger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Reads the arguments, trains, evaluates and saves a whole repository to `output_dir`."""
    model_args, data_args, loss_args, args = read_arguments(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)
    data_types = declare_data_types(data_args.data_types)
    mixed_loss = build_loss(loss_args, data_args.data_types, list(data_types))
    with loading_whole(args):
        model, processor = load_model(model_args, args, data_types)
    train_pairs = read_pairs(
        data_args.train_data, data_types, processor, data_args.check_media, data_args.without_tasks
    )
    eval_pairs = read_pairs(data_args.eval_data, data_types, processor, data_args.check_media)
    trainer = ViPolyQwenTrainer(
        model=model,
        args=args,
        processor=processor,
        mixed_loss=mixed_loss,
        train_dataset=train_pairs,
        eval_dataset=eval_pairs,
        train_collator=build_collator(processor, data_types, data_args, args, training=True),
        eval_collator=build_collator(processor, data_types, data_args, args, training=False),
    )
    if args.should_save:
        write_record(Path(args.output_dir), (model_args, data_args, loss_args, args), train_pairs, eval_pairs)
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(CompactProgressCallback)
    if train_pairs is not None:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
    if eval_pairs is not None and (train_pairs is None or args.eval_strategy == "no"):
        trainer.save_metrics("eval", trainer.evaluate())


def build_loss(loss_args: LossArguments, declared: dict[str, dict[str, Any]], tasks: list[str]) -> MixedLoss:
    """The loss of each task: the table's rows and those that the recipe declares, in the order of the task ids."""
    if loss_args.loss_table not in LOSS_TABLES:
        raise ValueError(f"`loss_table` is {loss_args.loss_table!r}; it must be one of {', '.join(LOSS_TABLES)}.")
    losses = dict(LOSS_TABLES[loss_args.loss_table])
    for task, fields in declared.items():
        if "loss" not in fields:
            raise ValueError(f"data_types.{task} has no `loss`; declare its components, for example {{nce: 1.0}}.")
        losses[task] = TaskLoss.from_dict(fields["loss"])
    return MixedLoss(
        {task: losses[task] for task in tasks},
        temperature=loss_args.temperature,
        learnable_temperature=loss_args.learnable_temperature,
        weighting=build_weighting(loss_args.task_weighting, tasks, loss_args.task_weighting_options),
        mask_duplicates=loss_args.mask_duplicates,
        mask_groups=loss_args.mask_groups,
        nce_min_score=loss_args.nce_min_score,
        false_negative_margin=loss_args.false_negative_margin,
        matryoshka_dims=loss_args.matryoshka_dims,
    )


def load_model(
    model_args: ModelArguments, args: ViPolyQwenTrainingArguments, data_types: dict[str, DataType]
) -> tuple[ViPolyQwenModel, ViPolyQwenProcessor]:
    """A model to go on from, or a new one on its backbones, that knows the prefix of every data type."""
    check_installed(model_args, args.device)
    attention = model_args.attn_implementation
    if attention == "auto":
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        attention = choose_attn_implementation(dtype, args.device.type)
    origin = model_args if model_args.lora_rank is None else continued(model_args, args)
    names = ("pooling", "projection", "audio_fusion")
    options = {name: value for name in names if (value := getattr(origin, name)) is not None}
    if origin.model is not None:
        model = ViPolyQwenModel.from_pretrained(origin.model, attn_implementation=attention, **options)
        processor = ViPolyQwenProcessor.from_pretrained(origin.model, config=model.config)
    else:
        backbones = (origin.vlm, origin.audio)
        model = ViPolyQwenModel.from_backbones(*backbones, attn_implementation=attention, **options)
        processor = ViPolyQwenProcessor.from_backbones(*backbones)
    _bound_inputs(processor, model_args)
    for data_type in data_types.values():
        processor.add_task(data_type.name, data_type.prefix)
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


def freeze_towers(model: ViPolyQwenModel, names: list[str]) -> None:
    """Keeps the weights of towers as they are; those behind which nothing is trained build no graph."""
    for name in names:
        if name == "audio" and model.config.audio_config is None:
            raise ValueError("`freeze` names 'audio', but this model has no speech encoder; drop it.")
        tower = model.get_submodule(TOWERS[name])
        tower.requires_grad_(False)
        if name != "language" or "vision" in names:  # else the images' part of the graph passes through
            # Frozen weights are not enough: gradient checkpointing makes the first layer's output require a gradient.
            tower.forward = torch.no_grad()(tower.forward)


def _bound_inputs(processor: ViPolyQwenProcessor, model_args: ModelArguments) -> None:
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, model_args.max_length)
    if model_args.min_pixels is not None:
        processor.image_processor.size["shortest_edge"] = model_args.min_pixels
    if model_args.max_pixels is not None:
        processor.image_processor.size["longest_edge"] = model_args.max_pixels
    if model_args.max_audio_seconds is not None:
        processor.max_audio_seconds = model_args.max_audio_seconds


def read_pairs(
    sources: list[dict[str, Any]] | None,
    data_types: dict[str, DataType],
    processor: ViPolyQwenProcessor,
    check_media: bool,
    without_tasks: list[str] | None = None,
) -> PairDataset | None:
    """All rows of all sources, checked, but those of `without_tasks`; `None` if no source is given."""
    if sources is None:
        return None
    return load_pairs(sources, data_types, processor.min_audio_samples, check_media, without_tasks or ())


def build_collator(
    processor: ViPolyQwenProcessor,
    data_types: dict[str, DataType],
    data_args: DataArguments,
    args: ViPolyQwenTrainingArguments,
    training: bool,
) -> MixedBatchCollator:
    """Rows to a joint batch of both sides; prefix dropout and hard negatives are for training."""
    return MixedBatchCollator(
        processor,
        data_types,
        prefix_sides=data_args.prefix_sides,
        prefix_dropout=data_args.prefix_dropout if training else 0.0,
        tasks_without_prefix=data_args.tasks_without_prefix or (),
        with_negatives=training,
        seed=args.seed,
    )


def end_processes() -> None:
    """Ends all processes of a launch together: one that leaves a group whose threads still run may be aborted."""
    gc.collect()  # a Trainer refers to itself, and so holds the group
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
    end_processes()
