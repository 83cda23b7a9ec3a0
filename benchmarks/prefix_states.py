"""What does a task's prefix change inside the model? Distance of the hidden states with it and without, by layer.

    python benchmarks/prefix_states.py [MODEL] [RECIPE] [--rows 60]

Embeds side a of the recipe's first held-out pairs of each task with the task's prefix and without, and compares the
hidden states of the tokens that both have: 1 − cosine, the mean over tokens and rows, after each layer of the language
model, and of the final vectors. The prefix is the first token, so causal attention lets it reach all others. Two other
rows of the task give the scale. Writes results/studies/prefix_states.json and .md.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from result_files import RESULTS, machine, versions
from torch.nn.functional import cosine_similarity

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import Task, with_prefix_sides
from vipolyqwen.data.sources import PairDataset, load_pairs
from vipolyqwen.microbatches_vipolyqwen import take_rows
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.training.arguments import DataArguments, read_recipe
from vipolyqwen.training.build import build_tasks

OUT = RESULTS / "studies" / "prefix_states"


def main() -> None:
    """Measures every task with text on side a, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=Path("outputs/demo/model"))
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/demo.yaml"))
    parser.add_argument("--eval_data", default="outputs/demo/corpus/parallel.jsonl", help="in place of the recipe's")
    parser.add_argument("--rows", type=int, default=60, help="of each task")
    options = parser.parse_args()
    recipe = read_recipe(options.recipe)
    tasks = build_tasks(DataArguments(**{name: recipe[name] for name in ("train_data", "tasks") if name in recipe}))
    pairs = load_pairs([{"path": options.eval_data, "media_root": str(Path(options.eval_data).parent)}], tasks, 1)
    model = ViPolyQwenModel.from_pretrained(options.model).eval()
    processor = ViPolyQwenProcessor.from_pretrained(options.model, config=model.config)
    found = {name: distances(model, processor, tasks, pairs, name, options.rows) for name in tasks}
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "distances": {name: value for name, value in found.items() if value},
        "machine": machine(),
        "versions": versions(),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    OUT.with_suffix(".md").write_text(report(result), encoding="utf-8")
    print(report(result))


def distances(
    model: ViPolyQwenModel,
    processor: ViPolyQwenProcessor,
    tasks: dict[str, Task],
    pairs: PairDataset,
    task: str,
    most: int,
) -> dict[str, list[float] | float]:
    """Returns the distances of one task; nothing for a task whose side a has no tokens or no prefix.

    Returns:
        layers: after the embeddings and after each layer, with the prefix against without.
        vector: of the final vectors.
        other_vector: of the final vectors of neighbouring rows, both without prefix.
    """
    number = list(tasks).index(task)
    chosen = [row for row, kind in enumerate(pairs.task_ids) if kind == number][:most]
    bare = with_prefix_sides(tasks, dict.fromkeys(tasks, "none"))
    prefix = processor.tokenizer.convert_tokens_to_ids(tasks[task].prefix)
    layers, same, vectors = [], [], []
    for row in chosen:
        (with_ids, with_states, with_vector), (_, states, vector) = (
            run(model, MixedBatchCollator(processor, kinds, prefix_dropout=0.0, with_negatives=False)([pairs[row]]))
            for kinds in (tasks, bare)
        )
        kept = [place for place, token in enumerate(with_ids) if token != prefix]
        if len(kept) == len(with_ids) or not kept:
            return {}
        layers.append([distance(one[kept], other) for one, other in zip(with_states, states, strict=True)])
        same.append(distance(with_vector, vector))
        vectors.append(vector)
    if not chosen:
        return {}
    others = [distance(one, other) for one, other in zip(vectors, vectors[1:], strict=False)]
    means = [statistics.mean(values) for values in zip(*layers, strict=True)]
    return {"layers": means, "vector": statistics.mean(same), "other_vector": statistics.mean(others)}


@torch.inference_mode()
def run(model: ViPolyQwenModel, batch: dict[str, Any]) -> tuple[list[int], list[torch.Tensor], torch.Tensor]:
    """Embeds side a of a batch of one pair.

    Returns:
        ids of its tokens, hidden states (tokens, D) after the embeddings and each layer, and the vector (1, D).
        Audio alone has no tokens.
    """
    inputs = take_rows(batch, torch.tensor([0]))
    with hidden_states(model) as seen:
        vector = model(**inputs, divide=False).embeddings
    if "input_ids" not in inputs:
        return [], [], vector
    mask = inputs["attention_mask"][0].bool()
    return inputs["input_ids"][0][mask].tolist(), [states[0][mask] for states in seen], vector


@contextmanager
def hidden_states(model: ViPolyQwenModel) -> Iterator[list[torch.Tensor]]:
    """Collects the inputs of the first layer of the language model and the outputs of all, (rows, tokens, D) each."""
    seen: list[torch.Tensor] = []
    layers = model.vlm.language_model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
    for layer in layers:
        hooks.append(
            layer.register_forward_hook(
                lambda _, __, output: seen.append(output if torch.is_tensor(output) else output[0])
            )
        )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean 1 − cosine of two (tokens, D)."""
    return (1 - cosine_similarity(one.float(), other.float(), dim=-1)).clamp(min=0).mean().item()


def report(result: dict[str, Any]) -> str:
    """The table by task."""
    found = result["distances"]
    count = len(next(iter(found.values()))["layers"])
    header = ["task", "embeddings", *(f"layer {number}" for number in range(1, count)), "vector", "vector, other row"]
    lines = [
        "# What a prefix changes inside",
        "",
        "1 − cosine of the hidden states of the same tokens with the task's prefix and without it, after each layer",
        "of the language model, and of the final vectors; last column: final vectors of two rows of the task.",
        f"`{result['command']}`, {result['machine']}.",
        "",
        *(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header))),
    ]
    for task, values in found.items():
        numbers = [*values["layers"], values["vector"], values["other_vector"]]
        lines.append(f"| {task} | {' | '.join(f'{number:.3f}' for number in numbers)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
