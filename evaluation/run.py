"""Runs or checks a suite over models and writes the scorecard."""

import argparse

import datasets
from mteb.abstasks import AbsTask

from .dry_run import check_task, show_check
from .encoder import MeasuredEncoder, Prompts
from .loading import load_encoder
from .scorecard import Row, write_scorecard
from .suite import Suite, SuiteError, read_suite
from .task_run import describe, run_task, suite_tasks

BASELINES = "baselines"  # in `--against`: the baselines of the suite


def run_suite(options: argparse.Namespace) -> int:
    """Runs or checks the suite of a command line (`evaluate_vipolyqwen.py`); returns the exit code."""
    datasets.disable_progress_bars()  # mteb casts and maps hundreds of small tables
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


def load(name: str, prompts: Prompts, options: argparse.Namespace) -> MeasuredEncoder:
    """Loads a model as an encoder of mteb."""
    return load_encoder(name, prompts, options.device, options.dtype, options.trust_remote_code)


def baselines(suite: Suite, names: list[str]) -> list[str]:
    """Returns the distinct models of `--against`, with `baselines` expanded."""
    if BASELINES in names and not suite.baselines:
        raise SuiteError(f"--against {BASELINES}: the suite {suite.name!r} has no baselines; name models.")
    expanded = [model for name in names for model in (suite.baselines if name == BASELINES else [name])]
    return list(dict.fromkeys(expanded))


def run_all(name: str, tasks: list[AbsTask | Row], prompts: Prompts, options: argparse.Namespace) -> list[Row]:
    """Returns the rows of one model; if a baseline cannot be loaded, all of them have failed."""
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
    """Prints the check of every task; returns the exit code."""
    rows = [check_task(encoder, task) if isinstance(task, AbsTask) else task for task in tasks]
    print(show_check(rows))
    return int(any(row["status"] == "failed" for row in rows))
