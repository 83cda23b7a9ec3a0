"""`--check`: resolves every task of a suite, names its data set, and runs the model on generated inputs. Offline.

The loader of each task is called with the network off: it either finds its data set in the cache or names the one it
would download. Then mteb runs the task, with its columns, categories and metric, on a stand-in: a few generated rows.
mteb's `mock_run` does not replace this: its mock tasks have other columns, lack several types of the suites
(DocumentUnderstanding, Any2AnyMultilingualRetrieval), and need torchcodec for audio.
"""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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

from .custom_tasks import media_table
from .encoder import MeasuredEncoder
from .scorecard import Row
from .task_run import describe, why

ROWS = 16  # of a stand-in: cross-validation needs several of each label
LABELS = 2


def check_task(encoder: MeasuredEncoder, task: AbsTask) -> Row:
    """Returns the task's description, `data` (cached or to be downloaded), `encode` (stand-in result) and `status`."""
    row = describe(task)
    row["data"], found = reach_loader(task)
    if missing := sorted(set(task.metadata.modalities) - set(encoder.mteb_model_meta.modalities)):
        row["encode"] = f"not run: it needs {', '.join(missing)}, which the model does not support"
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
    except Exception as error:  # any failure of a task is a finding to report
        return row | {"encode": why(error, task)[1], "status": "failed"}
    finally:
        task.dataset, task.data_loaded = None, False
    row["encode"] = f"{encoder.rows} stand-in rows embedded, {task.metadata.main_score} {result.get_score():.3f}"
    return row | {"status": "ok" if found else "failed"}


def reach_loader(task: AbsTask) -> tuple[str, bool]:
    """Calls the task's loader with the network off; returns a report, and whether the loader works."""
    wanted = f"{task.metadata.dataset['path']} at {task.metadata.dataset['revision']}"
    twin = type(task)()  # a failed loader may leave state that would mix with the stand-in
    twin.hf_subsets = task.hf_subsets
    try:
        with network_off():
            twin.load_data()
    except ConnectionError as error:
        if task.metadata.dataset["path"] not in str(error):
            wanted += f" ({error})"
        return f"would download {wanted}", True
    except Exception as error:  # a broken loader is a finding to report
        return f"the loader of {wanted} fails: {type(error).__name__}: {error}", False
    return f"{wanted} is cached", True


@contextmanager
def network_off() -> Iterator[None]:
    """Switches `huggingface_hub` and `datasets` to offline mode."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def stand_in(task: AbsTask) -> dict[str, Any]:
    """Returns `ROWS` generated rows, with the columns and features that the task reads, for each of its subsets."""
    splits = {*task.eval_splits, *([task.train_split] if isinstance(task, AbsTaskClassification) else [])}
    make = _retrieval if isinstance(task, AbsTaskRetrieval) else _labelled
    return {subset: {split: make(task) for split in splits} for subset in task.hf_subsets}


def _retrieval(task: AbsTaskRetrieval) -> RetrievalSplitData:
    """Returns as many queries as documents; each query has one relevant document and, to rerank, all candidates."""
    tables = {
        side: _table(
            task,
            [{modality: modality} for modality in task.metadata.get_modalities(side)],
            {"id": [f"{side.value}{i}" for i in range(ROWS)]},
        )
        for side in PromptType
    }
    queries, documents = (list(tables[side]["id"]) for side in (PromptType.query, PromptType.document))
    is_reranking = "Reranking" in task.metadata.type
    return RetrievalSplitData(
        queries=tables[PromptType.query],
        corpus=tables[PromptType.document],
        relevant_docs={query: {document: 1} for query, document in zip(queries, documents, strict=True)},
        top_ranked={query: documents for query in queries} if is_reranking else None,
    )


def _labelled(task: AbsTask) -> datasets.Dataset:
    """Returns inputs with a label or a score; clusters of texts are one row of lists, as mteb reads them."""
    label, values = "label", [i % LABELS for i in range(ROWS)]
    if isinstance(task, AbsTaskSTS):
        inputs, label, values = task.column_names, "score", np.linspace(task.min_score, task.max_score, ROWS).tolist()
    elif isinstance(task, AbsTaskPairClassification):
        inputs, label = (task.input1_column_name, task.input2_column_name), task.label_column_name
    elif isinstance(task, AbsTaskClassification | AbsTaskClusteringLegacy):
        inputs, label = task.input_column_name, task.label_column_name
    else:
        raise NotImplementedError(f"{__name__} has no stand-in for {type(task).__mro__[1].__name__}; add one")
    table = _table(task, [inputs] if isinstance(inputs, str) else inputs, {label: values})
    if isinstance(task, AbsTaskClusteringLegacy) and task.metadata.modalities == ["text"]:
        return datasets.Dataset.from_dict({name: [table[name][:]] for name in table.column_names})
    return table


def _table(
    task: AbsTask, columns: Iterable[str | Mapping[str, str]], others: Mapping[str, list[Any]]
) -> datasets.Dataset:
    """Returns generated inputs; a column is a name, of the task's only modality, or a dict of name -> modality."""
    modalities: dict[str, str] = {}
    for column in columns:
        modalities |= {column: task.metadata.modalities[0]} if isinstance(column, str) else column
    inputs = {
        column: [STAND_INS[modality](number * ROWS + row) for row in range(ROWS)]
        for number, (column, modality) in enumerate(modalities.items())
    }
    return media_table({**inputs, **others}, modalities)


def _text(number: int) -> str:
    return f"Câu số {number}, sentence {number}, 第{number}句."


def _image(number: int) -> bytes:
    """Returns a PNG of noise, 84 × 56 pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _audio(number: int) -> bytes:
    """Returns a WAV file of 0.3 to 0.45 s of noise at 16 kHz."""
    samples = np.random.default_rng(number).uniform(-0.5, 0.5, 4800 + 160 * (number % ROWS))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV")
    return buffer.getvalue()


STAND_INS = {"text": _text, "image": _image, "audio": _audio}


def show_check(rows: list[Row]) -> str:
    """Returns one line per task, and a last line with counts."""
    lines = []
    for row in rows:
        what = row.get("reason")
        if what is None:
            inputs = f"{row['type']} {row['category']}, {'+'.join(row['modalities'])}, {len(row['subsets'])} subsets"
            what = f"{inputs}; {row['data']}; {row['encode']}"
        lines.append(f"{row['status']:7} {row['task']}: {what}")
    counts = Counter(row["status"] for row in rows)
    return "\n".join([*lines, f"{len(rows)} tasks: " + ", ".join(f"{count} {name}" for name, count in counts.items())])
