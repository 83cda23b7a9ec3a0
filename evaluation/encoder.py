"""Any model as an encoder of mteb: which prompt it gets, how sounds reach it, and what speed and memory it takes."""

import hashlib
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.get_model_meta import MODEL_REGISTRY
from mteb.models.models_protocols import EncoderProtocol
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from ..media_vipolyqwen import load_audio, resample
from .memory import CLEAR_REFS, peak_host, reset_peaks

MODALITIES = ("image", "audio", "text", "video")  # in this order an input is read: a picture, then its question
AUDIO_RATE = 16_000  # Hz, as mteb's own; sentence-transformers takes one rate a batch
PLACEHOLDER = "<image>"  # where each of several images stands in a text
ENCODE = {None: SentenceTransformer.encode, PromptType.query: SentenceTransformer.encode_query}
ENCODE[PromptType.document] = SentenceTransformer.encode_document


def load_encoder(
    name: str, table: Mapping[str, str | None], device: str | None, dtype: str | None, trust_remote_code: bool
) -> "MeasuredEncoder":
    """Loads a folder or a model of the Hub.

    A model that mteb knows is loaded as mteb does, with its own prompts; any other through sentence-transformers.

    Args:
        name: folder or Hub id.
        table: see `prompt_key`; a value is the name of one of the model's prompts, or None for none.
        device: such as "cuda"; None: the library's choice.
        dtype: such as "bfloat16"; None: the library's choice, as for a model that mteb knows.
        trust_remote_code: whether code from the Hub may run; code of a folder always may.
    """
    folder = Path(name)
    if name in MODEL_REGISTRY and not folder.is_dir():
        encoder = mteb.get_model(name, device=device)
        if not isinstance(encoder, EncoderProtocol):
            raise ValueError(f"{name}: mteb has it as {type(encoder).__name__}, which makes no vectors of its own.")
        return MeasuredEncoder(encoder)
    model = SentenceTransformer(
        name,
        device=device,
        trust_remote_code=trust_remote_code or folder.is_dir(),
        model_kwargs={"dtype": dtype} if dtype else None,
    )
    label, revision = (
        (f"local/{folder.resolve().name}", _content(folder)) if folder.is_dir() else (name, _commit(name))
    )
    return MeasuredEncoder(SentenceEncoder(model, label, revision, table))


def _content(folder: Path) -> str:
    """A name for the weights and settings in a folder: results of another training are never taken for these."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted((*folder.rglob("*.safetensors"), *folder.rglob("*.bin"), *folder.rglob("*.json"))):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, hashlib.blake2b).digest())
    return digest.hexdigest()


def _commit(name: str) -> str:
    """The commit of a model that was loaded from the Hub."""
    for file in ("modules.json", "config.json"):
        cached = try_to_load_from_cache(name, file)
        if isinstance(cached, str):  # neither unknown nor known to be absent
            return Path(cached).parent.name
    raise ValueError(f"{name}: the commit it was loaded from cannot be told; give a folder instead.")


def prompt_keys(metadata: TaskMetadata, prompt_type: PromptType | None) -> list[str]:
    """The keys of a suite's table of prompts that fit one side of a task, the first being the strongest.

    They are the task's name, its type and the side's modalities (such as "text" or "image+text"), each with and
    without "-query" or "-document".
    """
    modalities = metadata.get_modalities(prompt_type)
    shown = "+".join(sorted(modalities))
    bases = (metadata.name, metadata.type, shown)
    return [key for base in bases for key in ([f"{base}-{prompt_type.value}"] if prompt_type else []) + [base]]


class SentenceEncoder(AbsEncoder):
    """A SentenceTransformer with the prompts of a suite.

    Sounds are read by soundfile and resampled by scipy: mteb's own way needs torchcodec and torchaudio.
    """

    def __init__(self, model: SentenceTransformer, name: str, revision: str, table: Mapping[str, str | None]) -> None:
        self.model = model
        self.table = dict(table)
        meta = ModelMeta.from_sentence_transformer_model(model, fill_missing=None)
        modalities = [modality for modality in MODALITIES if modality in model.modalities]
        self.mteb_model_meta = meta.model_copy(update={"name": name, "revision": revision, "modalities": modalities})

    def prompt(self, metadata: TaskMetadata, prompt_type: PromptType | None) -> str | None:
        """What the model gets in front of an input: by the suite's table, else by mteb's rule from its own prompts."""
        for key in prompt_keys(metadata, prompt_type):
            if key in self.table:
                name = self.table[key]
                if name is None or name in self.model.prompts:
                    return self.model.prompts[name] if name else ""  # None would let the model choose
                break  # a prompt that this model does not have
        own = get_prompt_name(self.model.prompts, metadata, prompt_type) or self.model.default_prompt_name
        return self.model.prompts[own] if own else None

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
        """(rows, dimension) float32 vectors of what the loader's data set shows."""
        table = inputs.dataset
        if "audio" in table.features:
            table = table.cast_column("audio", datasets.Audio(decode=False))
        columns = [name for name in MODALITIES if name in table.features and name in self.mteb_model_meta.modalities]
        loader = DataLoader(table, inputs.batch_size, num_workers=inputs.num_workers, collate_fn=list)
        options = {"prompt": self.prompt(task_metadata, prompt_type), **kwargs}
        encode = ENCODE[prompt_type]
        if columns == ["text"]:  # all at once: sentence-transformers sorts them by length
            return _as_array(encode(self.model, [row["text"] for batch in loader for row in batch], **options))
        options["show_progress_bar"] = False
        parts = [encode(self.model, [as_input(row, columns) for row in batch], **options) for batch in loader]
        return np.concatenate([_as_array(part) for part in parts])


def as_input(row: Mapping[str, Any], columns: list[str]) -> dict[str, Any] | list[dict[str, Any]]:
    """One row as sentence-transformers takes it; several images as a message, at their places in the text or first."""
    shown = {name: row[name] for name in columns}
    if "audio" in shown:
        source = shown["audio"]["bytes"] or shown["audio"]["path"]
        samples = resample(*load_audio(source), AUDIO_RATE)
        shown["audio"] = {"array": samples, "sampling_rate": AUDIO_RATE}
    images = shown.get("image")
    if not isinstance(images, list):
        return shown
    pieces = shown.get("text", "").split(PLACEHOLDER)
    if len(pieces) != len(images) + 1:
        pieces = [""] * len(images) + [shown.get("text", "")]
    content: list[dict[str, Any]] = []
    for piece, image in zip(pieces, [*images, None], strict=True):
        content.extend([{"type": "text", "text": piece}] if piece else [])
        content.extend([{"type": "image", "image": image}] if image else [])
    return [{"role": "user", "content": content}]


class MeasuredEncoder:
    """An encoder of mteb whose rows, seconds and memory are counted, and whose vectors are kept if asked for.

    Attributes:
        kept: (subset, split) -> "query", "document" or "inputs" -> arrays in the order in which they were made.
        documents: (subset, split) -> number of documents.
    """

    def __init__(self, encoder: EncoderProtocol) -> None:
        self.encoder = encoder
        self.mteb_model_meta = encoder.mteb_model_meta
        self.start(keep_vectors=False)

    def start(self, keep_vectors: bool) -> None:
        """Begins a task: everything is counted from here on."""
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
        """What the encoder gives."""
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
        """What the encoder gives."""
        return self.encoder.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """What the encoder gives."""
        return self.encoder.similarity_pairwise(embeddings1, embeddings2)

    def prompts(self, metadata: TaskMetadata) -> dict[str, str]:
        """The prompt of each side of a task, to be shown; "" for none, and no side for a model's own ways in mteb."""
        if not isinstance(self.encoder, SentenceEncoder):
            return {}
        if metadata.simplified_task_type != "retrieval":
            return {"all": self.encoder.prompt(metadata, None) or ""}
        return {side.value: self.encoder.prompt(metadata, side) or "" for side in PromptType}

    def home(self) -> dict[str, str]:
        """Device and dtype of the weights."""
        model = vars(self.encoder).get("model")  # what mteb's own wrappers call theirs
        weight = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        if weight is None:
            return {"device": "unknown", "dtype": "unknown"}
        return {"device": _device(weight.device), "dtype": str(weight.dtype).removeprefix("torch.")}

    def measures(self) -> dict[str, Any]:
        """What was counted since `start`."""
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
