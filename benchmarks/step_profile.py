"""Where the time of a training step goes, part by part.

    python benchmarks/step_profile.py [CORPUS] [--models demo mid] [--pairs 16] [--steps 3]

CORPUS is a demo corpus (`make demo` leaves one in outputs/demo/corpus). Steps of ViPolyQwenTrainer in float32, without
cached gradients: collation, forward and backward of each tower, loss, clipping and AdamW. `mixed` are pairs of all six
tasks in turn, `images` those of the tasks with images. A part ends where the next begins, at hooks on the towers'
inputs, outputs and gradients; on CUDA each waits for the device, so that the sum is more than an undisturbed step, and
the last line gives both. Writes benchmarks/results/step_profile.json and the table of docs/performance.md.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from demo_batches import TASKS
from result_files import write_result, write_table
from torch import Tensor, nn
from training_speed import MODELS
from transformers.utils import logging

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.data.sources import load_pairs
from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.demo.world import read_rows
from vipolyqwen.training.arguments import read_arguments
from vipolyqwen.training.build import build_loss
from vipolyqwen.training.trainer import ViPolyQwenTrainer

DATA = {"mixed": TASKS, "images": ("ocr", "vqa_single", "vqa_multi")}
PARTS = ("collation", "vision", "vision backward", "language", "language backward", "audio", "audio backward")
PARTS += ("loss", "rest of forward", "rest of backward", "optimizer")
OUTSIDE = "outside"


def main() -> None:
    """Profiles every model on every set of pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, nargs="?", default=Path("outputs/demo/corpus"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["mid"])
    parser.add_argument("--pairs", type=int, default=16, help="of a step")
    parser.add_argument("--steps", type=int, default=3, help="profiled, after one to warm up")
    options = parser.parse_args()
    logging.set_verbosity_error()
    table = {f"{name} {data}": profile(name, data, options) for name in options.models for data in DATA}
    write_result("step_profile", {}, table=table, settings=vars(options) | {"corpus": options.corpus.name})
    cells = [[part, *(f"{row['parts'][part]:.1%}" for row in table.values())] for part in PARTS]
    cells.append(["seconds, undisturbed", *(row["undisturbed"] for row in table.values())])
    write_table("performance.md", "step_profile", ["part", *table], cells)


def profile(name: str, data: str, options: argparse.Namespace) -> dict[str, Any]:
    """Shares of each part, and seconds of a step with and without marks."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, pairs = make_trainer(name, data, options, Path(folder))
        trainer.create_optimizer()
        runs: dict[bool, list[float]] = {True: [], False: []}
        marks, unread = Marks(), Marks()
        for number in range(options.steps + 1):
            for marked in (True, False):
                handles = watch(trainer, marks) if marked else []
                started = time.perf_counter()
                take_step(trainer, pairs, marks if marked else unread)
                if number:
                    runs[marked].append(time.perf_counter() - started)
                for handle in handles:
                    handle.remove()
            if not number:
                marks.seconds.clear()
    total = sum(marks.seconds.values())
    return {
        "parts": {part: round(marks.seconds[part] / total, 4) for part in PARTS},
        "seconds": round(statistics.median(runs[True]), 3),
        "undisturbed": round(statistics.median(runs[False]), 3),
    }


def make_trainer(name: str, data: str, options: argparse.Namespace, folder: Path) -> tuple[ViPolyQwenTrainer, list]:
    """A trainer, and the pairs of a step."""
    torch.manual_seed(0)
    sources = [
        {"path": str(options.corpus / f"train/{task}.jsonl"), "media_root": str(options.corpus)} for task in DATA[data]
    ]
    texts = [row["b"] for source in sources for row in read_rows(Path(source["path"]))]
    model, processor = build_tiny_base(texts, **MODELS[name][0])
    tasks = declare_tasks(None)
    pairs = load_pairs(sources, tasks, processor.min_audio_samples, check_media=False)
    collate = MixedBatchCollator(processor, tasks)
    flags = ["--model", str(folder), "--output_dir", str(folder), "--report_to", "none", "--monitor_steps", "0"]
    _, _, loss_args, args = read_arguments(flags)
    loss = build_loss(loss_args, {}, list(tasks))
    trainer = ViPolyQwenTrainer(model, args, processor, loss, pairs, None, collate, collate)
    trainer.current_gradient_accumulation_steps = 1
    step = len(pairs) // options.pairs
    return trainer, [pairs[number * step] for number in range(options.pairs)]


def take_step(trainer: ViPolyQwenTrainer, pairs: list[dict[str, Any]], marks: "Marks") -> None:
    """One step, from rows to weights; the parts that no hook sees are marked here."""
    marks.enter("collation")
    batch = trainer.data_collator(pairs)
    marks.enter("rest of forward")
    trainer.training_step(trainer.model, batch)
    marks.enter("optimizer")
    nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    marks.enter(OUTSIDE)


class Marks:
    """Adds up the seconds of each part; a part ends where the next begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.part, self.since = OUTSIDE, 0.0

    def enter(self, part: str) -> None:
        """Begins a part."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.part != OUTSIDE:
            self.seconds[self.part] += now - self.since
        self.part, self.since = part, now


def watch(trainer: ViPolyQwenTrainer, marks: Marks) -> list[Any]:
    """Hooks that mark the towers' forwards and backwards and the loss; returns their handles."""
    vlm = trainer.model.vlm
    towers = {"vision": vlm.visual, "language": vlm.language_model, "audio": trainer.model.audio_tower}
    handles = []
    for name, tower in towers.items():
        handles += watch_tower(tower, name, marks)
    loss = trainer.mixed_loss
    handles.append(loss.register_forward_pre_hook(lambda *_: marks.enter("loss")))
    handles.append(loss.register_forward_hook(lambda *_: marks.enter("rest of backward")))
    return handles


def watch_tower(tower: nn.Module, name: str, marks: Marks) -> list[Any]:
    """Hooks of one tower. Its backward ends at its input, or at its first weight where no gradient goes further."""

    def begins(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        if given is not None and given.requires_grad:
            given.register_hook(lambda gradient: marks.enter("rest of backward"))
        marks.enter(name)

    def ends(_: nn.Module, args: tuple, output: Any) -> None:
        hidden = output.pooler_output if name == "vision" else output.last_hidden_state
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda gradient: marks.enter(f"{name} backward"))
        marks.enter("rest of forward")

    first = next(parameter for parameter in tower.parameters() if parameter.requires_grad)
    handles = [tower.register_forward_pre_hook(begins, with_kwargs=True), tower.register_forward_hook(ends)]
    if name != "language":
        handles.append(first.register_post_accumulate_grad_hook(lambda _: marks.enter("rest of backward")))
    return handles


if __name__ == "__main__":
    main()
