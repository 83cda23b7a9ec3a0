"""Resuming deep in a large source against starting on it: seconds to the first batch, and memory.

    python benchmarks/resume.py [--rows 11000000] [--position 10000000] [--folder SCRATCH]

Writes a Parquet file of short text pairs, trains a tiny model on it for one step (which checks all rows once, and
takes most of the time), moves that step's checkpoint to row `position` of the epoch, and then runs the training
command anew from the beginning and from there. Writes benchmarks/results/resume.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
import yaml
from result_files import claim, write_result

from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.evaluation.memory import peak_host
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.train_vipolyqwen import main as train_main
from vipolyqwen.training.checkpoints import MANIFEST, publish_checkpoint
from vipolyqwen.training.resuming import SAMPLER_STATE
from vipolyqwen.training.trainer import ViPolyQwenTrainer

SECONDS_BAR, MEMORY_BAR = 5.0, 1.1
BATCH = 8
RUNS = 3  # of each kind, by turns; the medians count


def main() -> None:
    """Prepares the data, measures both kinds of runs and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=11_000_000)
    parser.add_argument("--position", type=int, default=10_000_000)
    parser.add_argument(
        "--folder", type=Path, help="where about 150 bytes a row are written; default: a temporary one"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        recipe = write_run(folder, options.rows)
        checking = measure(recipe, folder / "first", "--save_strategy", "steps")
        checkpoint, step = move(folder / "first" / "checkpoint-1", folder / "moved", options.position)
        fresh, resumed = [], []
        for number in range(RUNS):
            fresh.append(measure(recipe, folder / f"fresh{number}"))
            flags = ["--resume_from_checkpoint", str(checkpoint), "--max_steps", str(step + 1)]
            resumed.append(measure(recipe, folder / f"resumed{number}", *flags))
    seconds = median(resumed, "seconds_to_first_batch")
    memory = median(resumed, "peak_mib") / median(fresh, "peak_mib")
    claims = {
        "seconds_to_first_batch_after_resuming": claim(round(seconds, 2), SECONDS_BAR, holds=seconds <= SECONDS_BAR),
        "peak_memory_over_fresh_start": claim(round(memory, 3), MEMORY_BAR, holds=memory <= MEMORY_BAR),
    }
    write_result(
        "resume",
        claims,
        rows=options.rows,
        position=step * BATCH,
        first_run_that_checks_all_rows=checking,
        fresh=fresh,
        resumed=resumed,
    )


def write_run(folder: Path, rows: int) -> Path:
    """Writes pairs, a tiny model and a recipe of one step; returns the recipe."""
    schema = pa.schema({"id": pa.string(), "a": pa.string(), "b": pa.string(), "score": pa.float64()})
    with pyarrow.parquet.ParquetWriter(folder / "pairs.parquet", schema) as writer:
        for first in range(0, rows, 500_000):
            numbers = range(first, min(first + 500_000, rows))
            columns = [map(str, numbers), (f"câu số {n}" for n in numbers), (f"number {n}" for n in numbers)]
            scores = [n % 11 / 10 for n in numbers]
            writer.write_table(pa.table([*map(list, columns), scores], schema=schema))
    texts = [f"câu số {n}, number {n}" for n in range(1000)]
    model, processor = build_tiny_base(texts, hidden_size=64, layers=1, vision_size=32, audio_size=32, vocab_size=400)
    save_repository(model, processor, folder / "base")
    recipe = {
        "model": str(folder / "base"),
        "train_data": [{"path": str(folder / "pairs.parquet"), "task": "text_pair"}],
        "per_device_train_batch_size": BATCH,
        "max_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def move(checkpoint: Path, folder: Path, position: int) -> tuple[Path, int]:
    """A copy of a checkpoint as a run would leave it near row `position` of the first epoch, and its step."""
    step = position // BATCH
    written = folder / "unfinished"
    shutil.copytree(checkpoint, written)
    (written / MANIFEST).unlink()
    for name, changes in (
        (SAMPLER_STATE, {"epoch": 0, "row": step * BATCH, "step": step}),
        ("trainer_state.json", {"global_step": step}),
    ):
        content = json.loads((written / name).read_text(encoding="utf-8"))
        (written / name).write_text(json.dumps({**content, **changes}), encoding="utf-8")
    moved = folder / f"checkpoint-{step}"
    publish_checkpoint(written, moved)
    return moved, step


def measure(recipe: Path, output: Path, *flags: str) -> dict[str, float]:
    """Runs the training command in a separate process."""
    command = [sys.executable, __file__, "--measured", str(recipe), "--output_dir", str(output), *flags]
    command.append("--overwrite_output_dir")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(recipe.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    measured = json.loads(done.stdout.splitlines()[-1])
    print(f"{output.name}: {measured}", flush=True)
    return measured


def measured_run(argv: list[str]) -> None:
    """The training command; prints seconds from its beginning, imports not counted, to the first batch, and memory."""
    started = time.perf_counter()
    arrived = []
    step = ViPolyQwenTrainer.training_step

    def timed_step(*args: object, **kwargs: object) -> torch.Tensor:
        arrived.append(time.perf_counter() - started)
        return step(*args, **kwargs)

    ViPolyQwenTrainer.training_step = timed_step
    train_main(argv)
    print(json.dumps({"seconds_to_first_batch": round(arrived[0], 2), "peak_mib": peak_host() // 2**20}))


def median(runs: list[dict[str, float]], name: str) -> float:
    return sorted(run[name] for run in runs)[len(runs) // 2]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measured"]:
        measured_run(sys.argv[2:])
    else:
        main()
