"""Loads a folder or a model of the Hub as an encoder of mteb."""

import hashlib
from pathlib import Path

import mteb
from huggingface_hub import try_to_load_from_cache
from mteb.models.get_model_meta import MODEL_REGISTRY
from mteb.models.models_protocols import EncoderProtocol
from sentence_transformers import SentenceTransformer

from .baselines import IMAGE_MODELS, backbone_type, load_backbone, load_with_images
from .encoder import MeasuredEncoder, Prompts, SentenceEncoder

LOADED_HERE = ("facebook/hubert-base-ls960",)  # mteb's loader needs torchcodec and takes one clip at a time


def load_encoder(
    name: str, table: Prompts, device: str | None, dtype: str | None, trust_remote_code: bool
) -> MeasuredEncoder:
    """Loads a folder or a model of the Hub.

    A model registered in mteb is loaded by mteb, with the prompts registered there. Qwen2-VL and speech encoders
    without modules of sentence-transformers are mean-pooled backbones; sentence-transformers loads all others.

    Args:
        name: folder or Hub id.
        table: the prompts of a suite.
        device: such as "cuda"; None: the library's choice.
        dtype: such as "bfloat16"; None, and for models registered in mteb: the library's choice.
        trust_remote_code: whether code from the Hub may run; code in a folder always may.

    Raises:
        ValueError: the model returns no vectors, or the commit of a Hub model is unknown.
    """
    is_folder = Path(name).is_dir()
    if name in MODEL_REGISTRY and name not in LOADED_HERE and not is_folder:
        encoder = mteb.get_model(name, device=device)
        if not isinstance(encoder, EncoderProtocol):
            kind = type(encoder).__name__
            raise ValueError(f"{name}: mteb loads it as {kind}, which returns no vectors; name an embedding model.")
        return MeasuredEncoder(encoder)
    if (kind := backbone_type(name)) is not None:
        return MeasuredEncoder(load_backbone(name, kind, *_identity(name), device, dtype))
    options = {
        "device": device,
        "trust_remote_code": trust_remote_code or is_folder,
        "model_kwargs": {"dtype": dtype} if dtype else None,
    }
    if name in IMAGE_MODELS:
        model = load_with_images(name, IMAGE_MODELS[name], **options)
        revision = "-".join(commit(part)[:12] for part in (name, IMAGE_MODELS[name]))
        return MeasuredEncoder(SentenceEncoder(model, name, revision, table))
    return MeasuredEncoder(SentenceEncoder(SentenceTransformer(name, **options), *_identity(name), table))


def _identity(name: str) -> tuple[str, str]:
    """Returns the name and the revision of a loaded model for mteb's results."""
    folder = Path(name)
    return (f"local/{folder.resolve().name}", content_hash(folder)) if folder.is_dir() else (name, commit(name))


def content_hash(folder: Path) -> str:
    """Returns a hash of the weights and settings in a folder, so that cached results never belong to other weights."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted((*folder.rglob("*.safetensors"), *folder.rglob("*.bin"), *folder.rglob("*.json"))):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, hashlib.blake2b).digest())
    return digest.hexdigest()


def commit(name: str) -> str:
    """Returns the commit of a model that was loaded from the Hub."""
    for file in ("modules.json", "config.json"):
        cached = try_to_load_from_cache(name, file)
        if isinstance(cached, str):  # neither unknown nor known to be absent
            return Path(cached).parent.name
    raise ValueError(f"{name}: the commit of the cached files is unknown; download the model and pass its folder.")
