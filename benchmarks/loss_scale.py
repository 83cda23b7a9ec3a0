"""The mixed loss of large batches: time against its matrix products, and peak memory.

    python benchmarks/loss_scale.py [--rows 1024 4096 16384 65536] [--dim 1024] [--repeats 2] [--most_rows 16384]

Rows are pairs of unit vectors of all six tasks in turn, a tenth with a duplicate, with the losses of the table
`mixed`; the step is forward and backward to the vectors, without monitors. Above `WHOLE` similarities the loss is
computed in blocks. Its matrix products are those that it makes, in the same blocks: the similarities (twice in
blocks, since the backward computes them again), and the gradients of both sides. On a CPU a batch of more rows than
`--most_rows` is measured as one of 16 ranks that share it, which computes its rows against all columns, without the
collectives.

Memory is the peak of a fresh process less that before the vectors were made (on CUDA what torch allocated), with the
vectors and their gradients. Writes benchmarks/results/loss_scale.json and the table of docs/performance.md.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from result_files import claim, write_result, write_table
from timing import alternate, speedup
from torch import Tensor
from torch.nn.functional import normalize

from vipolyqwen.evaluation.memory import peak_host, reset_peaks
from vipolyqwen.training import loss_blocks
from vipolyqwen.training.distributed import RowShare
from vipolyqwen.training.losses import LOSS_TABLES
from vipolyqwen.training.mixed_loss import MixedLoss

MEMORY_BAR, TIME_BAR = 4 * 2**10, 1.3  # MiB; times of its matrix products
RANKS = 16  # that share a batch too large for this machine
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Measures every number of rows and writes the claims; with `--measure` it is the process whose memory counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--most_rows", type=int, default=2**20 if DEVICE == "cuda" else 16384)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(peak(options.measure, options)))
        return
    table = {rows: measure(rows, options) for rows in options.rows}
    largest = table[max(table)]
    claims = {
        f"{max(table)}_rows_peak_MiB": claim(largest["peak_MiB"], MEMORY_BAR, largest["peak_MiB"] <= MEMORY_BAR),
        f"{max(table)}_rows_time_over_products": claim(
            largest["over_products"]["median"], TIME_BAR, largest["over_products"]["median"] <= TIME_BAR
        ),
    }
    write_result("loss_scale", claims, table=table, settings=vars(options))
    columns = ["rows", "computed here", "seconds", "times its products", "peak MiB"]
    cells = [
        [rows, row["computed"], row["seconds"], row["over_products"]["median"], row["peak_MiB"]]
        for rows, row in table.items()
    ]
    write_table("performance.md", "loss_scale", columns, cells)


def measure(rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, ratio and memory of one number of rows."""
    command = [sys.executable, __file__, "--measure", str(rows), "--dim", str(options.dim)]
    command += ["--most_rows", str(options.most_rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = alternate({"loss": step(rows, options), "products": products(rows, options)}, options.repeats)
    over = speedup(seconds, "products", over="loss")
    return {
        "computed": computed_rows(rows, options.most_rows),
        "seconds": round(sorted(seconds["loss"])[len(seconds["loss"]) // 2], 3),
        "over_products": over,
        "peak_MiB": json.loads(done.stdout.splitlines()[-1]),
    }


def computed_rows(rows: int, most: int) -> int:
    """Rows that are computed here: all, or those of one rank."""
    return rows if rows <= most else rows // RANKS


def vectors(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """Both sides of `rows` pairs, unit vectors, side b near side a."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    sides = torch.randn(2, rows, dim, generator=generator, device=DEVICE)
    sides[1].add_(sides[0])
    sides = normalize(sides, dim=-1)
    return sides[0].clone().requires_grad_(), sides[1].clone().requires_grad_()


def step(rows: int, options: argparse.Namespace) -> Callable[[], None]:
    """Forward and backward of the loss of one batch."""
    loss = MixedLoss(LOSS_TABLES["mixed"]).to(DEVICE)
    a, b = vectors(rows, options.dim)
    numbers = torch.arange(rows, device=DEVICE)
    task_ids, keys = numbers % len(loss.tasks), numbers * 19 // 20  # one in ten shares its content with another
    scores = torch.where(task_ids == 0, 0.8, math.nan)
    share = None
    if rows > options.most_rows:
        share = RowShare(0, (rows // RANKS,) * RANKS)
        loss_blocks.gather_rows = as_if_gathered

    def run() -> None:
        a.grad = b.grad = None
        groups = torch.zeros_like(numbers)
        loss(a, b, task_ids, scores, keys, keys + rows, groups=groups, share=share).loss.backward()

    return run


def as_if_gathered(parts: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Repeats what this rank computed in place of what the others would."""
    return [torch.cat([part] * len(sizes)) for part in parts]


def products(rows: int, options: argparse.Namespace) -> Callable[[], None]:
    """The matrix products of the same step, in the same blocks."""
    a, b = (side.detach() for side in vectors(rows, options.dim))
    computed = computed_rows(rows, options.most_rows)
    size = loss_blocks.block_rows(rows, rows, None, a.device)
    times, size = (1, rows) if size is None else (2, size)
    matrix, gradients = a.new_empty(min(size, computed), rows), (torch.zeros_like(a), torch.zeros_like(b))

    def run() -> None:
        for first in range(0, computed, size):
            block = a[first : min(first + size, computed)]
            for _ in range(times):
                similarities = torch.mm(block, b.T, out=matrix[: len(block)])
            torch.mm(similarities, b, out=gradients[0][first : first + len(block)])
            gradients[1].addmm_(similarities.T, block)

    return run


def peak(rows: int, options: argparse.Namespace) -> int:
    """MiB that one step takes."""
    step(256, options)()  # what the first step alone takes
    reset_peaks()
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else peak_host()
    step(rows, options)()
    after = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_host()
    return (after - before) // 2**20


if __name__ == "__main__":
    main()
