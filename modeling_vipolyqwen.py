"""Model: two backbones, each with a pooling and a projection, fused into one unit vector an input."""

from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel, Qwen2VLModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .audio_vipolyqwen import PaddedAudio, keep_supported_attention, make_padding_invariant
from .configuration_vipolyqwen import ViPolyQwenConfig
from .packing_vipolyqwen import pack, packed_attention
from .pooling_vipolyqwen import POOLING_CLASSES, PROJECTION_CLASSES, AttentionPooling


@dataclass
class ViPolyQwenOutput(ModelOutput):
    """Output of `ViPolyQwenModel`.

    Attributes:
        embeddings: (batch, projection_dim) float32 unit vectors.
        pooling_weights: (text rows, tokens) float32 in [0, 1], each row sums to 1, with `output_pooling_weights=True`;
            text rows are the rows of the batch that have tokens.
        audio_pooling_weights: (clips, frames) float32, likewise, for the rows that have audio.
        hidden_states: (text rows, tokens, hidden) of each layer of the language model, with
            `output_hidden_states=True`.
        attentions: (text rows, heads, tokens, tokens) of each layer, with `output_attentions=True`.
    """

    embeddings: torch.FloatTensor | None = None
    pooling_weights: torch.FloatTensor | None = None
    audio_pooling_weights: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class ViPolyQwenPreTrainedModel(PreTrainedModel):
    """Declares to transformers how to build, load, shard and checkpoint the model."""

    config_class = ViPolyQwenConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # forward computes no loss, so the Trainer averages over accumulation
    _no_split_modules = [
        "Qwen2VLDecoderLayer",
        "Qwen2VLVisionBlock",
        "HubertEncoderLayer",
        "HubertEncoderLayerStableLayerNorm",
        "Wav2Vec2EncoderLayer",
        "Wav2Vec2EncoderLayerStableLayerNorm",
        "WavLMEncoderLayer",
        "WavLMEncoderLayerStableLayerNorm",
    ]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, *model_args: Any, verify: bool = False, **kwargs: Any
    ) -> Any:
        """Loads a model as `PreTrainedModel.from_pretrained` does, and verifies it on request.

        Args:
            pretrained_model_name_or_path: a folder or a repository on the Hub.
            *model_args: passed on.
            verify: measure the loaded model again and compare it with the repository's `fingerprint.json`.
            **kwargs: passed on.

        Raises:
            ValueError: with `verify`, the model differs from the published one; the message names the cause.
        """
        if not verify:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        from .fingerprint_vipolyqwen import verify as compare_with_fingerprint  # imports the processor too

        wants_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        dtype_was_asked_for = kwargs.get("dtype", "auto") != "auto"
        compare_with_fingerprint(model, report, pretrained_model_name_or_path, dtype_was_asked_for, **hub_kwargs)
        return (model, report) if wants_report else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AttentionPooling):
            init.normal_(module.query, mean=0.0, std=self.config.initializer_range)


class ViPolyQwenModel(ViPolyQwenPreTrainedModel):
    """Embeds text, images, audio and mixes of them as unit vectors of `projection_dim`.

    Text and images pass through Qwen2-VL, audio through a speech encoder; each backbone has a pooling and a
    projection. An input of both gets the fusion of its two unit vectors (`audio_fusion`).
    """

    def __init__(self, config: ViPolyQwenConfig) -> None:
        super().__init__(config)
        self.vlm = Qwen2VLModel._from_config(config)
        self.pooling, self.projection = self._new_route(config.text_config.hidden_size)
        if config.audio_config is not None:
            keep_supported_attention(config.audio_config)
            self.audio_tower = make_padding_invariant(AutoModel.from_config(config.audio_config))
            self.audio_pooling, self.audio_projection = self._new_route(config.audio_config.hidden_size)
        self.post_init()

    def _new_route(self, hidden_size: int) -> tuple[nn.Module, nn.Module]:
        """Builds the pooling and the projection of one backbone."""
        config = self.config
        pooling = POOLING_CLASSES[config.pooling](hidden_size)
        return pooling, PROJECTION_CLASSES[config.projection](hidden_size, config.projection_dim)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding of the language model."""
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding of the language model."""
        self.vlm.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        audio_features: torch.FloatTensor | None = None,
        audio_attention_mask: torch.Tensor | None = None,
        has_audio: torch.BoolTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        packing: bool = False,
        output_pooling_weights: bool = False,
        **kwargs: Any,
    ) -> ViPolyQwenOutput:
        """Embeds a batch whose rows may be text, images, audio or any mix of them.

        Args:
            input_ids: (batch, tokens) long; an image is a run of `image_token_id`, one for each merged patch.
            attention_mask: (batch, tokens), 1 for real tokens, padding on either side; a row of zeros has no text.
            pixel_values: (patches, patch values) float, the images of the batch one after the other.
            image_grid_thw: (images, 3) long, patches of each image in time, height and width.
            audio_features: (clips, samples) float, 16 kHz mono, zero mean and unit variance a clip, right-padded.
            audio_attention_mask: (clips, samples), 1 for real samples; `None`: no padding.
            has_audio: (batch,) bool, the rows to which the clips belong, in order; `None`: one clip a row.
            position_ids: (3, batch, tokens) long; `None`: computed from the tokens and the grids.
            inputs_embeds: (batch, tokens, hidden) float in place of `input_ids`.
            image_indices: (slots,) long, the image of each slot of the batch, so that an image in several rows is
                passed and encoded once; `None`: the images stand in the slots in their order.
            packing: pass the rows through the language model as one sequence without padding; saves time on CUDA.
            output_pooling_weights: return the pooling weights of every position.
            **kwargs: passed to the language model (`output_hidden_states`, `output_attentions`, …).

        Returns:
            `ViPolyQwenOutput` with one unit vector a row.

        Raises:
            ValueError: a row is empty, clips do not match rows, or the model or `packing` does not support an input.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None and audio_features is None:
            raise ValueError(
                "The inputs hold nothing to embed: pass `input_ids`, `inputs_embeds` or `audio_features`."
            )
        batch = len(tokens) if tokens is not None else len(audio_features)
        routes, extras = [], {}
        if tokens is not None:
            mask = torch.ones(tokens.shape[:2], device=tokens.device) if attention_mask is None else attention_mask
            rows = mask.any(dim=-1).nonzero().flatten()  # rows without tokens (audio alone) skip the language model
            if len(rows) > 0:
                inputs = [_take_rows(tensor, rows, batch) for tensor in (input_ids, mask.bool(), inputs_embeds)]
                inputs += [_take_rows(position_ids, rows, batch, dim=1), pixel_values, image_grid_thw, image_indices]
                vectors, extras = self._embed_text(*inputs, packing, **kwargs)
                routes.append((rows, vectors))
        if audio_features is not None:
            vectors, extras["audio_pooling_weights"] = self._embed_audio(audio_features, audio_attention_mask)
            routes.append((_audio_rows(has_audio, len(vectors), batch, vectors.device), vectors))
        kept = {key: extras[key] for key in extras if output_pooling_weights or not key.endswith("pooling_weights")}
        return ViPolyQwenOutput(embeddings=self._fuse(routes, batch), **kept)

    def _embed_text(
        self,
        input_ids: torch.LongTensor | None,
        mask: torch.BoolTensor,
        inputs_embeds: torch.FloatTensor | None,
        position_ids: torch.LongTensor | None,
        pixel_values: torch.FloatTensor | None,
        image_grid_thw: torch.LongTensor | None,
        image_indices: torch.LongTensor | None,
        packing: bool,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Embeds rows of tokens, images among them, into (rows, projection_dim) unit vectors."""
        if position_ids is None:
            grids = image_grid_thw if image_indices is None else image_grid_thw[image_indices]
            position_ids = self._position_ids(input_ids, mask, inputs_embeds, grids)
        attention = {"attention_mask": mask.long(), "position_ids": position_ids}
        if packing:
            if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
                raise ValueError(
                    "`packing` joins the rows, so hidden states or attentions of each row are not available. "
                    "Set `packing=False`."
                )
            input_ids, inputs_embeds = pack(input_ids, mask), pack(inputs_embeds, mask)
            attention = packed_attention(mask, pack(position_ids, mask, dim=1), self.vlm.language_model.config)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self._encode_images(pixel_values, image_grid_thw, image_indices).to(inputs_embeds)
            slots, _ = self.vlm.get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=features)
            inputs_embeds = inputs_embeds.masked_scatter(slots, features)
        backbone = self.vlm(inputs_embeds=inputs_embeds, use_cache=False, return_dict=True, **attention, **kwargs)
        hidden = backbone.last_hidden_state[0] if packing else backbone.last_hidden_state
        pooled, weights = self.pooling(hidden, mask)  # (rows, D), (rows, N)
        extras = {
            "pooling_weights": weights,
            "hidden_states": backbone.hidden_states,
            "attentions": backbone.attentions,
        }
        return F.normalize(self.projection(pooled).float(), dim=-1), extras

    def _encode_images(
        self,
        pixel_values: torch.FloatTensor,
        image_grid_thw: torch.LongTensor,
        image_indices: torch.LongTensor | None,
    ) -> torch.Tensor:
        """Encodes each image once and returns the features of all image slots, (image tokens, hidden)."""
        images = self.vlm.get_image_features(pixel_values, image_grid_thw, return_dict=True).pooler_output
        if image_indices is not None:
            images = [images[number] for number in image_indices.tolist()]
        return torch.cat(list(images))

    def _position_ids(
        self,
        input_ids: torch.LongTensor | None,
        mask: torch.BoolTensor,
        inputs_embeds: torch.FloatTensor | None,
        image_grid_thw: torch.LongTensor | None,
    ) -> torch.LongTensor:
        """Counts real tokens only, (3, rows, tokens) long, so that padding shifts no position."""
        if image_grid_thw is None:
            return (mask.long().cumsum(dim=-1) - 1).clamp(min=0).expand(3, -1, -1)
        if input_ids is None:  # as the backbone does: an image slot is where the image token's embedding stands
            image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            is_image = (inputs_embeds == self.get_input_embeddings()(image_token)).all(dim=-1)
            input_ids = is_image * image_token
        token_types = (input_ids == self.config.image_token_id).int()
        return self.vlm.get_rope_index(input_ids, token_types, image_grid_thw, attention_mask=mask)[0]

    def _embed_audio(
        self, audio_features: torch.FloatTensor, audio_attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeds clips into (clips, projection_dim) unit vectors; also their pooling weights (clips, frames)."""
        if self.config.audio_config is None:
            raise ValueError("This model is bimodal (`audio_config` is None): it embeds text and images, not audio.")
        if audio_attention_mask is None:
            audio_attention_mask = torch.ones_like(audio_features, dtype=torch.long)
        audio_attention_mask = audio_attention_mask.long()
        lengths = audio_attention_mask.sum(dim=-1)
        hidden = self.audio_tower(
            PaddedAudio(audio_features.to(self.audio_tower.dtype), lengths),
            attention_mask=audio_attention_mask,
            return_dict=True,
        ).last_hidden_state  # (clips, K, D_audio)
        frames = self.audio_tower._get_feat_extract_output_lengths(lengths)
        mask = torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]  # (clips, K)
        pooled, weights = self.audio_pooling(hidden, mask)
        return F.normalize(self.audio_projection(pooled).float(), dim=-1), weights

    def _fuse(self, routes: list[tuple[torch.Tensor, torch.Tensor]], batch: int) -> torch.Tensor:
        """Adds up the unit vectors (rows, projection_dim) of each route on its rows, as `audio_fusion` says."""
        rows = torch.cat([rows for rows, _ in routes]) if routes else torch.empty(0)
        missing = batch - len(rows.unique())
        if missing:
            raise ValueError(
                f"{missing} of the {batch} rows have neither tokens nor audio, so they hold nothing to embed. "
                "Give each row text, an image or audio."
            )
        vectors = [vectors for _, vectors in routes]
        if len(routes) == 2 and self.config.audio_fusion == "audio":
            text_rows, audio_rows = routes[0][0], routes[1][0]
            vectors[0] = vectors[0] * ~torch.isin(text_rows, audio_rows)[:, None]
        total = vectors[0].new_zeros(batch, self.config.projection_dim)
        return F.normalize(total.index_add(0, rows, torch.cat(vectors)), dim=-1)


def _take_rows(tensor: torch.Tensor | None, rows: torch.Tensor, batch: int, dim: int = 0) -> torch.Tensor | None:
    """Selects `rows` of dimension `dim`, without a copy if they are all."""
    return tensor if tensor is None or len(rows) == batch else tensor.index_select(dim, rows)


def _audio_rows(has_audio: torch.Tensor | None, clips: int, batch: int, device: torch.device) -> torch.Tensor:
    """Returns the row of each clip, (clips,) long."""
    if has_audio is None:
        if clips != batch:
            raise ValueError(
                f"{clips} clips for a batch of {batch} rows: pass `has_audio`, (batch,) bool, to assign them to rows."
            )
        return torch.arange(batch, device=device)
    rows = has_audio.bool().nonzero().flatten()
    if len(rows) != clips:
        raise ValueError(f"`has_audio` marks {len(rows)} rows, but {clips} clips were passed; pass one clip a row.")
    return rows.to(device)


def loading_problems(report: dict[str, Any]) -> str:
    """Lists the keys in which a checkpoint differs from its model; empty if it has none.

    Args:
        report: the loading info of `from_pretrained(…, output_loading_info=True)`.
    """
    return "; ".join(
        f"{name.replace('_', ' ')}: {', '.join(sorted(map(str, report[name])))}"
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report[name]
    )


def _reduce(model: ViPolyQwenModel) -> tuple[Any, ...]:
    """Pickles a model for another process; stock pickling refuses the weight norm in the speech encoder."""
    buffers = dict(model.named_non_persistent_buffers())
    return _rebuild, (type(model), model.config, model.state_dict(), buffers, model.training)


def _rebuild(
    model_class: type[ViPolyQwenModel],
    config: ViPolyQwenConfig,
    state_dict: dict[str, torch.Tensor],
    buffers: dict[str, torch.Tensor],
    training: bool,
) -> ViPolyQwenModel:
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(state_dict, assign=True)
    for name, buffer in buffers.items():  # a state dict lacks them
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner).register_buffer(attribute, buffer, persistent=False)
    return model.train(training)


# For process pools only: `copy` and `torch.save` do not use this pickler.
ForkingPickler.register(ViPolyQwenModel, _reduce)
ViPolyQwenModel.register_for_auto_class("AutoModel")

__all__ = ["AttentionPooling", "ViPolyQwenModel", "ViPolyQwenOutput", "ViPolyQwenPreTrainedModel", "loading_problems"]
