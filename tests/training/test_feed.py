"""A batch waits on the host: what moves to the device, when, and that the host does not wait for it.

The device is this machine's memory, told apart by its storages: those of the weights and of what was moved.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients, build_trainer, gradients_of, training_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vipolyqwen.data.positions import token_positions
from vipolyqwen.training import feed, joined_batch
from vipolyqwen.training import trainer as trainer_module
from vipolyqwen.training.feed import MicrobatchFeed
from vipolyqwen.training.trainer import ViPolyQwenTrainer

MEDIA = ("pixel_values", "audio_features", "audio_attention_mask")


def test_a_batch_stays_on_the_host(corpus: Path) -> None:
    trainer, pairs = build_trainer(corpus)
    batch = trainer.data_collator(list(pairs))
    assert trainer._prepare_inputs(batch) is batch
    assert trainer.get_train_dataloader().device is None
    assert trainer.get_eval_dataloader(pairs).device is None
    assert trainer.accelerator.device_placement


# --- media


class Media:
    """Sizes of the media on the device whenever a micro-batch has moved there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
        self.held: list[int] = []  # bytes of all, after each move
        self.moved: list[int] = []  # bytes of each move
        self.alive: list[weakref.ref[Tensor]] = []
        take, init = MicrobatchFeed._move, MicrobatchFeed.__init__

        def move(this: MicrobatchFeed, rows: Any) -> dict[str, Tensor]:
            inputs = {name: value.clone() for name, value in take(this, rows).items()}
            media = [inputs[name] for name in MEDIA if name in inputs]
            self.alive = [*(ref for ref in self.alive if ref() is not None), *map(weakref.ref, media)]
            self.moved.append(sum(value.nbytes for value in media))
            self.held.append(sum(value.nbytes for ref in self.alive if (value := ref()) is not None))
            return inputs

        monkeypatch.setattr(MicrobatchFeed, "_move", move)
        monkeypatch.setattr(MicrobatchFeed, "__init__", lambda this, *args: init(this, *args, ahead=ahead))


def test_media_of_two_micro_batches_at_most_are_on_the_device(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for ahead in (False, True):
        with monkeypatch.context() as patch:
            media = Media(patch, ahead)
            trainer, pairs = build_trainer(corpus, "--embed_chunk", "2")
            training_step(trainer, list(pairs))
        largest, passes = max(media.moved), len(media.moved) // 2
        assert media.moved[:passes] == media.moved[passes:]  # once without gradient, once with
        assert sum(media.moved[:passes]) > 4 * largest
        assert largest < max(media.held) <= 2 * largest if ahead else max(media.held) <= 2 * largest
        gradients.append(gradients_of(trainer))
    assert_same_gradients(*gradients)


# --- reads of the device

READS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal"}


class DeviceReads(TorchDispatchMode):
    """Counts operations for which the host would wait for the device, outside the model and inside."""

    def __init__(self, trainer: ViPolyQwenTrainer) -> None:
        super().__init__()
        self.counts, self.inside = {False: 0, True: 0}, False
        self.storages: dict[int, Any] = {}  # kept, so that no other tensor gets their place
        for module in (trainer.model, trainer.mixed_loss):
            for value in (*module.parameters(), *module.buffers()):
                self.put(value)
        trainer.model.register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
        trainer.model.register_forward_hook(lambda *_: setattr(self, "inside", False))

    def put(self, value: Tensor) -> Tensor:
        self.storages[value.untyped_storage()._cdata] = value.untyped_storage()
        return value

    def has(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self.storages

    def read(self, value: Any) -> None:
        self.counts[self.inside] += self.has(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = [
            x for arg in (*args, *(kwargs or {}).values()) for x in (arg if isinstance(arg, list | tuple) else [arg])
        ]
        result = func(*args, **(kwargs or {}))
        if any(map(self.has, tensors)):
            name = func.overloadpacket.__name__
            by_mask = name in ("index", "index_put", "index_put_") and any(
                x is not None and x.dtype == torch.bool for x in args[1]
            )
            self.counts[self.inside] += name in READS or by_mask
            for value in result if isinstance(result, list | tuple) else [result]:
                if isinstance(value, Tensor):
                    self.put(value)
        return result


@contextmanager
def watching(trainer: ViPolyQwenTrainer, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceReads]:
    reads = DeviceReads(trainer)
    with monkeypatch.context() as patch:
        for module in (feed, joined_batch, trainer_module):
            patch.setattr(module, "move", lambda value, device: reads.put(value.clone()))
        for name in ("tolist", "cpu", "numpy"):
            plain = getattr(Tensor, name)
            patch.setattr(Tensor, name, lambda self, *args, plain=plain: reads.read(self) or plain(self, *args))
        with reads:
            yield reads


@pytest.mark.parametrize("flags", [[], ["--embed_chunk", "4"], ["--loss_table", "dle", "--task_weighting", "table"]])
def test_a_step_reads_one_number_from_the_device(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    trainer, pairs = build_trainer(corpus, *flags)
    batch = trainer.data_collator(list(pairs))
    with watching(trainer, monkeypatch) as reads:
        loss = trainer.compute_loss(trainer.model, batch)
        assert reads.counts[False] == 1  # whether the loss is finite
        loss.item()
        assert reads.counts[False] == 2  # it does see reads


# --- positions


def test_positions_are_those_of_the_model(corpus: Path) -> None:
    trainer, pairs = build_trainer(corpus)
    batch = trainer.data_collator(list(pairs))
    rows = batch["attention_mask"].any(dim=1)  # the model's function takes no row of audio alone
    ids, mask, grids = batch["input_ids"][rows], batch["attention_mask"][rows], batch["image_grid_thw"]
    is_image = (ids == trainer.model.config.image_token_id).int()
    slots = grids[batch["image_indices"]]
    wanted, _ = trainer.model.vlm.get_rope_index(ids, is_image, slots, attention_mask=mask)
    assert is_image.any() and not rows.all()
    assert torch.equal(batch["position_ids"][:, rows], wanted)
    assert not batch["position_ids"][:, ~rows].any()


def test_an_image_stands_at_one_time_and_the_text_goes_on_after_its_longer_side() -> None:
    ids = torch.tensor([[1, 9, 9, 9, 9, 9, 9, 2], [0, 0, 0, 0, 0, 3, 4, 5]])
    positions = token_positions(ids, (ids > 0).long(), [[1, 4, 6]], image_token_id=9, merge_size=2)
    assert positions[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
    assert positions[:, 1].tolist() == [[0, 0, 0, 0, 0, 0, 1, 2]] * 3
