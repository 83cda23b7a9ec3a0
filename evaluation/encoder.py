"""Wraps any model as an encoder of mteb: chooses prompts, decodes audio, measures speed and memory."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from mteb.abstasks import AbsTask
from mteb.abstasks.pair_classification import AbsTaskPairClassification
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.models_protocols import EncoderProtocol
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from ..data.collator import message_parts
from ..data.sides import PLAIN_TEXT, SidePrompt, prefix_sides, takes_plain_text
from ..waveforms_vipolyqwen import load_audio, resample
from .memory import CLEAR_REFS, peak_host, reset_peaks

MODALITIES = ("image", "audio", "text", "video")  # order within an input: an image precedes its question
AUDIO_RATE = 16_000  # Hz, as in mteb; sentence-transformers requires one rate per batch
Prompts = Mapping[str, str | SidePrompt | None]  # keys as in `prompt_keys` -> a model's prompt, None for no prompt
SIDES = {
    None: "a",
    PromptType.query: "a",
    PromptType.document: "b",
}  # of training; both inputs of a symmetric task are a
PAIR_TASKS = (AbsTaskSTS, AbsTaskPairClassification)
PLACEHOLDER = "<image>"  # marks the place of each of several images in a text
ENCODE = {None: SentenceTransformer.encode, PromptType.query: SentenceTransformer.encode_query}
ENCODE[PromptType.document] = SentenceTransformer.encode_document


def prompt_keys(metadata: TaskMetadata, prompt_type: PromptType | None) -> list[str]:
    """Returns the keys of a suite's table of prompts that match one side of a task, in descending priority.

    The keys are the task's name, its type and the side's modalities (such as "text" or "image+text"), each with and
    without "-query" or "-document".
    """
    has_class = (metadata.category or "").endswith("2c")  # also of some tasks on pairs; mteb has no modality for it
    modalities = metadata.modalities if has_class else metadata.get_modalities(prompt_type)
    shown = "+".join(sorted(modalities))
    bases = (metadata.name, metadata.type, shown)
    return [key for base in bases for key in ([f"{base}-{prompt_type.value}"] if prompt_type else []) + [base]]


class SentenceEncoder(AbsEncoder):
    """Encodes with a SentenceTransformer and the prompts of a suite.

    Replaces mteb's `SentenceTransformerEncoderWrapper`, whose `encode` cannot be extended: it decodes audio with
    torchcodec and torchaudio (here: soundfile and scipy), orders the parts of an input as the data set's columns are,
    does not place several images in a text, and ignores prompts that are not named after tasks of mteb.
    """

    def __init__(self, model: SentenceTransformer, name: str, revision: str, table: Prompts) -> None:
        self.model = model
        self.table = dict(table)
        self.prefix_sides = prefix_sides(model)
        meta = ModelMeta.from_sentence_transformer_model(model, fill_missing=None)
        modalities = [modality for modality in MODALITIES if modality in model.modalities]
        self.mteb_model_meta = meta.model_copy(update={"name": name, "revision": revision, "modalities": modalities})

    def prompt(self, metadata: TaskMetadata, prompt_type: PromptType | None) -> str | None:
        """Returns the text that precedes an input, by the suite's table or by mteb's rule for the model's prompts.

        A task's prefix stands on the sides of training (queries are sides a, documents sides b), unless a key of the
        suite names the side (`STS-document`).
        """
        for key in prompt_keys(metadata, prompt_type):
            if key in self.table:
                name = self._trained(key, self.table[key], SIDES[prompt_type])
                if name is None or name in self.model.prompts:
                    return self.model.prompts[name] if name else ""  # None would select the model's default
                break  # this model lacks the prompt
        name = get_prompt_name(self.model.prompts, metadata, prompt_type) or self.model.default_prompt_name
        return self.model.prompts[name] if name else None

    def _trained(self, key: str, prompt: str | SidePrompt | None, side: str) -> str | None:
        """Returns the name of a prompt, `None` if it is for a side that had no prefix in training."""
        name, side = (prompt.task, prompt.side) if isinstance(prompt, SidePrompt) else (prompt, side)
        is_explicit = isinstance(prompt, str) and key.endswith(("-query", "-document"))
        known = self.prefix_sides.get(name)
        return name if is_explicit or known is None or known in (side, "both") else None

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Returns (rows, dimension) float32 vectors of the rows of the loader's data set."""
        loader, columns = read_rows(inputs, self.mteb_model_meta.modalities)
        plain = takes_plain_text(self.model)
        options = {"prompt": self.prompt(task_metadata, prompt_type), **kwargs}
        options |= {"processing_kwargs": PLAIN_TEXT} if plain else {}
        encode = ENCODE[prompt_type]
        if columns == ["text"]:  # in one call, which sorts them by length
            texts = [{"text": row["text"]} if plain else row["text"] for batch in loader for row in batch]
            return _as_array(encode(self.model, texts, **options))
        options["show_progress_bar"] = False
        parts = [encode(self.model, [as_input(row, columns) for row in batch], **options) for batch in loader]
        return np.concatenate([_as_array(part) for part in parts])


class BackboneEncoder(AbsEncoder):
    """Encodes with a bare backbone, without prompts, in the order and form in which `prepare` lays out its inputs.

    Args:
        model: maps the tensors of a batch to (rows, dimension) vectors.
        prepare: maps inputs, as `as_input` returns them, to the tensors of a batch.
        name: for mteb's results.
        revision: commit, or hash of a folder.
        modalities: that the backbone supports.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prepare: Callable[[list[Any]], Mapping[str, torch.Tensor]],
        name: str,
        revision: str,
        modalities: list[str],
    ) -> None:
        self.model, self.prepare = model.eval(), prepare
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "revision": revision, "modalities": modalities})

    @torch.inference_mode()
    def encode(self, inputs: DataLoader, **kwargs: Any) -> np.ndarray:
        """Returns (rows, dimension) float32 vectors of the rows of the loader's data set."""
        loader, columns = read_rows(inputs, self.mteb_model_meta.modalities)
        device = next(self.model.parameters()).device
        parts = []
        for batch in loader:
            tensors = self.prepare([as_input(row, columns) for row in batch])
            parts.append(_as_array(self.model(**{name: tensor.to(device) for name, tensor in tensors.items()})))
        return np.concatenate(parts)


def read_rows(inputs: DataLoader, modalities: list[str]) -> tuple[DataLoader, list[str]]:
    """Returns a loader of lists of rows, audio not decoded, and the columns that are among the modalities."""
    table = inputs.dataset
    if "audio" in table.features:
        table = table.cast_column("audio", datasets.Audio(decode=False))
    columns = [name for name in MODALITIES if name in table.features and name in modalities]
    return DataLoader(table, inputs.batch_size, num_workers=inputs.num_workers, collate_fn=list), columns


def as_input(row: Mapping[str, Any], columns: list[str]) -> dict[str, Any] | list[dict[str, Any]]:
    """Returns one row as sentence-transformers accepts it; a message where an input has several images."""
    shown = {name: row[name] for name in columns}
    if "audio" in shown:
        source = shown["audio"]["bytes"] or shown["audio"]["path"]
        samples = resample(*load_audio(source), AUDIO_RATE)
        shown["audio"] = {"array": samples, "sampling_rate": AUDIO_RATE}
    images = shown.get("image")
    if not isinstance(images, list):
        return shown
    parts = message_parts(shown.get("text", ""), images, shown.get("audio"), PLACEHOLDER)
    return [{"role": "user", "content": parts, "keep_order": True}]


class MeasuredEncoder:
    """Measures the rows, seconds and memory of an encoder of mteb, and keeps its vectors on request.

    Attributes:
        kept: (subset, split) -> "query", "document" or "inputs" -> arrays in order of creation.
        documents: (subset, split) -> number of documents.
    """

    def __init__(self, encoder: EncoderProtocol) -> None:
        self.encoder = encoder
        self.mteb_model_meta = encoder.mteb_model_meta
        self.start(keep_vectors=False)

    def start(self, keep_vectors: bool) -> None:
        """Resets all counters before a task."""
        self.keep_vectors = keep_vectors
        self.rows, self.seconds = 0, 0.0
        self.documents: dict[tuple[str, str], int] = defaultdict(int)
        self.kept: dict[tuple[str, str], dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        reset_peaks()

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the encoder's vectors and counts them."""
        started = time.perf_counter()
        where = {"task_metadata": task_metadata, "hf_split": hf_split, "hf_subset": hf_subset}
        vectors = self.encoder.encode(inputs, prompt_type=prompt_type, **where, **kwargs)
        self.seconds += time.perf_counter() - started
        self.rows += len(vectors)
        if prompt_type == PromptType.document:
            self.documents[hf_subset, hf_split] += len(vectors)
        if self.keep_vectors:
            side = prompt_type.value if prompt_type else "inputs"
            self.kept[hf_subset, hf_split][side].append(_as_array(vectors))
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the encoder's similarity of all pairs."""
        return self.encoder.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the encoder's similarity of matching rows."""
        return self.encoder.similarity_pairwise(embeddings1, embeddings2)

    def prompts(self, task: AbsTask) -> dict[str, str]:
        """Returns the prompt of each side of a task for display: "" for none; empty for a model registered in mteb."""
        if isinstance(self.encoder, BackboneEncoder):
            return {"all": ""}
        if not isinstance(self.encoder, SentenceEncoder):
            return {}
        if task.metadata.simplified_task_type != "retrieval" and not self._differs_by_side(task):
            return {"all": self.encoder.prompt(task.metadata, None) or ""}
        return {side.value: self.encoder.prompt(task.metadata, side) or "" for side in PromptType}

    def tell_sides_apart(self, task: AbsTask) -> None:
        """Lets a task on pairs encode its inputs as sides a and b where prompts differ; mteb treats them alike."""
        if self._differs_by_side(task):
            task.input1_prompt_type, task.input2_prompt_type = PromptType.query, PromptType.document

    def _differs_by_side(self, task: AbsTask) -> bool:
        """Whether the inputs of a task on pairs have different prompts, by the sides of the prefix in training."""
        encoder = self.encoder
        if not (isinstance(task, PAIR_TASKS) and isinstance(encoder, SentenceEncoder) and encoder.prefix_sides):
            return False
        return len({encoder.prompt(task.metadata, side) for side in (None, *PromptType)}) > 1

    def home(self) -> dict[str, str]:
        """Returns device and dtype of the weights."""
        model = vars(self.encoder).get("model")  # the attribute's name in mteb's wrappers
        weight = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        if weight is None:
            return {"device": "unknown", "dtype": "unknown"}
        return {"device": _device(weight.device), "dtype": str(weight.dtype).removeprefix("torch.")}

    def measures(self) -> dict[str, Any]:
        """Returns the measurements since `start`."""
        return {
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            "rows_per_second": round(self.rows / self.seconds, 2) if self.rows else None,
            "peak_host_bytes": peak_host(),
            "peak_host_of": "task" if CLEAR_REFS.exists() else "process",
            "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            **self.home(),
        }


def _as_array(vectors: Any) -> np.ndarray:
    if isinstance(vectors, torch.Tensor):
        return vectors.detach().float().cpu().numpy()
    return np.asarray(vectors, dtype=np.float32)


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
