"""The runs of the ablation study: variants as settings, warm-ups shared where settings allow it, all of it cached.

A run is named by a hash of everything that determines its result: its settings, those of the runs it continues, the
training and evaluation files, the training code and the libraries. A change of any of these makes new runs; an
interrupted study, or one with more seeds or variants, keeps the others.
"""

import gc
import glob
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from pair_vectors import ALL, Search, cells, collate, embed, load_groups, search
from result_files import versions

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import Task, declare_tasks, with_prefix_sides
from vipolyqwen.data.sources import PairDataset, load_pairs
from vipolyqwen.evaluation.metrics import spearman
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.train_vipolyqwen import main as train_main
from vipolyqwen.training.arguments import read_recipe
from vipolyqwen.training.losses import LOSS_TABLES

ROOT = Path(__file__).parent.parent
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """What differs from the base: a recipe of recipes/ablations, or tasks that are left out."""

    recipe: str | None = None
    leaves_out: str = "nothing"  # or "sounds", or "sounds and images"


VARIANTS = {
    "base": Variant(),
    "mean pooling": Variant("mean_pool"),
    "last token": Variant("last_token"),
    "NCE only": Variant("nce_only"),
    "fixed sum": Variant("fixed_sum"),
    "faithful losses": Variant("faithful_losses"),
    "STW weights": Variant("weighting_table"),
    "no prefix": Variant("no_prefix"),
    "no OCR prefix": Variant("no_ocr_prefix"),
    "no prefix dropout": Variant("no_prefix_dropout"),
    "no audio": Variant(leaves_out="sounds"),
    "text only": Variant(leaves_out="sounds and images"),
}
BEFORE_THE_LOSS = ("pooling",)  # settings of a variant that hold in its warm-up too
QUIET = {
    "eval_data": None,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "report_to": "none",
    "logging_strategy": "no",
    "monitor_steps": 0,
    "disable_tqdm": True,
    "resume_from_checkpoint": True,
}
# Replaces pretrained backbones: InfoNCE without prefixes, since pretrained backbones know none.
WARM_UP = {"loss_table": "nce", "task_weighting": "none", "prefix_dropout": 1.0, "warmup_steps": 20}
TEXT_ROWS = 192  # pairs of a batch of texts alone: they cost little


@dataclass(frozen=True)
class Stage:
    """A training run that continues another one, or starts from the model in its settings."""

    settings: Settings
    start: "Stage | None" = None

    @property
    def key(self) -> str:
        """Returns the hash of everything that determines the result; the order of settings does not matter."""
        model = self.settings.get("model")
        return digest(
            {
                "settings": self.settings,
                "start": self.start.key if self.start else repository_digest(model) if model else None,
                "data": {source["path"]: data_digest(source["path"]) for source in self.settings["train_data"]},
                "code": code_digest(),
                "versions": versions(),
            }
        )

    def train(self, folder: Path) -> Path:
        """The repository that the run, or an earlier one of the same key, leaves in `folder`."""
        place = folder / self.key
        finished = place / "finished"  # written last
        if not finished.is_file():
            settings = dict(self.settings) | {"output_dir": str(place)}
            if self.start is not None:
                settings = {name: value for name, value in settings.items() if name not in ("vlm", "audio")}
                settings["model"] = str(self.start.train(folder))
            place.mkdir(parents=True, exist_ok=True)
            (place / "recipe.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
            train_main([str(place / "recipe.yaml"), "--overwrite_output_dir"])
            gc.collect()  # a Trainer refers to itself
            finished.touch()
        return place


@dataclass(frozen=True)
class Study:
    """What all runs of a study share.

    Attributes:
        recipe: settings of the base, as `read_recipe` gives them.
        bases: the model of each seed; empty if all use the recipe's.
        folder: of warm-ups and cached figures.
        text_steps: steps of the warm-up on texts alone; 0: none.
        warm_steps: steps of the warm-up on everything after it; 0: none.
        warm_learning_rate: of both; `None`: the recipe's.
    """

    recipe: Settings
    bases: tuple[str, ...]
    folder: Path
    text_steps: int = 0
    warm_steps: int = 0
    warm_learning_rate: float | None = None

    def stage(self, name: str, seed: int) -> Stage:
        """The last run of a variant, with those that it starts from."""
        variant = VARIANTS[name]
        changes = read_recipe(ROOT / f"recipes/ablations/{variant.recipe}.yaml") if variant.recipe else {}
        early = {key: value for key, value in changes.items() if key in BEFORE_THE_LOSS}
        without = left_out(variant.leaves_out, self.tasks)
        base = {**self.recipe, **QUIET, "seed": seed} | ({"model": self.bases[seed]} if self.bases else {})
        rate = {} if self.warm_learning_rate is None else {"learning_rate": self.warm_learning_rate}
        start = None
        if self.text_steps:
            rows = {"per_device_train_batch_size": TEXT_ROWS, "max_steps": self.text_steps}
            only_text = {"without_tasks": left_out("sounds and images", self.tasks)}
            start = Stage(warm(base | early | rows | rate | only_text), start)
        without_some = {"without_tasks": without} if without else {}
        rows = {"per_device_train_batch_size": self.batch_size(tuple(without))}
        if self.warm_steps:
            steps = {"max_steps": self.warm_steps}
            start = Stage(warm(base | early | rows | rate | without_some | steps), start)
        return Stage(base | rows | without_some | changes | declared_losses(base | changes), start)

    @property
    def tasks(self) -> dict[str, Task]:
        """The six, and those that the recipe declares."""
        return declare_tasks(self.recipe.get("tasks"))

    def batch_size(self, without: tuple[str, ...]) -> int:
        """So many pairs a step that as many as in the base are of the tasks that are trained."""
        return max(2, round(self.recipe["per_device_train_batch_size"] * self.kept_share(without)))

    def kept_share(self, without: tuple[str, ...]) -> float:
        """Share of an epoch's pairs that are not of these tasks."""
        pairs = _train_pairs(json.dumps(self.recipe["train_data"]), json.dumps(self.recipe.get("tasks", {})))
        total = kept = 0.0
        first = 0
        for length, weight in zip(pairs.source_lengths, pairs.source_weights, strict=True):
            for task, count in pairs.task_counts(first, first + length).items():
                total += weight * count
                kept += 0 if task in without else weight * count
            first += length
        return kept / total


@lru_cache
def _train_pairs(sources: str, declared: str) -> PairDataset:
    return load_pairs(json.loads(sources), declare_tasks(json.loads(declared)), 1, check_media=False)


def warm(settings: Settings) -> dict[str, Any]:
    """These settings, but for a warm-up."""
    changed = {**settings, **WARM_UP}
    changed.pop("task_weighting_options", None)
    return changed | declared_losses(changed)


def declared_losses(settings: Settings) -> dict[str, Any]:
    """`tasks` with the losses that an ablation of the loss gives to every task."""
    table, declared = settings.get("loss_table"), settings.get("tasks")
    if table not in ("nce", "sum") or not declared:
        return {}
    loss = asdict(next(iter(LOSS_TABLES[table].values())))
    return {"tasks": {name: {**fields, "loss": loss} for name, fields in declared.items()}}


def left_out(what: str, tasks: Mapping[str, Task]) -> list[str]:
    """The tasks whose rows must have sounds, or sounds or images."""
    if what == "nothing":
        return []
    images = what == "sounds and images"
    needs = ["audio_a", "audio_b", *(["images_a", "images_b"] if images else [])]
    return [name for name, task in tasks.items() if set(needs) & set(task.needed())]


class HeldOut:
    """The held-out pairs of a study, and retrieval among them."""

    def __init__(self, study: Study, group_by: str | Sequence[str] | None, min_samples: int = 1) -> None:
        recipe, self.keeps = study.recipe, bool(study.bases)
        self.tasks = study.tasks
        self.min_score = recipe.get("nce_min_score", 0.5)
        self.pairs, groups = load_groups(recipe["eval_data"], group_by, self.tasks, min_samples)
        names = list(self.tasks)
        self.row_tasks = [names[number] for number in self.pairs.task_ids]
        found = cells(self.row_tasks, groups)
        self.cells = {cell: rows for cell, rows in found.items() if group_by is None or cell[1] != ALL}
        if group_by is not None and not self.cells:
            raise ValueError(f"No held-out pair has a value in the column {group_by!r}; name another one.")
        keys = [(row["a_key"], row["b_key"], row["score"]) for row in (self.pairs[i] for i in range(len(self.pairs)))]
        self.columns = {
            "a_keys": torch.tensor([key[0] for key in keys]),
            "b_keys": torch.tensor([key[1] for key in keys]),
            "similarity_scores": torch.tensor([float("nan") if key[2] is None else key[2] for key in keys]),
        }
        self.searches: dict[tuple[str, str], Search] = {
            cell: search(self.columns, rows, self.min_score) for cell, rows in self.cells.items()
        }
        self._batches: dict[str, list[dict[str, Any]]] = {}

    def figures(self, repository: Path) -> dict[str, Any]:
        """Ranks of all queries with prefixes as trained ("own") and without any ("bare"), and Spearman's ρ."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = ViPolyQwenModel.from_pretrained(repository).eval().to(device)
        processor = ViPolyQwenProcessor.from_pretrained(repository, config=model.config)
        started = time.perf_counter()
        nowhere = dict.fromkeys(self.tasks, "none")
        made: dict[str, dict[str, torch.Tensor]] = {}
        figures: dict[str, Any] = {}
        for view, sides in {"own": processor.prefix_sides, "bare": nowhere}.items():
            tasks = with_prefix_sides(self.tasks, sides)
            key = digest({name: task.prefix_sides for name, task in tasks.items()})
            vectors = made[key] = made.get(key) or embed(model, self.batches(processor, tasks))
            figures[view] = self.measure(vectors)
        return figures | {"seconds_of_embedding": time.perf_counter() - started}

    def measure(self, vectors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Ranks by cell and ρ by task of one embedding of all pairs, as `embed` returns it."""
        ranks = {
            cell: found.ranks(vectors["a"][found.queries] @ vectors["b"][found.candidates].T)
            for cell, found in self.searches.items()
        }
        return {
            "ranks": {"/".join(cell): rank.tolist() for cell, rank in ranks.items()},
            "spearman": self.correlations(vectors),
        }

    def batches(self, processor: ViPolyQwenProcessor, tasks: Mapping[str, Task]) -> Iterable[dict[str, Any]]:
        """The pairs as model inputs; on the demo world they are kept, since all its runs see the same ones."""
        tokens = processor.tokenizer.backend_tokenizer.to_str()
        sides = {name: task.prefix_sides for name, task in tasks.items()}
        key = digest([tokens, processor.to_json_string(), processor.tokenizer.model_max_length, sides])
        if key in self._batches:
            return self._batches[key]
        collator = MixedBatchCollator(
            processor,
            tasks,
            prefix_dropout=0.0,
            with_negatives=False,
        )
        made = collate(self.pairs, collator, 64)
        if self.keeps:
            made = self._batches[key] = list(made)
        return made

    def correlations(self, vectors: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Spearman's ρ of each task whose scores are not all alike."""
        found = {}
        for task in dict.fromkeys(self.row_tasks):
            rows = torch.tensor([number for number, name in enumerate(self.row_tasks) if name == task])
            value = spearman(*(vectors[name][rows] for name in ("a", "b", "similarity_scores")))
            if value == value:
                found[task] = value
        return found


def measured(study: Study, held_out: HeldOut, name: str, seed: int, group_by: str | None) -> dict[str, Any]:
    """The figures of a variant's run: those of an earlier one of the same key, or of one that is trained now."""
    stage = study.stage(name, seed)
    sources = study.recipe["eval_data"]
    data = {source["path"]: data_digest(source["path"]) for source in sources}
    key = digest({"run": stage.key, "sources": sources, "data": data, "group_by": group_by})
    path = study.folder / "figures" / f"{key}.json"
    if not path.is_file():
        started = time.perf_counter()
        model = stage.train(study.folder / "models")
        figures = held_out.figures(model)
        figures |= {"variant": name, "seed": seed, "seconds": time.perf_counter() - started}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(figures | {"settings": dict(stage.settings)}), encoding="utf-8")
        unfinished.rename(path)
        shutil.rmtree(model)
    return json.loads(path.read_text(encoding="utf-8"))


def digest(value: Any) -> str:
    """A short hash of plain data."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@lru_cache
def data_digest(path: str) -> str:
    """Hash of the files that a source names; of the name alone where they are on the Hub. Media are not read."""
    found = sorted(Path(path).rglob("*")) if Path(path).is_dir() else sorted(map(Path, glob.glob(path)))
    files = [
        file for file in found if file.is_file() and file.suffix in (".jsonl", ".json", ".csv", ".parquet", ".arrow")
    ]
    return files_digest(files) if files else path


@lru_cache
def repository_digest(model: str) -> str:
    """Hash of a local repository's weights, config and tokenizer, or the name of one on the Hub."""
    files = [file for file in sorted(Path(model).glob("*")) if file.suffix in (".safetensors", ".json")]
    return files_digest(files) if files else model


@lru_cache
def code_digest() -> str:
    """Hash of the code that a run's result follows from."""
    shipped = [ROOT / f"{name}_vipolyqwen.py" for name in ("media", "modeling", "packing", "pooling", "processing")]
    rooms = [*(ROOT / "training").glob("*.py"), *(ROOT / "data").glob("*.py")]
    files = [*shipped, *sorted(rooms), ROOT / "train_vipolyqwen.py", ROOT / "evaluation" / "metrics.py"]
    return files_digest([*files, Path(__file__).with_name("pair_vectors.py")])


def files_digest(files: Sequence[Path]) -> str:
    """Hash of the contents of files."""
    found = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as content:
            found.update(hashlib.file_digest(content, "blake2b").digest())
    return found.hexdigest()
