"""Does the hardest-negative triplet draw an untrained model's vectors together? A curve for each remedy.

    python benchmarks/triplet_collapse.py CORPUS [--steps 60] [--seeds 3]

CORPUS is the demo's (`demo_vipolyqwen.py` writes outputs/demo/corpus). A tiny untrained model learns pairs of texts by
InfoNCE + triplet with the hardest or a semi-hard negative, by the triplet alone, and by InfoNCE alone; every step
notes the mean cosine of different sides: 1 is collapse. Writes results/studies/triplet_collapse.json and .svg.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from result_files import RESULTS, machine, versions

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.sampler import MixtureSampler
from vipolyqwen.data.schema import declare_tasks, with_prefix_sides
from vipolyqwen.data.sources import load_pairs
from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.demo_vipolyqwen import BASE_SIZES
from vipolyqwen.evaluation.charts import line_chart
from vipolyqwen.training.losses import TaskLoss
from vipolyqwen.training.mixed_loss import MixedLoss

VARIANTS = {
    "InfoNCE": (TaskLoss(nce=1.0), "hardest"),
    "InfoNCE + hardest": (TaskLoss(nce=1.0, triplet=1.0), "hardest"),
    "InfoNCE + semi-hard": (TaskLoss(nce=1.0, triplet=1.0), "semi_hard"),
    "hardest alone": (TaskLoss(triplet=1.0), "hardest"),
    "semi-hard alone": (TaskLoss(triplet=1.0), "semi_hard"),
}
ROWS, RATE = 48, 1e-3
Curve = list[tuple[float, float]]  # of each step: mean cosine of different sides, share of rows found in the batch


def main() -> None:
    """Trains every variant with every seed and writes the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "studies" / "triplet_collapse")
    options = parser.parse_args()
    started = time.perf_counter()
    curves = {
        name: [curve(options.corpus, *variant, seed, options.steps) for seed in range(options.seeds)]
        for name, variant in VARIANTS.items()
    }
    write(curves, options.out, (time.perf_counter() - started) / 60)


def curve(corpus: Path, task_loss: TaskLoss, negatives: str, seed: int, steps: int) -> Curve:
    """Trains one untrained model."""
    tasks = with_prefix_sides(declare_tasks(None), dict.fromkeys(declare_tasks(None), "none"))
    pairs = load_pairs([{"path": str(corpus / "train/instr.jsonl")}], tasks, 1, check_media=False)
    torch.manual_seed(seed)
    texts = (text for row in pairs.texts() for text in row)
    model, processor = build_tiny_base(texts, **BASE_SIZES)
    for task in tasks.values():
        processor.add_task(task.name, task.prefix, task.prefix_sides)
    model.resize_token_embeddings(max(len(processor.tokenizer), model.get_input_embeddings().num_embeddings))
    collate = MixedBatchCollator(processor, tasks, with_negatives=False)
    loss = MixedLoss(dict.fromkeys(tasks, task_loss), triplet_negatives=negatives)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    order, found = list(MixtureSampler([len(pairs)], [1.0], seed)), []
    for step in range(steps):
        first = step * ROWS % (len(order) - ROWS)
        batch = collate([pairs[row] for row in order[first : first + ROWS]])
        a, b = model(batch["input_ids"], batch["attention_mask"]).embeddings.split(ROWS)
        found.append(noted(a.detach(), b.detach()))
        output = loss(a, b, batch["data_type"], batch["similarity_scores"], batch["a_keys"], batch["b_keys"])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return found


def noted(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Mean cosine of sides of different rows, and the share of rows whose own b is the nearest, of (B, D) each."""
    similarities = a @ b.T
    others = ~torch.eye(len(a), dtype=torch.bool)
    nearest = similarities.argmax(dim=1) == torch.arange(len(a))
    return similarities[others].mean().item(), nearest.float().mean().item()


def write(curves: dict[str, list[Curve]], out: Path, minutes: float) -> None:
    """Writes OUT.json and OUT.svg: the mean cosine by step, mean over seeds."""
    means = {
        name: [
            [statistics.mean(seed[step][part] for seed in seeds) for part in (0, 1)] for step in range(len(seeds[0]))
        ]
        for name, seeds in curves.items()
    }
    result = {
        "seeds": len(next(iter(curves.values()))),
        "minutes": round(minutes, 2),
        "last": {name: {"cosine": steps[-1][0], "found": steps[-1][1]} for name, steps in means.items()},
        "last_by_seed": {name: [seed[-1] for seed in seeds] for name, seeds in curves.items()},
        "curves": {name: [[round(value, 4) for value in step] for step in steps] for name, steps in means.items()},
        "machine": machine(),
        "versions": versions(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    chart = line_chart({name: [(n, step[0]) for n, step in enumerate(steps)] for name, steps in means.items()})
    drawing = chart.partition("<div")[0].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    out.with_suffix(".svg").write_text(drawing + "\n", encoding="utf-8")
    print(json.dumps(result["last"], indent=1))


if __name__ == "__main__":
    main()
