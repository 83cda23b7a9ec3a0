"""How often `task="auto"` finds the task that a row says it is.

    python benchmarks/adaptive_prefix.py outputs/demo/corpus/eval.jsonl

Reads JSONL rows with `task`, `a`, `images` and `audio`, as `make demo` writes them; prints the share of rows
whose side a gets the row's task, and the tasks that the others get.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from vipolyqwen.tasks_vipolyqwen import infer_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="a JSONL file")
    counts: dict[str, Counter] = {}
    with parser.parse_args().rows.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            found = infer_task(row["a"], len(row["images"]), row["audio"] is not None)
            counts.setdefault(row["task"], Counter())[found] += 1
    for task, found in counts.items():
        total = found.total()
        others = ", ".join(f"{other} {count}" for other, count in found.most_common() if other != task)
        print(f"{task:12} {found[task] / total:6.1%} of {total}{f'; others: {others}' if others else ''}")


if __name__ == "__main__":
    main()
