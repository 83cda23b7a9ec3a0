"""Configuration of the model: its two backbones, the pooling, the projection and the fusion of their vectors."""

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from packaging.specifiers import SpecifierSet
from transformers import AutoConfig, PreTrainedConfig, Qwen2VLConfig, __version__
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The versions that were tried; sentence-transformers checks those of a repository before it loads anything. Its code
# stands on internals of both, which change silently from one minor version to the next.
SUPPORTED = {"sentence-transformers": ">=6.0.1,<6.3", "transformers": ">=5.17,<5.24"}

if TYPE_CHECKING:
    # Never runs. transformers keeps one model class for each configuration class, and one configuration class for the
    # hash of this file and of those named here: without this line a second folder of the same name, with other code
    # beside an equal configuration, would run the code of the first.
    from .modeling_vipolyqwen import ViPolyQwenModel  # noqa: F401

POOLINGS = ("attention", "mean", "last")
PROJECTIONS = ("linear", "mlp")
AUDIO_FUSIONS = ("mean", "audio", "attention")
AUDIO_PREFIXES = ("none", "fuse")
TOWERS = ("text", "image", "audio")
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
CHOICES = {
    "pooling": POOLINGS,
    "projection": PROJECTIONS,
    "audio_pooling": POOLINGS,
    "audio_projection": PROJECTIONS,
    "audio_fusion": AUDIO_FUSIONS,
    "audio_prefix": AUDIO_PREFIXES,
}


class ViPolyQwenConfig(Qwen2VLConfig):
    """Extends Qwen2-VL's configuration by a speech encoder, a pooling and a projection.

    Attributes:
        audio_config: configuration of the speech encoder (hubert, wav2vec2, wavlm, …), or a dict with its
            `model_type`; `None` gives the bimodal model of text and images.
        projection_dim: width of the embedding, at least 1; sentence-transformers looks it up under this name.
        pooling: `attention` (one learned query for each backbone), `mean` or `last`.
        projection: `linear` (papers 001, 003, 004) or `mlp` (paper 000).
        audio_pooling: pooling of the audio route; `None`: as `pooling`.
        audio_projection: projection of the audio route; `None`: as `projection`.
        audio_fusion: how to embed an input with audio and text or images: `mean`, the normalised mean of the two
            unit vectors; `audio`, the unit vector of the audio alone; or `attention`, the mean moved by a trained
            cross-attention over the hidden states of both routes (`AttentionFusion`).
        audio_prefix: what a task prefix does to audio alone: `none`, nothing; or `fuse`, prefix and end token are
            embedded as a text and fused with the audio. The processor has the same setting.
        towers: which of `TOWERS` to load, `text` among them; `None`: all. The model refuses inputs for the others and
            cannot be saved; the setting is never saved.
        initializer_range: standard deviation of new pooling queries and projections (paper 000 §3.2.1).

    Raises:
        ValueError: a field has an unknown value.
    """

    model_type = "vipolyqwen"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        **Qwen2VLConfig.sub_configs,
        "audio_config": AutoConfig,
    }

    audio_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 1024
    pooling: str = "attention"
    projection: str = "linear"
    audio_pooling: str | None = None
    audio_projection: str | None = None
    audio_fusion: str = "mean"
    audio_prefix: str = "none"
    towers: list[str] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Resolves the nested configurations and refuses unknown values."""
        if isinstance(self.audio_config, dict):
            if "model_type" not in self.audio_config:
                raise ValueError(
                    "`audio_config` has no `model_type`; say which speech encoder it is, such as 'hubert'."
                )
            self.audio_config = AutoConfig.for_model(**self.audio_config)
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known and not (value is None and name in ("audio_pooling", "audio_projection")):
                raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(known)}.")
        if self.projection_dim < 1:
            raise ValueError(f"`projection_dim` is {self.projection_dim}; an embedding needs at least 1 dimension.")
        super().__post_init__(**kwargs)

    def loads(self, tower: str) -> bool:
        """Returns whether the model has a tower: `text`, `image` or `audio`.

        Raises:
            ValueError: `towers` has an unknown one or lacks `text`.
        """
        exists = tower != "audio" or self.audio_config is not None
        if self.towers is None:
            return exists
        is_list = isinstance(self.towers, (list, tuple))
        if not is_list or "text" not in self.towers or not set(self.towers) <= set(TOWERS):
            raise ValueError(
                f"`towers` is {self.towers!r}; give a list of {', '.join(TOWERS)}, 'text' among them, or none for all."
            )
        return exists and tower in self.towers

    def check_inputs(self, names: Iterable[str]) -> None:
        """Raises ValueError if inputs of the model, given their names, are for a tower that was not loaded."""
        given = set(names)
        for tower, argument in (("image", "pixel_values"), ("audio", "audio_features")):
            if argument in given and self.towers is not None and not self.loads(tower):
                raise ValueError(
                    f"`{argument}` were passed, but the model was loaded with `towers={list(self.towers)}`. Load it "
                    f"with `towers={[*self.towers, tower]}`, or without `towers` for all."
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns what is saved: all but `towers`, which is for the user of a model to decide."""
        return {name: value for name, value in super().to_dict().items() if name != "towers"}


@cache
def warn_of_untested_version() -> None:
    """Warns once if the installed transformers is none that was tried."""
    bounds = SUPPORTED["transformers"]
    if not SpecifierSet(bounds).contains(__version__, prereleases=True):
        logger.warning(
            f"transformers {__version__} was not tried with this model and may change its vectors. Compare them with "
            f"the fingerprint (`verify=True`), or `pip install 'transformers{bounds}'`."
        )


ViPolyQwenConfig.register_for_auto_class()

__all__ = [
    "AUDIO_FUSIONS",
    "AUDIO_PREFIXES",
    "CHOICES",
    "HUB_KWARGS",
    "POOLINGS",
    "PROJECTIONS",
    "SUPPORTED",
    "TOWERS",
    "ViPolyQwenConfig",
    "warn_of_untested_version",
]
