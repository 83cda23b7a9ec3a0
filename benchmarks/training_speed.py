"""Pairs a second of ViPolyQwenTrainer and of sentence-transformers' Trainer, side by side in one run.

    python benchmarks/training_speed.py [CORPUS] [--models demo mid] [--repeats 3]

CORPUS is a demo corpus (`make demo` leaves one in outputs/demo/corpus). Both trainers take the same steps: the same
repository loaded from disk, the same pairs in the same order and number a step, the same symmetric InfoNCE (the first
losses are compared), AdamW with clipping, float32, no prefixes, no worker processes, cached gradients whose largest
forward is the same: N rows in theirs, the tokens of N longest rows in ours (`embed_chunk_tokens`). Collation, padding
and splitting into micro-batches differ. The other trainer runs twice: on the stock layers of transformers, as without
this package, and on the faster layers of this model (`ratio_on_the_same_layers`). Step times include collation, over
`train()` of both in turn. Two sets of pairs:

- `long_tail`: texts of 3 to 100 words, spread evenly over the logarithm, as questions and passages are;
- `text_and_images`: the demo corpus without audio, about half with an image.

In batches that mix audio with other rows, sentence-transformers' loss splits the clips as if every row had one; its
error is recorded, and this trainer measured alone. Writes benchmarks/results/training_speed.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from demo_batches import TASKS
from result_files import claim, write_result
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from vipolyqwen.configuration_vipolyqwen import ViPolyQwenConfig
from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.sampler import MixtureSampler
from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.data.sources import PairDataset, load_pairs
from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.demo.world import read_rows
from vipolyqwen.demo_vipolyqwen import BASE_SIZES
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.training.arguments import read_arguments
from vipolyqwen.training.build import build_loss
from vipolyqwen.training.microbatches import row_lengths
from vipolyqwen.training.trainer import ViPolyQwenTrainer

BARS = {"long_tail": 2.0, "text_and_images": 1.5}
TEMPERATURE = 0.05
MODELS = {  # sizes, pairs of a step, rows of a forward, timed steps
    "demo": (BASE_SIZES, 64, 16, 10),
    "mid": (
        {"hidden_size": 640, "layers": 12, "vision_size": 512, "audio_size": 512, "vocab_size": 2048},
        16,
        4,
        2,
    ),
}
DATA = ("long_tail", "text_and_images")
WORDS = (3, 100)  # shortest and longest side of a long-tailed pair


def main() -> None:
    """Compares on every model and set of pairs, and writes the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, nargs="?", default=Path("outputs/demo/corpus"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        table = {name: compare(name, options.corpus, Path(folder) / name, options.repeats) for name in options.models}
    claims = {
        f"{name}_{data}_speed_over_sentence_transformers": claim(
            row["ratio"], BARS[data], holds=row["ratio"] >= BARS[data]
        )
        for name, rows in table.items()
        for data, row in rows.items()
        if "ratio" in row
    }
    write_result("training_speed", claims, table=table, repeats=options.repeats)


def compare(name: str, corpus: Path, folder: Path, repeats: int) -> dict[str, dict[str, Any]]:
    """A row of the table for each set of pairs."""
    sizes, pairs_a_step, rows_a_forward, steps = MODELS[name]
    torch.manual_seed(0)
    texts = [row["b"] for task in TASKS for row in read_rows(corpus / f"train/{task}.jsonl")]
    model, processor = build_tiny_base(texts, **sizes)
    save_repository(model, processor, folder / "model")
    settings = {
        "parameters": model.num_parameters(),
        "pairs_a_step": pairs_a_step,
        "rows_a_forward": rows_a_forward,
        "timed_steps": steps,
    }
    del model
    write_long_tail(texts, folder / "long_tail.jsonl", pairs_a_step * (steps + 2))
    sources = {
        "long_tail": [{"path": str(folder / "long_tail.jsonl"), "task": "instr"}],
        "text_and_images": demo_sources(corpus, [task for task in TASKS if task != "audio"]),
        "with_sounds": demo_sources(corpus, TASKS),
    }
    rows = {}
    for data, of_data in sources.items():
        contest = Contest(folder, of_data, settings)
        rows[data] = settings | (contest.run(repeats) if data in DATA else contest.alone(repeats))
        print(name, data, json.dumps(rows[data]), flush=True)
    return rows


def demo_sources(corpus: Path, tasks: Sequence[str]) -> list[dict[str, str]]:
    """The corpus's rows, with all images before the text: the other trainer's dicts know no place in it."""
    common = {"media_root": str(corpus), "image_placeholder": "<nowhere>"}
    return [{"path": str(corpus / f"train/{task}.jsonl"), **common} for task in tasks]


def write_long_tail(texts: list[str], path: Path, count: int) -> None:
    """Pairs of texts whose numbers of words are spread evenly over the logarithm, of the corpus's words."""
    rng = np.random.default_rng(0)
    words = " ".join(texts).split()

    def draw() -> str:
        length = int(np.exp(rng.uniform(*np.log(WORDS))))
        start = rng.integers(len(words) - length)
        return " ".join(words[start : start + length])

    path.write_text("\n".join(json.dumps({"a": draw(), "b": draw()}) for _ in range(count)), encoding="utf-8")


class Contest:
    """Both trainers on the same model and pairs.

    Args:
        folder: with the repository `model`.
        sources: of the pairs.
        settings: pairs of a step, rows of a forward, timed steps.
    """

    def __init__(self, folder: Path, sources: list[dict[str, Any]], settings: dict[str, int]) -> None:
        self.folder, self.settings = folder, settings
        tasks = declare_tasks(None)
        config = ViPolyQwenConfig.from_pretrained(folder / "model")
        processor = ViPolyQwenProcessor.from_pretrained(folder / "model", config=config)
        self.collator = MixedBatchCollator(processor, tasks, prefix_dropout=1.0, with_negatives=False)
        self.pairs = load_pairs(sources, tasks, processor.min_audio_samples, check_media=False)
        self.arguments = {
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": settings["pairs_a_step"],
            "max_steps": 1 + settings["timed_steps"],  # the first is a warm-up
            "learning_rate": 1e-4,
            "seed": 0,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
        }

    def run(self, repeats: int) -> dict[str, Any]:
        """Medians of both over `repeats`, in turn, and their ratio."""
        makers = {
            "vipolyqwen": self.make_own,
            "sentence_transformers": lambda: self.make_other(stock_layers=True),
            "sentence_transformers_on_the_same_layers": self.make_other,
        }
        trainers = {name: make() for name, make in makers.items()}
        speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
        losses = {}
        for repeat in range(repeats):
            for name in list(trainers)[:: 1 if repeat % 2 == 0 else -1]:
                speeds[name].append(self.measure(trainers[name]))
                losses.setdefault(name, trainers[name].state.log_history[0]["loss"])
        if max(losses.values()) - min(losses.values()) > 1e-3 * max(losses.values()):
            raise ValueError(f"The first losses are {losses}: the trainers do not do the same work.")

        def ratios(over: str, clock: int) -> list[float]:
            return [own[clock] / other[clock] for own, other in zip(speeds["vipolyqwen"], speeds[over], strict=True)]

        by_wall, by_processor = (ratios("sentence_transformers", clock) for clock in (0, 1))
        on_same_layers = ratios("sentence_transformers_on_the_same_layers", 0)
        return {
            "ratio": round(statistics.median(by_wall), 3),
            "lowest_and_highest_ratio": [round(min(by_wall), 3), round(max(by_wall), 3)],
            "ratio_of_processor_time": round(statistics.median(by_processor), 3),
            "ratio_on_the_same_layers": round(statistics.median(on_same_layers), 3),
            "pairs_per_second": {
                name: round(statistics.median(wall for wall, _ in values), 2) for name, values in speeds.items()
            },
            "first_loss": losses,
        }

    def alone(self, repeats: int) -> dict[str, Any]:
        """Medians of this trainer, and what sentence-transformers says to the same pairs."""
        own = self.make_own()
        speed = statistics.median(self.measure(own)[0] for _ in range(repeats))
        refusal = "none"
        try:
            self.make_other().train()
        except Exception as error:  # whatever it is, it is what a user would see
            refusal = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"pairs_per_second": {"vipolyqwen": round(speed, 2)}, "sentence_transformers_says": refusal}

    def measure(self, trainer: Trainer) -> tuple[float, float]:
        """Pairs a second of a run's steps after its first, by the clock and by this process's processor time."""
        clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock))
        clock.ends.clear()
        trainer.train()
        pairs = self.settings["pairs_a_step"] * self.settings["timed_steps"]
        return tuple(pairs / (last - first) for first, last in zip(clock.ends[0], clock.ends[-1], strict=True))

    def tokens_a_forward(self) -> int:
        """Tokens of the other trainer's largest forward: its rows, padded to the longest."""
        count = self.arguments["max_steps"] * self.settings["pairs_a_step"]
        order = list(MixtureSampler(self.pairs.source_lengths, self.pairs.source_weights, seed=self.arguments["seed"]))
        longest = max(row_lengths(self.collator([self.pairs[row]])).max().item() for row in order[:count])
        return self.settings["rows_a_forward"] * longest

    def make_own(self) -> ViPolyQwenTrainer:
        """This trainer, with the loss of the other and forwards as large."""
        given = {"model": self.folder / "model", "loss_table": "nce", "temperature": TEMPERATURE, **self.arguments}
        given |= {"embed_chunk_tokens": self.tokens_a_forward(), "mask_duplicates": False, "mask_groups": False}
        given["nce_min_score"] = 0.0
        _, _, loss_args, args = read_arguments([word for k, v in given.items() for word in (f"--{k}", str(v))])
        model = ViPolyQwenModel.from_pretrained(self.folder / "model")
        loss = build_loss(loss_args, {}, list(declare_tasks(None)))
        collator = self.collator
        trainer = ViPolyQwenTrainer(model, args, collator.processor, loss, self.pairs, None, collator, collator)
        return with_clock(trainer)

    def make_other(self, stock_layers: bool = False) -> SentenceTransformerTrainer:
        """The other trainer, on the pairs in the order in which this one visits them."""
        order = list(self.make_own()._get_train_sampler())
        model = SentenceTransformer(str(self.folder / "model"), trust_remote_code=True)
        if stock_layers:
            use_stock_layers(model)
        loss = CachedMultipleNegativesRankingLoss(
            model,
            scale=1 / TEMPERATURE,
            mini_batch_size=self.settings["rows_a_forward"],
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )
        arguments = SentenceTransformerTrainingArguments(**self.arguments, batch_sampler=in_order)
        dataset = Dataset.from_dict({"a": order, "b": order}).with_transform(Sides(self.pairs))
        return with_clock(SentenceTransformerTrainer(model, arguments, dataset, loss=loss))


def use_stock_layers(model: nn.Module) -> None:
    """Turns the faster layers of a model back into those of transformers."""
    stock = {"Linear": nn.Linear, "PatchProjection": nn.Conv3d, "BatchedVisionAttention": VisionAttention}
    for module in model.modules():
        module.__class__ = stock.get(type(module).__name__, type(module))


class Sides:
    """Row numbers to both sides of pairs, as sentence-transformers takes them."""

    def __init__(self, pairs: PairDataset) -> None:
        self.pairs = pairs

    def __call__(self, numbers: dict[str, list[int]]) -> dict[str, list[Any]]:
        """The sides of a batch of numbers."""
        rows = [self.pairs[number] for number in numbers["a"]]
        return {"a": [side_a(row) for row in rows], "b": [row["b"] for row in rows]}


def side_a(row: dict[str, Any]) -> str | dict[str, Any]:
    """A text, or a dict of what stands in side a."""
    parts = {"image": row["images_a"], "text": row["a"], "audio": row["audio_a"]}
    parts = {name: part for name, part in parts.items() if part}
    return row["a"] if set(parts) == {"text"} else parts


def in_order(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> DefaultBatchSampler:
    """Batches of rows as they lie."""
    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


class Clock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimiser's step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))


def with_clock(trainer: Trainer) -> Any:
    """The same trainer, timed and silent."""
    trainer.add_callback(Clock())
    trainer.remove_callback(PrinterCallback)
    return trainer


if __name__ == "__main__":
    main()
