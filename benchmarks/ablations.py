"""The papers' ablations and hypotheses, answered by runs that are paired by seed (`make ablations`).

    python benchmarks/ablations.py [--seeds 3] [--steps 40] [--output_dir DIR] [--out FILE]
    python benchmarks/ablations.py --recipe RECIPE.yaml [--steps N] [--group_by language]

On the demo world every seed has a separate tiny base, and a warm-up on InfoNCE replaces pretrained backbones: text
first, then all tasks. Variants that change the warm-up (pooling, left-out tasks) get a separate one; the others share
one. Then each variant trains on the same rows in the same order. `--recipe` studies the model and pairs of a recipe;
`--text_steps` or `--warm_steps` add a warm-up. Results are cached in OUTPUT_DIR under a hash of their settings, so
that the same command resumes an interrupted study.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from ablation_report import write_report
from ablation_runs import VARIANTS, HeldOut, Study, left_out, measured
from demo_runs import write_base, write_parallel
from result_files import RESULTS, machine, versions
from sklearn.feature_extraction.text import TfidfVectorizer

from vipolyqwen.demo.world import write_corpus
from vipolyqwen.evaluation.memory import peak_memory
from vipolyqwen.training.arguments import read_recipe

ROOT = Path(__file__).parent.parent
DEMO_STEPS = {"text_steps": 120, "warm_steps": 140, "warm_learning_rate": 1e-3, "steps": 40}
DEMO_BATCH = 96  # with these steps three seeds take three quarters of an hour
# How often an epoch visits the rows of a task: reading is learned slowest, then hearing.
DEMO_WEIGHTS = {"text_pair": 0.8, "instr": 0.5, "ocr": 1.6, "vqa_single": 0.4, "vqa_multi": 0.25, "audio": 2.4}
DEMO_WEIGHTS["image_caption"] = 1.2
SCENES = 80  # held out, in each of three languages
NGRAMS = {"analyzer": "char_wb", "ngram_range": (2, 4)}


def main() -> None:
    """Trains and measures missing runs, compares all, writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, help="base of the study; default: the demo world's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each variant; default: the recipe's")
    parser.add_argument("--text_steps", type=int, help="warm-up on texts alone")
    parser.add_argument("--warm_steps", type=int, help="warm-up on everything after it")
    parser.add_argument("--warm_learning_rate", type=float, help="of both warm-ups; default: the recipe's")
    parser.add_argument("--batch_size", type=int, help=f"pairs a step; default: the recipe's, or {DEMO_BATCH}")
    parser.add_argument("--group_by", help="column of the held-out pairs: retrieval is within each of its values")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablations"))
    parser.add_argument("--out", type=Path, default=RESULTS / "ablations", help="OUT.md, .json and .svg")
    options = parser.parse_args()
    started = time.perf_counter()
    if options.recipe is None:
        study, group_by = demo_study(options), "language"
    else:
        study, group_by = recipe_study(options), options.group_by
    results = run(study, options.variants, options.seeds, group_by)
    results |= {
        "command": shlex.join(["python", *sys.argv]),
        "steps": {"text": study.text_steps, "warm": study.warm_steps, "run": study.recipe.get("max_steps")},
        "batch_size": study.recipe["per_device_train_batch_size"],
        "learning_rate": study.recipe["learning_rate"],
        "demo": options.recipe is None,
        "minutes": (time.perf_counter() - started) / 60,
        "machine": machine(),
        "versions": versions(),
    }
    write_report(results, options.out)


def demo_study(options: argparse.Namespace) -> Study:
    """The demo world's mixture with the default prefix dropout, measured on the same scenes in three languages."""
    folder: Path = options.output_dir
    corpus = folder / "corpus"
    if not (corpus / "trimodal.jsonl").is_file():
        write_corpus(corpus)
    if not (corpus / "parallel.jsonl").is_file():
        write_parallel(corpus, SCENES)
    bases = [folder / f"base{seed}" for seed in range(options.seeds)]
    for seed, base in enumerate(bases):
        if not (base / "model.safetensors").is_file():
            write_base(corpus, seed, base)
    text = (ROOT / "recipes/demo.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(text.replace("outputs/demo/corpus", corpus.as_posix()))
    recipe |= {"prefix_dropout": 0.1, "save_strategy": "no"}
    recipe["train_data"] = [source for source in recipe["train_data"] if Path(source["path"]).stem in DEMO_WEIGHTS]
    for source in recipe["train_data"]:
        source["weight"] = DEMO_WEIGHTS[Path(source["path"]).stem]
    recipe["eval_data"] = [{"path": str(corpus / "parallel.jsonl"), "media_root": str(corpus)}]
    recipe["per_device_train_batch_size"] = options.batch_size or DEMO_BATCH
    given = {name: value for name, value in vars(options).items() if name in DEMO_STEPS and value is not None}
    steps = DEMO_STEPS | given
    recipe |= {"max_steps": steps.pop("steps")}
    return Study(recipe, tuple(map(str, bases)), folder, **steps)


def recipe_study(options: argparse.Namespace) -> Study:
    """Returns the study of a recipe's model and pairs."""
    recipe = {"per_device_train_batch_size": 8, "learning_rate": 5e-5, **read_recipe(options.recipe)}
    for name in ("train_data", "eval_data"):
        if not recipe.get(name):
            raise ValueError(f"{options.recipe} has no `{name}`; the study trains on one and measures on the other.")
    if options.steps is not None:
        recipe["max_steps"] = options.steps
    if options.batch_size:
        recipe["per_device_train_batch_size"] = options.batch_size
    steps = (options.text_steps or 0, options.warm_steps or 0)
    return Study(recipe, (), options.output_dir, *steps, options.warm_learning_rate)


def run(study: Study, names: list[str], seeds: int, group_by: str | None) -> dict[str, Any]:
    """Every run's figures, what was searched, and what n-grams find there."""
    if "base" not in names:
        names = ["base", *names]
    names = [name for name in names if applies(study, name)]
    held_out = HeldOut(study, group_by)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            figures = measured(study, held_out, name, seed, group_by)
            runs[name].append(figures)
            ranks = [rank for cell in figures["own"]["ranks"].values() for rank in cell]
            found = sum(rank == 1 for rank in ranks) / len(ranks)
            print(f"seed {seed}, {name}: recall@1 {found:.3f}, {figures['seconds']:.0f} s", flush=True)
    tasks = {
        name: {
            "audio": bool({"audio_a", "audio_b"} & set(task.needed())),
            "text": not set(task.needed()) - {"score"},
        }
        for name, task in held_out.tasks.items()
        if name in held_out.row_tasks
    }
    return {
        "runs": runs,
        "tasks": tasks,
        "pairs": len(held_out.pairs),
        "peak_memory_mib": peak_memory() / 2**20,
        "left_out": {name: left_out(VARIANTS[name].leaves_out, held_out.tasks) for name in names},
        "chance": {"/".join(cell): found.chance for cell, found in held_out.searches.items()},
        "candidates": {"/".join(cell): len(found.candidates) for cell, found in held_out.searches.items()},
        "ngrams": ngram_ranks(held_out, [name for name, kind in tasks.items() if kind["text"]]),
    }


def applies(study: Study, name: str) -> bool:
    """Whether a variant differs from the base of this study and leaves something to train on."""
    what = VARIANTS[name].leaves_out
    if what != "nothing":
        return 0 < study.kept_share(tuple(left_out(what, study.tasks))) < 1
    return name == "base" or study.stage(name, 0).key != study.stage("base", 0).key


def ngram_ranks(held_out: HeldOut, tasks: list[str]) -> dict[str, list[int]]:
    """Ranks by the cosine of TF-IDF bags of character n-grams, document frequencies from the held-out texts."""
    sides = list(zip(*held_out.pairs.texts(), strict=True))
    grams = TfidfVectorizer(**NGRAMS).fit([*sides[0], *sides[1]])
    a, b = (grams.transform(side) for side in sides)
    return {
        "/".join(cell): found.ranks(torch.from_numpy((a[found.queries] @ b[found.candidates].T).toarray())).tolist()
        for cell, found in held_out.searches.items()
        if cell[0] in tasks
    }


if __name__ == "__main__":
    main()
