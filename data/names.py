"""Resolves the names that users write in recipes, suites and flags: old keys, suggestions for unknown ones."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

OLD_NAMES = {"data_type": "task", "data_type_column": "task_column", "data_types": "tasks"}


def rename_old_keys(values: Mapping[str, Any], where: str, old_names: Mapping[str, str] = OLD_NAMES) -> dict[str, Any]:
    """Renames old keys of settings to their current names.

    Args:
        values: key -> value, as a recipe or the flags give them.
        where: names the settings in an error.
        old_names: old -> new.

    Raises:
        ValueError: both names of one key are given.
    """
    for old, new in old_names.items():
        if old in values and new in values:
            raise ValueError(
                f"{where}: `{old}` ({values[old]!r}) and `{new}` ({values[new]!r}) are old and new name of one key; "
                f"keep `{new}`."
            )
    return {old_names.get(key, key): value for key, value in values.items()}


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Suggests the nearest known name as a sentence with a leading space; empty if none is close."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
