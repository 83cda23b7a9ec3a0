"""Loads the papers' baselines that no library loads as it should: mean-pooled backbones, and a multilingual CLIP.

Qwen2-VL runs through this package's processor, whose image processor needs no torchvision, and a speech encoder
through this package's padding-invariant convolutions: clips of a batch do not change each other's vectors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from torch import Tensor, nn
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLModel,
    Wav2Vec2FeatureExtractor,
)
from transformers.utils.hub import cached_file

from ..audio_vipolyqwen import PADDING_BLIND, PaddedAudio, make_padding_invariant, receptive_field
from ..configuration_vipolyqwen import ViPolyQwenConfig
from ..modeling_vipolyqwen import ViPolyQwenModel
from ..pooling_vipolyqwen import MeanPooling
from ..processing_vipolyqwen import ViPolyQwenProcessor
from .encoder import AUDIO_RATE, BackboneEncoder

MAX_TOKENS = 8192  # of an input, as in training
MAX_SECONDS = 30  # of audio, as in the processor
# Text encoders distilled into the space of another model, which embeds the images.
IMAGE_MODELS = {
    "sentence-transformers/clip-ViT-B-32-multilingual-v1": "sentence-transformers/clip-ViT-B-32",
}
OPTIONAL = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def backbone_type(name: str) -> str | None:
    """Returns `qwen2_vl` or the type of a speech encoder for a bare backbone of these, `None` for another model."""
    config = cached_file(name, "config.json", **OPTIONAL)
    if config is None or cached_file(name, "modules.json", **OPTIONAL) is not None:
        return None
    kind = json.loads(Path(config).read_text(encoding="utf-8")).get("model_type")
    return kind if kind in ("qwen2_vl", *PADDING_BLIND) else None


def load_backbone(
    name: str, kind: str, label: str, revision: str, device: str | None, dtype: str | None
) -> BackboneEncoder:
    """Loads a mean-pooled backbone.

    Args:
        name: folder or Hub id.
        kind: as `backbone_type` returns it.
        label: name in mteb's results.
        revision: commit, or hash of the folder.
        device: such as "cuda"; None: CUDA where available.
        dtype: of the weights; None: that of the checkpoint.

    Raises:
        ValueError: weights are missing or have other shapes, or padding would change the vectors of the encoder.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "qwen2_vl":
        model, prepare = MeanPooledQwen2VL(_load(Qwen2VLModel, name, dtype)), Conversations(name)
        return BackboneEncoder(model.to(device), prepare, label, revision, ["image", "text"])
    tower = _load(AutoModel, name, dtype)
    prepare = Clips(name, receptive_field(tower.config))
    return BackboneEncoder(MeanPooledSpeech(tower).to(device), prepare, label, revision, ["audio"])


def _load(auto_class: type, name: str, dtype: str | None) -> PreTrainedModel:
    """Loads a backbone, every weight of it; heads in the checkpoint are left out."""
    model, report = auto_class.from_pretrained(
        name, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
    )
    if broken := sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]})):
        raise ValueError(
            f"{name}: {len(broken)} weights of {type(model).__name__} are missing or have another shape, e.g. "
            f"{broken[0]}; use a complete checkpoint."
        )
    return model


class MeanPooledQwen2VL(nn.Module):
    """Means the last hidden states of all tokens: this package's model with mean pooling and without projection."""

    def __init__(self, vlm: Qwen2VLModel) -> None:
        super().__init__()
        width = vlm.config.text_config.hidden_size
        with torch.device("meta"):
            self.model = ViPolyQwenModel(_without_audio(vlm.config, pooling="mean", projection_dim=width))
        self.model.vlm, self.model.projection = vlm, nn.Identity()

    def forward(self, **inputs: Tensor) -> Tensor:
        """Returns (rows, hidden size) float32 unit vectors of the processor's tensors."""
        return self.model(**inputs).embeddings


def _without_audio(config: Qwen2VLConfig, **fields: Any) -> ViPolyQwenConfig:
    kept = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    return ViPolyQwenConfig(**{**kept, "audio_config": None, **fields})


class Conversations:
    """Lays out texts and images with this package's processor, without task prefixes.

    Args:
        name: folder or Hub id of a Qwen2-VL.
    """

    def __init__(self, name: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.model_max_length = min(tokenizer.model_max_length, MAX_TOKENS)
        self.processor = ViPolyQwenProcessor(
            Qwen2VLImageProcessorPil.from_pretrained(name),
            tokenizer,
            Wav2Vec2FeatureExtractor(return_attention_mask=True),  # the processor has one; unused
            task_prefixes={},
        )

    def __call__(self, inputs: list[Any]) -> Mapping[str, Tensor]:
        """Returns the tensors of inputs: dicts of `text` and `image`, or messages."""
        messages = [given if isinstance(given, list) else _message(given) for given in inputs]
        return self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", plain_text=True
        )


def _message(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, kind: part} for kind, part in parts.items()]}]


class MeanPooledSpeech(nn.Module):
    """Means the last hidden states of a speech encoder over the real frames of each clip."""

    def __init__(self, tower: PreTrainedModel) -> None:
        super().__init__()
        self.tower = make_padding_invariant(tower)
        self.pooling = MeanPooling(tower.config.hidden_size)

    def forward(self, input_values: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns (clips, hidden size) vectors of (clips, samples) float values and their mask."""
        lengths = attention_mask.sum(dim=-1)
        audio = PaddedAudio(input_values.to(self.tower.dtype), lengths)
        hidden = self.tower(audio, attention_mask=attention_mask, return_dict=True).last_hidden_state
        frames = self.tower._get_feat_extract_output_lengths(lengths)
        mask = torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]
        return self.pooling(hidden, mask)[0]


class Clips:
    """Scales and pads clips with the feature extractor of a speech encoder.

    Args:
        name: folder or Hub id of the encoder.
        min_samples: that give one frame; shorter clips are padded with zeros.
    """

    def __init__(self, name: str, min_samples: int) -> None:
        self.extractor, self.min_samples = AutoFeatureExtractor.from_pretrained(name), min_samples

    def __call__(self, inputs: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        """Returns `input_values` and `attention_mask` (clips, samples) of dicts of `audio`, cut at 30 seconds."""
        clips = [given["audio"]["array"][: MAX_SECONDS * AUDIO_RATE] for given in inputs]
        clips = [np.pad(clip, (0, max(0, self.min_samples - len(clip)))) for clip in clips]
        return self.extractor(
            clips, sampling_rate=AUDIO_RATE, padding=True, return_attention_mask=True, return_tensors="pt"
        )


def load_with_images(texts: str, images: str, **options: Any) -> SentenceTransformer:
    """Loads a text encoder and the model in whose space it embeds as one: texts go to the first, images to the second.

    Args:
        texts: folder or Hub id of the text encoder.
        images: folder or Hub id of the model that embeds the images.
        **options: of `SentenceTransformer`.
    """
    encoders = {"text": SentenceTransformer(texts, **options), "image": SentenceTransformer(images, **options)}
    modules = {route: list(model.children()) for route, model in encoders.items()}
    routes = {(None, route): route for route in modules}
    router = Router(modules, allow_empty_key=False, route_mappings=routes)
    return SentenceTransformer(modules=[router], device=options["device"])
