"""Feeds micro-batches to the device: a batch waits on the host, and the next micro-batch moves while one runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..microbatches_vipolyqwen import take_rows

Rows = Sequence[int]


class MicrobatchFeed:
    """Inputs of the micro-batches of one batch; at most those of two micro-batches are on the device.

    Args:
        batch: collated batch on the host.
        microbatches: row indices of each, in the order in which they are taken, once or several times.
        extra: rows that every micro-batch has besides its own, at its end.
        device: of the model.
        ahead: whether the next micro-batch moves while one runs; `None`: unless the device is the host.
    """

    def __init__(
        self,
        batch: Mapping[str, Any],
        microbatches: Sequence[Rows],
        extra: Rows,
        device: torch.device,
        ahead: bool | None = None,
    ) -> None:
        self.batch, self.extra, self.device = batch, list(extra), device
        self.following = {id(rows): later for rows, later in zip(microbatches, microbatches[1:], strict=False)}
        self.ahead = device.type != "cpu" if ahead is None else ahead
        self.stream = torch.cuda.Stream(device) if self.ahead and device.type == "cuda" else None
        self.waiting: tuple[Rows, dict[str, Tensor]] | None = None

    def take(self, rows: Rows) -> dict[str, Tensor]:
        """Returns the model inputs of a micro-batch, an element of `microbatches`, on the device."""
        waiting, self.waiting = self.waiting, None
        if waiting is None or waiting[0] is not rows:
            return self._move(rows)
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for value in waiting[1].values():
                value.record_stream(current)
        return waiting[1]

    def move_ahead(self, rows: Rows) -> None:
        """Starts to move the micro-batch after `rows`, whose forward has been launched."""
        later = self.following.get(id(rows))
        if self.ahead and later is not None:
            with torch.cuda.stream(self.stream):  # without effect where it is `None`
                self.waiting = later, self._move(later)

    def _move(self, rows: Rows) -> dict[str, Tensor]:
        chosen = torch.tensor([*rows, *self.extra], dtype=torch.long)
        return {name: move(value, self.device) for name, value in take_rows(self.batch, chosen).items()}


def move(value: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor from the host to a device; the host does not wait for it."""
    if device.type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
