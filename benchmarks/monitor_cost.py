"""Cost of monitoring: steps that measure the tasks' gradients against steps that do not, side by side.

    python benchmarks/monitor_cost.py [CORPUS] [--batches 12] [--batch_size 96]

CORPUS is a demo corpus (`make demo` leaves one in outputs/demo/corpus). Every batch is trained on both ways in turn
(forward, losses, backward), and the numbers for the log are made once for each log. By default gradients are measured
every 10 steps. Writes benchmarks/results/monitor_cost.json.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from demo_batches import model_and_batches
from pair_vectors import by_length
from result_files import claim, write_result
from transformers import TrainerControl, TrainerState

from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.training.arguments import ViPolyQwenTrainingArguments
from vipolyqwen.training.balance import BalanceMonitor
from vipolyqwen.training.losses import LOSS_TABLES
from vipolyqwen.training.mixed_loss import MixedLoss

BAR = 0.03  # of the time of a step
MONITOR_STEPS = ViPolyQwenTrainingArguments.monitor_steps


def main() -> None:
    """Times every batch both ways and reports medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, nargs="?", default=Path("outputs/demo/corpus"))
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=96)
    options = parser.parse_args()
    model, batches = model_and_batches(options.corpus, options.batches, options.batch_size)
    loss, monitor = MixedLoss(LOSS_TABLES["dle"]), BalanceMonitor()
    monitor.on_train_begin(None, TrainerState(), TrainerControl(), model=model)
    step(model, loss, batches[0], measured=True)  # warm-up
    extra, plain, logs = [], [], []
    for number, batch in enumerate(batches):
        ways = (False, True) if number % 2 else (True, False)
        seconds = {measured: step(model, loss, batch, measured) for measured in ways}
        plain.append(seconds[False])
        extra.append((seconds[True] - seconds[False]) / seconds[False])
        started = time.perf_counter()
        monitor.record(1.0)
        monitor.summary(model, TrainerState(max_steps=100), 1.0)
        logs.append((time.perf_counter() - started) / seconds[False])
    cost = (statistics.median(extra) + statistics.median(logs)) / MONITOR_STEPS
    write_result(
        "monitor_cost",
        {"monitoring_share_of_step_time": claim(round(cost, 5), BAR, holds=cost < BAR)},
        measuring_gradients_in_every_step=round(statistics.median(extra), 5),
        numbers_for_one_log_over_a_step=round(statistics.median(logs), 5),
        seconds_of_a_step=round(statistics.median(plain), 4),
        monitor_steps=MONITOR_STEPS,
        pairs=options.batch_size,
        batches=options.batches,
    )


def step(model: ViPolyQwenModel, loss: MixedLoss, batch: dict[str, Any], measured: bool) -> float:
    """Seconds of forward, losses, numbers for the log, and backward."""
    started = time.perf_counter()
    vectors = by_length(model, batch)
    pairs = len(batch["data_type"])
    names = ("data_type", "similarity_scores", "a_keys", "b_keys")
    inputs = (batch[name] for name in names)
    output = loss(vectors[:pairs], vectors[pairs:], *inputs, with_gradients=measured)
    loss.summarise(output)
    output.loss.backward()
    model.zero_grad()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
