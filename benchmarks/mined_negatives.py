"""Recall@1 of held-out text pairs after training with and without mined hard negatives, paired by seed.

    python benchmarks/mined_negatives.py --recipe recipes/real_pairs.yaml [--seeds 3] [--steps 250]

Trains an untrained small base on the recipe's text pairs; mines negatives with that model, as `python -m
vipolyqwen.data mine` does; trains the same base anew on the same rows in the same order, with the negatives. Runs and
figures are kept in OUTPUT_DIR; the same command resumes.
"""

import argparse
import json
import random
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ablation_runs import QUIET, Stage, left_out
from pair_vectors import ALL, cells, collate, embed, load_groups, search
from paired_statistics import spread
from prefix_sides import SETTINGS, TASK, base
from result_files import RESULTS, machine, versions

from vipolyqwen.data.__main__ import main as data_command
from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.training.arguments import read_recipe

KINDS = ("without", "with")


def main() -> None:
    """Trains and measures what is not known yet, and writes results/mined_negatives.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, required=True, help="train_data and eval_data with text pairs")
    parser.add_argument("--group_by", default="language", help="column whose values are measured apart")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8000, help="training pairs, drawn once (default: 8000)")
    parser.add_argument("--steps", type=int, default=125)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--count", type=int, default=1, help="negatives of a row (default: 1)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/mined_negatives"))
    options = parser.parse_args()
    started = time.perf_counter()
    recipe = drawn(read_recipe(options.recipe), options.rows, options.output_dir)
    runs = [found for seed in range(options.seeds) for found in seed_runs(recipe, seed, options)]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "rows": options.rows,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "count": options.count,
        "runs": runs,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "machine": machine(),
        "versions": versions(),
    }
    (RESULTS / "mined_negatives.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    page = report(result)
    (RESULTS / "mined_negatives.md").write_text(page, encoding="utf-8")
    print(page)


def drawn(recipe: dict[str, Any], rows: int, folder: Path) -> dict[str, Any]:
    """Returns the recipe with some of its text pairs as training data; they are written once."""
    source = next(each for each in recipe["train_data"] if TASK in Path(each["path"]).parts)
    path = folder / TASK / f"train-{rows}.jsonl"
    if not path.is_file():
        lines = Path(source["path"]).read_text(encoding="utf-8").splitlines(keepends=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(random.Random(0).sample(lines, min(rows, len(lines)))), encoding="utf-8")
    return {**recipe, "train_data": [{**source, "path": str(path)}]}


def seed_runs(recipe: dict[str, Any], seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the figures of a seed: trained without mined negatives, and with those of that model."""
    without = left_out("sounds and images", declare_tasks(recipe.get("tasks")))
    names = ("train_data", "tasks", "nce_min_score")
    settings = {name: recipe[name] for name in names if name in recipe} | SETTINGS | QUIET
    settings |= {"max_steps": options.steps, "per_device_train_batch_size": options.batch_size, "seed": seed}
    settings |= {"loss_table": "nce", "check_media": False}
    settings["model"] = str(base(recipe, without, seed, options.output_dir))
    first = Stage(settings)
    found = [figures("without", first, recipe, seed, options)]
    folder = options.output_dir / "mined" / first.key
    if not (folder / "counts.json").is_file():
        mine(first.train(options.output_dir / "models"), settings, folder, options.count)
    mined = read_recipe(folder / "recipe.yaml")["train_data"]
    return [*found, figures("with", Stage(settings | {"train_data": mined}), recipe, seed, options, folder)]


def mine(model: Path, settings: dict[str, Any], folder: Path, count: int) -> None:
    """Writes the training pairs with the negatives that a model finds."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "given.yaml"
    recipe.write_text(json.dumps({name: settings[name] for name in ("train_data", "tasks")}), encoding="utf-8")
    started = time.perf_counter()
    data_command(["mine", str(recipe), "--model", str(model), "--out", str(folder), "--count", str(count)])
    counts = {"minutes_of_mining": round((time.perf_counter() - started) / 60, 1)}
    (folder / "counts.json").write_text(json.dumps(counts), encoding="utf-8")


def figures(
    kind: str, stage: Stage, recipe: dict[str, Any], seed: int, options: argparse.Namespace, mined: Path | None = None
) -> dict[str, Any]:
    """Returns recall@1 of one training, that of an earlier run of the same settings if there is one."""
    path = options.output_dir / "figures" / f"{stage.key}.json"
    if not path.is_file():
        started = time.perf_counter()
        found: dict[str, Any] = {"trained": kind, "seed": seed}
        repository = stage.train(options.output_dir / "models")
        found["seconds"] = round(time.perf_counter() - started, 1)
        found |= measure(repository, recipe, options.group_by)
        found |= {} if mined is None else json.loads((mined / "counts.json").read_text(encoding="utf-8"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    print(f"seed {seed}, {kind}: {found['recall@1']}", flush=True)
    return found


def measure(repository: Path, recipe: dict[str, Any], group_by: str) -> dict[str, Any]:
    """Returns recall@1 of the held-out text pairs by group and of all together, and the queries of each."""
    model = ViPolyQwenModel.from_pretrained(repository).eval()
    processor = ViPolyQwenProcessor.from_pretrained(repository, config=model.config)
    tasks = declare_tasks(recipe.get("tasks"))
    sources = [each for each in recipe["eval_data"] if TASK in Path(each["path"]).parts]
    pairs, groups = load_groups(sources, group_by, tasks, 1)
    vectors = embed(model, collate(pairs, MixedBatchCollator(processor, tasks, 0.0, with_negatives=False), 64))
    recalls, queries, chances = {}, {}, {}
    for (_, group), rows in cells([TASK] * len(pairs), groups).items():
        found = search(vectors, rows, recipe.get("nce_min_score", 0.5))
        if found.queries:
            ranks = found.ranks(vectors["a"][found.queries] @ vectors["b"][found.candidates].T)
            recalls[group] = (ranks <= 1).double().mean().item()
            queries[group], chances[group] = len(found.queries), found.chance
    return {"recall@1": recalls, "queries": queries, "chance": chances}


def report(result: dict[str, Any]) -> str:
    """Returns the page: recall@1 of both by group, and the difference by seed."""
    by_run = {(run["trained"], run["seed"]): run for run in result["runs"]}
    seeds = sorted({seed for _, seed in by_run})
    queries = result["runs"][0]["queries"]
    lines = [
        "# Mined negatives",
        "",
        f"Recall@1 of held-out text pairs, mean ± standard deviation of {len(seeds)} seeds; {result['steps']} steps "
        f"of {result['batch_size']} of {result['rows']} pairs from random weights, without and with {result['count']} "
        "mined negative(s) a row, mined by the model trained without. "
        f"`{result['command']}`, {result['machine']}.",
        "",
        "| pairs | queries | chance | without | with | difference | by seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in sorted(queries, key=lambda name: (name != ALL, name)):
        values = {kind: [by_run[kind, seed]["recall@1"][group] for seed in seeds] for kind in KINDS}
        gained = [one - other for one, other in zip(values["with"], values["without"], strict=True)]
        cells_of = [spread(values["without"], 3), spread(values["with"], 3), spread(gained, 3, "+")]
        listed = ", ".join(f"{gain:+.3f}" for gain in gained)
        chance = result["runs"][0]["chance"][group]
        lines.append(f"| {group} | {queries[group]} | {chance:.4f} | {' | '.join(cells_of)} | {listed} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
