"""Respells Vietnamese texts of training pairs as people type them, by the rules of `vietnamese.py`."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .names import did_you_mean
from .schema import Task, canonical_task
from .vietnamese import RULES

EVERY_TASK = "all"
SIDES = {"a": ("a",), "b": ("b",), "both": ("a", "b")}
RULE_NAMES = {name.lower().replace(" ", "_").replace("-", "_"): name for name in RULES}


@dataclass(frozen=True)
class Augmentation:
    """Respells a text by at most one rule, drawn anew for each row, side and epoch.

    What is drawn depends on the seed, the id of the row, the side and the epoch alone: not on the batch, the rank, the
    worker or a resume. Keys of duplicates and a teacher's vectors stay those of the text as it is written.

    Attributes:
        rules: task -> name of a rule in `RULES` -> probability.
        sides: the sides that are respelled, of `SIDES`.
        seed: seed of what is drawn.
    """

    rules: Mapping[str, Mapping[str, float]]
    sides: str = "a"
    seed: int = 0

    @classmethod
    def of(
        cls, settings: Mapping[str, Any] | None, sides: str, tasks: Mapping[str, Task], seed: int = 0
    ) -> "Augmentation | None":
        """Reads `{TASK: {RULE: PROBABILITY}}`, where `all` stands for the other tasks; `None` for nothing.

        Raises:
            ValueError: an unknown task, rule or side, or probabilities of a task that are not in [0, 1] together.
        """
        if sides not in SIDES:
            raise ValueError(f"`augment_sides` is {sides!r}; write one of {', '.join(SIDES)}.")
        if not settings:
            return None
        if not isinstance(settings, Mapping):
            raise ValueError(f"`augment_vietnamese` is {settings!r}; write {{TASK: {{RULE: PROBABILITY}}}}.")
        given = {canonical_task(str(name)): _rules(str(name), rules) for name, rules in settings.items()}
        for name in given:
            if name not in tasks and name != EVERY_TASK:
                known = [EVERY_TASK, *tasks]
                raise ValueError(
                    f"augment_vietnamese: unknown task {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}"
                )
        return cls({name: given.get(name, given.get(EVERY_TASK, {})) for name in tasks}, sides, seed)

    def respell(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a row of a `PairDataset` with the texts of its sides respelled."""
        changed = {}
        for side in SIDES[self.sides]:
            rule = self._draw(row, side)
            if rule is not None:
                pieces = row[side].split(row["image_placeholder"])
                changed[side] = row["image_placeholder"].join(map(RULES[rule], pieces))
        return {**row, **changed}

    def _draw(self, row: Mapping[str, Any], side: str) -> str | None:
        origin = repr((self.seed, row.get("epoch", 0), row["source"], row["id"], side)).encode("utf-8", "replace")
        uniform = int.from_bytes(hashlib.blake2b(origin, digest_size=8).digest()) / 2**64  # in [0, 1)
        for rule, probability in self.rules[row["task"]].items():
            if uniform < probability:
                return rule
            uniform -= probability
        return None


def _rules(task: str, rules: Any) -> dict[str, float]:
    """Returns the rules of a task by their names in `RULES`; spaces, hyphens and capitals do not matter."""
    if not isinstance(rules, Mapping):
        raise ValueError(f"augment_vietnamese.{task} is {rules!r}; write {{RULE: PROBABILITY}}.")
    found = {}
    for name, probability in rules.items():
        rule = RULE_NAMES.get(str(name).lower().replace(" ", "_").replace("-", "_"))
        if rule is None:
            hint = did_you_mean(name, RULES)
            raise ValueError(f"augment_vietnamese.{task}: unknown rule {name!r}; known: {', '.join(RULES)}.{hint}")
        is_number = isinstance(probability, (int, float)) and not isinstance(probability, bool)
        if not is_number or not 0 <= probability <= 1:
            raise ValueError(f"augment_vietnamese.{task}.{name} is {probability!r}; a probability is in [0, 1].")
        found[rule] = float(probability)
    if sum(found.values()) > 1 + 1e-9:
        raise ValueError(
            f"augment_vietnamese.{task}: the probabilities sum to {sum(found.values()):g}; a text follows one rule at "
            "most, so the sum is at most 1."
        )
    return found
