"""Measures a model, and any other beside it, on a suite of tasks through mteb.

    python evaluate_vipolyqwen.py MODEL [--suite papers|vietnamese|chinese|trimodal|demo|FILE.yaml] [--against MODEL …]

MODEL is a folder or the Hub id of anything that mteb or sentence-transformers loads. Leaves in `--out`: mteb's results
(`results/`, to be submitted as they are; `own/results/` for own tasks), and for each suite and model summary.md and
summary.json with scores, prompts, speed and memory.
"""

import argparse
import sys
from pathlib import Path

try:
    import mteb  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("Evaluation needs mteb; install it with: pip install -e '.[evaluate]'") from error

import datasets
from mteb.abstasks import AbsTask

from vipolyqwen.encoders_vipolyqwen import MeasuredEncoder, load_encoder
from vipolyqwen.scorecard_vipolyqwen import write_scorecard
from vipolyqwen.suite_check_vipolyqwen import check_task, show_check
from vipolyqwen.suite_runs_vipolyqwen import Row, describe, run_task, suite_tasks
from vipolyqwen.suites_vipolyqwen import Suite, SuiteError, read_suite

BASELINES = "baselines"  # in `--against`: those that the suite names


def main(argv: list[str] | None = None) -> int:
    """Runs or checks a suite; returns the exit code: 0, or 1 if a task failed or does not resolve."""
    options = read_options(sys.argv[1:] if argv is None else argv)
    datasets.disable_progress_bars()  # mteb casts and maps small tables by the hundred
    suite = read_suite(options.suite)
    tasks = suite_tasks(suite)
    prompts = suite.table(task for task in tasks if isinstance(task, AbsTask))
    if options.check:
        return check(load(options.model, prompts, options), tasks)
    rows: dict[str, list[Row]] = {}
    for name in [options.model, *baselines(suite, options.against)]:
        rows[name] = run_all(name, tasks, prompts, options)
    folder = options.out / suite.name / options.model.strip("/").replace("/", "__")
    print(write_scorecard(folder, suite.name, rows))
    print(f"\nWritten to {folder / 'summary.md'}")
    return int(any(row["status"] == "failed" for of_model in rows.values() for row in of_model))


def read_options(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--suite", default="papers", help="name in recipes/suites, or a YAML file")
    parser.add_argument("--against", nargs="+", default=[], help=f"more models; {BASELINES!r}: those of the suite")
    parser.add_argument("--check", action="store_true", help="only say whether every task resolves; fetch nothing")
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluation"), help="folder of results")
    parser.add_argument("--save_vectors", action="store_true", help="write vectors; runs every task anew")
    parser.add_argument("--batch_size", type=int, default=32, help="rows that are embedded at a time")
    parser.add_argument("--device", help="such as cuda or cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; not of models that mteb knows"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run a model's code from the Hub")
    return parser.parse_args(argv)


def load(name: str, prompts: dict[str, str | None], options: argparse.Namespace) -> MeasuredEncoder:
    """The model as an encoder of mteb."""
    return load_encoder(name, prompts, options.device, options.dtype, options.trust_remote_code)


def baselines(suite: Suite, names: list[str]) -> list[str]:
    """The models of `--against`, each once."""
    if BASELINES in names and not suite.baselines:
        raise SuiteError(f"--against {BASELINES}: the suite {suite.name!r} names none; give names of models.")
    expanded = [model for name in names for model in (suite.baselines if name == BASELINES else [name])]
    return list(dict.fromkeys(expanded))


def run_all(
    name: str, tasks: list[AbsTask | Row], prompts: dict[str, str | None], options: argparse.Namespace
) -> list[Row]:
    """The rows of one model; a baseline that cannot be loaded has failed in all of them."""
    try:
        encoder = load(name, prompts, options)
    except Exception as error:
        if name == options.model:
            raise
        reason = f"{name} cannot be loaded: {type(error).__name__}: {error}"
        print(reason, flush=True)
        described = [describe(task) if isinstance(task, AbsTask) else task for task in tasks]
        return [{"status": "failed", "reason": reason, **row} for row in described]
    rows = []
    for task in tasks:
        row = task
        if isinstance(task, AbsTask):
            row = run_task(encoder, task, options.out, options.batch_size, options.save_vectors)
        print(f"{name}, {row['task']}: {row.get('score', row.get('reason'))}", flush=True)
        rows.append(row)
    return rows


def check(encoder: MeasuredEncoder, tasks: list[AbsTask | Row]) -> int:
    """Prints whether every task resolves; returns the exit code."""
    rows = [check_task(encoder, task) if isinstance(task, AbsTask) else task for task in tasks]
    print(show_check(rows))
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SuiteError as error:
        sys.exit(f"error: {error}")
