"""Reads the data of a recipe: the sources of pairs to train and evaluate on, and the tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .names import rename_old_keys
from .readers import SourceConfig
from .schema import SIDES_OF_TASKS, Task, declare_tasks, with_ready_tasks
from .yaml_files import read_yaml

SPLITS = {"train": "train_data", "eval": "eval_data"}


@dataclass(frozen=True)
class DataRecipe:
    """What a recipe says about data.

    Attributes:
        sources: "train" and "eval" -> their enabled sources, empty if the recipe has none.
        disabled: the sources that the recipe names with `enabled: false`.
        tasks: the tasks in the order of their task ids.
        settings: every key of the recipe as it is written.
    """

    sources: dict[str, list[SourceConfig]]
    disabled: list[SourceConfig]
    tasks: dict[str, Task]
    settings: Mapping[str, Any]


def read_data_recipe(path: Path) -> DataRecipe:
    """Reads a recipe (.yaml, .yml, .json), or a file of pairs as a recipe that trains on it.

    Raises:
        ValueError: the recipe is malformed or names no data.
        OSError: it cannot be read.
    """
    settings: Mapping[str, Any] = {"train_data": [{"path": str(path)}]}
    if path.suffix in (".yaml", ".yml"):
        settings = read_yaml(path)
        if not isinstance(settings, Mapping):
            raise ValueError(f"{path} holds {type(settings).__name__}; a recipe is a mapping of `key: value` lines.")
        settings = rename_old_keys(settings, str(path))
    named = {split: _sources(settings.get(key), key, path) for split, key in SPLITS.items()}
    sources = {split: [source for source in of_split if source.enabled] for split, of_split in named.items()}
    if not any(sources.values()):
        raise ValueError(f"{path} has no (enabled) `train_data` and no `eval_data`; name the pairs there.")
    disabled = [source for of_split in named.values() for source in of_split if not source.enabled]
    entries = [entry for key in SPLITS.values() for entry in settings.get(key) or []]
    declared = with_ready_tasks(settings.get("tasks"), entries)
    tasks = declare_tasks(declared, settings.get("prefix_sides", SIDES_OF_TASKS))
    return DataRecipe(sources, disabled, tasks, settings)


def enabled_entries(settings: Mapping[str, Any], split: str) -> list[Mapping[str, Any]]:
    """Returns the entries of "train" or "eval" as the recipe writes them, one for each of `DataRecipe.sources`."""
    return [entry for entry in settings.get(SPLITS[split]) or [] if entry.get("enabled", True)]


def _sources(entries: Any, key: str, path: Path) -> list[SourceConfig]:
    if entries is None:
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"{path}: `{key}` is {entries!r:.100}; write a list of mappings, such as [{{path: FILE}}].")
    return [SourceConfig.from_dict(entry) for entry in entries]
