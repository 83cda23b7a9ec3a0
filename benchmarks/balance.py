"""Do the task weightings balance the tasks? Three seeds of each on the demo world, made imbalanced (`make balance`).

    python benchmarks/balance.py [--output_dir outputs/balance] [--seeds 3] [--steps 100]

Half of all rows are graded text pairs (scores below 1), under the DLE losses (MSE × 20, Rank × 7). For every
seed a tiny model first trains on InfoNCE, in place of pretrained backbones; each weighting continues from it on the
same rows in the same order. Warm-ups in OUTPUT_DIR are reused. Writes balance.json and
balance.md to benchmarks/results.

A task's gradient share is the norm of its weighted loss's gradient by the embeddings over the sum of these norms; the
share ratio is the largest over the smallest of the tasks' means over the last quarter of a run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from demo_runs import write_base
from paired_statistics import interval, spread
from result_files import RESULTS, machine

from vipolyqwen.demo.world import read_rows, write_corpus, write_rows
from vipolyqwen.training.balance import share_ratio, task_means

ROOT = Path(__file__).parent.parent
WEIGHTINGS = {
    "none": "weighting_none",
    "table": "weighting_table",
    "inverse_loss ema": "weighting_inverse_loss_ema",
    "uncertainty": "weighting_uncertainty",
    "gradnorm": "weighting_gradnorm",
}
ROW_SHARES = {"text_pair": 0.50, "audio": 0.17, "ocr": 0.17, "instr": 0.09, "vqa_multi": 0.05, "vqa_single": 0.02}
TASK_ROWS = 2736  # training rows of each task in the demo corpus
FAST_GRADNORM = ["--task_weighting_options", '{"learning_rate": 0.1}']  # these runs are short
BALANCED, IMBALANCED = 3.0, 10.0  # share ratios: the bar for a weighting, and what `none` must be above to need one


def main() -> None:
    """Warms a model up for each seed, trains it with every weighting, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/balance"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of each run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = options.output_dir
    if not (folder / "corpus/trimodal.jsonl").is_file():
        write_corpus(folder / "corpus")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WEIGHTINGS}
    for seed in range(options.seeds):
        if not (folder / f"seed{seed}/warm/model.safetensors").is_file():
            warm_up(folder, seed)
        for name, recipe in WEIGHTINGS.items():
            output = folder / f"seed{seed}" / recipe
            recipes = [write_recipe(folder, seed), ROOT / f"recipes/ablations/{recipe}.yaml"]
            train(recipes, options.steps, seed, output, FAST_GRADNORM if name == "gradnorm" else [])
            runs[name].append(measure(output))
            shutil.rmtree(output)
            print(f"seed {seed}, {name}: {runs[name][-1]}", flush=True)
    report(runs, options.steps, options.results)


def warm_up(folder: Path, seed: int) -> None:
    """Trains a tiny base for the seed on InfoNCE: text first, then all tasks alike."""
    write_base(folder / "corpus", seed, folder / f"seed{seed}/base")
    stages = {
        "text": ({"text_pair": 3.0, "instr": 1.0}, {"steps": 400, "rows": 192, "model": "base"}),
        "warm": (dict.fromkeys(ROW_SHARES, 1.0) | {"audio": 2.0}, {"steps": 600, "rows": 112, "model": "text"}),
    }
    for name, (weights, how) in stages.items():
        recipe = settings(folder, weights) | {
            "model": str(folder / f"seed{seed}" / how["model"]),
            "loss_table": "nce",
            "per_device_train_batch_size": how["rows"],
            "eval_strategy": "no",
        }
        path = folder / f"seed{seed}-{name}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        train([path], how["steps"], seed, folder / f"seed{seed}" / name)


def write_recipe(folder: Path, seed: int) -> Path:
    """The imbalanced mixture under the DLE losses."""
    graded = [row for row in read_rows(folder / "corpus/train/text_pair.jsonl") if row["score"] < 1]
    write_rows(folder / "corpus/train/graded.jsonl", graded)
    rows = {task: len(graded) if task == "text_pair" else TASK_ROWS for task in ROW_SHARES}
    weights = {task: ROW_SHARES[task] * TASK_ROWS / rows[task] for task in ROW_SHARES}
    recipe = settings(folder, {"graded" if task == "text_pair" else task: w for task, w in weights.items()}) | {
        "model": str(folder / f"seed{seed}/warm"),
        "loss_table": "dle",
        "per_device_train_batch_size": 96,
        "learning_rate": 3.0e-4,
        "eval_strategy": "no",
        "eval_data": [{"path": str(folder / "corpus/eval.jsonl")}],
    }
    path = folder / f"seed{seed}-imbalanced.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def settings(folder: Path, weights: dict[str, float]) -> dict[str, Any]:
    """What all runs share."""
    corpus = folder / "corpus"
    sources = [
        {"path": str(corpus / f"train/{task}.jsonl"), "media_root": str(corpus), "weight": weight}
        for task, weight in weights.items()
    ]
    return {
        "train_data": sources,
        "check_media": False,
        "nce_min_score": 0.9,
        "learning_rate": 1.0e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 20,
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "monitor_steps": 1,
        "logging_steps": 5,
        "save_strategy": "no",
        "dataloader_num_workers": 1,
        "report_to": "none",
        "per_device_eval_batch_size": 64,
    }


def train(recipes: list[Path], steps: int, seed: int, output: Path, flags: Sequence[str] = ()) -> None:
    """One run of the training command."""
    command = [sys.executable, ROOT / "train_vipolyqwen.py", *recipes, "--output_dir", output, *flags]
    command += ["--overwrite_output_dir", "--max_steps", str(steps), "--seed", str(seed)]
    subprocess.run(command, check=True, env={"GOMP_SPINCOUNT": "5000", **os.environ})


def measure(output: Path) -> dict[str, Any]:
    """Share ratio, shares and held-out recall of a run."""
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    entries = [entry for entry in history if "loss" in entry]
    last = entries[-max(1, len(entries) // 4) :]
    held_out = json.loads((output / "eval_results.json").read_text(encoding="utf-8"))
    return {
        "share_ratio": share_ratio(last),
        "recall@1": held_out["eval_recall@1"],
        "shares": task_means(last, "gradient_share"),
        "recalls": {task: held_out[f"eval_{task}_recall@1"] for task in ROW_SHARES},
    }


def report(runs: dict[str, list[dict[str, Any]]], steps: int, folder: Path) -> None:
    """Writes balance.json and balance.md."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        name: {key: [run[key] for run in of_name] for key in ("share_ratio", "recall@1")}
        for name, of_name in runs.items()
    }
    (folder / "balance.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    rows = ", ".join(f"{task} {share:.0%}" for task, share in ROW_SHARES.items())
    lines = [
        "# Do the task weightings balance the tasks?",
        "",
        f"`make balance`, {len(runs['none'])} seeds, {steps} steps of 96 pairs from a model warmed up on InfoNCE, "
        f"on {machine()}, torch {torch.__version__}, transformers {transformers.__version__}.",
        f"Rows: {rows}; text pairs are graded, losses DLE. GradNorm's learning rate is 0.1, since the runs are short.",
        "Shares are those of the gradient by the embeddings, over the last quarter of the steps; recall@1 is that of "
        "held-out scenes, within each task. Mean ± standard deviation over the seeds.",
        "",
        "| weighting | largest / smallest share | mean recall@1 | recall@1 against `none`, same seed |",
        "|---|---|---|---|",
        *(
            f"| {name} | {spread(of_name['share_ratio'], 1)} | {spread(of_name['recall@1'], 3)} "
            f"| {spread(differences(figures, name), 3, sign='+')} |"
            for name, of_name in figures.items()
        ),
        "",
        "Share of the gradient norm:",
        "",
        *task_table(runs, "shares"),
        "",
        "Held-out recall@1:",
        "",
        *task_table(runs, "recalls"),
        "",
        "## Claims of the papers and measurements",
        "",
        *(f"- {sentence}" for sentence in verdicts(figures)),
        "",
    ]
    (folder / "balance.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def differences(figures: dict[str, dict[str, list[float]]], name: str) -> list[float]:
    """Recall of a weighting less that of `none`, seed by seed."""
    pairs = zip(figures[name]["recall@1"], figures["none"]["recall@1"], strict=True)
    return [own - plain for own, plain in pairs]


def task_table(runs: dict[str, list[dict[str, Any]]], key: str) -> list[str]:
    """One row a weighting, one column a task."""
    rows = [f"| weighting | {' | '.join(ROW_SHARES)} |", "|---" * (1 + len(ROW_SHARES)) + "|"]
    for name, of_name in runs.items():
        cells = [spread([run[key][task] for run in of_name], 3) for task in ROW_SHARES]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def verdicts(figures: dict[str, dict[str, list[float]]]) -> list[str]:
    """One sentence for each hypothesis, from the figures alone."""
    plain = statistics.mean(figures["none"]["share_ratio"])
    needed = "needs balancing by our bar" if plain > IMBALANCED else "does not need balancing by our bar"
    sentences = [
        f"Without weights the largest share is {plain:.1f} times the smallest: this {needed} ({IMBALANCED:.0f})."
    ]
    claims = {
        "table": "The published weights bring the tasks into balance (STW paper §3.1.2)",
        "inverse_loss ema": "Weights inverse to the loss bring the tasks into balance (STW paper §3.1.1)",
        "uncertainty": "Learned uncertainties bring the tasks into balance (Kendall et al. 2018)",
        "gradnorm": "Weights from gradient norms bring the tasks into balance (Chen et al. 2018)",
    }
    for name, claim in claims.items():
        ratio, change = statistics.mean(figures[name]["share_ratio"]), differences(figures, name)
        low, high = interval(change)
        recall = (
            "recall@1 is lower" if high < 0 else "recall@1 is higher" if low > 0 else "no change of recall@1 shown"
        )
        sentences.append(
            f"{claim}: {'held' if ratio < BALANCED else 'did NOT hold'}; ratio {ratio:.1f} (bar {BALANCED:.0f}), "
            f"{recall} ({statistics.mean(change):+.3f}, 95 % interval {low:+.3f} … {high:+.3f})."
        )
    return sentences


if __name__ == "__main__":
    main()
