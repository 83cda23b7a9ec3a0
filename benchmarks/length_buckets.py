"""Forward and backward of mixed batches: rows of like length together against all 2B rows in one forward.

    python benchmarks/length_buckets.py [CORPUS] [--batches 8] [--batch_size 64]

CORPUS is a demo corpus (`make demo` leaves one in outputs/demo/corpus). Writes benchmarks/results/length_buckets.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo_batches import model_and_batches
from result_files import claim, write_result

from vipolyqwen.microbatches_vipolyqwen import length_buckets, take_rows
from vipolyqwen.training.microbatches import row_lengths

MICROBATCH_COSTS = (16, 32, 64, 128, 256)  # tokens


def main() -> None:
    """Times every batch both ways, in turn, and reports the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, nargs="?", default=Path("outputs/demo/corpus"))
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args()
    size = options.batch_size
    model, batches = model_and_batches(options.corpus, options.batches, size)
    ways = {"one": lambda batch: [list(range(2 * size))]}
    ways |= {
        str(cost): lambda batch, c=cost: length_buckets(row_lengths(batch).tolist(), c) for cost in MICROBATCH_COSTS
    }
    step(model, batches[0], ways["one"])  # warm-up
    seconds = {name: [step(model, batch, way) for batch in batches] for name, way in ways.items()}
    ratios = {
        name: statistics.median(one / own for one, own in zip(seconds["one"], own_seconds, strict=True))
        for name, own_seconds in seconds.items()
    }
    claims = {
        f"microbatch_cost_{name}_speedup_over_one_forward": claim(round(ratio, 3), 1.0, holds=ratio >= 1.0)
        for name, ratio in ratios.items()
        if name != "one"
    }
    write_result("length_buckets", claims, batches=options.batches, pairs=size)


def step(model: torch.nn.Module, batch: dict[str, Any], way: Callable[[dict[str, Any]], list[list[int]]]) -> float:
    """Seconds of a forward and backward over the groups of rows that `way` makes."""
    started = time.perf_counter()
    groups = [torch.tensor(rows) for rows in way(batch)]
    torch.cat([model(**take_rows(batch, rows)).embeddings for rows in groups]).square().sum().backward()
    model.zero_grad()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
