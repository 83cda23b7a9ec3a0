"""Trainer for pairs of all tasks in one batch: overrides of the transformers Trainer."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend, gather_object
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import CONFIG_NAME, logging

from ..configuration_vipolyqwen import CHOICES, ViPolyQwenConfig
from ..data.budget import BudgetBatches
from ..data.collator import MixedBatchCollator
from ..data.sampler import MixtureBatches, MixtureSampler
from ..data.sources import PairDataset
from ..data.streamed_pairs import StreamedPairs
from ..evaluation.metrics import pair_retrieval, spearman
from ..microbatches_vipolyqwen import training_cost
from ..modeling_vipolyqwen import ViPolyQwenModel
from ..packing_vipolyqwen import takes_lengths
from ..processing_vipolyqwen import ViPolyQwenProcessor
from ..publishing.repository import load_adapter, save_adapter, save_repository
from .adapters import ADAPTER, check_adapter, is_adapted
from .arguments import ViPolyQwenTrainingArguments
from .bad_rows import ReplacedRows
from .balance import BalanceMonitor
from .budgets import budget_batches, has_budget
from .cached_gradients import DeepSpeedInChunks, embed_in_chunks
from .callbacks import DiscardCallback, RateCallback
from .distributed import unsharded_class, unsharded_loading
from .faults import StepState
from .feed import MicrobatchFeed, move
from .joined_batch import join_batches
from .learning import LearningCallback, check_that_it_learns
from .loss_figures import MixedLossOutput
from .loss_optimizer import LossOptimizer
from .microbatches import MicrobatchLimit, RowSize, first_images, plan_microbatches, row_lengths
from .mixed_loss import MixedLoss
from .parts import plain_name
from .restoring import fitting_state, group_values, restore_by_name, restore_rates, restore_schedule
from .resuming import ResumingTrainer
from .run_settings import OPTIMIZER, SCHEDULE, check_differences, read_settings
from .speedups import compile_layers, use_liger_kernels
from .stream_batches import launch_streams

logger = logging.get_logger(__name__)

LOSS_STATE = (
    "loss_state.safetensors"  # in a checkpoint: learned loss parameters, weighting, initial values of the new modules
)


class ViPolyQwenTrainer(ResumingTrainer):
    """Embeds both sides of each pair, computes the mixed loss by task, and logs every component.

    Args:
        model: the model to train.
        args: training arguments.
        processor: its processor; saved into every checkpoint.
        mixed_loss: the loss of each task and the weighting between tasks.
        train_dataset: training pairs.
        eval_dataset: held-out pairs.
        train_collator: rows to a joint batch of both sides, with prefix dropout.
        eval_collator: the same without dropout.
        max_bad_rows: largest share of training rows that may turn bad, if `train_dataset` replaces them.
    """

    def __init__(
        self,
        model: ViPolyQwenModel,
        args: ViPolyQwenTrainingArguments,
        processor: ViPolyQwenProcessor,
        mixed_loss: MixedLoss,
        train_dataset: PairDataset | StreamedPairs | None,
        eval_dataset: PairDataset | None,
        train_collator: MixedBatchCollator,
        eval_collator: MixedBatchCollator,
        max_bad_rows: float = 0.01,
        **kwargs: Any,
    ) -> None:
        if args.world_size > 1 and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every forward passes through every tower
        launch_streams(train_dataset, args)
        super().__init__(
            model=model,
            args=args,
            processing_class=processor,
            data_collator=train_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self.embed_chunk = args.embed_chunk  # halved where memory runs out
        self.in_chunks = args.embed_chunk is not None or args.embed_chunk_tokens is not None
        self._check_launch()
        for dataset in (train_dataset, eval_dataset):
            if dataset is not None and model.config.audio_config is None:
                dataset.refuse_audio()
        self._speed_up(model)
        for name, parameter in model.named_parameters():
            if name.endswith("masked_spec_embed"):  # never used: DDP would wait for its gradient
                parameter.requires_grad_(False)
        self.eval_collator = eval_collator
        self.replaced = ReplacedRows.of(train_dataset, max_bad_rows)
        if args.world_size > 1:
            for collator in (train_collator, eval_collator):
                collator.extra_parts = every_tower(processor, with_audio=model.config.audio_config is not None)
        self.mixed_loss = mixed_loss.to(args.device)
        self.loss_optimizer = LossOptimizer(self.mixed_loss, args)
        self.loss_optimizer.adamw.register_step_post_hook(lambda *_: self.mixed_loss.keep_bounds())
        self.rates, self.monitor, self.discard = RateCallback(), BalanceMonitor(), DiscardCallback(self.loss_optimizer)
        self.learning = LearningCallback()
        for callback in (self.rates, self.monitor, self.discard, self.learning):
            self.add_callback(callback)
        if self.loss_optimizer.parameters:
            self.add_callback(self.loss_optimizer)
        self._budgeted: BudgetBatches | None = None  # planned once
        self.figures: list[torch.Tensor] = []  # of the batches since the last log, each on its device

    def _check_launch(self) -> None:
        """Raises ValueError for settings that the launcher does not support."""
        args = self.args
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process would separate side a from side b. Run one process per GPU: "
                f"accelerate launch --num_processes {args.n_gpu} train_vipolyqwen.py …"
            )
        if args.on_nan == "skip" and self.is_deepspeed_enabled:
            raise ValueError("`on_nan` is skip, but DeepSpeed does not let an update be skipped. Use error.")

    def _speed_up(self, model: ViPolyQwenModel) -> None:
        """Applies packing, fused kernels and compiled layers as configured."""
        args = self.args
        pays = takes_lengths(model.vlm.language_model.config, args.device)
        self.packing = args.packing == "true" or (args.packing == "auto" and pays)
        if args.use_liger_kernel:
            use_liger_kernels(model, args.device)
        if args.torch_compile:
            compile_layers(model, args.torch_compile_backend, args.torch_compile_mode)
            self.accelerator.state.dynamo_plugin.backend = (
                DynamoBackend.NO
            )  # otherwise accelerate compiles the full model

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the stock step, with half as large micro-batches again where memory runs out.

        Under DeepSpeed with chunks, the engine runs the backward of each chunk.
        """
        if "stream" in inputs:
            self._batches.seen(inputs.pop("stream"))
        if self.in_chunks and self.is_deepspeed_enabled:
            self.accelerator.deepspeed_engine_wrapped = DeepSpeedInChunks(model)
        while True:
            parts = (self.model, self.mixed_loss, self.figures, self.rates, self.monitor, self.args.device)
            before = StepState(*parts)
            try:
                return super().training_step(model, inputs, *args, **kwargs)
            except torch.OutOfMemoryError as error:
                self._halve_microbatches(inputs, before, error)
            before.restore()  # not above, where the exception still holds the activations

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Leaves a batch on the host; its micro-batches and the columns of the loss move when their turn comes."""
        return inputs

    def _halve_microbatches(self, inputs: dict[str, Any], before: StepState, error: torch.OutOfMemoryError) -> None:
        """Halves the micro-batch; raises if that cannot help, or if the step cannot be taken again."""
        rows = max(map(len, self._microbatches(inputs))) if self.in_chunks else _row_count(inputs)
        half = rows // 2
        advice = f"Set `embed_chunk: {max(half, 1)}` or less, or `gradient_checkpointing: true`."
        if half < 1 or self.args.world_size > 1 or self.is_deepspeed_enabled or before.accumulated:
            raise torch.OutOfMemoryError(f"{error}\nA micro-batch of {rows} rows does not fit. {advice}") from error
        step = self.state.global_step
        logger.warning(f"Step {step}: no memory for {rows} rows at once; from here on {half} at once. {advice}")
        self.embed_chunk, self.in_chunks = half, True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the mixed loss of the joined batch of all ranks (STW paper §4.2).

        With budgets, `num_items_in_batch` are the pairs of the update, of which each counts the same.
        """
        self.mixed_loss.check_rows(inputs["data_type"], inputs["similarity_scores"], inputs.get("teacher_sides"))
        embeddings = self.embed(model, inputs)  # sides a, sides b, hard negatives
        monitor_steps = self.args.monitor_steps
        output = self.mixed_loss(
            **join_batches(embeddings, inputs, self.args.process_index),
            checked=True,
            epoch=self.state.epoch or 0,
            with_gradients=monitor_steps > 0 and self.state.global_step % monitor_steps == 0,
        )
        loss, figures = self.mixed_loss.measure(output)
        value = loss.item()  # one transfer to the host; NaN if anything is not finite
        if math.isfinite(value):
            self.figures.append(figures)
            self.monitor.record(value)
        else:
            self._refuse_non_finite(output, embeddings, inputs["ids"])
        pairs = len(output.per_sample)  # of all ranks
        if self.replaced is not None and model.training:
            self.replaced.add(inputs["replaced"], pairs)
        self.rates.count(pairs, inputs)
        self.learning.watch(embeddings)
        loss = output.loss
        if num_items_in_batch is not None:  # the stock loop takes the mean over batches, which differ in size
            loss = loss * (pairs * self.current_gradient_accumulation_steps / num_items_in_batch)
        self.loss_optimizer.watch(loss, self.current_gradient_accumulation_steps)
        return (loss, {"embeddings": embeddings}) if return_outputs else loss

    def embed(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Embeds both sides and the hard negatives, (2 · pairs + N, D) float32 unit vectors.

        On one rank, `plan_microbatches` groups rows of similar length, unless they are packed. On several ranks, all
        rows form one micro-batch that passes through every tower, so that all ranks join the same collectives in the
        same order. `embed_chunk` and `embed_chunk_tokens` limit the size of a micro-batch (the row for every tower not
        counted), and all ranks run the same number of them.
        """
        microbatches, device = self._microbatches(inputs), self.args.device
        extra = range(_row_count(inputs), len(inputs["attention_mask"]))
        feed = MicrobatchFeed(inputs, microbatches, extra, device)
        mask = inputs["attention_mask"]  # on the host
        right_padded = bool((mask[:, 1:] <= mask[:, :-1]).all())

        def embed(rows: Sequence[int]) -> torch.Tensor:
            vectors = _embed_rows(model, feed.take(rows), len(rows), len(extra) > 0, self.packing, right_padded)
            feed.move_ahead(rows)
            return vectors

        if self.in_chunks:
            vectors = embed_in_chunks(embed, microbatches, model, device, exchange=self.accelerator.sync_gradients)
        else:
            vectors = torch.cat([embed(rows) for rows in microbatches])
        order = move(torch.tensor([row for rows in microbatches for row in rows], dtype=torch.long), device)
        return torch.empty_like(vectors).index_copy(0, order, vectors)

    def _microbatches(self, inputs: dict[str, Any]) -> list[Sequence[int]]:
        """Returns the row indices of each micro-batch, every row once; as many micro-batches on every rank."""
        rows = _row_count(inputs)
        if self.args.world_size > 1 and not self.in_chunks:
            return [range(rows)]
        frames, windows = self._audio_sizes(inputs)
        columns = (row_lengths(inputs), frames, first_images(inputs), windows)
        sizes = [RowSize(*row) for row in torch.stack(columns, dim=1)[:rows].tolist()]
        limit = MicrobatchLimit(self.embed_chunk, self.args.embed_chunk_tokens, self.packing)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        cost = training_cost(model.config.text_config.hidden_size)
        microbatches: list[Sequence[int]] = list(plan_microbatches(sizes, limit, cost))
        if self.in_chunks and self.args.world_size > 1:
            count = torch.tensor([len(microbatches)], device=self.args.device)
            microbatches += [()] * (int(self.accelerator.gather(count).max()) - len(microbatches))
        return microbatches

    def _audio_sizes(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the frames of the longest window of each row's audio, 0 without, and its windows, (rows,) long."""
        frames = torch.zeros_like(inputs["images_per_row"])
        windows = torch.ones_like(frames)
        if "has_audio" in inputs:
            samples = inputs["audio_attention_mask"].sum(dim=1)  # of each window
            rows = inputs["has_audio"].bool()
            if "audio_windows" in inputs:
                counts = inputs["audio_windows"]
                samples = samples[(counts.cumsum(0) - counts).to(samples.device)]  # the first is the longest
                windows[rows] = counts
            tower = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).audio_tower
            frames[rows] = tower._get_feat_extract_output_lengths(samples).to(frames.device)
        return frames, windows

    def _refuse_non_finite(self, output: MixedLossOutput, embeddings: torch.Tensor, ids: Sequence[str]) -> None:
        """Raises, or with `on_nan: skip` skips this step's update, on all ranks, since their loss is the same.

        A single non-finite vector makes the loss of every row non-finite; then only rows with such vectors are named.
        """
        finite = embeddings[: 2 * len(ids)].isfinite().all(dim=1).view(2, -1).all(dim=0)  # (pairs,)
        rows = gather_object(list(zip(ids, finite.tolist(), strict=True)))
        bad = [row for row, (_, vectors_are_finite) in enumerate(rows) if not vectors_are_finite]
        bad = bad or (~output.per_sample.isfinite()).nonzero().flatten().tolist() or range(len(rows))
        by_task: dict[str, list[str]] = defaultdict(list)
        for row in bad:
            by_task[self.mixed_loss.tasks[output.task_ids[row]]].append(rows[row][0])
        named = "; ".join(f"{task}: {', '.join(names)}" for task, names in by_task.items())
        message = f"Step {self.state.global_step}: the loss is {output.loss.item()}, by these rows: {named}."
        if self.args.on_nan == "error":
            raise FloatingPointError(
                f"{message} Lower the learning rate, check these rows, or skip such steps with `on_nan: skip`."
            )
        logger.warning(f"{message} This step's update is skipped.")
        self.discard.pending = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds rates, balance and the mean of every loss figure since the last log."""
        if "loss" in logs:
            if self.figures:
                logs.update(sorted(self.mixed_loss.figures.average(self.figures).items()))
            logs.update(self.rates.rates())
            model = self.accelerator.unwrap_model(self.model)
            logs.update(self.monitor.summary(model, self.state, logs.get("grad_norm")))
            logs["skipped_steps"] = self.discard.count
            self.figures.clear()
            self.learning.check()
        elif "train_samples_per_second" in logs:
            logs.update(self.rates.of_run(self.state.global_step - self.learning.first_step))
        if self.replaced is not None and not {"loss", "train_loss"}.isdisjoint(logs):
            logs.update(self.replaced.summary())
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Runs the evaluation, whose time is no training time."""
        with self.rates.pause():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Saves a checkpoint, which is no training time either."""
        with self.rates.pause():
            super()._save_checkpoint(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, unless nothing could be learned."""
        names = [plain_name(name) for name, value in self.model.named_parameters() if value.requires_grad]
        loss_rate = self.loss_optimizer.rate if self.loss_optimizer.parameters else 0.0
        rows = self._largest_batch()
        rates = [self.rate_of(name) for name in names]
        check_that_it_learns([*rates, loss_rate], bool(names), self.mixed_loss, self.train_dataset, rows)
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: PairDataset | None = None) -> MixtureSampler | StreamedPairs:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, StreamedPairs):
            return dataset  # which draws its rows itself
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return MixtureSampler(
            dataset.source_lengths,
            dataset.source_weights,
            seed,
            self.args.mixture_temperature,
            dataset.source_caps,
            batching=self.args.batching,
            batch_rows=self._train_batch_size * self.args.world_size,
        )

    def _get_train_batches(self) -> MixtureBatches:
        """Returns the batches of this rank, filled to the budgets if there are any."""
        if not has_budget(self.args):
            return super()._get_train_batches()
        if self._budgeted is None:
            sampler = self._get_train_sampler()
            self._budgeted = budget_batches(self.train_dataset, self.processing_class, sampler, self.args)
        return self._budgeted

    def _largest_batch(self) -> int:
        """Returns the rows of the largest batch of all ranks."""
        if has_budget(self.args):
            return self._get_train_batches().largest()
        return self.args.per_device_train_batch_size * self.args.world_size

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Counts the pairs of an update, if its batches differ in size by budgets."""
        if len(batch_samples) < 2 or not has_budget(self.args):
            return None
        pairs = torch.tensor([sum(len(batch["ids"]) for batch in batch_samples)], device=device)
        return int(self.accelerator.gather(pairs).sum())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates AdamW with a learning rate for each part of the model."""
        model = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
            names: dict[tuple[float, bool], list[str]] = defaultdict(list)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    key = (self.rate_of(plain_name(name)), name in decayed)
                    groups[key].append(parameter)
                    names[key].append(plain_name(name))
            self.group_names = list(names.values())
            self.optimizer = optimizer_class(
                [
                    {"params": parameters, "lr": rate, "weight_decay": self.args.weight_decay if decay else 0.0}
                    for (rate, decay), parameters in groups.items()
                ],
                **options,
            )
            self.loss_optimizer.model_rate = max(rate for rate, _ in groups)
        return self.optimizer

    def rate_of(self, name: str) -> float:
        """Returns the learning rate of a parameter, before any schedule."""
        rates = {
            "vlm.visual.": self.args.vision_learning_rate,
            "vlm.": None,
            "audio_tower.": self.args.audio_learning_rate,
            "": self.args.head_learning_rate,
        }
        rate = next(rate for prefix, rate in rates.items() if name.startswith(prefix))
        return self.args.learning_rate if rate is None else rate

    def get_eval_dataloader(self, eval_dataset: PairDataset | None = None) -> torch.utils.data.DataLoader:
        """Returns the stock loader with the collator without prefix dropout."""
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        placement, self.accelerator.device_placement = self.accelerator.device_placement, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator, self.accelerator.device_placement = train_collator, placement

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measures retrieval of side b by side a within each task, and Spearman's ρ of scored pairs."""
        self.model.eval()
        columns = defaultdict(list)
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            pairs = len(inputs["data_type"])
            with self.compute_loss_context_manager():
                embeddings = self.embed(self.model, inputs)
            row = {"a": embeddings[:pairs], "b": embeddings[pairs:]}
            names = ("data_type", "similarity_scores", "a_keys", "b_keys")
            row |= {name: move(inputs[name], self.args.device) for name in names}
            for name, value in self.accelerator.gather_for_metrics(row).items():
                columns[name].append(value.cpu())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        rows = {name: torch.cat(values) for name, values in columns.items()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._pair_metrics(rows).items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(rows["data_type"]))

    def _pair_metrics(self, rows: dict[str, torch.Tensor]) -> dict[str, float]:
        metrics = {}
        for task_id in rows["data_type"].unique().tolist():
            task = self.mixed_loss.tasks[task_id]
            of_task = {name: value[rows["data_type"] == task_id] for name, value in rows.items()}
            scores = of_task["similarity_scores"]
            retrieval = pair_retrieval(
                of_task["a"],
                of_task["b"],
                of_task["a_keys"],
                of_task["b_keys"],
                scores=scores,
                min_score=self.mixed_loss.nce_min_score or 0.0,
            )
            metrics.update({f"{task}_{name}": value for name, value in retrieval.items()})
            scored = ~scores.isnan()
            if scored.sum() > 1:
                metrics[f"{task}_spearman"] = spearman(of_task["a"][scored], of_task["b"][scored], scores[scored])
        for name in ("recall@1", "mrr"):
            values = [value for key, value in metrics.items() if key.endswith(f"_{name}")]
            metrics[name] = sum(values) / len(values)
        return metrics

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Also saves the state of the loss and of the monitor."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {f"loss.{name}": value for name, value in self.mixed_loss.state_dict().items()}
            state |= {f"optimizer.{name}": value for name, value in self.loss_optimizer.state_dict().items()}
            state |= {f"start.{name}": value for name, value in self.monitor.start.items()}
            state["discard.count"] = torch.tensor(self.discard.count)
            save_file({name: value.contiguous() for name, value in state.items()}, Path(output_dir) / LOSS_STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also applies changed settings, and loads the state of the loss and of the monitor."""
        if checkpoint is None:
            return
        path = Path(checkpoint) / LOSS_STATE
        if not path.is_file():  # a complete checkpoint of `save_only_model`
            raise FileNotFoundError(f"{path} is missing: this checkpoint cannot be resumed. Take another one.")
        if not self.changed & (OPTIMIZER | SCHEDULE) or self.is_deepspeed_enabled:
            self._load_stock_optimizer(checkpoint)
        elif self.is_fsdp_enabled:
            fresh = group_values(self.optimizer)
            super()._load_optimizer_and_scheduler(checkpoint)
            restore_rates(self.optimizer, fresh)
            restore_schedule(self.lr_scheduler, Path(checkpoint), 1.0)
        else:
            fits = not self.changed & {"optim", "optim_args", "optim_target_modules"}
            groups = (self.saved_groups, self.group_names)
            restore_by_name(self.optimizer, self.lr_scheduler, Path(checkpoint), *groups, with_state=fits)
        self._load_loss(path)

    def _load_stock_optimizer(self, checkpoint: str) -> None:
        """Runs the stock loading, whose error for other groups (of an earlier checkpoint) gets a remedy."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"The state of the optimizer in {checkpoint} does not fit this run: {error}. Resume it with the "
                "`freeze`, `optim` and learning rates by part of its run, or start a new run from its weights with "
                f"`--model {checkpoint}`."
            ) from error

    def _load_loss(self, path: Path) -> None:
        """Loads the state of the loss, except where changed settings let it start anew."""
        parts: dict[str, dict[str, torch.Tensor]] = {"loss": {}, "optimizer": {}, "start": {}, "discard": {}}
        for name, value in load_file(path).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        state = fitting_state("state", self.mixed_loss, parts["loss"], self.changed, path)
        kept = {name for name, value in state.items() if parts["loss"].get(name) is value}
        moments = {name: value for name, value in parts["optimizer"].items() if name.rpartition(".")[0] in kept}
        self.mixed_loss.load_state_dict(state)
        self.loss_optimizer.load_state_dict(moments)
        self.monitor.start = parts["start"]
        self.discard.count = int(parts["discard"]["count"])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Saves checkpoints as full repositories or adapters, and the final model always as a full repository."""
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        folder = Path(output_dir or self.args.output_dir)
        if not is_adapted(model):
            with unsharded_class(model):
                save_repository(model, self.processing_class, folder, state_dict)
        elif self._unfinished is not None:
            save_adapter(model, self.processing_class, folder, state_dict)
        else:
            save_adapter(model, self.processing_class, folder / ADAPTER, state_dict)
            with unsharded_loading(self.args):  # only this rank reads the base
                save_repository(*load_adapter(folder / ADAPTER), folder)  # base as before any quantisation

    def _weights_bytes(self) -> int:
        """Returns the size of the weights of a checkpoint: of an adapter alone, if the model has one."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return sum(value.nbytes for value in model.parameters() if value.requires_grad or not is_adapted(model))

    def _compare(self, checkpoint: Path) -> None:
        """Compares the adapter first: the stock loading would silently load one of another shape in part."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_fsdp_enabled:
            check_adapter(model, checkpoint)
        if read_settings(checkpoint) is None and (checkpoint / CONFIG_NAME).is_file():  # of an earlier version
            before = ViPolyQwenConfig.from_pretrained(checkpoint)
            pairs = {name: (getattr(before, name), getattr(model.config, name)) for name in CHOICES}
            changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
            check_differences(checkpoint, changed, (), self._sharded())
        super()._compare(checkpoint)


def every_tower(processor: ViPolyQwenProcessor, with_audio: bool) -> list[dict[str, Any]]:
    """Returns message parts for all towers at little cost; a rank without a modality would deadlock the others."""
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    parts = [{"type": "image", "image": Image.new("RGB", (side, side))}]
    if with_audio:
        silence = np.zeros(2 * processor.min_audio_samples, dtype=np.float32)
        rate = processor.feature_extractor.sampling_rate
        parts.append({"type": "audio", "audio": {"array": silence, "sampling_rate": rate}})
    return parts


def _row_count(batch: Mapping[str, Any]) -> int:
    """Counts the rows of a collated batch that are sides or hard negatives of its pairs."""
    return 2 * len(batch["data_type"]) + len(batch["negative_owners"])


def _embed_rows(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    rows: int,
    with_extra: bool,
    packing: bool,
    right_padded: bool,
) -> torch.Tensor:
    """Embeds the rows of a micro-batch in one forward, together with the row for every tower at weight 0.

    That row means several ranks, which have to call a sharded tower equally often: all windows of audio at once.
    """
    if right_padded and "pixel_values" not in inputs:
        inputs.pop("position_ids", None)  # of texts they count from 0, the same in all rows
    options = {"packing": packing, "right_padded": right_padded, "all_windows_at_once": with_extra}
    vectors = model(**inputs, divide=False, **options).embeddings
    return vectors[:rows] + 0.0 * vectors[rows:].sum()
