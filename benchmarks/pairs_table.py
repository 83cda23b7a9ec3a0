"""A model on a recipe's held-out pairs, task by task and language by language, beside a bag of character n-grams.

    python benchmarks/pairs_table.py MODEL RECIPE [--group_by language] [--scores_by source] [--out FILE]

RECIPE is one that training reads; its `eval_data` is measured. Every distinct side a that has a right answer searches
the distinct sides b of its task and language. Sides carry prefixes as in training. Writes OUT.md and OUT.json.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from pair_vectors import cells, collate, embed, load_grouped, search
from result_files import RESULTS, machine, versions
from scipy.sparse import csr_matrix
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import declare_tasks, with_prefix_sides
from vipolyqwen.evaluation.memory import peak_memory
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.training.arguments import read_arguments

NGRAMS = {"analyzer": "char_wb", "ngram_range": (2, 4)}
NO_TEXT = "-"
Row = dict[str, str | int | float | None]


def main() -> None:
    """Embeds, searches, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="viPolyQwen repository: a folder or a Hub id")
    parser.add_argument("recipe", help="with `eval_data`")
    parser.add_argument("--group_by", help="column of the pairs, such as language: a row of the table for each value")
    parser.add_argument("--scores_by", help="column, such as source, within whose values scores are on one scale")
    parser.add_argument("--out", type=Path, default=RESULTS / "pairs")
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args()
    command = shlex.join(["python", *sys.argv])
    columns = (options.group_by, options.scores_by)
    rows, speed = measure(options.model, options.recipe, columns, options.batch_size)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": command, "rows": rows, "speed": speed, "machine": machine(), "versions": versions()}
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    text = page(command, rows, speed)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def measure(
    name: str, recipe: str, by: tuple[str | None, str | None], batch_size: int
) -> tuple[list[Row], dict[str, float]]:
    """The table's rows, by the columns of groups and of scales of scores, and how fast the model embedded."""
    model_args, data, loss, _ = read_arguments([recipe, "--output_dir", "unused", "--report_to", "none"])
    if data.eval_data is None:
        raise ValueError(f"{recipe} has no `eval_data`; name there the held-out pairs to measure.")
    tasks = declare_tasks(data.tasks)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ViPolyQwenModel.from_pretrained(name).eval().to(device)
    processor = ViPolyQwenProcessor.from_pretrained(name, config=model.config)
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, model_args.max_length)
    pairs, groups = load_grouped(data.eval_data, by[0], tasks, processor.min_audio_samples)
    scales = load_grouped(data.eval_data, by[1], tasks, processor.min_audio_samples)[1]
    collator = MixedBatchCollator(
        processor,
        with_prefix_sides(tasks, processor.prefix_sides),  # as in training
        prefix_dropout=0.0,
        with_negatives=False,
    )
    started = time.perf_counter()
    columns = embed(model, collate(pairs, collator, batch_size))
    seconds = time.perf_counter() - started
    sides_a, sides_b = zip(*pairs.texts(), strict=True)
    grams = TfidfVectorizer(**NGRAMS).fit([*sides_a, *sides_b])
    bags = (grams.transform(sides_a), grams.transform(sides_b))
    names = list(tasks)
    rows = []
    for (task, group), members in cells([names[i] for i in pairs.task_ids], groups).items():
        figures = compare(columns, bags, members, scales, loss.nce_min_score)
        if not all(any(side[row].strip() for row in members) for side in (sides_a, sides_b)):
            figures |= dict.fromkeys([key for key in figures if key.startswith("ngrams_")])
        rows.append({"task": task, "group": group, **figures})
    speed = {
        "pairs": len(pairs),
        "pairs_per_second": len(pairs) / seconds,
        "peak_memory_mib": peak_memory() / 2**20,
    }
    return rows, speed


def compare(
    columns: Mapping[str, Tensor],
    bags: tuple[csr_matrix, csr_matrix],
    rows: list[int],
    scales: list[str | None],
    min_score: float | None,
) -> Row:
    """The model's numbers and the n-grams' on the same search; `None` where a number is not defined."""
    task = search(columns, rows, min_score)
    bag_cosines = torch.from_numpy(bags[0][rows].multiply(bags[1][rows]).sum(1)).flatten()
    both = {
        "": (
            columns["a"][task.queries] @ columns["b"][task.candidates].T,
            (columns["a"][rows] * columns["b"][rows]).sum(1),
        ),
        "ngrams_": (
            torch.from_numpy((bags[0][task.queries] @ bags[1][task.candidates].T).toarray()),
            bag_cosines,
        ),
    }
    scores, of_rows = columns["similarity_scores"][rows], [scales[row] for row in rows]
    figures: Row = {"pairs": len(rows), "candidates": len(task.candidates), "chance": task.chance}
    for prefix, (similarities, cosines) in both.items():
        ranks = task.ranks(similarities)
        figures |= {f"{prefix}recall@{k}": (ranks <= k).double().mean().item() for k in (1, 10)}
        figures[f"{prefix}spearman"] = correlation(cosines, scores, of_rows)
    return figures


def correlation(cosines: Tensor, scores: Tensor, scales: list[str | None]) -> float | None:
    """Spearman's ρ of the scored pairs of each scale, averaged by their numbers; `None` where none is defined.

    A scale whose scores are all alike has no ρ and is left out; cosines that are all alike have ρ = 0.
    """
    correlations, counts = [], []
    for scale in dict.fromkeys(scales):
        own = torch.tensor([value == scale for value in scales]) & ~scores.isnan()
        if own.sum() > 1 and scores[own].min() < scores[own].max():
            alike = bool(cosines[own].min() == cosines[own].max())
            rho = 0.0 if alike else float(spearmanr(cosines[own].numpy(), scores[own].numpy()).statistic)
            correlations.append(rho)
            counts.append(int(own.sum()))
    return float(np.average(correlations, weights=counts)) if counts else None


def page(command: str, rows: list[Row], speed: Mapping[str, float]) -> str:
    """The table as markdown."""
    names = ("recall@1", "recall@10", "spearman", "ngrams_recall@1", "ngrams_recall@10", "ngrams_spearman")
    lines = [
        "# Held-out pairs by task and language",
        "",
        f"`{command}` on {machine()}: {speed['pairs']} pairs, {speed['pairs_per_second']:.0f} pairs/s, "
        f"peak memory {speed['peak_memory_mib']:.0f} MiB.",
        "",
        "Retrieval of side b by side a among the distinct sides b of the row's task and language; `all`: among those "
        "of every language. Ties count against a model. chance: expected R@1 of a random order. ρ: Spearman, over "
        "scored pairs alone, within each source whose scores are not all alike, averaged by pairs; `-` where there is "
        "none. n-grams: cosine of TF-IDF bags of character "
        f"{NGRAMS['ngram_range'][0]}- to {NGRAMS['ngram_range'][1]}-grams within words (scikit-learn "
        "`TfidfVectorizer`), document frequencies from both sides of these held-out texts; they see the text part of "
        f"a side only, and `{NO_TEXT}` where no side a has any.",
        "",
        "| task | language | pairs | candidates | chance | R@1 | R@10 | ρ | n-grams R@1 | n-grams R@10 | n-grams ρ |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        numbers = [show(row[name]) for name in names]
        first = [row["task"], row["group"], row["pairs"], row["candidates"], f"{row['chance']:.4f}"]
        lines.append("| " + " | ".join(map(str, [*first, *numbers])) + " |")
    return "\n".join([*lines, ""])


def show(value: float | None) -> str:
    """Returns three digits, or `NO_TEXT` for a missing number."""
    return NO_TEXT if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
