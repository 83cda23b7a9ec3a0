"""Faults from outside a run: SIGTERM, a full or read-only disk, a killed data worker, too little memory."""

import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from .balance import BalanceMonitor
from .callbacks import RateCallback

STOPPED = 128 + signal.SIGTERM  # exit status 143, as a shell reports a process that SIGTERM ended
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
RESUME = "continue with `--resume_from_checkpoint true`; the checkpoints before it are as they were."


class StoppedRun(SystemExit):
    """A run that SIGTERM ended after it had saved a checkpoint; the process ends with status 143."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(STOPPED)
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return f"SIGTERM: saved {self.checkpoint}; continue with `--resume_from_checkpoint true`."


class StopCallback(TrainerCallback):
    """Saves a checkpoint at the end of the step in which SIGTERM arrives at any rank.

    Attributes:
        agreed: whether all ranks know that they stop after the next checkpoint.
    """

    def __init__(self) -> None:
        self.received, self.agreed = False, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGTERM inside the context; only the main thread of a process can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _receive(self, *_: Any) -> None:
        self.received = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks for a checkpoint on all ranks if one of them received the signal; the last step ends the run anyway."""
        received = self.received
        if args.world_size > 1:
            flag = torch.tensor([received], dtype=torch.int32, device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            received = bool(flag.item())
        if received and state.global_step < state.max_steps:
            self.agreed = control.should_save = True


@contextmanager
def saving(path: Path, need: int, partial: Iterable[Path]) -> Iterator[None]:
    """Names path, need and remedy if what is written inside the context finds no room or may not be written.

    Args:
        path: what is saved.
        need: its size in bytes, at least.
        partial: files and folders that are deleted if writing them fails.

    Raises:
        OSError: the disk is full, then before anything is written if `need` tells; or read-only.
    """
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(errno.ENOSPC, _no_room(path, need, free))
    try:
        yield
    except BaseException as error:
        free = shutil.disk_usage(folder).free
        for leftover in partial:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        number = _errno(error)
        if number in NO_ROOM:
            raise OSError(number, _no_room(path, need, free)) from error
        if number in READ_ONLY:
            reason = f"{os.strerror(number)}. Make its folder writable, then {RESUME}"
            raise OSError(number, f"{path} cannot be saved: {reason}") from error
        raise


def _no_room(path: Path, need: int, free: int) -> str:
    return f"{path} cannot be saved: it needs about {need:,} bytes and {free:,} are free. Make room, then {RESUME}"


def _errno(error: BaseException | None) -> int | None:
    """Returns the error number of a failed write, also where torch or safetensors report it in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        named = [number for number in (*NO_ROOM, *READ_ONLY) if os.strerror(number) in str(error)]
        if named:
            return named[0]
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def explained_workers() -> Iterator[None]:
    """Says what to do if a data worker was killed inside the context."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            f"{error} A data worker was killed, often for memory: lower `dataloader_num_workers` or "
            f"`dataloader_prefetch_factor`, then {RESUME}"
        ) from error


class StepState:
    """What a training step changes before its backward ends, so that it can be taken again.

    Args:
        model: the model.
        mixed_loss: the loss, whose weighting observes each batch.
        figures: of the batches since the last log.
        rates: pairs and tokens since the last log.
        monitor: losses of the last batches.
        device: device of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        mixed_loss: nn.Module,
        figures: list[torch.Tensor],
        rates: RateCallback,
        monitor: BalanceMonitor,
        device: torch.device,
    ) -> None:
        self.model, self.mixed_loss, self.figures, self.rates, self.monitor = (
            model,
            mixed_loss,
            figures,
            rates,
            monitor,
        )
        self.device = device
        self.accumulated = any(parameter.grad is not None for parameter in model.parameters())
        self.random = torch.get_rng_state(), get_device_states(torch.empty(0, device=device))
        self.loss = {name: value.clone() for name, value in mixed_loss.state_dict().items()}
        self.batches, self.losses = len(figures), list(monitor.losses)
        self.counts = rates.pairs, rates.tokens

    def restore(self) -> None:
        """Goes back to the beginning of the step; only if no gradient had been accumulated before it."""
        self.model.zero_grad(set_to_none=True)
        self.mixed_loss.zero_grad(set_to_none=True)
        self.mixed_loss.load_state_dict(self.loss)
        torch.set_rng_state(self.random[0])
        set_device_states(*self.random[1], device_type=self.device.type)
        del self.figures[self.batches :]
        self.monitor.losses.clear()
        self.monitor.losses.extend(self.losses)
        self.rates.pairs, self.rates.tokens = self.counts
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
