"""Studies of the hypotheses: variants and questions in a YAML file, many seeds, and the power that these give.

    python benchmarks/studies.py recipes/studies/losses.yaml [--base MODEL ...] [--seeds 8] [--minutes 20]

A study names a recipe (data and settings), variants that change it, and questions that compare two of them. `train:
heads` trains new poolings and projections on the frozen towers of a base, in seconds a run (frozen_heads.py); `train:
all` trains everything. A GPU is used if there is one. Runs are cached in OUTPUT_DIR by all that determines them; after
`--minutes` no run is started, and the same command resumes. Writes results/studies/NAME.json, .md and .svg.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from ablation_runs import (
    QUIET,
    HeldOut,
    Settings,
    Stage,
    Study,
    code_digest,
    data_digest,
    declared_losses,
    digest,
    files_digest,
    measured,
    repository_digest,
)
from frozen_heads import Heads, Rows, States, head_vectors, tower_states, train_heads
from pair_vectors import collate
from result_files import RESULTS, machine, versions
from space_geometry import geometry
from study_report import MEASURES, write_report

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import Task, with_prefix_sides
from vipolyqwen.data.sources import PairDataset, load_pairs
from vipolyqwen.evaluation.metrics import six_directions, spearman
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.training.arguments import DataArguments, LossArguments, read_recipe
from vipolyqwen.training.build import build_loss, build_tasks

MODES = ("heads", "all")


@dataclass(frozen=True)
class Variants(Study):
    """A study whose variants are changes of settings.

    Attributes:
        variants: name -> changes of the recipe.
        questions: what is asked, see `study_report.Question`.
        train: heads or all.
        fresh: whether heads start anew.
        rows: first rows of each source that are trained on; `None`: all.
        shares: task -> its share of the rows, in place of the sources' weights.
        group_by: columns whose values, with the task, make a cell.
        directions: column whose equal values name one scene, for the six directions between modalities.
        rivals: column whose equal values, within a group, name the two pairs on one image that differ in the task.
    """

    variants: Mapping[str, Settings] = field(default_factory=dict)
    questions: Sequence[Mapping[str, Any]] = ()
    train: str = "heads"
    fresh: bool = True
    rows: int | None = None
    shares: Mapping[str, float] | None = None
    group_by: str | Sequence[str] | None = None
    directions: str | None = None
    rivals: str | None = None

    def settings(self, name: str) -> dict[str, Any]:
        """The recipe with a variant's changes, and the losses of declared tasks that follow from them."""
        merged = {**self.recipe, **self.variants[name]}
        return merged | declared_losses(merged)

    def stage(self, name: str, seed: int) -> Stage:
        """The run of `train: all`."""
        model = {"model": self.bases[seed % len(self.bases)]}
        return Stage({**self.settings(name), **QUIET, **model, "seed": seed})


class Cells(HeldOut):
    """The held-out pairs, with ρ of each cell, six directions and the geometry of the space."""

    def __init__(self, study: Variants) -> None:
        super().__init__(study, study.group_by)
        self.scenes = None if study.directions is None else self._column(study, study.directions)
        self.rivals = {} if study.rivals is None else rivals_of(self._column(study, study.rivals))

    def _column(self, study: Variants, name: str) -> list[str | None]:
        """The values of a column of the held-out pairs."""
        sources = study.recipe["eval_data"]
        renamed = [{**source, "columns": {**source.get("columns", {}), "group": name}} for source in sources]
        return load_pairs(renamed, self.tasks, 1).groups()

    def measure(self, vectors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Adds to the ranks what else a study reports."""
        found = super().measure(vectors)
        found["rho"] = {}
        for cell, rows in self.cells.items():
            value = spearman(*(vectors[name][torch.tensor(rows)] for name in ("a", "b", "similarity_scores")))
            if value == value:
                found["rho"]["/".join(cell)] = value
        found["geometry"] = geometry(vectors, self.row_tasks, self.pairs_above)
        if self.scenes is not None:
            found["directions"] = self._directions(vectors)
        if self.rivals:
            found["rivals"] = {"/".join(cell): self._above_rivals(vectors, rows) for cell, rows in self.cells.items()}
        return found

    def _above_rivals(self, vectors: Mapping[str, torch.Tensor], rows: Sequence[int]) -> float:
        """Share of queries that are nearer to their side b than to that of the other task's pair; chance is 0.5."""
        a, b = vectors["a"][rows], vectors["b"]
        nearer = (a * b[rows]).sum(dim=1) > (a * b[[self.rivals[row] for row in rows]]).sum(dim=1)
        return nearer.float().mean().item()

    @cached_property
    def pairs_above(self) -> torch.Tensor:
        """Whether each pair belongs together, (pairs,) bool."""
        scores = self.columns["similarity_scores"]
        return scores.isnan() | (scores >= (self.min_score or 0.0))

    def _directions(self, vectors: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """recall@1 of the six directions among the scenes of each group, the mean of the groups."""
        totals: dict[str, list[float]] = {}
        for group in sorted({cell[1] for cell in self.cells}):
            rows = {task: self.cells[task, group] for task in ("image_caption", "audio")}
            if [self.scenes[row] for row in rows["image_caption"]] != [self.scenes[row] for row in rows["audio"]]:
                raise ValueError(f"The images and the audio of {group!r} show other scenes; the directions need both.")
            sides = {
                "text": vectors["b"][rows["image_caption"]],
                "image": vectors["a"][rows["image_caption"]],
                "audio": vectors["a"][rows["audio"]],
            }
            for name, figures in six_directions(sides).items():
                totals.setdefault(name, []).append(figures["recall@1"])
        return {name: sum(values) / len(values) for name, values in totals.items()}


def rivals_of(names: Sequence[str | None]) -> dict[int, int]:
    """The other row of the same name for each row.

    Raises:
        ValueError: a name that is not that of two rows.
    """
    members: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    for name, rows in members.items():
        if name is None or len(rows) != 2:
            raise ValueError(f"Rivals come in twos, but {len(rows)} pairs have the value {name!r}; name others.")
    return {row: other for rows in members.values() for row, other in (rows, rows[::-1])}


class FrozenBase:
    """A base whose towers stay as they are: its states of the training and held-out pairs."""

    def __init__(self, study: Variants, held_out: Cells, path: str) -> None:
        self.study, self.held_out, self.path = study, held_out, path
        self.model = ViPolyQwenModel.from_pretrained(path).eval()
        if torch.cuda.is_available():
            self.model.cuda()
        self._states: dict[str, States] = {}

    @cached_property
    def pairs(self) -> PairDataset:
        """The training pairs."""
        return load_pairs(self.study.recipe["train_data"], self.study.tasks, 1, check_media=False)

    @cached_property
    def sources(self) -> list[list[int]]:
        """Rows of each source that are trained on, as positions in the states."""
        first, found = 0, []
        for length in self.pairs.source_lengths:
            count = min(length, self.study.rows or length)
            found.append(list(range(first, first + count)))
            first += count
        return found

    def _rows(self) -> list[int]:
        starts = [0]
        for length in self.pairs.source_lengths:
            starts.append(starts[-1] + length)
        return [start + n for start, rows in zip(starts, self.sources, strict=False) for n in range(len(rows))]

    def states(self, tasks: Mapping[str, Task], which: str) -> States:
        """The states of the training ("train") or the held-out ("eval") pairs with the prefixes of these tasks."""
        key = digest([which, {name: task.prefix_sides for name, task in tasks.items()}])
        if key not in self._states:
            processor = ViPolyQwenProcessor.from_pretrained(self.path, config=self.model.config)
            length = self.study.recipe.get("max_length", 8192)
            processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, length)
            for task in tasks.values():
                processor.add_task(task.name, task.prefix, task.prefix_sides)
            if len(processor.tokenizer) > self.model.get_input_embeddings().num_embeddings:
                raise ValueError(
                    f"{self.path} has no token of a prefix of {', '.join(tasks)}; train the base on them."
                )
            collator = MixedBatchCollator(processor, tasks, prefix_dropout=0.0, with_negatives=False)
            if which == "eval":
                batches = collate(self.held_out.pairs, collator, 64)
            else:
                chosen = self._rows()
                parts = [chosen[first : first + 64] for first in range(0, len(chosen), 64)]
                batches = (collator([self.pairs[row] for row in part]) for part in parts)
            self._states[key] = tower_states(self.model, batches)
        return self._states[key]

    def mixture(self, settings: Settings, states: States) -> Rows:
        """The sources that a variant trains on, with their weights."""
        tasks = list(self.study.tasks)
        left = [tasks.index(name) for name in settings.get("without_tasks") or ()]
        kinds = states.facts["data_type"].tolist()
        kept = [[row for row in rows if kinds[row] not in left] for rows in self.sources]
        if self.study.shares is None:
            weights = self.pairs.source_weights
        else:
            names = [tasks[kinds[rows[0]]] for rows in self.sources]
            weights = [self.study.shares.get(name, 0.0) / len(rows) for name, rows in zip(names, kept, strict=True)]
            largest = max(weights)
            weights = [weight / largest for weight in weights]
        chosen = [(rows, weight) for rows, weight in zip(kept, weights, strict=True) if rows and weight]
        return Rows(*zip(*chosen, strict=True))

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Trains and measures one variant."""
        settings = self.study.settings(name)
        data = DataArguments(**_known(DataArguments, settings))
        tasks, bare = build_tasks(data), with_prefix_sides(self.study.tasks, dict.fromkeys(self.study.tasks, "none"))
        torch.manual_seed(seed)
        heads = Heads(self.model, settings, self.study.fresh)
        loss = build_loss(LossArguments(**_known(LossArguments, settings)), data.tasks, list(tasks))
        started = time.perf_counter()
        if settings["max_steps"]:
            views = self.states(tasks, "train"), self.states(bare, "train")
            rows = self.mixture(settings, views[0])
            share = sum(map(len, rows.sources)) / sum(map(len, self.sources)) if settings.get("without_tasks") else 1
            size = max(2, round(settings["per_device_train_batch_size"] * share))
            losses = train_heads(heads, views, rows, loss, {**settings, "per_device_train_batch_size": size}, seed)
        else:
            losses = {}
        figures = {
            view: self.held_out.measure(head_vectors(heads.eval(), self.states(of, "eval")))
            for view, of in {"own": tasks, "bare": bare}.items()
        }
        return figures | {"losses": losses, "seconds": time.perf_counter() - started}


def _known(kind: type, settings: Settings) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in settings.items() if name in names}


def read_study(path: Path, bases: Sequence[str] | None, folder: Path) -> Variants:
    """Reads a study's file.

    Raises:
        ValueError: an unknown key or mode, or a question about a variant that the study does not have.
    """
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {"recipe", "base", "settings", *(item.name for item in fields(Variants) if item.name not in ("bases",))}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"{path} has the unknown keys {unknown}; known: {sorted(known)}.")
    recipe = read_recipe(given.pop("recipe")) | given.pop("settings", {})
    bases = tuple(bases or [given.pop("base")])
    given.pop("base", None)
    study = Variants(recipe, bases, folder, **given)
    if study.train not in MODES:
        raise ValueError(f"{path}: `train` is {study.train!r}; it must be one of {', '.join(MODES)}.")
    for question in study.questions:
        if question.get("figure", "recall") not in MEASURES:
            raise ValueError(f"{path}: `figure` is {question['figure']!r}; it must be one of {', '.join(MEASURES)}.")
        for side in ("ours", "theirs"):
            if question[side] not in study.variants:
                raise ValueError(f"{path}: {side} {question[side]!r} is none of {', '.join(study.variants)}.")
    return study


def run_key(study: Variants, name: str, seed: int) -> str:
    """Hash of all that determines a run of heads."""
    here = Path(__file__).parent
    code = files_digest([here / f"{file}.py" for file in ("frozen_heads", "space_geometry", "ablation_runs")])
    return digest(
        {
            "settings": study.settings(name),
            "base": repository_digest(study.bases[seed % len(study.bases)]),
            "seed": seed,
            "how": [study.fresh, study.rows, study.shares, study.group_by, study.directions, study.rivals],
            "data": {
                s["path"]: data_digest(s["path"]) for s in (*study.recipe["train_data"], *study.recipe["eval_data"])
            },
            "code": [code_digest(), code],
            "versions": versions(),
        }
    )


def run_all(study: Variants, seeds: int, minutes: float) -> tuple[dict[str, list[dict[str, Any]]], Cells]:
    """All runs, seed by seed, until the time is over; the last seed may lack variants and is then left out."""
    held_out, bases = Cells(study), {}
    deadline = time.perf_counter() + 60 * minutes
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in study.variants}
    for seed in range(seeds):
        of_seed = {}
        for name in study.variants:
            if study.train == "all":
                if time.perf_counter() < deadline:
                    of_seed[name] = measured(study, held_out, name, seed, digest([study.group_by]))
                continue
            path = study.folder / "heads" / f"{run_key(study, name, seed)}.json"
            if not path.is_file() and time.perf_counter() < deadline:
                base = study.bases[seed % len(study.bases)]
                bases[base] = bases.get(base) or FrozenBase(study, held_out, base)
                path.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(bases[base].run(name, seed))
                path.with_suffix(".unfinished").write_text(text, encoding="utf-8")
                path.with_suffix(".unfinished").rename(path)
            if path.is_file():
                of_seed[name] = json.loads(path.read_text(encoding="utf-8"))
        if len(of_seed) < len(study.variants):
            break
        for name, figures in of_seed.items():
            runs[name].append(figures)
        print(f"seed {seed}: {sum(figures['seconds'] for figures in of_seed.values()):.0f} s", flush=True)
    return runs, held_out


def main() -> None:
    """Reads the study, makes missing runs, writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--base", nargs="+", help="models to start from, seed by seed in turn; default: the study's")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=600, help="no run is started after them")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/studies"))
    parser.add_argument("--out", type=Path, help="OUT.md, .json and .svg; default: results/studies/NAME")
    options = parser.parse_args()
    study = read_study(options.study, options.base, options.output_dir)
    runs, held_out = run_all(study, options.seeds, options.minutes)
    if not next(iter(runs.values())):
        raise SystemExit(f"No seed is complete after {options.minutes} minutes; repeat the command to go on.")
    results = {
        "title": options.study.read_text(encoding="utf-8").splitlines()[0].lstrip("# "),
        "command": shlex.join(["python", *sys.argv]),
        "bases": study.bases,
        "train": study.train,
        "steps": study.recipe.get("max_steps"),
        "batch_size": study.recipe["per_device_train_batch_size"],
        "learning_rate": study.recipe["learning_rate"],
        "variants": study.variants,
        "questions": study.questions,
        "runs": runs,
        "chance": {"/".join(cell): found.chance for cell, found in held_out.searches.items()},
        "queries": {"/".join(cell): len(found.queries) for cell, found in held_out.searches.items()},
        "minutes": sum(run["seconds"] for of_name in runs.values() for run in of_name) / 60,
        "machine": machine(),
        "versions": versions(),
    }
    out = options.out or RESULTS / "studies" / options.study.stem
    write_report(results, out)


if __name__ == "__main__":
    main()
