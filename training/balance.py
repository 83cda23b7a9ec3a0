"""Balance between tasks: figures in the log of a run, and a page at its end.

`BalanceMonitor` logs figures over many batches: volatility, drift, phase. `MixedLoss.summarise` logs those of a batch:
losses, shares, gradients. `write_page` renders the log as HTML.
"""

import math
from collections import defaultdict, deque
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from ..evaluation.charts import line_chart
from .distributed import full_parameters
from .parts import new_parameters

logger = logging.get_logger(__name__)

PHASES = ("exploration", "stabilisation", "optimisation")
PHASE_BOUNDS = (2000, 10_000)  # steps (STW paper §3.4.2)
SHORTEST_FULL_RUN = 12_500  # steps; shorter runs scale every step of the schedule down in proportion
CHECKPOINTS = {  # step -> expectation (STW paper §5.3)
    1000: "the loss has a falling trend",
    2000: "a sharp improvement has begun",
    5000: "the tasks are in balance",
    10_000: "training is stable",
}
BALANCED = 3.0  # largest over smallest gradient share
SOLVED = 0.5  # largest loss of a solved task, as a fraction of that at the start
SHARP = 0.9  # largest loss of a sharp improvement, as a fraction of that at the previous checkpoint
WINDOW = 100  # values in a volatility

Log = dict[str, Any]


class BalanceMonitor(TrainerCallback):
    """Computes volatility and drift from the last losses and gradient norms and the initial new parts."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.gradient_norms: deque[float] = deque(maxlen=WINDOW)
        self.start: dict[str, torch.Tensor] = {}  # parameter -> initial values

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Copies the initial new parts, unless they came with the checkpoint of a resumed run."""
        if not self.start and model is not None:
            self.start = {name: value.cpu() for name, value in full_parameters(new_parameters(model)).items()}

    def record(self, loss: float) -> None:
        """Adds the loss of one batch."""
        self.losses.append(loss)

    def summary(self, model: nn.Module, state: TrainerState, gradient_norm: float | None) -> dict[str, float]:
        """Returns `volatility/loss`, `volatility/gradient_norm`, `drift/PART` and `phase` for one log entry.

        Volatility is standard deviation / mean of the losses of the last 100 batches, and of the last 100 logged
        norms of the full gradient. Drift is ‖θ − θ₀‖ / ‖θ₀‖ of a new part. Phase is an index of `PHASES`.

        Args:
            model: the model, unwrapped.
            state: step and length of the run.
            gradient_norm: norm of the gradient before clipping, if one was logged.
        """
        if gradient_norm is not None and math.isfinite(gradient_norm):
            self.gradient_norms.append(float(gradient_norm))
        squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name, value in full_parameters(new_parameters(model)).items():
            if name in self.start:
                start = self.start[name].to(value.device)
                part = squares[f"drift/{name.split('.')[0]}"]
                part[0] += (value - start).float().square().sum().item()
                part[1] += start.float().square().sum().item()
        drifts = {name: math.sqrt(moved / start) for name, (moved, start) in squares.items() if start}
        return {
            "volatility/loss": volatility(self.losses),
            "volatility/gradient_norm": volatility(self.gradient_norms),
            **drifts,
            "phase": float(PHASES.index(phase(state.global_step, state.max_steps))),
        }

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Log | None = None,
        **kwargs: Any,
    ) -> None:
        """Logs the result of each checkpoint of the paper when a run passes it."""
        if state.is_world_process_zero and logs and "loss" in logs:
            before = _step_before(state)
            for checkpoint in paper_checkpoints(state.log_history, state.max_steps):
                if before < checkpoint.step <= state.global_step:
                    logger.info(f"Step {checkpoint.step}: {checkpoint}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes `balance.html` into the output folder."""
        if state.is_world_process_zero:
            write_page(state.log_history, state.max_steps, Path(args.output_dir) / "balance.html")


def _step_before(state: TrainerState) -> int:
    steps = [entry["step"] for entry in state.log_history if "loss" in entry]
    return steps[-2] if len(steps) > 1 else 0


def volatility(values: Any) -> float:
    """Returns standard deviation / mean of a series; 0 for fewer than two values."""
    series = torch.tensor(list(values), dtype=torch.float64)
    if len(series) < 2 or not series.mean():
        return 0.0
    return (series.std() / series.mean().abs()).item()


def scaled(step: int, max_steps: int) -> int:
    """Scales a step of the paper's schedule to a run of `max_steps`; unchanged from `SHORTEST_FULL_RUN` on."""
    return max(1, round(step * min(1.0, max_steps / SHORTEST_FULL_RUN)))


def paper_steps(max_steps: int) -> list[int]:
    """Returns the steps of the paper's checkpoints, scaled to a run of `max_steps`."""
    return [scaled(step, max_steps) for step in CHECKPOINTS]


def phase(step: int, max_steps: int) -> str:
    """Returns the phase of a step (STW paper §3.4.2)."""
    return PHASES[sum(step >= scaled(bound, max_steps) for bound in PHASE_BOUNDS)]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the STW paper (§5.3) and the result of a run there."""

    step: int
    expected: str
    figure: str  # measurement, in words
    seen: bool | None  # `None`: not measured

    def __str__(self) -> str:
        verdict = {True: "seen", False: "NOT seen", None: "not measured"}[self.seen]
        return f"{self.expected}: {verdict} ({self.figure})"


def paper_checkpoints(history: list[Log], max_steps: int) -> list[Checkpoint]:
    """Judges the checkpoints of the paper that a run has passed, by thresholds of ours (the paper gives none).

    Each compares the last quarter of the steps before it: the loss with that of the first quarter (trend) or of the
    last quarter before the previous checkpoint (sharp improvement: 10 % lower), the gradient shares with one another
    (balance: largest below three times the smallest), the volatility of the loss with that of the first quarter
    (stability: lower).
    """
    entries = [entry for entry in history if "loss" in entry]
    reached = entries[-1]["step"] if entries else 0
    steps = paper_steps(max_steps)
    judges = (_trend, _improvement, _balance, _stability)
    found = []
    for number, (step, expected) in enumerate(zip(steps, CHECKPOINTS.values(), strict=True)):
        if step <= reached:
            figure, seen = judges[number](entries, step, steps[max(0, number - 1)])
            found.append(Checkpoint(step, expected, figure, seen))
    return found


def _quarter(entries: list[Log], step: int, first: bool = False) -> list[Log]:
    """Returns the entries in the first or last quarter of the steps up to `step`."""
    low, high = (0, step / 4) if first else (step * 3 / 4, step)
    return [entry for entry in entries if low < entry["step"] <= high]


def _mean(entries: list[Log], name: str) -> float:
    values = [entry[name] for entry in entries if name in entry]
    return sum(values) / len(values) if values else math.nan


def _trend(entries: list[Log], step: int, before: int) -> tuple[str, bool | None]:
    start, end = _mean(_quarter(entries, step, first=True), "loss"), _mean(_quarter(entries, step), "loss")
    return f"loss {start:.3f} → {end:.3f}", None if math.isnan(start + end) else end < start


def _improvement(entries: list[Log], step: int, before: int) -> tuple[str, bool | None]:
    start, end = _mean(_quarter(entries, before), "loss"), _mean(_quarter(entries, step), "loss")
    return f"loss {start:.3f} → {end:.3f}", None if math.isnan(start + end) else end <= SHARP * start


def _balance(entries: list[Log], step: int, before: int) -> tuple[str, bool | None]:
    last = _quarter(entries, step)
    solved = solved_tasks(last, start_losses([entry for entry in entries if entry["step"] <= step]))
    ratio = share_ratio(last, without=solved)
    return f"largest over smallest gradient share of unsolved tasks {ratio:.1f}", None if math.isnan(
        ratio
    ) else ratio < BALANCED


def _stability(entries: list[Log], step: int, before: int) -> tuple[str, bool | None]:
    start = _mean(_quarter(entries, step, first=True), "volatility/loss")
    end = _mean(_quarter(entries, step), "volatility/loss")
    return f"loss volatility {start:.3f} → {end:.3f}", None if math.isnan(start + end) else end < start


def task_means(entries: list[Log], name: str) -> dict[str, float]:
    """Returns {task: mean of `NAME/TASK`} over log entries."""
    keys = sorted({key for entry in entries for key in entry if key.startswith(f"{name}/") and key.count("/") == 1})
    return {key.removeprefix(f"{name}/"): _mean(entries, key) for key in keys}


def start_losses(entries: list[Log]) -> dict[str, float]:
    """Returns {task: mean loss over the first tenth of the log}."""
    return task_means(entries[: max(1, len(entries) // 10)], "loss")


def solved_tasks(entries: list[Log], start: dict[str, float]) -> set[str]:
    """Returns the tasks whose mean loss over the entries is below half of that at the start.

    Args:
        entries: log entries.
        start: task -> loss at the start of the run.
    """
    return {task for task, loss in task_means(entries, "loss").items() if loss < SOLVED * start.get(task, 0.0)}


def share_ratio(entries: list[Log], name: str = "gradient_share", without: Container[str] = ()) -> float:
    """Returns the largest over the smallest mean share of the tasks; NaN if none was measured.

    Args:
        entries: log entries.
        name: `gradient_share` (by task) or `gradient_share_per_row`.
        without: tasks whose small share does not count.
    """
    shares = task_means(entries, name)
    if not shares:
        return math.nan
    least = min((share for task, share in shares.items() if task not in without), default=max(shares.values()))
    return max(shares.values()) / least if least > 0 else math.inf


def verdict(entries: list[Log], start: dict[str, float]) -> str:
    """Says in one or two sentences which task is starved of gradient, and which ones are solved.

    A share is small if it is below a third of the largest. With a small share a task is starved while its loss is
    above half of that at the start, and solved below.

    Args:
        entries: log entries to judge.
        start: task -> loss at the start of the run.
    """
    shares = task_means(entries, "gradient_share")
    if not shares:
        return "No gradients were measured (monitor_steps: 0)."
    solved, losses = solved_tasks(entries, start), task_means(entries, "loss")
    small = sorted((task for task in shares if _is_small(shares, task)), key=shares.__getitem__)
    starved = [task for task in small if task not in solved]
    least, most = (starved or sorted(shares, key=shares.__getitem__))[0], max(shares, key=shares.__getitem__)
    by_row = _ratio_by_row(entries, most, least)
    shown = f"{most} has {shares[most]:.1%} of the gradient, {least} {shares[least]:.1%}: "
    shown += f"{_times(shares[most], shares[least])} less by task" + (f", {by_row} by row" if by_row else "")
    done = [f"{task} (loss {start[task]:.3g} → {losses[task]:.3g})" for task in small if task in solved]
    ended = f" Small share, but solved: {', '.join(done)}." if done else ""
    if not starved:
        return f"Balanced: {shown}.{ended}"
    stands = f" Its loss stands at {losses[least] / start[least]:.0%} of the start." if start.get(least) else ""
    return f"{least} is starved: {shown}.{stands}{ended}"


def _is_small(shares: dict[str, float], task: str) -> bool:
    return max(shares.values()) >= BALANCED * shares[task]


def _ratio_by_row(entries: list[Log], most: str, least: str) -> str:
    """Returns how many times larger one task's gradient share per row is than another's; "" if not measured."""
    shares = task_means(entries, "gradient_share_per_row")
    return _times(shares[most], shares[least]) if {most, least} <= set(shares) else ""


def _times(larger: float, smaller: float) -> str:
    return f"{larger / smaller:.1f}×" if smaller else "∞×"


def write_page(history: list[Log], max_steps: int, path: Path) -> None:
    """Renders the log of a run as a self-contained page.

    Args:
        history: entries of `TrainerState.log_history`.
        max_steps: length of the run.
        path: HTML file to write.
    """
    entries = [entry for entry in history if "loss" in entry]
    last = entries[-max(1, len(entries) // 4) :]
    tasks = sorted(task_means(entries, "loss"))
    names = ("rows", "loss", "weight", "share", "share_per_row", "gradient_share", "gradient_share_per_row")
    columns = {name: task_means(last, name) for name in names}
    first = start_losses(entries)
    rows = [
        {"task": task, "first": first.get(task), **{name: values.get(task) for name, values in columns.items()}}
        for task in tasks
    ]
    charts = {
        "Gradient share by task": _series(entries, "gradient_share"),
        "Gradient share by row": _series(entries, "gradient_share_per_row"),
        "Share of the weighted loss": _series(entries, "share"),
        "Loss": _series(entries, "loss"),
        "Weight λ": _series(entries, "weight"),
        "Drift of the new parts": _series(entries, "drift"),
        "Volatility": _series(entries, "volatility"),
    }
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = templates.get_template("balance.html.jinja").render(
        verdict=verdict(last, first),
        rows=rows,
        cosines=_cosine_table(last, tasks),
        tasks=tasks,
        charts={title: line_chart(series) for title, series in charts.items() if series},
        checkpoints=paper_checkpoints(history, max_steps),
        phase=phase(entries[-1]["step"], max_steps) if entries else PHASES[0],
        steps=entries[-1]["step"] if entries else 0,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _series(entries: list[Log], name: str) -> dict[str, list[tuple[float, float]]]:
    """Returns {X: points (step, value)} of the figures `NAME/X` in the log."""
    series = defaultdict(list)
    for entry in entries:
        for key, value in entry.items():
            if key.startswith(f"{name}/") and key.count("/") == 1:
                series[key.removeprefix(f"{name}/")].append((entry["step"], value))
    return dict(sorted(series.items()))


def _cosine_table(entries: list[Log], tasks: list[str]) -> dict[str, dict[str, float]]:
    """Returns {task: {task: mean gradient cosine}}, symmetric."""
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for one in tasks:
        for other in tasks:
            cosine = _mean(entries, f"gradient_cosine/{one}/{other}")
            if not math.isnan(cosine):
                table[one][other] = table[other][one] = round(cosine, 2) + 0.0  # + 0.0: no "-0.00"
    return dict(table)
