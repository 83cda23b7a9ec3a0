"""The public surface: names, configuration, recipe keys, files. `make api` writes docs/api.md."""

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

from transformers import Qwen2VLConfig, TrainingArguments

import vipolyqwen
from vipolyqwen.configuration_vipolyqwen import ViPolyQwenConfig
from vipolyqwen.data.schema import Task
from vipolyqwen.data.source_config import SourceConfig
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.publishing.checks import PUBLISHED
from vipolyqwen.training.arguments import (
    DataArguments,
    LossArguments,
    ModelArguments,
    ViPolyQwenTrainingArguments,
)
from vipolyqwen.training.checkpoints import MANIFEST
from vipolyqwen.training.losses import TaskLoss
from vipolyqwen.training.resuming import SAMPLER_STATE
from vipolyqwen.training.run_settings import SETTINGS_FILE
from vipolyqwen.training.trainer import LOSS_STATE

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
HEAD = """# Public surface

Written by `make api`; a test compares it with the code, so that no change goes unnoticed. A name or key here keeps
its meaning within a minor version, or is refused in words and named in CHANGELOG.md. What is not here may change at
any time.
"""
RECIPE = (ModelArguments, DataArguments, LossArguments, ViPolyQwenTrainingArguments)
CHECKPOINT = [MANIFEST, SAMPLER_STATE, SETTINGS_FILE, LOSS_STATE, "optimizer.pt", "scheduler.pt", "trainer_state.json"]


def default(value: Any) -> str:
    """A default as a page shows it."""
    return "required" if value in (dataclasses.MISSING, inspect.Parameter.empty) else f"`{value!r}`"


def fields_of(owner: type, inherited: type | None = None) -> dict[str, str]:
    """Name -> default of the fields of a dataclass, without those that it inherits as they are."""
    before = {} if inherited is None else {field.name: field for field in dataclasses.fields(inherited)}
    found = {}
    for field in dataclasses.fields(owner):
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        stock = before.get(field.name)
        if stock is None or stock.default != field.default:
            found[field.name] = default(made)
    return found


def parameters_of(function: Any) -> dict[str, str]:
    """Name -> default of the parameters of a function."""
    given = list(inspect.signature(function).parameters.values())[1:]
    return {each.name: default(each.default) for each in given if each.kind is not each.VAR_KEYWORD}


def exports() -> dict[str, list[str]]:
    """Module -> public names of the package and of each shipped file."""
    files = sorted(name.removesuffix(".py") for name in PUBLISHED if name.endswith(".py"))
    return {"": sorted(vipolyqwen.__all__)} | {
        name: sorted(importlib.import_module(f"vipolyqwen.{name}").__all__) for name in files
    }


def page() -> str:
    """The page as the code has it now."""
    parts = [HEAD, "## Names\n", "| module | names |", "|---|---|"]
    for module, names in exports().items():
        title = ".".join(filter(None, ("vipolyqwen", module)))
        parts.append(f"| `{title}` | {', '.join(f'`{name}`' for name in names)} |")
    recipe = {key: value for owner in RECIPE[:3] for key, value in fields_of(owner).items()}
    recipe |= fields_of(ViPolyQwenTrainingArguments, TrainingArguments)
    tables = {
        "config.json, besides Qwen2-VL's keys": fields_of(ViPolyQwenConfig, Qwen2VLConfig),
        "processor_config.json": parameters_of(ViPolyQwenProcessor.__init__),
        "Recipe, besides the keys of TrainingArguments (defaults that differ from theirs are listed)": recipe,
        "A source of `train_data` and `eval_data`": fields_of(SourceConfig),
        "A task of `tasks`": fields_of(Task),
        "`loss` of a task": fields_of(TaskLoss),
    }
    for title, rows in tables.items():
        lines = [f"| `{name}` | {value} |" for name, value in rows.items()]
        parts += [f"\n## {title}\n", "| key | default |", "|---|---|", *lines]
    parts += ["\n## Files of a published repository\n", *(f"- `{name}`" for name in PUBLISHED)]
    parts += ["\n## Files of a checkpoint, besides those of a repository\n", *(f"- `{name}`" for name in CHECKPOINT)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
