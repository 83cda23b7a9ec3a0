"""Counts the faults that tests/reliability injects; writes docs/reliability.md and docs/reliability.json."""

import json
import os
from pathlib import Path

import jinja2

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


class Record:
    """Faults and how often each was injected and what it cost."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    def add(self, fault: str, same: bool, lost: int = 0, seconds: float | None = None) -> None:
        """Adds one injection.

        Args:
            fault: its name.
            same: whether the run ended with the weights of an undisturbed run, or the damage was found.
            lost: complete checkpoints that it cost.
            seconds: until the other ranks had ended.
        """
        row = self.rows.setdefault(fault, {"times": 0, "same_end": 0, "lost": 0})
        row["times"] += 1
        row["same_end"] += same
        row["lost"] += lost
        if seconds is not None:
            row["most_seconds"] = max(row.get("most_seconds", 0.0), round(seconds, 1))
        write(self.rows)


def write(rows: dict[str, dict[str, float]]) -> None:
    """Writes both files, if `RELIABILITY_WRITE` says so; after each injection, so that an ended suite leaves them."""
    if os.environ.get("RELIABILITY_WRITE") != "1":
        return
    (DOCS / "reliability.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "tests" / "reliability"), autoescape=False, keep_trailing_newline=True
    )
    page = templates.get_template("reliability.md.jinja").render(rows=rows)
    (DOCS / "reliability.md").write_text(page, encoding="utf-8")
