"""Verdicts with power from the quick ablations: no new run, the cells at chance left out, modality by modality.

    python benchmarks/verdicts.py [results/ablations.json]

Reads what `make ablations` wrote and writes results/studies/quick_ablations.md and .json.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from result_files import RESULTS
from study_report import Question, answer, rounded, sentence

TEXTS = ("text_pair", "instr")
IMAGES = ("ocr", "vqa_single", "vqa_multi", "image_caption")
MODALITIES = {"all tasks": (), "texts": TEXTS, "images": IMAGES, "audio": ("audio",)}
OF_ALL = (  # hypothesis, claim, ours, theirs
    ("H2", "a loss for each task finds more than InfoNCE alone", "base", "NCE only"),
    ("H6", "training with prefixes finds more than without any", "base", "no prefix"),
    ("H7", "a loss for each task finds more than one fixed sum", "base", "fixed sum"),
    ("STW", "the published weights find more than equal ones", "STW weights", "base"),
)
QUESTIONS = (
    *(
        Question("H1", f"attention finds more than {name}, {modality}", "base", variant, tasks=tasks)
        for variant, name in (("mean pooling", "the mean"), ("last token", "the last position"))
        for modality, tasks in MODALITIES.items()
    ),
    *(Question(*four) for four in OF_ALL),
    Question("H3", "with images and audio in training, texts are found better", "base", "text only", tasks=TEXTS),
    Question("H5", "with audio in training, audio is found", "base", "no audio", tasks=("audio",)),
    Question("H5", "audio in training helps the other tasks", "base", "no audio", tasks=(*TEXTS, *IMAGES)),
    Question("H6", "OCR's prefix helps OCR", "base", "no OCR prefix", tasks=("ocr",)),
)


def main() -> None:
    """Reads the recalls of every seed, answers, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ablations", type=Path, nargs="?", default=RESULTS / "ablations.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "studies" / "quick_ablations")
    options = parser.parse_args()
    given = json.loads(options.ablations.read_text(encoding="utf-8"))
    results = from_recalls(given)
    asked = [question for question in QUESTIONS if {question.ours, question.theirs} <= set(results["runs"])]
    answers = [(question, answer(results, question)) for question in asked]
    head = (
        f"From `{given['command']}`: {len(results['runs']['base'])} seeds, {given['minutes']:.1f} minutes on "
        f"{given['machine']}, {given['steps']['run']} steps of {given['batch_size']} pairs after a warm-up."
    )
    lines = ["# Verdicts of the quick ablations", "", head, "", *(f"- {sentence(*pair)}" for pair in answers), ""]
    kept = {name: given[name] for name in ("command", "minutes", "machine", "versions")}
    found = [asdict(question) | ({} if said is None else asdict(said)) for question, said in answers]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded({"answers": found, **kept}), indent=1, ensure_ascii=False)
    options.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def from_recalls(given: dict[str, Any]) -> dict[str, Any]:
    """Figures as a study has them, with as many hits as each seed's recall@1 says."""
    recalls = given["recall@1"]
    values = {cell: [value for of_cells in recalls.values() for value in of_cells[cell]] for cell in given["chance"]}
    most = max(_queries(values[cell], given["candidates"][cell]) for cell in values)
    queries = {cell: min(most, given["candidates"][cell]) for cell in values}
    runs = {}
    for name, of_cells in recalls.items():
        seeds = range(len(next(iter(of_cells.values()))))
        runs[name] = [
            {
                "own": {
                    "ranks": {cell: _ranks(found[seed], queries[cell]) for cell, found in of_cells.items()},
                    "rho": {},
                }
            }
            for seed in seeds
        ]
    return {"runs": runs, "chance": given["chance"], "queries": queries}


def _queries(values: list[float], candidates: int) -> int:
    """The fewest queries of which all these recalls are whole numbers of hits."""
    counts = range(1, candidates + 1)
    return next((n for n in counts if all(abs(value * n - round(value * n)) < 1e-6 for value in values)), candidates)


def _ranks(recall: float, queries: int) -> list[int]:
    hits = round(recall * queries)
    return [1] * hits + [2] * (queries - hits)


if __name__ == "__main__":
    main()
