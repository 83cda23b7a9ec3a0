"""Model: two backbones, each with a pooling and a projection, fused into one unit vector an input."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from os import PathLike
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, Qwen2VLModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple, logging

from .arguments_vipolyqwen import check_names, check_tensors
from .audio_vipolyqwen import (
    PaddedAudio,
    check_windows,
    join_windows,
    keep_supported_attention,
    make_padding_invariant,
    receptive_field,
)
from .configuration_vipolyqwen import HUB_KWARGS, ViPolyQwenConfig, warn_of_untested_version
from .linear_vipolyqwen import use_onednn
from .microbatches_vipolyqwen import Division, divide_batch, inference_cost, take_rows
from .packing_vipolyqwen import pack, packed_attention, takes_lengths
from .pooling_vipolyqwen import (
    POOLING_CLASSES,
    PROJECTION_CLASSES,
    AttentionFusion,
    AttentionPooling,
    PackedStates,
    ZeroLinear,
    unit_vectors,
)
from .vision_vipolyqwen import use_faster_vision

logger = logging.get_logger(__name__)


@dataclass
class ViPolyQwenOutput(ModelOutput):
    """Output of `ViPolyQwenModel`.

    Attributes:
        embeddings: (batch, projection_dim) float32 unit vectors.
        pooling_weights: (text rows, tokens) float32 in [0, 1], each row sums to 1, with `output_pooling_weights=True`;
            text rows are the rows of the batch that have tokens.
        audio_pooling_weights: (clips, frames) float32, likewise, for the rows that have audio; the frames of all
            windows of a clip one after another.
        hidden_states: (text rows, tokens, hidden) of each layer of the language model, with
            `output_hidden_states=True`.
        attentions: (text rows, heads, tokens, tokens) of each layer, with `output_attentions=True`.
    """

    embeddings: torch.FloatTensor | None = None
    pooling_weights: torch.FloatTensor | None = None
    audio_pooling_weights: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


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
        cls,
        pretrained_model_name_or_path: str | PathLike,
        *model_args: Any,
        verify: bool = False,
        towers: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a model as `PreTrainedModel.from_pretrained` does, and verifies it on request.

        Args:
            pretrained_model_name_or_path: a folder or a repository on the Hub.
            *model_args: passed on.
            verify: measure the loaded model again and compare it with the repository's `fingerprint.json`.
            towers: which of `text`, `image` and `audio` to load; the weights of others are neither read nor held.
            **kwargs: passed on.

        Raises:
            ValueError: with `verify`, the model differs from the published one; the message names the cause. Or
                `towers` is unknown, or was passed with `verify`, which compares all.
        """
        warn_of_untested_version()
        if towers is not None:
            if verify:
                raise ValueError(f"`verify` compares all towers, but `towers` is {towers!r}; leave one of them out.")
            kwargs |= _with_towers(towers, kwargs.get("config"))
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model.use_faster_layers()
        if verify:
            from .fingerprint_vipolyqwen import verify as compare_with_fingerprint  # imports the processor too

            hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
            dtype_was_asked_for = kwargs.get("dtype", "auto") != "auto"
            compare_with_fingerprint(model, report, pretrained_model_name_or_path, dtype_was_asked_for, **hub_kwargs)
        return (model, report) if wants_report else model

    def use_faster_layers(self) -> None:
        """Turns stock layers into faster ones with the same weights and values; again if a backbone is replaced."""
        use_faster_vision(self)
        use_onednn(self)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of all modules as torch does, unless they have it: `encode` calls `eval()` each time."""
        found: list[nn.Module] = [self]
        while found:
            module = found.pop()
            if module.training != mode:
                return super().train(mode)
            found.extend(part for part in module._modules.values() if part is not None)
        return self

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yields the modules as torch does, without a generator for each level: `encode` asks for all each time."""
        memo = set() if memo is None else memo
        found: list[tuple[str, nn.Module]] = [(prefix, self)]
        while found:
            name, module = found.pop()
            if module not in memo:
                if remove_duplicate:
                    memo.add(module)
                yield name, module
                if module._modules:
                    start = f"{name}." if name else ""
                    parts = reversed(module._modules.items())
                    found += [(start + part, inner) for part, inner in parts if inner is not None]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AttentionPooling):
            init.normal_(module.query, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)


Pooled = tuple[torch.Tensor, torch.Tensor, torch.BoolTensor]  # vectors, hidden states and mask of a route


class Route(NamedTuple):
    """Result of one route.

    Attributes:
        rows: (R,) long, its rows of the batch in ascending order.
        vectors: (R, projection_dim) float32 unit vectors.
        hidden: (R, N, D) float, or packed (T, D).
        mask: (R, N) bool, real positions.
    """

    rows: torch.LongTensor
    vectors: torch.Tensor
    hidden: torch.Tensor
    mask: torch.BoolTensor

    def states_of(self, rows: torch.LongTensor) -> PackedStates:
        """Returns the hidden states of some of its rows of the batch."""
        chosen = torch.isin(self.rows, rows)
        if self.hidden.dim() == 2:
            return PackedStates(self.hidden[chosen[self.mask.nonzero()[:, 0]]], self.mask[chosen])
        return PackedStates(self.hidden[chosen][self.mask[chosen]], self.mask[chosen])


class ViPolyQwenModel(ViPolyQwenPreTrainedModel):
    """Embeds text, images, audio and mixes of them as unit vectors of `projection_dim`.

    Text and images pass through Qwen2-VL, audio through a speech encoder; each backbone has a pooling and a
    projection. An input of both gets the fusion of its two unit vectors (`audio_fusion`).
    """

    def __init__(self, config: ViPolyQwenConfig) -> None:
        super().__init__(config)
        self.vlm = Qwen2VLModel._from_config(config)
        self.pooling, self.projection = self._new_route(
            config.pooling, config.projection, config.text_config.hidden_size
        )
        if not config.loads("image"):
            self.vlm.visual = None
        if config.loads("audio"):
            keep_supported_attention(config.audio_config)
            self.audio_tower = make_padding_invariant(AutoModel.from_config(config.audio_config))
            self.audio_pooling, self.audio_projection = self._new_route(
                config.audio_pooling or config.pooling,
                config.audio_projection or config.projection,
                config.audio_config.hidden_size,
            )
            if config.audio_fusion == "attention":
                widths = (config.text_config.hidden_size, config.audio_config.hidden_size, config.projection_dim)
                self.audio_fusion = AttentionFusion(*widths)
        if config.towers is not None:
            absent = {"image": r"^vlm\.visual\.", "audio": r"^audio_"}
            self._keys_to_ignore_on_load_unexpected = [absent[name] for name in absent if not config.loads(name)]
        if self.device.type != "meta":  # else when it is loaded: some quantizers take layers of the stock class only
            self.use_faster_layers()
        self.post_init()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves the model as `PreTrainedModel.save_pretrained` does.

        Raises:
            ValueError: it was loaded with some `towers` only.
        """
        if self.config.towers is not None:
            raise ValueError(
                f"The model was loaded with `towers={list(self.config.towers)}`, so a repository of it would lack "
                "weights. Load it without `towers` to save it."
            )
        super().save_pretrained(*args, **kwargs)

    def _new_route(self, pooling: str, projection: str, hidden_size: int) -> tuple[nn.Module, nn.Module]:
        """Builds the pooling and the projection of one backbone."""
        width = self.config.projection_dim
        return POOLING_CLASSES[pooling](hidden_size), PROJECTION_CLASSES[projection](hidden_size, width)

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
        audio_windows: torch.LongTensor | None = None,
        has_audio: torch.BoolTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        packing: bool = False,
        all_windows_at_once: bool = False,
        output_pooling_weights: bool = False,
        divide: bool = True,
        right_padded: bool = False,
        **kwargs: Any,
    ) -> ViPolyQwenOutput:
        """Embeds a batch whose rows may be text, images, audio or any mix of them.

        Args:
            input_ids: (batch, tokens) long; an image is a run of `image_token_id`, one for each merged patch.
            attention_mask: (batch, tokens), 1 for real tokens, padding on either side; a row of zeros has no text.
            pixel_values: (patches, patch values) float, the images of the batch one after the other.
            image_grid_thw: (images, 3) long, patches of each image in time, height and width.
            audio_features: (windows, samples) float, 16 kHz mono, zero mean and unit variance a clip, right-padded;
                the windows of a clip one after another.
            audio_attention_mask: (windows, samples), 1 for real samples; `None`: no padding.
            audio_windows: (clips,) long, windows of each clip; `None`: one.
            has_audio: (batch,) bool, the rows to which the clips belong, in order; `None`: one clip a row.
            position_ids: (3, batch, tokens) long; `None`: computed from the tokens and the grids.
            inputs_embeds: (batch, tokens, hidden) float in place of `input_ids`.
            image_indices: (slots,) long, the image of each slot of the batch, so that an image in several rows is
                passed and encoded once; `None`: the images stand in the slots in their order.
            packing: pass the rows through the language model as one sequence without padding; saves time on CUDA.
            all_windows_at_once: pass all windows through the speech encoder in one call, for ranks that must make as
                many calls; otherwise as many windows at a time as there are clips, which bounds memory.
            output_pooling_weights: return the pooling weights of every position.
            divide: in inference, embed equal rows once and rows of like length together, without padding where the
                attention takes lengths, unless outputs of every position are wanted. False, or `all_windows_at_once`,
                makes one pass of all rows, as ranks need it that join collectives in a forward (FSDP, ZeRO-3).
            right_padded: all padding stands on the right of its row, where no position of a causal model sees it, so
                that attention takes no mask; `forward` finds out itself where it divides a batch.
            **kwargs: passed to the language model: `output_hidden_states`, `output_attentions`, `is_causal`.

        Returns:
            `ViPolyQwenOutput` with one unit vector a row.

        Raises:
            ValueError: a row is empty, images, clips or windows do not match rows, an argument is unknown, or the
                model or `packing` does not support an input.
        """
        check_names(kwargs)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "audio_features": audio_features,
            "audio_attention_mask": audio_attention_mask,
            "audio_windows": audio_windows,
            "has_audio": has_audio,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "image_indices": image_indices,
        }
        check_tensors(inputs)
        if input_ids is not None and attention_mask is None:
            self._refuse_padding(input_ids)
        self.config.check_inputs(name for name, value in inputs.items() if value is not None)
        requests = output_pooling_weights or kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
        if divide and not all_windows_at_once and not requests and self._may_divide(inputs):
            by_length = not (packing or takes_lengths(self.vlm.language_model.config, self.device))
            division = self._divide(inputs, by_length)
            if division is not None:
                return self._embed_division(division, packing or not by_length, **kwargs)
        options = {"all_windows_at_once": all_windows_at_once, "output_pooling_weights": output_pooling_weights}
        return self._embed_batch(**inputs, packing=packing, right_padded=right_padded, **options, **kwargs)

    def _refuse_padding(self, input_ids: torch.LongTensor) -> None:
        """Raises ValueError if ids without a mask have padding, which would be embedded; no text gives that token."""
        config = self.config.text_config
        padding = config.pad_token_id
        if padding is None or padding == config.eos_token_id or torch.compiler.is_compiling() or input_ids.is_meta:
            return
        if input_ids.shape[1] and (input_ids[:, [0, -1]] == padding).any():
            raise ValueError(
                "`input_ids` has padding, but no `attention_mask` was passed; pass it as the processor returns it."
            )

    def _may_divide(self, inputs: dict[str, torch.Tensor | None]) -> bool:
        """Returns whether `forward` may divide a batch: in inference, if each row can be taken from the inputs."""
        given = inputs["input_ids"] if inputs["input_ids"] is not None else inputs["audio_features"]
        refused = inputs["inputs_embeds"] is not None or inputs["position_ids"] is not None
        if torch.is_grad_enabled() or refused or given is None or len(given) == 1 or given.is_meta:
            return False
        config = self.vlm.language_model.config
        recorded = config.output_hidden_states or config.output_attentions
        return not (recorded or torch.compiler.is_compiling() or torch.jit.is_tracing())

    def _divide(self, inputs: dict[str, torch.Tensor | None], by_length: bool) -> Division | None:
        """Returns the micro-batches of a batch in inference."""
        audio = self.config.audio_config
        of_frames = (1, 1) if audio is None else (math.prod(audio.conv_stride), receptive_field(audio))
        merge_size = self.config.vision_config.spatial_merge_size
        token = self.config.image_token_id
        cost = inference_cost(self.config.text_config.hidden_size, self.device) if by_length else None
        return divide_batch(inputs, token, merge_size, *of_frames, cost)

    def _embed_division(self, division: Division, packing: bool, **kwargs: Any) -> ViPolyQwenOutput:
        """Embeds each micro-batch and puts its vectors, (batch, projection_dim), in the order of the rows."""
        batch, device = division.batch, division.batch["attention_mask"].device
        vectors = None
        for rows in division.microbatches:
            chosen = torch.tensor(rows, device=device)
            inputs = take_rows(batch, chosen)
            part = self._embed_batch(**inputs, packing=packing, right_padded=True, **kwargs).embeddings
            vectors = part.new_empty(len(division.sources), part.shape[1]) if vectors is None else vectors
            vectors[chosen] = part
        if division.sources != list(range(len(division.sources))):
            vectors = vectors[torch.tensor(division.sources, device=device)]
        return ViPolyQwenOutput(embeddings=vectors)

    def _embed_batch(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        audio_features: torch.FloatTensor | None = None,
        audio_attention_mask: torch.Tensor | None = None,
        audio_windows: torch.LongTensor | None = None,
        has_audio: torch.BoolTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        packing: bool = False,
        all_windows_at_once: bool = False,
        output_pooling_weights: bool = False,
        right_padded: bool = False,
        **kwargs: Any,
    ) -> ViPolyQwenOutput:
        """Embeds a batch in one pass; `right_padded` rows need no mask of a causal model."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None and audio_features is None:
            raise ValueError(
                "The inputs hold nothing to embed: pass `input_ids`, `inputs_embeds` or `audio_features`."
            )
        clips = audio_features if audio_windows is None else audio_windows
        batch = len(tokens) if tokens is not None else len(clips)
        routes, extras = [], {}
        if tokens is not None:
            mask = torch.ones(tokens.shape[:2], device=tokens.device) if attention_mask is None else attention_mask
            rows = mask.any(dim=-1).nonzero().flatten()  # rows without tokens (audio alone) skip the language model
            if len(rows) > 0:
                inputs = [select_rows(tensor, rows, batch) for tensor in (input_ids, mask.bool(), inputs_embeds)]
                inputs += [select_rows(position_ids, rows, batch, dim=1), pixel_values, image_grid_thw, image_indices]
                route, extras = self._embed_text(*inputs, packing, right_padded, **kwargs)
                routes.append(Route(rows, *route))
            elif pixel_values is not None:
                raise ValueError("`pixel_values` were passed, but no row has tokens; pass the ids of their rows.")
        if audio_features is not None:
            audio = (audio_features, audio_attention_mask, audio_windows, all_windows_at_once)
            route, extras["audio_pooling_weights"] = self._embed_audio(*audio)
            routes.append(Route(_audio_rows(has_audio, len(clips), batch, route[0].device), *route))
        elif has_audio is not None and has_audio.any():
            raise ValueError(
                f"`has_audio` marks {int(has_audio.sum())} rows, but 0 clips were passed; pass `audio_features` with "
                "one clip for each of these rows."
            )
        kept = {key: extras[key] for key in extras if output_pooling_weights or not key.endswith("pooling_weights")}
        embeddings = self._fuse(routes, batch)
        self._refuse_broken_weights(embeddings)
        return ViPolyQwenOutput(embeddings=embeddings, **kept)

    def _refuse_broken_weights(self, embeddings: torch.Tensor) -> None:
        """Raises FloatingPointError if encoding gave a vector that is not finite because a weight is not.

        Training names the rows instead; an input may also overflow float16, which whoever encodes it has to see.
        """
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling() or embeddings.sum().isfinite():
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():  # weights may be shards
            return
        broken = [name for name, value in self.named_parameters() if not value.isfinite().all()]
        if broken:
            raise FloatingPointError(
                f"{len(broken)} weights of the model have NaN or infinite values, the first {broken[0]!r}, so its "
                "vectors mean nothing. Download the repository again, or take an earlier checkpoint."
            )
        logger.warning(
            f"Vectors of this batch have NaN or infinite values in {self.dtype}, though all weights are finite. "
            "Encode with `dtype=torch.bfloat16` or float32."
        )

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
        right_padded: bool,
        **kwargs: Any,
    ) -> tuple[Pooled, dict[str, Any]]:
        """Embeds rows of tokens, images among them, into (rows, projection_dim) unit vectors."""
        self._check_images(input_ids, pixel_values, image_grid_thw, image_indices)
        starts_at_0 = right_padded or _is_one_text(mask)
        if position_ids is None and starts_at_0 and image_grid_thw is None:
            rows = len(mask) if packing else 1  # else the same for all
            position_ids = torch.arange(mask.shape[1], device=mask.device).expand(3, rows, -1)
        elif position_ids is None:
            grids = image_grid_thw if image_indices is None else image_grid_thw[image_indices]
            position_ids = self._position_ids(input_ids, mask, inputs_embeds, grids)
        # no real position of a causal model sees the padding on its right
        unmasked = starts_at_0 and kwargs.get("is_causal") is not False
        attention = {"attention_mask": None if unmasked else mask.long(), "position_ids": position_ids}
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
        return (unit_vectors(self.projection(pooled).float()), hidden, mask), extras

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

    def _check_images(
        self,
        input_ids: torch.LongTensor | None,
        pixel_values: torch.FloatTensor | None,
        image_grid_thw: torch.LongTensor | None,
        image_indices: torch.LongTensor | None,
    ) -> None:
        """Raises ValueError unless pixels, grids and image slots are those of the same images."""
        slots = 0 if input_ids is None else int((input_ids == self.config.image_token_id).sum())
        if slots == 0 and pixel_values is None and image_grid_thw is None and image_indices is None:
            return
        if (pixel_values is None) != (image_grid_thw is None):
            given, missing = ("image_grid_thw", "pixel_values")[:: 1 if pixel_values is None else -1]
            raise ValueError(f"`{given}` was passed without `{missing}`; pass both, as the processor returns them.")
        grids = torch.empty(0, 3, dtype=torch.long) if image_grid_thw is None else image_grid_thw
        patches = 0 if pixel_values is None else len(pixel_values)
        if patches != grids.prod(dim=-1).sum():
            raise ValueError(
                f"`pixel_values` has {patches} patches, but the {len(grids)} images of `image_grid_thw` have "
                f"{int(grids.prod(dim=-1).sum())}; pass both as the processor returns them."
            )
        if input_ids is None:  # embeddings may already hold the images
            return
        if image_indices is not None and not ((image_indices >= 0) & (image_indices < len(grids))).all():
            raise ValueError(
                f"`image_indices` is {image_indices.tolist()}, but {len(grids)} images were passed; give the index of "
                "an image for each slot."
            )
        shown = grids if image_indices is None else grids[image_indices]
        filled = int(shown.prod(dim=-1).sum()) // self.config.vision_config.spatial_merge_size**2
        if slots != filled:
            raise ValueError(
                f"`input_ids` has {slots} image tokens, but the {len(shown)} images passed fill {filled}; pass "
                "`pixel_values` and `image_grid_thw` of exactly the images in the rows."
            )

    def _embed_audio(
        self,
        audio_features: torch.FloatTensor,
        audio_attention_mask: torch.Tensor | None,
        audio_windows: torch.LongTensor | None,
        all_windows_at_once: bool,
    ) -> tuple[Pooled, torch.Tensor]:
        """Embeds clips into (clips, projection_dim) unit vectors; also their pooling weights (clips, frames)."""
        if self.config.audio_config is None:
            raise ValueError("This model is bimodal (`audio_config` is None): it embeds text and images, not audio.")
        if audio_attention_mask is None:
            audio_attention_mask = torch.ones_like(audio_features, dtype=torch.long)
        audio_attention_mask = audio_attention_mask.long()
        if audio_features.shape[1] < receptive_field(self.config.audio_config):
            raise ValueError(
                f"The clips have {audio_features.shape[1]} samples; the speech encoder needs at least "
                f"{receptive_field(self.config.audio_config)} (`min_audio_samples` of the processor)."
            )
        if audio_windows is None or len(audio_windows) == len(audio_features):
            hidden, mask = self._encode_audio(audio_features, audio_attention_mask)
        else:
            check_windows(audio_windows, len(audio_features))
            size = len(audio_features) if all_windows_at_once else len(audio_windows)
            parts = zip(audio_features.split(size), audio_attention_mask.split(size), strict=True)
            encoded = [self._encode_audio(*part) for part in parts]
            hidden = torch.cat([frames[real] for frames, real in encoded])  # (frames of all windows, D_audio)
            mask = join_windows(torch.cat([real.sum(dim=-1) for _, real in encoded]), audio_windows)
        _refuse_empty_clips(mask)
        pooled, weights = self.audio_pooling(hidden, mask)
        return (unit_vectors(self.audio_projection(pooled).float()), hidden, mask), weights

    def _encode_audio(self, values: torch.FloatTensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes windows (windows, samples) into frames (windows, K, D_audio), and which are real (windows, K)."""
        lengths = mask.sum(dim=-1)
        hidden = self.audio_tower(
            PaddedAudio(values.to(self.audio_tower.dtype), lengths), attention_mask=mask, return_dict=True
        ).last_hidden_state
        frames = self.audio_tower._get_feat_extract_output_lengths(lengths)
        return hidden, torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]

    def _fuse(self, routes: list["Route"], batch: int) -> torch.Tensor:
        """Adds up the unit vectors (rows, projection_dim) of each route on its rows, as `audio_fusion` says."""
        if len(routes) == 1 and len(routes[0].rows) == batch:
            return unit_vectors(routes[0].vectors)  # again, as the sum of several would be
        rows = torch.cat([route.rows for route in routes]) if routes else torch.empty(0)
        missing = batch - len(rows.unique())
        if missing:
            raise ValueError(
                f"{missing} of the {batch} rows have neither tokens nor audio, so they hold nothing to embed. "
                "Give each row text, an image or audio."
            )
        vectors = [route.vectors for route in routes]
        if len(routes) == 2 and self.config.audio_fusion == "audio":
            vectors[0] = vectors[0] * ~torch.isin(routes[0].rows, routes[1].rows)[:, None]
        total = vectors[0].new_zeros(batch, self.config.projection_dim)
        total = total.index_add(0, rows, torch.cat(vectors))
        if len(routes) == 2 and self.config.audio_fusion == "attention":
            text, audio = routes
            shared = text.rows[torch.isin(text.rows, audio.rows)]  # both in ascending order
            if len(shared) > 0:
                fused = self.audio_fusion(total[shared], text.states_of(shared), audio.states_of(shared))
                total = total.index_copy(0, shared, fused)
        return unit_vectors(total)


def select_rows(tensor: torch.Tensor | None, rows: torch.Tensor, batch: int, dim: int = 0) -> torch.Tensor | None:
    """Selects `rows` of dimension `dim`, without a copy if they are all."""
    return tensor if tensor is None or len(rows) == batch else tensor.index_select(dim, rows)


def _is_one_text(mask: torch.BoolTensor) -> bool:
    """Returns whether a batch in inference is one row without padding, (1, tokens)."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (len(mask) > 1 or torch.is_grad_enabled() or traced or mask.is_meta) and bool(mask.all())


def _audio_rows(has_audio: torch.Tensor | None, clips: int, batch: int, device: torch.device) -> torch.Tensor:
    """Returns the row of each clip, (clips,) long."""
    if has_audio is None:
        if clips != batch:
            raise ValueError(
                f"{clips} clips for a batch of {batch} rows: pass `has_audio`, (batch,) bool, to assign them to rows."
            )
        return torch.arange(batch, device=device)
    if len(has_audio) != batch:
        raise ValueError(f"`has_audio` has {len(has_audio)} entries for a batch of {batch} rows; pass one a row.")
    rows = has_audio.bool().nonzero().flatten()
    if len(rows) != clips:
        raise ValueError(f"`has_audio` marks {len(rows)} rows, but {clips} clips were passed; pass one clip a row.")
    return rows.to(device)


def _refuse_empty_clips(mask: torch.BoolTensor) -> None:
    """Raises ValueError if a clip (clips, frames) has no frame: all its samples are padding, or too few."""
    empty = (~mask.any(dim=-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"Clips {empty} of the {len(mask)} have too few samples for one frame of the speech encoder. Give "
            "`audio_attention_mask` ones for all samples of a clip, and each clip the processor's `min_audio_samples`."
        )


def _with_towers(towers: Sequence[str], config: PreTrainedConfig | None) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that make it load some towers; leaves the caller's config alone."""
    if not isinstance(config, PreTrainedConfig):
        return {"towers": towers}
    config = copy.deepcopy(config)
    config.towers = towers
    return {"config": config}


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
    model.use_faster_layers()
    return model.train(training)


# For process pools only: `copy` and `torch.save` do not use this pickler.
ForkingPickler.register(ViPolyQwenModel, _reduce)
ViPolyQwenModel.register_for_auto_class("AutoModel")

__all__ = ["AttentionPooling", "ViPolyQwenModel", "ViPolyQwenOutput", "ViPolyQwenPreTrainedModel", "loading_problems"]
