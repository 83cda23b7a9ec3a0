"""Times alternatives in turn, so that other load on the machine hits all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def alternate(runs: Mapping[str, Callable[[], Any]], repeats: int = 3) -> dict[str, list[float]]:
    """Returns the seconds of each run of each alternative, after one run of each to warm up.

    Args:
        runs: name -> what to time.
        repeats: timed runs of each; every second round runs backwards.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
            started = time.perf_counter()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def speedup(seconds: Mapping[str, list[float]], name: str, over: str) -> dict[str, float]:
    """Returns the median of the ratios of each round, above 1 if `name` is faster than `over`, and their range."""
    ratios = [slow / fast for slow, fast in zip(seconds[over], seconds[name], strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
    }
