"""Batches of streamed pairs for the Trainer: one epoch of `max_steps`, and the place of each rank in the streams."""

from functools import partial
from typing import Any

from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from ..data.streamed_pairs import StreamCollator, StreamedPairs
from .arguments import ViPolyQwenTrainingArguments


def loader_options(args: TrainingArguments) -> dict[str, Any]:
    """Returns how data workers load batches, for any loader of a run."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "worker_init_fn": partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    }


class StreamBatches:
    """Batches of streamed pairs: a run is one epoch of them, whose length `max_steps` says.

    Args:
        pairs: the pairs.
        args: arguments of the run.
        resumed: the place of the checkpoint to resume from, see `place`.
    """

    def __init__(self, pairs: StreamedPairs, args: TrainingArguments, resumed: dict[str, Any] | None) -> None:
        self.sampler = pairs
        self.args = args
        self.joined = pairs.batch_size * pairs.ranks
        self.before = 0  # batches that count as taken when this run begins
        self.taken = 0  # batches of this run
        if resumed is None:
            pairs.begin_at(0, 0, None)
        else:
            self.before = resumed["step"] * args.gradient_accumulation_steps
            pairs.begin_at(self.before, resumed["batches"], resumed["streams"][pairs.rank])
        self.states = list(pairs.states)  # of this rank's workers, after the batches that were trained on

    def loader(self, collator: Any) -> DataLoader:
        """Returns the stock loader of the batches."""
        loader = DataLoader(
            self.sampler,
            batch_size=None,  # the pairs come in batches
            collate_fn=StreamCollator(collator),
            **loader_options(self.args),
        )
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=False)

    def seen(self, stream: tuple[int, dict[str, Any]]) -> None:
        """Records worker and state of a batch that is trained on."""
        worker, state = stream
        self.states[worker] = state
        self.taken += 1

    def begin(self, epoch: int) -> tuple[int, int, int]:
        """Returns the first row, the batches that count as taken, and the batches in total."""
        return 0, self.before, self.args.max_steps * self.args.gradient_accumulation_steps

    def position(self, epoch: int, batches: int) -> tuple[int, int]:
        """Returns the epoch and the rows of all ranks so far."""
        return 0, (self.before + self.taken) * self.joined

    def place(self) -> dict[str, Any]:
        """Returns where the streams of all ranks stand; every rank has to call it."""
        return {"streams": gather_object([self.states]), "batches": self.before + self.taken}


def launch_streams(pairs: Any, args: ViPolyQwenTrainingArguments) -> None:
    """Tells pairs for which rank, batches and workers they are, if they are streamed.

    Raises:
        ValueError: an argument needs rows that are known beforehand.
    """
    if not isinstance(pairs, StreamedPairs):
        return
    if args.max_steps <= 0:
        raise ValueError(
            f"`max_steps` is {args.max_steps}, but the train_data is streamed, so the rows of an epoch are not known; "
            "give the steps of the run."
        )
    defaults = {"batching": "mixed", "mixture_temperature": 1.0, "batch_tokens": None, "batch_pixels": None}
    for name, default in defaults.items():
        value = getattr(args, name)
        if value != default:
            raise ValueError(
                f"`{name}` is {value!r}, which needs all rows beforehand, but the train_data is streamed. Leave it "
                "out, or leave `streaming` out of the sources."
            )
    seed = args.seed if args.data_seed is None else args.data_seed
    pairs.launch(args.train_batch_size, args.process_index, args.world_size, args.dataloader_num_workers, seed)
