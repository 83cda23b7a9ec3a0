"""Reads suites: YAML lists of mteb's tasks and of custom tasks, with prompts by kind of task.

prompts: {STS: text_pair, "image+text-query": vqa_single}   # name of a model's prompt, null for none
languages: [vie]                # subset of multilingual tasks; an entry may override it
baselines: [intfloat/multilingual-e5-base]                   # the models of `--against baselines`
pair_tasks: {image_caption: {prefix: <image_caption>}}       # `tasks` of a training recipe, for local pairs
tasks:
- STSBenchmark-VN
- {task: XM3600T2IRetrieval, languages: [vie]}
- {task: retrieval, name: Signs, path: dev.jsonl}          # see custom_tasks.py
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import mteb
from mteb.abstasks import AbsTask
from mteb.abstasks.task_metadata import TaskType
from mteb.get_tasks import TASK_LIST
from mteb.types import PromptType

from ..data.names import did_you_mean, rename_old_keys
from ..data.schema import TASK_NAME, Task, declare_tasks, with_ready_tasks
from ..data.sides import SidePrompt
from ..data.yaml_files import read_yaml
from .custom_tasks import ENTRY_KEYS, KINDS, custom_tasks

SUITES = Path(__file__).parents[1] / "recipes" / "suites"  # package data, beside the rooms in both kinds of install
TASKS = {task.metadata.name for task in TASK_LIST}
KEYS = ("prompts", "languages", "baselines", "pair_tasks", "tasks")
OLD_NAMES = {"data_type": "pair_task", "data_type_column": "task_column", "data_types": "pair_tasks"}
MODALITY_SETS = ("text", "image", "audio", "image+text", "audio+text", "audio+image", "audio+image+text")


class SuiteError(ValueError):
    """Reports an invalid suite; the message names the value and suggests the nearest valid one."""


@dataclass(frozen=True)
class Suite:
    """The content of a suite's file, validated except for local pairs, which are not opened.

    Attributes:
        name: of the file.
        entries: `{"task": …, …}`, in the file's order.
        prompts: keys as in `encoder.prompt_keys` -> name of a prompt, None for no prompt.
        languages: subset of multilingual tasks; None: all.
        baselines: names of models.
        pair_tasks: tasks of the rows of local pairs.
    """

    name: str
    entries: list[dict[str, Any]]
    prompts: dict[str, str | None] = field(default_factory=dict)
    languages: list[str] | None = None
    baselines: list[str] = field(default_factory=list)
    pair_tasks: dict[str, Task] = field(default_factory=dict)

    def tasks(self, entry: Mapping[str, Any]) -> list[AbsTask]:
        """Builds the tasks of one entry; reads local pairs, but no data sets of the Hub.

        Raises:
            FileNotFoundError: a file of local pairs does not exist.
            ValueError: local pairs or their settings are invalid, or a task has none of the languages.
        """
        if entry["task"] in KINDS:
            return custom_tasks(entry, self.pair_tasks)
        return [mteb.get_task(entry["task"], languages=entry.get("languages", self.languages))]

    def table(self, tasks: Iterable[AbsTask]) -> dict[str, str | SidePrompt | None]:
        """Returns the table of prompts, with the defaults of custom tasks where the suite names none."""
        defaults = {
            f"{task.metadata.name}-{side}": prompt
            for task in tasks
            if task.metadata.name not in TASKS
            for side, prompt in task.prompt_names.items()
        }
        return defaults | self.prompts


def read_suite(name: str) -> Suite:
    """Reads a suite of recipes/suites by its name, or any YAML file.

    Raises:
        SuiteError: an unknown suite, key or task; the message suggests the nearest known name.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = SUITES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in SUITES.glob("*.yaml"))
        raise SuiteError(
            f"Unknown suite {name!r}; known: {', '.join(known)}, or a .yaml file.{did_you_mean(name, known)}"
        )
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise SuiteError(str(error)) from error
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), list) or not content["tasks"]:
        raise SuiteError(f"{path} has no list of tasks; write `tasks: [NAME, …]`.")
    content = _rename(content, str(path))
    _check_keys(content, KEYS, str(path))
    entries = [_entry(entry, path) for entry in content["tasks"]]
    _check_names(entries, path)
    prompts = content.get("prompts") or {}
    _check_prompts(prompts, entries, path)
    return Suite(
        path.stem,
        entries,
        prompts,
        content.get("languages"),
        content.get("baselines") or [],
        _pair_tasks(content.get("pair_tasks"), entries, path),
    )


def _pair_tasks(declared: Any, entries: Sequence[Mapping[str, Any]], path: Path) -> dict[str, Task]:
    named = [{"task": entry.get("pair_task"), "map": entry.get("map")} for entry in entries]
    try:
        return declare_tasks(with_ready_tasks(declared, named))
    except ValueError as error:
        raise SuiteError(f"{path}, pair_tasks: {error}") from error


def _entry(entry: Any, path: Path) -> dict[str, Any]:
    """Returns an entry as a dict with a `task`."""
    entry = {"task": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("task"), str):
        raise SuiteError(f"{path}: the entry {entry!r} names no task; write NAME or {{task: NAME, …}}.")
    where, is_custom = f"{path}: {entry['task']}", entry["task"] in KINDS
    entry = _rename(entry, where)
    _check_keys(entry, ENTRY_KEYS if is_custom else ("task", "languages"), where)
    for key in ("name", "path") if is_custom else ():
        if not isinstance(entry.get(key), str):
            raise SuiteError(f"{path}: an entry of `task: {entry['task']}` has no {key}; write `{key}: …`.")
    return entry


def _check_names(entries: list[dict[str, Any]], path: Path) -> None:
    unknown = [entry["task"] for entry in entries if entry["task"] not in KINDS and entry["task"] not in TASKS]
    if unknown:
        known = [*TASKS, *KINDS]
        lines = [f"{name!r}{did_you_mean(name, known)}" for name in unknown]
        raise SuiteError(f"{path}: mteb {mteb.__version__} has no task {'; no task '.join(lines)}")
    names = [entry.get("name", entry["task"]) for entry in entries]
    for name in names:
        if not TASK_NAME.fullmatch(str(name)):
            raise SuiteError(
                f"{path}: the name {name!r} becomes a file name of results; write letters and digits, then also "
                "'_', '-', '.' and spaces."
            )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SuiteError(f"{path}: {twice} occur twice; results are stored by name, so names must differ.")


def _check_prompts(prompts: Any, entries: list[dict[str, Any]], path: Path) -> None:
    if not isinstance(prompts, dict):
        raise SuiteError(f"{path}: prompts is {prompts!r}; write {{TASK_TYPE: NAME, …}}.")
    custom = [entry["name"] for entry in entries if "name" in entry]
    known = [*get_args(TaskType), *MODALITY_SETS, *TASKS]
    for key, value in prompts.items():
        base = key
        for side in PromptType:
            base = base.removesuffix(f"-{side.value}")
        if base not in known and not any(base.startswith(name) for name in custom):
            raise SuiteError(
                f"{path}: the prompt {value!r} is for {base!r}, which is neither a type or name of a task nor a set "
                f"of modalities ({', '.join(MODALITY_SETS)}).{did_you_mean(base, known)}"
            )


def _rename(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return rename_old_keys(values, where, OLD_NAMES)
    except ValueError as error:
        raise SuiteError(str(error)) from error


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            raise SuiteError(f"{where}: unknown key {key!r}; known: {', '.join(known)}.{did_you_mean(key, known)}")
