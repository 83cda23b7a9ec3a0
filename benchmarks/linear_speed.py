"""Times float32 linear layers with oneDNN and with torch's choice, by rows and shape, and prepared and new shapes.

    python benchmarks/linear_speed.py [--repeats 15]

For each shape: torch's choice over oneDNN (above 1: oneDNN is faster) in inference, and of a forward with its
backward; and the microseconds that oneDNN takes more for rows that it has not seen, since it generates code for each
number of rows. linear_vipolyqwen.py takes its limits from this. Writes benchmarks/results/linear_speed.json and the
table of docs/performance.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from result_files import write_result, write_table
from timing import alternate, speedup
from torch import Tensor
from torch.nn import functional as F

from vipolyqwen.linear_vipolyqwen import _by_onednn

SHAPES = ((128, 256), (640, 640), (640, 1280), (1536, 8960))  # in and out features: demo, mid, Qwen2-VL-2B
ROWS = (1, 8, 32, 128, 512, 2048)
Layer = Callable[[Tensor, Tensor, None], Tensor]


def main() -> None:
    """Measures all shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    rows = [measure(*shape, count, options.repeats) for shape in SHAPES for count in ROWS]
    for row in rows:
        print(row)
    write_result("linear_speed", {}, table=rows, repeats=options.repeats)
    header = ("layer", "rows", "inference", "with gradient", "new rows, µs")
    cells = [
        (f"{row['in']} → {row['out']}", row["rows"], row["inference"], row["with_gradient"], row["more_for_new_rows"])
        for row in rows
    ]
    write_table("performance.md", "linear_speed", header, cells)


def measure(width: int, out: int, rows: int, repeats: int) -> dict[str, float]:
    """Returns the ratios of one shape."""
    torch.manual_seed(0)
    values, weight = torch.randn(rows, width), torch.randn(out, width)
    layers: dict[str, Layer] = {"mkl": F.linear, "onednn": _by_onednn}
    with torch.inference_mode():
        seconds = alternate({name: lambda f=f: f(values, weight, None) for name, f in layers.items()}, repeats)
        fresh = statistics.median(first_call(width, weight, rows + count + 1) for count in range(5))
    values, weight = values.requires_grad_(), weight.requires_grad_()
    gradient = torch.randn(rows, out)
    with_gradient = alternate(
        {name: lambda f=f: f(values, weight, None).backward(gradient) for name, f in layers.items()}, repeats
    )
    return {
        "in": width,
        "out": out,
        "rows": rows,
        "inference": speedup(seconds, "onednn", "mkl")["median"],
        "with_gradient": speedup(with_gradient, "onednn", "mkl")["median"],
        "microseconds": round(statistics.median(seconds["onednn"]) * 1e6, 1),
        "more_for_new_rows": round(fresh * 1e6, 1),
    }


def first_call(width: int, weight: Tensor, rows: int) -> float:
    """Returns the seconds by which the first call with so many rows takes longer than the second."""
    values = torch.randn(rows, width)
    ends = [time.perf_counter()]
    for _ in range(2):
        _by_onednn(values, weight, None)
        ends.append(time.perf_counter())
    return (ends[1] - ends[0]) - (ends[2] - ends[1])


if __name__ == "__main__":
    main()
