"""What a viPolyQwen model is: the sizes of its backbones and the parts that stand on top of them."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig, Qwen2VLConfig

POOLINGS = ("attention", "mean", "last")
PROJECTIONS = ("linear", "mlp")
AUDIO_FUSIONS = ("mean", "audio")


class ViPolyQwenConfig(Qwen2VLConfig):
    """A Qwen2-VL configuration plus a speech encoder, a pooling and a projection.

    Attributes:
        audio_config: configuration of the speech encoder (hubert, wav2vec2, wavlm, …); `None` gives the bimodal model.
        projection_dim: width of the embedding; the name under which sentence-transformers looks it up.
        pooling: `attention` (a learned query for each route), `mean` or `last`.
        projection: `linear` (papers 001, 003, 004) or `mlp` (paper 000).
        audio_fusion: what an input with both sound and text or images gives: `mean`, the normalised mean of the two
            unit vectors, or `audio`, the vector of the sound alone.
        initializer_range: standard deviation of the pooling queries and the projections when built from scratch.
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
    audio_fusion: str = "mean"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Resolves the nested configurations and refuses values the model has no meaning for."""
        if isinstance(self.audio_config, dict):
            if "model_type" not in self.audio_config:
                raise ValueError(
                    "`audio_config` has no `model_type`; say which speech encoder it is, such as 'hubert'."
                )
            self.audio_config = AutoConfig.for_model(**self.audio_config)
        for name, known in (("pooling", POOLINGS), ("projection", PROJECTIONS), ("audio_fusion", AUDIO_FUSIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be one of {', '.join(known)}.")
        if self.projection_dim < 1:
            raise ValueError(f"`projection_dim` is {self.projection_dim}; an embedding needs at least 1 dimension.")
        super().__post_init__(**kwargs)


ViPolyQwenConfig.register_for_auto_class()

__all__ = ["ViPolyQwenConfig"]
