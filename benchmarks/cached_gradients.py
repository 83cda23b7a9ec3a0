"""Cached gradients: memory of a large batch in small chunks against that of a small batch, and the cost in time.

    python benchmarks/cached_gradients.py [--pairs 2048] [--chunk 16] [--timed_pairs 128] [--repeats 7]

Uses a tiny model of text, images and audio, and pairs of noise made in memory. Peak memory is the resident set of a
process that loads model and batch and takes one training step, monitors included. Time is the median over steps of
both kinds in turn. Writes benchmarks/results/cached_gradients.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from result_files import claim, write_result

from vipolyqwen.configuration_vipolyqwen import ViPolyQwenConfig
from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.evaluation.memory import peak_host, reset_peaks
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.training.arguments import read_arguments
from vipolyqwen.training.build import build_loss
from vipolyqwen.training.trainer import ViPolyQwenTrainer

MEMORY_BAR, TIME_BAR = 1.3, 1.6
WORDS = "one two three red blue green small large star circle square sky sea sand grass above below".split()
SIZES = {"hidden_size": 512, "layers": 8, "vision_size": 256, "audio_size": 256, "image_side": 56}


def main() -> None:
    """Measures both and writes the claims; with `--measure` it is the process whose memory counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=16, help="rows of a chunk, and pairs of the small batch")
    parser.add_argument("--timed_pairs", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "BATCH", "CHUNK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Makes model and batches, compares memory and time, and writes the result."""
    torch.manual_seed(0)
    save_repository(*build_tiny_base([" ".join(WORDS)] * 4, vocab_size=400, **SIZES), folder / "model")
    memory = {
        "small_batch": peak(folder, options.chunk, None),
        "large_batch_in_chunks": peak(folder, options.pairs, options.chunk),
    }
    seconds = step_times(folder, options)
    ratios = {
        "peak_memory_over_small_batch": (memory["large_batch_in_chunks"][1] / memory["small_batch"][1], MEMORY_BAR),
        "step_time_over_plain": (statistics.median(seconds["chunks"]) / statistics.median(seconds["plain"]), TIME_BAR),
    }
    claims = {name: claim(round(value, 3), bar, holds=value <= bar) for name, (value, bar) in ratios.items()}
    write_result(
        "cached_gradients",
        claims,
        MiB_before_and_at_the_peak_of_a_step=memory,
        median_seconds_of_a_step={name: round(statistics.median(values), 3) for name, values in seconds.items()},
        settings={name: value for name, value in vars(options).items() if name != "measure"},
    )


def peak(folder: Path, pairs: int, chunk: int | None) -> list[int]:
    """MiB of a fresh process before and at the peak of one step."""
    batch = folder / "batch.pt"
    torch.save(make_batch(folder / "model", pairs), batch)
    command = [sys.executable, __file__, "--measure", folder / "model", batch, str(chunk or 0)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, batch: str, chunk: str) -> list[int]:
    """Takes one step and returns this process's resident memory before it and at its peak, in MiB."""
    trainer, inputs = build_trainer(Path(model), int(chunk) or None), torch.load(batch, mmap=True)
    reset_peaks()
    before = peak_host()
    trainer.training_step(trainer.model, inputs)
    return [before // 2**20, peak_host() // 2**20]


def step_times(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of steps of one batch with and without chunks, in turn."""
    batch = make_batch(folder / "model", options.timed_pairs)
    trainers = {
        name: build_trainer(folder / "model", chunk) for name, chunk in (("plain", None), ("chunks", options.chunk))
    }
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for repeat in range(options.repeats + 1):
        for name in sorted(trainers, reverse=repeat % 2 == 0):
            trainer = trainers[name]
            trainer.model.zero_grad()
            trainer.state.global_step = 1  # a step without monitors, as nine of ten are
            started = time.perf_counter()
            trainer.training_step(trainer.model, batch)
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def build_trainer(model: Path, chunk: int | None) -> ViPolyQwenTrainer:
    """A trainer that takes ready batches."""
    flags = ["--model", str(model), "--output_dir", str(model / "out"), "--use_cpu", "true", "--report_to", "none"]
    _, _, loss_args, args = read_arguments(flags + ([] if chunk is None else ["--embed_chunk", str(chunk)]))
    loaded = ViPolyQwenModel.from_pretrained(model)
    loss = build_loss(loss_args, {}, list(declare_tasks(None)))
    collate = collator(model)
    trainer = ViPolyQwenTrainer(loaded, args, collate.processor, loss, None, None, collate, collate)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def collator(model: Path) -> MixedBatchCollator:
    """The collator of a model's folder."""
    config = ViPolyQwenConfig.from_pretrained(model)
    return MixedBatchCollator(ViPolyQwenProcessor.from_pretrained(model, config=config), declare_tasks(None))


def make_batch(model: Path, pairs: int) -> dict[str, Any]:
    """A collated batch of all six tasks in turn, of noise."""
    rng = np.random.default_rng(0)
    tasks = list(declare_tasks(None))
    return collator(model)([make_pair(number, tasks[number % len(tasks)], rng) for number in range(pairs)])


def make_pair(number: int, task: str, rng: np.random.Generator) -> dict[str, Any]:
    """A pair as a `PairDataset` gives it."""
    sides = [" ".join(rng.choice(WORDS, rng.integers(4, 25))) for _ in range(2)]
    sound = {"array": rng.uniform(-0.5, 0.5, 8000).astype(np.float32), "sampling_rate": 16_000}
    picture = Image.fromarray(rng.integers(0, 256, (56, 56, 3), dtype=np.uint8))
    return {
        "id": str(number),
        "task": task,
        "a": "" if task == "audio" else sides[0],
        "b": sides[1],
        "images_a": [picture] if task in ("ocr", "vqa_single", "vqa_multi") else [],
        "image_placeholder": "<image>",
        "audio_a": sound if task == "audio" else None,
        "images_b": [],
        "audio_b": None,
        "score": 1.0 if task == "text_pair" else None,
        "group": None,
        "negatives": [],
        "a_key": 2 * number,
        "b_key": 2 * number + 1,
    }


if __name__ == "__main__":
    main()
