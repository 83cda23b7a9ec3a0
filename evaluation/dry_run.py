"""`--check`: does every task of a suite resolve, which data set would it fetch, and can the model take its inputs?

Nothing is fetched. The loader of each task is called with the network off: it either finds its data set here or says
which one it wants. Then the task itself, with its own columns, categories and metric, is run on a stand-in: a few rows
of made-up texts, images and sounds with the features that the task reads.
"""

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import huggingface_hub.constants
import mteb
import numpy as np
import soundfile
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClusteringLegacy,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.types import PromptType
from PIL import Image

from .encoder import MeasuredEncoder
from .task_run import Row, describe, why

ROWS = 16  # of a stand-in: cross-validation wants some of each label
LABELS = 2


def check_task(encoder: MeasuredEncoder, task: AbsTask) -> Row:
    """What a task is, `data` (here, or which it would fetch), `encode` (how the stand-in went), `status`."""
    row = describe(task)
    row["data"], found = reach_loader(task)
    if missing := sorted(set(task.metadata.modalities) - set(encoder.mteb_model_meta.modalities)):
        row["encode"] = f"not run: it needs {', '.join(missing)}, which the model does not take"
        return row | {"status": "ok" if found else "failed"}
    encoder.start(keep_vectors=False)
    try:
        task.dataset, task.data_loaded = stand_in(task), True
        result = mteb.evaluate(
            encoder,
            task,
            cache=None,
            co2_tracker=False,
            encode_kwargs={"batch_size": ROWS, "show_progress_bar": False},
            show_progress_bar=False,
        ).task_results[0]
    except Exception as error:  # whatever a task of mteb raises is the finding
        return row | {"encode": why(error, task)[1], "status": "failed"}
    finally:
        task.dataset, task.data_loaded = None, False
    row["encode"] = f"{encoder.rows} stand-in rows embedded, {task.metadata.main_score} {result.get_score():.3f}"
    return row | {"status": "ok" if found else "failed"}


def reach_loader(task: AbsTask) -> tuple[str, bool]:
    """Calls the task's loader with the network off; says what came of it, and whether that is as it should be."""
    wanted = f"{task.metadata.dataset['path']} at {task.metadata.dataset['revision']}"
    twin = type(task)()  # what a loader leaves behind where it fails is not to meet the stand-in
    twin.hf_subsets = task.hf_subsets
    try:
        with network_off():
            twin.load_data()
    except ConnectionError as error:
        if task.metadata.dataset["path"] not in str(error):
            wanted += f" ({error})"
        return f"would fetch {wanted}", True
    except Exception as error:  # the loader's own fault is what this is to find
        return f"the loader of {wanted} fails: {type(error).__name__}: {error}", False
    return f"{wanted} is here", True


@contextmanager
def network_off() -> Iterator[None]:
    """No library for data sets and models reaches out."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def stand_in(task: AbsTask) -> dict[str, Any]:
    """A data set of `ROWS` made-up rows with the columns and features that the task reads, for all its subsets."""
    splits = {*task.eval_splits, *([task.train_split] if isinstance(task, AbsTaskClassification) else [])}
    return {subset: {split: _split(task) for split in splits} for subset in task.hf_subsets}


def _split(task: AbsTask) -> Any:
    kinds = {
        AbsTaskRetrieval: _retrieval,
        AbsTaskSTS: _sts,
        AbsTaskPairClassification: _pairs,
        AbsTaskClusteringLegacy: _clusters,
        AbsTaskClassification: _labelled,
    }
    for kind, make in kinds.items():
        if isinstance(task, kind):
            return make(task)
    raise NotImplementedError(f"there is no stand-in for {type(task).__mro__[1].__name__}; add one to {__name__}")


def _retrieval(task: AbsTaskRetrieval) -> RetrievalSplitData:
    """As many queries as documents; each query has one right document and, to rerank, all of them."""
    sides = {side: task.metadata.get_modalities(side) for side in PromptType}
    tables = {
        side: _table(
            {modality: modality for modality in modalities}, {"id": [f"{side.value}{i}" for i in range(ROWS)]}
        )
        for side, modalities in sides.items()
    }
    queries, documents = tables[PromptType.query]["id"], tables[PromptType.document]["id"]
    is_reranking = "Reranking" in task.metadata.type
    return RetrievalSplitData(
        queries=tables[PromptType.query],
        corpus=tables[PromptType.document],
        relevant_docs={query: {document: 1} for query, document in zip(queries, documents, strict=True)},
        top_ranked={query: list(documents) for query in queries} if is_reranking else None,
    )


def _sts(task: AbsTaskSTS) -> datasets.Dataset:
    scores = np.linspace(task.min_score, task.max_score, ROWS).tolist()
    return _table(_columns(task, *task.column_names), {"score": scores})


def _pairs(task: AbsTaskPairClassification) -> datasets.Dataset:
    columns = _columns(task, task.input1_column_name, task.input2_column_name)
    return _table(columns, {task.label_column_name: [i % LABELS for i in range(ROWS)]})


def _labelled(task: AbsTaskClassification) -> datasets.Dataset:
    names = [task.input_column_name] if isinstance(task.input_column_name, str) else task.input_column_name
    return _table(_columns(task, *names), {task.label_column_name: [i % LABELS for i in range(ROWS)]})


def _clusters(task: AbsTaskClusteringLegacy) -> datasets.Dataset:
    """Texts come as whole sets of sentences and labels, one set a row."""
    table = _table(_columns(task, task.input_column_name), {task.label_column_name: [i % LABELS for i in range(ROWS)]})
    if task.metadata.modalities == ["text"]:
        return datasets.Dataset.from_dict({name: [table[name][:]] for name in table.column_names})
    return table


def _columns(task: AbsTask, *names: str | Mapping[str, str]) -> dict[str, str]:
    """Column -> modality, of names that mean the task's only modality or say theirs."""
    columns: dict[str, str] = {}
    for name in names:
        columns |= {name: task.metadata.modalities[0]} if isinstance(name, str) else dict(name)
    return columns


def _table(columns: Mapping[str, str], others: Mapping[str, list[Any]]) -> datasets.Dataset:
    """Media columns are made as the bytes of files, as data sets on the Hub hold them."""
    medium = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    content: dict[str, list[Any]] = {}
    for number, (column, modality) in enumerate(columns.items()):
        content[column] = [STAND_INS[modality](number * ROWS + row) for row in range(ROWS)]
    table = datasets.Dataset.from_dict({**content, **others})
    for column, modality in columns.items():
        if modality in ("image", "audio"):
            table = table.cast_column(column, medium)
            table = table.cast_column(column, datasets.Image() if modality == "image" else datasets.Audio())
    return table


def _text(number: int) -> str:
    return f"Câu số {number}, sentence {number}, 第{number}句."


def _image(number: int) -> dict[str, Any]:
    pixels = np.random.default_rng(number).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _audio(number: int) -> dict[str, Any]:
    """0.3 to 0.45 s of noise at 16 kHz."""
    samples = np.random.default_rng(number).uniform(-0.5, 0.5, 4800 + 160 * (number % ROWS))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV")
    return {"bytes": buffer.getvalue(), "path": None}


STAND_INS = {"text": _text, "image": _image, "audio": _audio}


def show_check(rows: list[Row]) -> str:
    """One line for each task, and a last one that counts."""
    lines = []
    for row in rows:
        what = row.get("reason")
        if what is None:
            inputs = f"{row['type']} {row['category']}, {'+'.join(row['modalities'])}, {len(row['subsets'])} subsets"
            what = f"{inputs}; {row['data']}; {row['encode']}"
        lines.append(f"{row['status']:7} {row['task']}: {what}")
    counts = Counter(row["status"] for row in rows)
    return "\n".join([*lines, f"{len(rows)} tasks: " + ", ".join(f"{count} {name}" for name, count in counts.items())])
