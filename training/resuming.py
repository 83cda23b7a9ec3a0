"""A Trainer that can be killed at any moment: atomic checkpoints, and an exact position in the data."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from ..data.budget import BudgetBatches
from ..data.sampler import MixtureBatches
from ..data.streamed_pairs import StreamedPairs
from .bad_rows import ReplacedRows
from .balance import paper_steps
from .checkpoints import (
    UNFINISHED,
    check_checkpoint,
    delete_old_checkpoints,
    delete_unfinished,
    newest_intact_checkpoint,
    publish_checkpoint,
    set_aside_later,
)
from .faults import StopCallback, StoppedRun, explained_workers, saving
from .run_settings import (
    BEST,
    ORDER,
    check_differences,
    check_names,
    find_differences,
    read_settings,
    recorded,
    show_table,
    write_settings,
)
from .stream_batches import StreamBatches, loader_options

logger = logging.get_logger(__name__)

SAMPLER_STATE = "sampler_state.json"  # in a checkpoint: the position of the run in its data, in rows


class ResumingTrainer(Trainer):
    """The stock Trainer with atomic checkpoints and an exact position in the data.

    The position is counted in rows of the epoch, not in steps: a run resumes with any batch size and number of ranks
    (with DeepSpeed, which shards its state by rank, the same number), and no row of an epoch is skipped or repeated.
    `_get_train_sampler` of a subclass returns a `MixtureSampler`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unfinished: Path | None = None  # parent of the checkpoint being written
        self._resumed: dict[str, Any] | None = None  # SAMPLER_STATE of the checkpoint to resume from
        self._epoch_start = (0, 0)  # current epoch, and the step at which this run began it
        self._began_from: Path | None = None  # the checkpoint that this run resumed from
        self._chosen: str | None = None  # the checkpoint that `choose_checkpoint` has compared
        self.settings: dict[str, Any] | None = None  # of `describe_settings`, saved in each checkpoint
        self.history: list[dict[str, Any]] = []  # changes of settings at each resumption so far
        self.changed: set[str] = set()  # settings that this resumption changes
        self.group_names: list[list[str]] = []  # parameters of each group of the optimizer
        self.saved_groups: list[list[str]] = []  # the same of the optimizer in the checkpoint
        self.replaced: ReplacedRows | None = None  # counts the rows that turn bad, if these are skipped
        self.stop = StopCallback()
        self.add_callback(self.stop)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains; `True` resumes from the newest intact checkpoint, or starts if there is none yet.

        Raises:
            StoppedRun: SIGTERM arrived; a checkpoint is saved.
            OSError: a checkpoint could not be saved.
        """
        if resume_from_checkpoint is None or resume_from_checkpoint != self._chosen:
            resume_from_checkpoint = self.choose_checkpoint(resume_from_checkpoint)
        self._chosen = None
        self._began_from = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        with self.stop.listening(), explained_workers():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def choose_checkpoint(self, wanted: str | bool | None) -> str | None:
        """Chooses the checkpoint to resume from, and compares the run that wrote it with this one.

        Args:
            wanted: a checkpoint, or `True` for the newest intact one.

        Returns:
            the checkpoint; `None` to start a new run.

        Raises:
            DamagedCheckpointError: no checkpoint is intact, or not the one that is wanted.
            ValueError: settings, data or launch differ from those of the run that wrote it.
        """
        if self.args.should_save:
            delete_unfinished(Path(self.args.output_dir))
        self._resumed, self.history, self.changed = None, [], set()
        if self.replaced is not None:
            self.replaced.restore({})
        check_names(self.args.resume_with)
        self._chosen = self._find_checkpoint(wanted)
        if self._chosen is not None:
            self._compare(Path(self._chosen))
        return self._chosen

    def _find_checkpoint(self, wanted: str | bool | None) -> str | None:
        """Returns the checkpoint to resume from, the same on all ranks; rank 0 compares it with its manifest."""
        chosen: list[str | None] = [None]
        if wanted and self.args.process_index == 0:
            if wanted is True:
                newest = newest_intact_checkpoint(Path(self.args.output_dir))
                chosen = [newest and str(newest)]
                if newest is None:
                    logger.warning(f"No checkpoint in {self.args.output_dir} yet; starting a new run.")
            else:
                check_checkpoint(Path(wanted))
                chosen = [str(wanted)]
        return broadcast_object_list(chosen)[0]

    def _compare(self, checkpoint: Path) -> None:
        """Compares this run with the one that wrote a checkpoint; sets the position in the data and the history.

        Raises:
            ValueError: this run was launched in another way, or has other settings or data that are not accepted.
        """
        place = json.loads((checkpoint / SAMPLER_STATE).read_text(encoding="utf-8"))
        self._check_launch_of(checkpoint, place)
        saved = None if self.settings is None else read_settings(checkpoint)
        differences = {} if saved is None else find_differences(saved["settings"], self.settings)
        accepted = {*self.args.resume_with, *(ORDER if self.args.ignore_data_skip else ())}
        now = self._get_train_sampler().identity()
        if place["order"] != now and not accepted & ORDER:
            table = f"\n{show_table(differences)}" if differences else ""
            raise ValueError(
                f"{checkpoint} was written by a run on {place['order']}, and this one has {now}, so its position in "
                "the data does not apply. Give the same sources, weights and seed (for streams also as many ranks and "
                "data workers); or restart the epoch with "
                f"`--ignore_data_skip true`; or start a new run with `--model CHECKPOINT`.{table}"
            )
        if self.settings is not None and saved is None:
            logger.warning(
                f"{checkpoint} was written by an earlier version, without the settings of its run: learning rates, "
                "losses, tasks, model and the content of the data cannot be compared. Make sure they are the same."
            )
        check_differences(checkpoint, differences, accepted, self._sharded())
        self._take_over(saved, differences, place["step"])
        if place["order"] != now:
            self.args.ignore_data_skip = True
        elif self.replaced is not None:
            self.replaced.restore(place.get("bad_rows", {}))  # which earlier versions did not save
        self._resumed = None if self.args.ignore_data_skip else place

    def _take_over(self, saved: dict[str, Any] | None, differences: dict[str, tuple[Any, Any]], step: int) -> None:
        """Takes over the history of a run, and adds the changes at this resumption."""
        if saved is None:
            return
        self.changed, self.saved_groups, self.history = set(differences), saved["optimizer_groups"], saved["history"]
        if differences:
            changes = {name: [recorded(value) for value in pair] for name, pair in differences.items()}
            self.history = [*self.history, {"step": step, "changed": changes}]
            logger.warning(f"From step {step} on, other settings apply:\n{show_table(differences)}")
            self._leave_former_course()

    def _leave_former_course(self) -> None:
        """Sets aside the checkpoints in the output folder after the one to resume from: they had other settings."""
        checkpoint = Path(self._chosen)
        if self.args.should_save and checkpoint.resolve().parent == Path(self.args.output_dir).resolve():
            moved = set_aside_later(checkpoint)
            if moved:
                names = ", ".join(path.name for path in moved)
                logger.warning(f"{names} had the former settings and are now in {moved[0].parent}.")

    def _sharded(self) -> str | None:
        """Returns the launcher that shards the optimizer's state; `None` for none."""
        return "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else None

    def _check_launch_of(self, checkpoint: Path, place: dict[str, Any]) -> None:
        """Raises ValueError if the optimizer state of a checkpoint has the format of another launch."""
        launch = place.get("launch", "an earlier version of this code")
        if launch != self._launch():
            raise ValueError(
                f"{checkpoint} was written by {launch}, and this run is {self._launch()}, which cannot read that "
                "optimizer state. Launch it as before, or start a new run from its weights with `--model CHECKPOINT`."
            )

    def get_train_dataloader(self) -> DataLoader:
        """Returns the stock loader on `MixtureBatches`, which split every batch between the ranks."""
        args = self.args
        if isinstance(self.train_dataset, StreamedPairs):
            self._batches = StreamBatches(self.train_dataset, args, self._resumed)
            return self._batches.loader(self.data_collator)
        self._batches = self._get_train_batches()
        if len(self._batches) == 0:
            rows = len(self._batches.sampler)
            raise ValueError(
                f"An epoch has {rows} rows, fewer than the {self._batches.joined} of a batch of all ranks, "
                "and `dataloader_drop_last` drops them. Leave it out, or lower `per_device_train_batch_size`."
            )
        epoch, row = (0, 0) if self._resumed is None else (self._resumed["epoch"], self._resumed["row"])
        self._batches.start_at(epoch, row, args.gradient_accumulation_steps)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            in_order=args.dataloader_in_order,
            **loader_options(args),
        )
        return prepare_data_loader(  # as for one rank: the batches are split already
            loader,
            args.device,
            num_processes=1,
            process_index=0,
            put_on_device=False,  # each micro-batch moves when its turn comes
            non_blocking=self.accelerator.non_blocking,
        )

    def _get_train_batches(self) -> MixtureBatches:
        """Returns the batches of this rank, of a fixed number of rows."""
        args = self.args
        shares = (args.process_index, args.world_size, args.dataloader_drop_last)
        return MixtureBatches(self._get_train_sampler(), self._train_batch_size, *shares)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        """Returns the stock values; after resuming with another batch size, more or fewer steps remain."""
        epochs, updates, *counts, max_steps = super().set_initial_training_values(args, dataloader)
        if isinstance(self._batches, BudgetBatches):
            if args.max_steps > 0:
                epochs = sys.maxsize  # as the stock method where the batches of an epoch are not known
            else:
                max_steps = self._steps_of_budgets(args.num_train_epochs)
        elif self._resumed is not None and isinstance(self._batches, MixtureBatches):
            epoch = self._resumed["epoch"]
            _, before, batches = self._batches.begin(epoch)
            here = (
                epoch * updates + before // args.gradient_accumulation_steps
            )  # if all batches so far had had the present size
            shift = self._resumed["step"] - here + self._updates(batches) - updates
            max_steps += 0 if args.max_steps > 0 else shift
            epochs = math.ceil((max_steps - shift) / updates)
        return (epochs, updates, *counts, max_steps)

    def _steps_of_budgets(self, epochs: float) -> int:
        """Returns the steps of a run over so many epochs, each of which has other batches; those taken count."""
        steps, first = 0, 0
        if self._resumed is not None:
            steps, first = self._resumed["step"], self._resumed["epoch"]
        for epoch in range(first, math.ceil(epochs)):
            _, before, batches = self._batches.begin(epoch)
            share = min(1.0, epochs - epoch)
            wanted = math.ceil(share * self._updates(batches))
            steps += max(0, wanted - before // self.args.gradient_accumulation_steps)
        return steps

    def _updates(self, batches: int) -> int:
        return math.ceil(batches / self.args.gradient_accumulation_steps)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Returns the epoch and the number of batches to count as taken in it, from rows instead of steps."""
        stock = super()._init_training_state(*args, **kwargs)
        self.state.compute_steps(self.args, self.state.max_steps)  # of this run, not of the checkpoint's
        self._find_best()
        if self._resumed is None:
            return stock
        return self._resumed["epoch"], self._batches.begin(self._resumed["epoch"])[1]

    def _find_best(self) -> None:
        """Finds the best checkpoint so far, whose folder may have moved or be spelled in another way.

        The stock Trainer compares paths as they are written: it would delete the best checkpoint, or not find it at
        the end of the run.
        """
        step = self.state.best_global_step
        if self._began_from is None or not step:
            return
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        folders = (self._began_from.parent, Path(self.args.output_dir))
        found = next((folder / name for folder in folders if (folder / name).is_dir()), None)
        if self.changed & BEST or found is None:
            reason = "is not comparable" if found is not None else f"is neither in {folders[0]} nor in {folders[1]}"
            logger.warning(f"The best checkpoint so far, {name}, {reason}; the best one is chosen among later ones.")
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        else:
            self.state.best_model_checkpoint = str(found)

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        """Runs the stock epoch, unless the run was resumed from its last checkpoint and is complete."""
        self._epoch_start = (epoch, self.state.global_step)
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        _, _, batches = self._batches.begin(epoch)
        kwargs |= {"steps_in_epoch": batches, "num_update_steps_per_epoch": self._updates(batches)}
        super()._run_epoch(epoch=epoch, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Runs the stock evaluation and restores the random state, so that its order with saving does not matter."""
        with torch.random.fork_rng(devices=[]):  # a data loader draws its seed on the CPU
            return super().evaluate(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the stock checkpoint atomically, then deletes older ones."""
        output_dir = Path(self._get_output_dir(trial))
        final = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written = output_dir / UNFINISHED / final.name
        need = self._checkpoint_bytes() if self.args.should_save else 0
        with saving(final, need, [written] if self.args.should_save else []):
            self._write_checkpoint(model, trial, written, final)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = {final} if best is None else {final, Path(best)}
            steps = paper_steps(self.state.max_steps)
            delete_old_checkpoints(output_dir, self.args.save_total_limit, keep, steps)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.stop.agreed:
            raise StoppedRun(final)

    def _write_checkpoint(self, model: nn.Module, trial: Any, written: Path, final: Path) -> None:
        """Writes the stock checkpoint and the position in the data to `written`, then renames it."""
        place = self._place()
        self._unfinished = written.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished = None
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            (written / SAMPLER_STATE).write_text(json.dumps(place, indent=2) + "\n", encoding="utf-8")
            if self.settings is not None:
                write_settings(written, self.settings, self.history, self.group_names)
        self.accelerator.wait_for_everyone()  # every rank writes its random state
        if self.args.should_save:
            publish_checkpoint(written, final)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model; of one that finds no room, no truncated weights are left."""
        if _internal_call or not self.args.should_save:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        weights = [folder / "model.safetensors", *folder.glob("model-*-of-*.safetensors")]
        with saving(folder / "model.safetensors", self._weights_bytes(), weights):
            super().save_model(output_dir)

    def _checkpoint_bytes(self) -> int:
        """Returns the size of weights and optimizer state, about that of a checkpoint."""
        if self.args.save_only_model or self.optimizer is None:
            return self._weights_bytes()
        values = [value for moments in self.optimizer.state.values() for value in moments.values()]
        return self._weights_bytes() + sum(value.nbytes for value in values if isinstance(value, torch.Tensor))

    def _weights_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # otherwise `_save_checkpoint` calls it after the renaming
            super()._push_from_checkpoint(checkpoint_folder)

    def _launch(self) -> str:
        """Describes the launch as far as the format of the optimizer state depends on it."""
        if self.is_deepspeed_enabled:  # one shard a rank
            stage = self.accelerator.state.deepspeed_plugin.zero_stage
            return f"DeepSpeed ZeRO-{stage} with {self.args.world_size} processes"
        return "FSDP with any number of processes" if self.is_fsdp_enabled else "one process, or several with DDP"

    def _place(self) -> dict[str, Any]:
        """Returns the position in the data, and the bad rows so far; every rank has to call it."""
        epoch, step = self._epoch_start
        batches = (self.state.global_step - step) * self.args.gradient_accumulation_steps
        epoch, row = self._batches.position(epoch, batches)
        return {
            "epoch": epoch,
            "row": row,
            "step": self.state.global_step,
            "order": self._batches.sampler.identity(),
            "launch": self._launch(),
            **(self._batches.place() if isinstance(self._batches, StreamBatches) else {}),
            **({} if self.replaced is None else {"bad_rows": self.replaced.state()}),
        }
