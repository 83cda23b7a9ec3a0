"""Processor: turns text, images, audio and a task into tensors, and keeps content from forging special tokens."""

import difflib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import Qwen2VLImageProcessorPil
from transformers.processing_utils import BatchFeature, MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils import cached_file, logging

from .configuration_vipolyqwen import HUB_KWARGS, ViPolyQwenConfig
from .conversations_vipolyqwen import (
    EmbeddingInput,
    clean_text,
    in_defined_order,
    join_clips,
    read_columns,
    read_conversations,
    read_parts,
)
from .images_vipolyqwen import ImageScaler, load_image, loaded_size
from .media_vipolyqwen import Limits, check_is_text
from .tasks_vipolyqwen import AUTO_TASK, PREFIX_SIDES, TASK_PREFIXES, infer_task
from .waveforms_vipolyqwen import load_audio, resample

logger = logging.get_logger(__name__)

MODALITIES = {
    "text_kwargs": "tokenizer",
    "images_kwargs": "image_processor",
    "audio_kwargs": "feature_extractor",
    "videos_kwargs": "video_processor",
}
NO_TENSORS: dict[str, Any] = {"return_tensors": None, "return_attention_mask": False}  # lists, not padded
TEXT_SHARE = 0.25  # of an input's tokens that images leave to its text
RETRIEVAL_SIDES = ("query", "document")  # sentence-transformers passes them as tasks; they select no prefix
VISION_START, IMAGE_TOKEN, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"

# A readable form of a conversation: the system message is the task prefix, and audio has no token. The processor
# builds ids from the parts of a conversation, not from this string, so that content cannot forge a token. It mentions
# `task` (here the prefix), without which sentence-transformers would drop `encode(…, task=…)`.
CHAT_TEMPLATE = """{%- if task -%}{{ task }}{%- endif -%}
{%- for message in messages -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}{{ eos_token }}"""


class ViPolyQwenProcessorKwargs(ProcessingKwargs, total=False):
    """Stock keyword arguments; by default batches are padded and long texts truncated."""

    _defaults = {"text_kwargs": {"padding": True, "truncation": True}}


OPTIONS = {name for kind in MODALITIES for name in ViPolyQwenProcessorKwargs.__annotations__[kind].__annotations__}


class ViPolyQwenProcessor(ProcessorMixin):
    """Turns text, image(s), audio and every mix of them into the tensors of `ViPolyQwenModel`.

    Args:
        image_processor: Qwen2-VL's image processor; its `min_pixels` and `max_pixels` bound the tokens of an image. It
            resizes with Pillow, with torchvision installed or not.
        tokenizer: a byte-level BPE tokenizer of the Qwen2 family; `model_max_length` bounds the tokens of an input.
        feature_extractor: the speech encoder's feature extractor (16 kHz, zero mean and unit variance a clip).
        chat_template: Jinja template that renders a conversation as a string; `None`: `CHAT_TEMPLATE`.
        task_prefixes: task name -> prefix token; `None`: `TASK_PREFIXES`, the six tasks of the STW paper (§3.1.1).
        prefix_sides: task name -> the sides of its pairs that carried the prefix in training: `a`, `both` or `none`;
            a task that is not in it (as in processors saved before this setting): `a`.
        min_audio_samples: fewest samples that give the speech encoder a frame (400, 25 ms, for HuBERT-base).
        max_audio_seconds: longer audio passes through the speech encoder in windows of this length.
        max_audio_windows: windows of an input at most; longer audio is refused (120 windows of 30 s: an hour).
        audio_prefix: what a task prefix does to audio alone: `none`, nothing; or `fuse`, prefix and end token are
            tokens of the input. Must be that of the model's configuration.
        allow_urls: fetch images and audio given as `http(s)://` URLs; without it they are an error. `True` allows
            public addresses, `"private"` all. It is never saved and never read from a saved processor.
        limits: bounds of inputs that differ from the defaults of `Limits`, by name.
    """

    valid_processor_kwargs = ViPolyQwenProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        chat_template: str | None = None,
        task_prefixes: dict[str, str] | None = None,
        prefix_sides: dict[str, str] | None = None,
        min_audio_samples: int = 400,
        max_audio_seconds: float = 30.0,
        max_audio_windows: int = 120,
        audio_prefix: str = "none",
        allow_urls: bool | str = False,
        limits: dict[str, float] | None = None,
    ) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.task_prefixes: dict[str, str] = {}
        self.prefix_sides: dict[str, str] = {}
        self.min_audio_samples = min_audio_samples
        self.max_audio_seconds = max_audio_seconds
        self.max_audio_windows = max_audio_windows
        if audio_prefix not in ("none", "fuse"):
            raise ValueError(f"`audio_prefix` is {audio_prefix!r}; it must be one of none, fuse.")
        self.audio_prefix = audio_prefix
        if allow_urls not in (False, True, "private"):
            raise ValueError(f"`allow_urls` is {allow_urls!r}; it must be False, True or 'private'.")
        self.allow_urls = allow_urls
        Limits.of(limits)  # raises for a wrong one
        self.limits = dict(limits or {})
        self._text_tokenizer: Tokenizer | None = None
        self._merged: tuple[tuple, dict[str, Any]] | None = None  # keyword arguments and their merged form
        images = with_pillow(image_processor)
        super().__init__(images, tokenizer, feature_extractor, chat_template=chat_template or CHAT_TEMPLATE)
        for task, prefix in (TASK_PREFIXES if task_prefixes is None else task_prefixes).items():
            self.add_task(task, prefix, (prefix_sides or {}).get(task, "a"))

    def add_task(self, task: str, prefix: str, prefix_sides: str = "a") -> None:
        """Makes `prefix` the prefix token of `task` and adds it to the tokenizer if it is new.

        Args:
            task: name of the task.
            prefix: its prefix token. After a new one, `model.resize_token_embeddings` may be needed.
            prefix_sides: the sides of its pairs that carry the prefix in training: `a`, `both` or `none`.

        Raises:
            ValueError: the task is called `auto`, the prefix is empty or a token that texts or images use, or the
                sides are unknown.
        """
        if task == AUTO_TASK:
            raise ValueError(f"A task cannot be called {task!r}: that name infers the task. Choose another name.")
        if prefix_sides not in PREFIX_SIDES:
            raise ValueError(
                f"The prefix of task {task!r} is said to stand on {prefix_sides!r}; write one of "
                f"{', '.join(PREFIX_SIDES)} (`prefix_sides` in processor_config.json)."
            )
        structure = {*self.tokenizer.all_special_tokens, VISION_START, IMAGE_TOKEN, VISION_END}
        is_new = prefix not in self.tokenizer.get_vocab()
        if not prefix or prefix in structure or not (is_new or prefix in self.tokenizer.get_added_vocab()):
            raise ValueError(
                f"The prefix {prefix!r} of task {task!r} is empty or a token that texts or images use; "
                f"choose a new token, such as '<{task}>'."
            )
        if is_new:
            self.tokenizer.add_tokens([AddedToken(prefix, special=True, normalized=False)])
            self._text_tokenizer = None
        self.task_prefixes[task] = prefix
        self.prefix_sides[task] = prefix_sides

    def has_prefix(self, task: str, side: str) -> bool:
        """Whether the prefix of a task stood on a side of its pairs in training, `a` or `b`."""
        return self.prefix_sides[task] == "both" or self.prefix_sides[task] == side

    @property
    def _limits(self) -> Limits:
        return _limits(tuple(self.limits.items()), self.max_audio_seconds * self.max_audio_windows)

    def to_dict(self) -> dict[str, Any]:
        """Returns what is saved: all settings but `allow_urls`, which is for the user of a model to decide."""
        saved = super().to_dict()
        saved.pop("allow_urls", None)
        return saved

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Loads a saved processor as the stock method does, but never asks to trust code: this class's runs already.

        Without `config` the stock loader of the tokenizer would read the model's through `AutoConfig`, which asks.
        """
        place = pretrained_model_name_or_path
        if not kwargs.get("trust_remote_code") and "config" not in kwargs:
            of_hub = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
            if cached_file(place, "config.json", _raise_exceptions_for_missing_entries=False, **of_hub) is not None:
                kwargs["config"] = ViPolyQwenConfig.from_pretrained(place, **of_hub)
        return super().from_pretrained(place, **kwargs)

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the processor of a saved one; only the caller allows URLs."""
        saved = {name: value for name, value in processor_dict.items() if name != "allow_urls"}
        return super().from_args_and_dict(args, saved, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Returns the keys that a batch may have, besides `image_indices` and `audio_windows`."""
        return [
            "input_ids",
            "attention_mask",
            "pixel_values",
            "image_grid_thw",
            "audio_features",
            "audio_attention_mask",
            "has_audio",
        ]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        task: str | list[str | None] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares a batch of inputs.

        Args:
            images: one image, a list with one image a text, or a list of lists; they stand before the text. An image
                is a PIL image, a path, the bytes of a file or an array of 0 … 255 (see `load_image`).
            text: one text or a list of texts. Tokens such as `<|image_pad|>` or `<ocr>` in them are plain characters.
            videos: not supported.
            audio: one clip or a list with one clip (or `None`) an input: a path, the bytes of a file,
                `{"array", "sampling_rate"}`, a decoder, or an array with the keyword `sampling_rate` in Hz (see
                `load_audio`).
            task: name of the task whose prefix steers the embedding, for all inputs or one for each; `"auto"`
                infers it from the input (see `infer_task`).
            **kwargs: stock keyword arguments, flat or as `text_kwargs`, `images_kwargs`, `audio_kwargs`,
                `common_kwargs`.

        Returns:
            `input_ids`, `attention_mask` (batch, tokens) long, unless all inputs are audio alone; with images
            `pixel_values` (patches, patch values) float32 and `image_grid_thw` (images, 3) long; with audio
            `audio_features` (windows, samples) float32, `audio_attention_mask` (windows, samples) and `has_audio`
            (batch,) bool; if a clip is longer than a window also `audio_windows` (clips,) long, the windows of each.

        Raises:
            ValueError: an input is empty, cannot be read, is out of range or does not fit the batch; the message
                names the value, the limit and the remedy.
        """
        if videos is not None:
            raise ValueError(
                "`videos` were passed, but this model embeds text, images and audio; pass frames as images."
            )
        merged, limits = self._merge(kwargs), self._limits
        columns = read_columns(text, images, audio)

        def build(number: int) -> EmbeddingInput:
            texts, images, clip = columns.row(number)
            if len(images) > limits.input_parts:
                raise ValueError(f"{len(images)} images in an input; the limit `input_parts` is {limits.input_parts}.")
            parts = [*(self._load_image(image, merged) for image in images), *(clean_text(t, limits) for t in texts)]
            return EmbeddingInput(parts, self._prepare_audio(clip, merged)).check()

        inputs = [_named(build, number, columns.size) for number in range(columns.size)]
        return self._encode(self._set_tasks(inputs, task), merged)

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        task: str | list[str | None] | None = None,
        plain_text: bool = False,
        share_images: bool = False,
        **kwargs: Any,
    ) -> str | list[str] | BatchFeature | list[list[int]]:
        """Prepares conversations: a system message is the task prefix, every other part is content in its order.

        sentence-transformers passes its inputs here; `task` and `plain_text` reach it through
        `encode(…, processing_kwargs={"chat_template": {…}})`.

        Args:
            conversation: the messages of one input, or a list of such lists. A message is a dict of `role` and
                `content`, a string or a list of parts, such as `{"type": "image", "image": source}`.
            chat_template: Jinja template in place of the processor's; for `tokenize=False`.
            tokenize: return tensors, built from the parts without the string, so that content cannot forge a token.
            return_dict: return all tensors, not `input_ids` alone.
            return_tensors: such as `"pt"`.
            processor_kwargs: keyword arguments of `__call__`.
            task: as in `__call__`, for conversations without a system message.
            plain_text: embed a text alone that looks like the path of an image or audio file; otherwise it is an
                error. Beside other parts a text is always a text.
            share_images: prepare images of equal content once. `pixel_values` and `image_grid_thw` are then of the
                different images, and `image_indices` (slots,) long gives the image of each slot.
            **kwargs: further keyword arguments of `__call__`.

        Returns:
            The conversation as a string, or the batch that `__call__` returns.

        Raises:
            ValueError: as `__call__`; also for a part of an unknown type, more than one audio clip in an input, or a
                pair in place of an input.
        """
        if not tokenize:
            name = task if isinstance(task, str) else None
            kwargs["task"] = self.task_prefixes.get(name) if name else None
            batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
            ordered = [in_defined_order(entry) for entry in (conversation if batched else [conversation])]
            conversation = ordered if batched else ordered[0]
            return super().apply_chat_template(conversation, chat_template=chat_template, tokenize=False, **kwargs)
        options = {**kwargs, **(processor_kwargs or {})}
        for name in ("add_generation_prompt", "continue_final_message", "load_audio_from_video", "tools", "documents"):
            options.pop(name, None)  # options of generation, which sentence-transformers always passes
        if return_tensors is not None:
            options["return_tensors"] = return_tensors
        merged = self._merge(options)
        conversations, limits = read_conversations(conversation), self._limits

        def build(number: int) -> EmbeddingInput:
            return self._from_messages(conversations[number], merged, plain_text, limits)

        inputs = [_named(build, number, len(conversations)) for number in range(len(conversations))]
        encoded = self._encode(self._set_tasks(inputs, task), merged, share_images)
        return encoded if return_dict else encoded["input_ids"]

    def _merge(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Sorts keyword arguments by modality, the same ones only once, since nothing else takes as long.

        Raises:
            ValueError: an argument would be ignored, such as `image=`.
        """
        init_kwargs = self.tokenizer.init_kwargs
        of_tokenizer = {
            name: getattr(self.tokenizer, name, init_kwargs[name]) for name in init_kwargs.keys() & OPTIONS
        }
        key = _hashable({**kwargs, "of_tokenizer": of_tokenizer})
        last = self._merged  # another thread may replace it
        if key is None or last is None or last[0] != key:
            self._refuse_unknown_kwargs(kwargs)
            last = key, self._merge_kwargs(ViPolyQwenProcessorKwargs, tokenizer_init_kwargs=init_kwargs, **kwargs)
            self._merged = None if key is None else last
        return {name: dict(value) if isinstance(value, dict) else value for name, value in last[1].items()}

    def _refuse_unknown_kwargs(self, kwargs: dict[str, Any]) -> None:
        known = self._known_kwargs()
        for name, value in kwargs.items():
            if name in known:
                if not isinstance(value, Mapping):
                    raise ValueError(f"`{name}` is {value!r:.80}; pass a dict of keyword arguments.")
                _refuse_unknown(value, known[name], f" of `{name}`")
        flat = set().union(known, *known.values(), ViPolyQwenProcessorKwargs.__annotations__)
        _refuse_unknown(kwargs, flat, "")

    def _known_kwargs(self) -> dict[str, set[str]]:
        """Returns the keyword arguments of each modality; `common_kwargs` may have those that all share."""
        known = {}
        for name, part in MODALITIES.items():
            accepted = getattr(getattr(self, part, None), "valid_kwargs", None)
            known[name] = {*ViPolyQwenProcessorKwargs.__annotations__[name].__annotations__}
            known[name] |= set(accepted.__annotations__) if accepted is not None else set()
        return {**known, "common_kwargs": set.intersection(*known.values())}

    def _set_tasks(self, inputs: list[EmbeddingInput], task: str | list[str | None] | None) -> list[EmbeddingInput]:
        """Sets the prefix of each input to that of its task."""
        tasks = [task] * len(inputs) if task is None or isinstance(task, str) else task
        if not isinstance(tasks, (list, tuple)):
            raise ValueError(
                f"`task` is a {type(task).__name__}, {task!r:.80}; pass a name, or a list of one an input."
            )
        if len(tasks) != len(inputs):
            raise ValueError(f"`task` has {len(tasks)} entries for a batch of {len(inputs)}; give one entry an input.")
        for item, name in zip(inputs, tasks, strict=True):
            if not isinstance(name, str | None):
                raise ValueError(f"A task is a {type(name).__name__}, {name!r:.80}; pass its name.")
            if name is None or (name in RETRIEVAL_SIDES and name not in self.task_prefixes):
                continue
            if name == AUTO_TASK:
                name = infer_task(" ".join(item.texts), len(item.images), item.audio is not None)
            elif name not in self.task_prefixes:
                known = ", ".join([*self.task_prefixes, AUTO_TASK])
                raise ValueError(f"Unknown task {name!r}; this processor knows {known}.")
            item.prefix = self.task_prefixes.get(name)  # custom tasks may lack the inferred one
        return inputs

    def _from_messages(
        self, messages: Sequence[Mapping[str, Any]], merged: dict[str, dict], plain_text: bool, limits: Limits
    ) -> EmbeddingInput:
        """Reads one conversation as one input."""
        result = EmbeddingInput()
        clips = []
        parts = read_parts(messages, limits)
        is_bare = len([role for role, *_ in parts if role != "system"]) == 1  # not beside others, so perhaps a path
        for role, kind, source in parts:
            if kind == "text" and role == "system":
                result.prefix, source = self._split_prefix(clean_text(source, limits))
                result.parts.extend([source] if source else [])
            elif kind == "text":
                result.parts.append(clean_text(source, limits))
                if is_bare and not plain_text:
                    check_is_text(source)
            elif kind == "image":
                result.parts.append(self._load_image(source, merged))
            else:
                clips.append(source)
        result.audio = self._prepare_audio(join_clips(clips), merged)
        return result.check()

    def _split_prefix(self, system: str) -> tuple[str | None, str]:
        """Splits a system text into the task prefix with which it begins, if any, and its content."""
        if system in self.task_prefixes.values():
            return system, ""
        prefixes = [prefix for prefix in self.task_prefixes.values() if system.startswith(prefix)]
        prefix = max(prefixes, key=len, default=None)
        return prefix, system.removeprefix(prefix or "")

    def _load_image(self, source: Any, merged: dict[str, dict]) -> Any:
        rescale = merged["images_kwargs"].get("do_rescale", self.image_processor.do_rescale)
        return load_image(source, self.allow_urls, rescale, self._limits)

    def _prepare_audio(self, source: Any, merged: dict[str, dict]) -> np.ndarray | None:
        """Loads audio as (samples,) float32 at the encoder's rate; refuses what is too short or beyond the limits."""
        if source is None:
            return None
        rate = self.feature_extractor.sampling_rate
        given_rate = merged["audio_kwargs"].get("sampling_rate")
        samples = resample(*load_audio(source, given_rate, self.allow_urls, self._limits), rate)
        if len(samples) < self.min_audio_samples:
            raise ValueError(
                f"The audio has {len(samples)} samples at {rate} Hz; the speech encoder needs at least "
                f"{self.min_audio_samples}. Pad it with silence or leave it out."
            )
        return samples

    def _encode(
        self, inputs: list[EmbeddingInput], merged: dict[str, dict], share_images: bool = False
    ) -> BatchFeature:
        """Turns loaded inputs into the tensors of a batch."""
        data = {}
        tensors = merged["text_kwargs"].get("return_tensors")
        texts = self.tokenize_texts([item.texts for item in inputs])
        image_tokens: list[int] = []
        images = [image for item in inputs for image in item.images]
        if images:
            scaler = ImageScaler(self.image_processor, merged["images_kwargs"])
            bounds = self._pixel_bounds(inputs, texts, scaler, self._limit(merged["text_kwargs"]))
            slots = range(len(images))
            if share_images:
                images, bounds, slots = _share(images, bounds)
                data["image_indices"] = slots
            data.update(scaler.prepare(images, bounds))
            counts = [int(np.prod(grid)) // scaler.merge_size**2 for grid in np.asarray(data["image_grid_thw"])]
            image_tokens = [counts[slot] for slot in slots]
        if any(item.parts or item.audio is None or self._embeds_prefix(item) for item in inputs):
            data.update(self._encode_tokens(inputs, texts, image_tokens, merged["text_kwargs"]))
        if any(item.audio is not None for item in inputs):
            data.update(self._encode_audio(inputs, {**merged["audio_kwargs"], "return_tensors": tensors}))
        if tensors == "pt" and all(isinstance(values, np.ndarray) for values in data.values()):
            return BatchFeature({name: torch.from_numpy(values) for name, values in data.items()})
        return BatchFeature(data, tensor_type=tensors)

    def _encode_audio(self, inputs: list[EmbeddingInput], audio_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Scales and pads the clips; `max_length`, padding and truncation of the batch concern its tokens only."""
        fixed = {"truncation": False, "sampling_rate": self.feature_extractor.sampling_rate}
        clips = [item.audio for item in inputs if item.audio is not None]
        has_audio = {"has_audio": [item.audio is not None for item in inputs]}
        padded = {"padding": True, "return_attention_mask": True}
        if all(len(clip) <= self._window_samples() for clip in clips):
            encoded = self.feature_extractor(clips, **{**audio_kwargs, **fixed, **padded})
        else:
            scaled = self.feature_extractor(clips, **{**audio_kwargs, **fixed, "padding": False, **NO_TENSORS})
            windows = [self._cut(values) for values in scaled["input_values"]]
            has_audio["audio_windows"] = [len(of_clip) for of_clip in windows]
            joined = {"input_values": [window for of_clip in windows for window in of_clip]}
            tensors = {"return_tensors": audio_kwargs.get("return_tensors")}
            encoded = self.feature_extractor.pad(joined, **padded, **tensors)
        features = {"audio_features": encoded["input_values"], "audio_attention_mask": encoded["attention_mask"]}
        return {**features, **has_audio}

    def _window_samples(self) -> int:
        """Returns the samples of a window of audio; at least those of one frame of the speech encoder."""
        return max(int(self.max_audio_seconds * self.feature_extractor.sampling_rate), self.min_audio_samples)

    def _cut(self, values: np.ndarray) -> list[np.ndarray]:
        """Cuts (samples,) into windows; silence completes the last one to one frame of the speech encoder."""
        size = self._window_samples()
        *windows, last = (values[start : start + size] for start in range(0, len(values), size))
        return [*windows, np.pad(last, (0, max(0, self.min_audio_samples - len(last))))]

    def _pixel_bounds(
        self, inputs: list[EmbeddingInput], texts: list[list[list[int]]], scaler: ImageScaler, limit: float
    ) -> list[int | None]:
        """Returns the bound of pixels of each image that makes its input fit; `None`: no other than always.

        The text of an input keeps at least the share `TEXT_SHARE` of the tokens, if it has as many.
        """
        bounds: list[int | None] = []
        for item, of_texts in zip(inputs, texts, strict=True):
            sizes = [loaded_size(image) for image in item.images]
            kept = 0 if limit == math.inf else min(sum(map(len, of_texts)), int(limit * TEXT_SHARE))
            room = limit - kept - (item.prefix is not None) - 1 - 2 * len(sizes)
            bounds += [scaler.bound(sizes, room)] * len(sizes)
        return bounds

    def _limit(self, text_kwargs: dict[str, Any]) -> float:
        """Returns the tokens that an input may have."""
        if text_kwargs.get("truncation") in (None, False, "do_not_truncate"):
            return math.inf
        return text_kwargs.get("max_length") or self.tokenizer.model_max_length

    def _encode_tokens(
        self,
        inputs: list[EmbeddingInput],
        texts: list[list[list[int]]],
        image_tokens: list[int],
        text_kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Builds the ids of prefix, texts, image slots and end token of each input, truncated and padded."""
        counts = iter(image_tokens)
        limit = self._limit(text_kwargs)
        end, prefixes = self.tokenizer.eos_token_id, self._prefix_ids(inputs)
        rows, cut = [], []
        for number, (item, of_texts) in enumerate(zip(inputs, texts, strict=True)):
            # audio alone skips the language model; an end token, or a prefix not to be fused, makes it no text
            alone = item.audio is not None and not any(item.texts) and not item.images
            alone = alone and not self._embeds_prefix(item)
            ids = iter(of_texts)
            segments = [
                (next(ids), True) if isinstance(part, str) else (self._image_slot(next(counts)), False)
                for part in item.parts
            ]
            try:
                row = [] if alone else [*_join(segments, prefixes[item.prefix], limit), end]
            except ValueError as error:
                raise ValueError(f"{_name(number, len(inputs), item)}: {error}") from error
            rows.append(row)
            excess = sum(len(segment) for segment, _ in segments) + 1 + (item.prefix is not None) - len(row)
            if excess > 0 and not alone:
                cut.append(f"{_name(number, len(inputs), item)}: {excess} of {excess + len(row)} tokens")
        if cut:
            logger.warning(
                f"Texts beyond the {limit} tokens of an input (`max_length`) are cut at their end: {'; '.join(cut)}. "
                "Split long texts into several inputs."
            )
        if not any(rows):
            return {}  # audio alone beside empty texts
        names = ("padding", "pad_to_multiple_of", "padding_side")
        padding = {name: text_kwargs[name] for name in names if name in text_kwargs}
        if padding.get("padding") == "max_length":
            padding["max_length"] = text_kwargs.get("max_length") or self.tokenizer.model_max_length
        if text_kwargs.get("return_tensors") is not None and padding.get("padding") in (True, "longest"):
            return self._pad(rows, padding.get("padding_side"), padding.get("pad_to_multiple_of") or 1)
        return dict(self.tokenizer.pad({"input_ids": rows}, return_attention_mask=True, **padding))

    def _pad(self, rows: list[list[int]], side: str | None, multiple: int) -> dict[str, np.ndarray]:
        """Returns the rows padded to the longest as arrays, as `tokenizer.pad` does by way of lists."""
        counts = [len(row) for row in rows]
        width = -(-max(counts) // multiple) * multiple
        if min(counts) == width:
            ids = np.array(rows, np.int64)
            return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        lengths = np.array(counts)
        mask = np.arange(width) < lengths[:, None]
        if (side or self.tokenizer.padding_side) == "left":
            mask = mask[:, ::-1]
        ids = np.full(mask.shape, self.tokenizer.pad_token_id, np.int64)
        ids[mask] = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(lengths.sum()))
        return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}

    def _prefix_ids(self, inputs: list[EmbeddingInput]) -> dict[str | None, list[int]]:
        """Returns the token of each prefix of the inputs, none for none."""
        named = {item.prefix for item in inputs}
        return {name: [] if name is None else [self.tokenizer.convert_tokens_to_ids(name)] for name in named}

    def _embeds_prefix(self, item: EmbeddingInput) -> bool:
        """Returns whether the prefix of an input is embedded even if it has audio alone."""
        return self.audio_prefix == "fuse" and item.prefix is not None

    def tokenize_texts(self, texts: list[list[str]]) -> list[list[list[int]]]:
        """Returns the ids of the texts of each input; the characters of special tokens become ordinary tokens.

        A copy of the tokenizer does it: a call of the tokenizer itself, from another thread, changes whether it splits
        special tokens, pads and truncates while this one runs.
        """
        tokenizer = self._text_tokenizer
        if tokenizer is None:
            tokenizer = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
            tokenizer.encode_special_tokens = True
            tokenizer.no_padding()
            tokenizer.no_truncation()
            self._text_tokenizer = tokenizer
        encodings = iter(tokenizer.encode_batch_fast([t for of in texts for t in of], add_special_tokens=False))
        return [[next(encodings).ids for _ in of_input] for of_input in texts]

    def _image_slot(self, count: int) -> list[int]:
        start, end = self.tokenizer.convert_tokens_to_ids([VISION_START, VISION_END])
        return [start, *[self.image_token_id] * count, end]

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Counts the tokens and patches of images by their (height, width)."""
        data = {}
        if image_sizes is not None:
            options = self._merge(kwargs)["images_kwargs"]
            merge = options.get("merge_size") or self.image_processor.merge_size
            patches = [self.image_processor.get_number_of_image_patches(*size, options) for size in image_sizes]
            data = {"num_image_tokens": [count // merge**2 for count in patches], "num_image_patches": patches}
        return MultiModalData(**data)


def with_pillow(image_processor: Any) -> Qwen2VLImageProcessorPil:
    """Returns the image processor as the class that resizes with Pillow.

    Where torchvision is installed, transformers loads another class, whose resizing differs by a level of some pixels
    and moves vectors by 1e-3.
    """
    if isinstance(image_processor, Qwen2VLImageProcessorPil):
        return image_processor
    return Qwen2VLImageProcessorPil.from_dict(image_processor.to_dict())


def _refuse_unknown(given: Mapping[str, Any], known: set[str], place: str) -> None:
    """Raises ValueError for a keyword argument that nothing reads."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), [*known, "text", "images", "audio", "task"], n=1)
            hint = f"do you mean `{near[0]}`?" if near else "drop it."
            raise ValueError(f"The processor takes no argument `{name}`{place}, which would be ignored; {hint}")


def _join(segments: list[tuple[list[int], bool]], head: list[int], limit: float) -> list[int]:
    """Joins prefix and segments of one input; text, but never an image slot, is cut from the end to fit `limit`."""
    fixed = len(head) + 1 + sum(len(ids) for ids, is_text in segments if not is_text)
    if fixed > limit:
        raise ValueError(
            f"images, prefix and end token take {fixed} tokens; the limit is {limit}. "
            "Pass fewer images or a lower `min_pixels`, or raise `max_length`."
        )
    room = limit - fixed
    if room < 1 and any(ids for ids, is_text in segments if is_text):
        raise ValueError(
            f"images, prefix and end token take {fixed} tokens and leave none of {limit} for the text. "
            "Pass fewer images or a lower `min_pixels`, or raise `max_length`."
        )
    joined = list(head)
    for ids, is_text in segments:
        if is_text:
            ids = ids[: int(min(room, len(ids)))]
            room -= len(ids)
        joined += ids
    return joined


@lru_cache
def _limits(limits: tuple[tuple[str, float], ...], audio_seconds: float) -> Limits:
    """Returns the limits of a processor; they are asked for with every input."""
    return replace(Limits.of(dict(limits)), audio_seconds=audio_seconds)


def _hashable(options: dict[str, Any]) -> tuple | None:
    """Returns a key of nested options that tells them apart; `None` if a value is no number, string or `None`."""
    key: list[tuple] = []
    for name, value in options.items():
        if isinstance(value, dict):
            value = _hashable(value)
            if value is None:
                return None
        elif not isinstance(value, (str, int, float, type(None))):
            return None
        key.append((name, type(value), value))
    return tuple(key)


def _share(images: list[Any], bounds: list[int | None]) -> tuple[list[Any], list[int | None], list[int]]:
    """Returns the different ones among loaded images, their bounds of pixels, and which of them is in each slot."""
    alike: dict[tuple, list[int]] = {}  # numbers of the different images that have some pixels in common
    different, slots = [], []
    for image, bound in zip(images, bounds, strict=True):
        others = alike.setdefault((bound, *_some_pixels(image)), [])
        same = next((number for number in others if _are_equal(different[number][0], image)), None)
        if same is None:
            same = len(different)
            others.append(same)
            different.append((image, bound))
        slots.append(same)
    return [image for image, _ in different], [bound for _, bound in different], slots


def _some_pixels(image: Any) -> tuple[Any, ...]:
    """Returns size, type and a few lines of a loaded image, which tell most images apart at little cost."""
    height, width = loaded_size(image)
    lines = range(0, height, max(1, height // 4))
    if isinstance(image, np.ndarray):
        return image.shape, image.dtype.str, image[list(lines)].tobytes()
    return height, width, image.mode, b"".join(image.crop((0, y, width, y + 1)).tobytes() for y in lines)


def _are_equal(first: Any, second: Any) -> bool:
    return first is second or np.array_equal(np.asarray(first), np.asarray(second))


def _named(build: Callable[[int], Any], number: int, count: int) -> Any:
    """Returns `build(number)`; its error names the input if the batch has several."""
    try:
        return build(number)
    except ValueError as error:
        if count == 1:
            raise
        raise ValueError(f"{_name(number, count)}: {error}") from error


def _name(number: int, count: int, item: EmbeddingInput | None = None) -> str:
    """Returns how errors and warnings name an input of a batch."""
    text = next((f" ({text[:40]!r}…)" for text in item.texts if text), "") if item else ""
    return f"Input {number} of a batch of {count}{text}"


ViPolyQwenProcessor.register_for_auto_class()

__all__ = ["CHAT_TEMPLATE", "PREFIX_SIDES", "TASK_PREFIXES", "EmbeddingInput", "ViPolyQwenProcessor"]
