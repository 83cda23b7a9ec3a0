"""Where the time of `encode` goes for one short query, and for 32, beside stock sentence-transformers.

    python benchmarks/query_profile.py [--models demo mid] [--repeats 200]

Both have the same language model (encode_speed.py). Each part is measured alone, in turn with that of the other, as
the median of its runs: the walk of sentence-transformers over parameters and buffers, `eval()`, the inputs, `forward`,
and the language model alone in one pass of the padded batch. What is left of `encode` is sentence-transformers' loop.
Writes benchmarks/results/query_profile.json and the table of docs/performance.md.
"""

import argparse
import re
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encode_speed import MODELS, PAGE, Contest, words, write_models
from result_files import machine, write_result
from timing import alternate
from transformers.utils import logging

TABLE = re.compile(r"(?<=<!-- query_profile -->\n).*?(?=<!-- end -->)", re.DOTALL)
PARTS = ("parameters", "eval", "inputs", "forward", "rest of encode", "encode", "language model alone")


def main() -> None:
    """Measures all models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            write_models(name, Path(folder) / name)
            contest = Contest(name, Path(folder) / name, "float32")
            rng = np.random.default_rng(1)
            short = [words(rng, int(n)) for n in rng.integers(3, 12, 32)]
            found[f"{name}, one query"] = profile(contest, short[:1], options.repeats)
            found[f"{name}, 32 texts"] = profile(contest, short, max(3, options.repeats // 8))
    write_result("query_profile", {}, microseconds=found, repeats=options.repeats)
    PAGE.write_text(TABLE.sub(lambda _: table_of(found), PAGE.read_text(encoding="utf-8"), count=1), encoding="utf-8")


def profile(contest: Contest, texts: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Returns the microseconds of each part, of both."""
    sides = {"ours": contest.ours, "stock": contest.stock}
    backbones = {"ours": contest.ours.transformers_model.vlm.language_model, "stock": contest.stock[0].model}
    prepared = {name: side.preprocess(texts) for name, side in sides.items()}
    runs: dict[str, Callable[[str], Any]] = {
        "parameters": lambda name: [each.device for each in chain(sides[name].parameters(), sides[name].buffers())],
        "eval": lambda name: sides[name].eval(),
        "inputs": lambda name: sides[name].preprocess(texts),
        "language model alone": lambda name: backbones[name](input_ids=prepared[name]["input_ids"], use_cache=False),
        "forward": lambda name: sides[name](dict(prepared[name])),
        "encode": lambda name: contest.encode(sides[name], texts),
    }
    medians: dict[str, dict[str, float]] = {"ours": {}, "stock": {}}
    with torch.inference_mode():
        for part, run in runs.items():
            seconds = alternate({name: lambda name=name, run=run: run(name) for name in sides}, repeats)
            for name, values in seconds.items():
                medians[name][part] = float(np.median(values)) * 1e6
    for of in medians.values():
        of["rest of encode"] = of["encode"] - sum(of[name] for name in ("parameters", "eval", "inputs", "forward"))
    return {name: {part: round(of[part], 1) for part in PARTS} for name, of in medians.items()}


def table_of(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Returns the table of the page: microseconds of ours, and of stock."""
    lines = [f"Measured on {machine()}; microseconds of ours / stock.", "", f"| part | {' | '.join(found)} |"]
    lines.append("|---" * (len(found) + 1) + "|")
    for part in PARTS:
        cells = [f"{of['ours'][part]:,.0f} / {of['stock'][part]:,.0f}" for of in found.values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
