"""Spearman's ρ of text_pair with the prefix on both sides, on side a and on no side, paired by seed.

    python benchmarks/prefix_sides.py [--seeds 3] [--steps 200]
    python benchmarks/prefix_sides.py --recipe recipes/real_pairs.yaml --scores_by source --out prefix_sides_real

Trains an untrained small base on the texts of the demo world, or of a recipe, once for each setting and seed, on the
same rows in the same order, and measures each model with prefixes on both sides, on side a and on none, so that each
setting of training meets each of evaluation. ρ is measured among graded pairs of one scale (`--scores_by`, a column of
the pairs) and averaged over the scales. Runs and figures are kept in OUTPUT_DIR; the same command resumes.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from ablation_runs import QUIET, Stage, left_out
from pair_vectors import collate, embed
from paired_statistics import spread
from result_files import RESULTS, machine, versions

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.data.sources import PairDataset, load_pairs
from vipolyqwen.demo.rows import Split
from vipolyqwen.demo.scenes import held_out_scenes, train_scenes
from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.demo.world import evaluation_rows, training_rows, write_rows
from vipolyqwen.evaluation.metrics import spearman
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.training.arguments import read_recipe

TRAINED = {"both": {"prefix_sides": "task"}, "a": {"prefix_sides": "a"}, "none": {"prefix_dropout": 1.0}}
TASK, TEXT_TASKS = "text_pair", ("text_pair", "instr")
FEWEST_GRADED = 100  # pairs of a scale
SIZES = {"hidden_size": 128, "layers": 2, "vision_size": 64, "audio_size": 64, "vocab_size": 4000}
SETTINGS = {"loss_table": "mixed", "task_weighting": "none", "lr_scheduler_type": "cosine", "warmup_steps": 20}
SETTINGS |= {"learning_rate": 1e-3, "weight_decay": 0.01, "adam_beta2": 0.98, "max_length": 128, "save_strategy": "no"}


def main() -> None:
    """Trains and measures what is not known yet, and writes OUT.json and OUT.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, help="train_data, eval_data and tasks; default: the demo world's texts")
    parser.add_argument("--scores_by", help="column whose values have separate scales of scores")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=96)
    parser.add_argument("--prefix_dropout", type=float, default=0.1, help="for prefixes on both sides or on side a")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/prefix_sides"))
    parser.add_argument("--out", default="prefix_sides", help="name in benchmarks/results")
    options = parser.parse_args()
    started = time.perf_counter()
    recipe = read_recipe(options.recipe) if options.recipe else demo_texts(options.output_dir / "corpus")
    runs = [run(recipe, sides, seed, options) for seed in range(options.seeds) for sides in TRAINED]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "pairs": runs[0]["pairs"],
        "steps": options.steps,
        "batch_size": options.batch_size,
        "runs": runs,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "machine": machine(),
        "versions": versions(),
    }
    (RESULTS / f"{options.out}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    page = report(result)
    (RESULTS / f"{options.out}.md").write_text(page, encoding="utf-8")
    print(page)


def demo_texts(folder: Path) -> dict[str, Any]:
    """Writes the demo world's pairs of texts; returns their recipe."""
    if not (folder / "eval.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        split = Split("train", train_scenes(0))
        for task in TEXT_TASKS:
            write_rows(folder / f"{task}.jsonl", (row for row, _ in training_rows(task, split, 0, 3)))
        held_out = evaluation_rows(Split("eval", held_out_scenes(0)), 0)
        write_rows(folder / "eval.jsonl", (row for row, _ in held_out if row["task"] == TASK))
    return {
        "train_data": [{"path": str(folder / f"{task}.jsonl")} for task in TEXT_TASKS],
        "eval_data": [{"path": str(folder / "eval.jsonl")}],
        "nce_min_score": 0.9,  # as in recipes/demo.yaml
    }


def run(recipe: dict[str, Any], sides: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one training, those of an earlier run of the same settings if there are any."""
    names = ("train_data", "tasks", "nce_min_score")
    settings = {name: recipe[name] for name in names if name in recipe} | SETTINGS | QUIET
    settings |= {"max_steps": options.steps, "per_device_train_batch_size": options.batch_size, "seed": seed}
    without = left_out("sounds and images", declare_tasks(recipe.get("tasks")))
    settings |= {"without_tasks": without, "check_media": False, "prefix_dropout": options.prefix_dropout}
    settings |= TRAINED[sides] | {"model": str(base(recipe, without, seed, options.output_dir))}
    stage = Stage(settings)
    path = options.output_dir / "figures" / f"{stage.key}.json"
    if not path.is_file():
        started = time.perf_counter()
        found = measure(stage.train(options.output_dir / "models"), recipe, options.scores_by)
        found |= {"trained": sides, "seed": seed, "seconds": round(time.perf_counter() - started, 1)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    print(f"seed {seed}, trained on {sides}: {found['spearman']}", flush=True)
    return found


def base(recipe: dict[str, Any], without: list[str], seed: int, folder: Path) -> Path:
    """Returns an untrained model for the seed; its tokenizer knows the training texts."""
    place = folder / f"base{seed}-{Path(recipe['train_data'][0]['path']).parent.name}"
    if not (place / "model.safetensors").is_file():
        pairs = load_pairs(recipe["train_data"], declare_tasks(recipe.get("tasks")), 1, False, without)
        torch.manual_seed(seed)
        save_repository(*build_tiny_base((text for row in pairs.texts() for text in row), **SIZES), place)
    return place


def measure(repository: Path, recipe: dict[str, Any], scores_by: str | None) -> dict[str, Any]:
    """Returns ρ for each setting of evaluation, the mean over the scales, and the number of graded pairs of each."""
    model = ViPolyQwenModel.from_pretrained(repository).eval()
    processor = ViPolyQwenProcessor.from_pretrained(repository, config=model.config)
    pairs, groups = held_out(recipe, scores_by)
    figures, counts = {}, {}
    for sides in TRAINED:
        tasks = declare_tasks(recipe.get("tasks"), sides)
        vectors = embed(model, collate(pairs, MixedBatchCollator(processor, tasks, 0.0, with_negatives=False), 64))
        scales = graded_rows(vectors["similarity_scores"], groups)
        counts = {name: len(rows) for name, rows in scales.items()}
        figures[sides] = statistics.mean(
            spearman(*(vectors[name][rows] for name in ("a", "b", "similarity_scores"))) for rows in scales.values()
        )
    return {"spearman": figures, "pairs": counts}


def held_out(recipe: dict[str, Any], scores_by: str | None) -> tuple[PairDataset, list[str | None]]:
    """Returns the held-out text pairs, and each one's value of the column `scores_by`."""
    sources = recipe["eval_data"]
    if scores_by is not None:
        sources = [{**source, "columns": {**source.get("columns", {}), "group": scores_by}} for source in sources]
    tasks = declare_tasks(recipe.get("tasks"))
    pairs = load_pairs(sources, tasks, 1, False, [task for task in tasks if task != TASK])
    return pairs, pairs.groups() if scores_by is not None else [None] * len(pairs)


def graded_rows(scores: torch.Tensor, groups: list[str | None]) -> dict[str, torch.Tensor]:
    """Returns the rows of each scale that has enough graded pairs, of more than two scores.

    Raises:
        ValueError: no scale has.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for row, (score, group) in enumerate(zip(scores.tolist(), groups, strict=True)):
        if score == score:
            members[group or "all"].append(row)
    found = {name: torch.tensor(rows) for name, rows in members.items()}
    kept = {
        name: rows for name, rows in found.items() if len(rows) >= FEWEST_GRADED and len(scores[rows].unique()) > 2
    }
    if not kept:
        raise ValueError(
            f"No scale has {FEWEST_GRADED} graded pairs of more than two scores; name others in eval_data."
        )
    return kept


def report(result: dict[str, Any]) -> str:
    """Returns the page: ρ of each training under each evaluation, and the differences to the prefix on both sides."""
    by_run = {(run["trained"], run["seed"]): run["spearman"] for run in result["runs"]}
    seeds = sorted({seed for _, seed in by_run})
    lines = [
        "# Sides of the prefix",
        "",
        f"Spearman's ρ of text_pair, mean ± standard deviation of {len(seeds)} seeds, on held-out graded pairs "
        f"({', '.join(f'{name} {count}' for name, count in result['pairs'].items())}); {result['steps']} steps of "
        f"{result['batch_size']} pairs from random weights. `{result['command']}`, {result['minutes']} minutes on "
        f"{result['machine']}.",
        "",
        "| trained with the prefix on | evaluated: both sides | side a | no side | as trained, less both sides |",
        "|---|---|---|---|---|",
    ]
    for sides in TRAINED:
        cells = [spread([by_run[sides, seed][evaluated] for seed in seeds], 3) for evaluated in TRAINED]
        ahead = [by_run[sides, seed][sides] - by_run["both", seed]["both"] for seed in seeds]
        name = {"both": "both sides", "a": "side a", "none": "no side"}[sides]
        lines.append(f"| {name} | {' | '.join(cells)} | {spread(ahead, 3, '+')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
