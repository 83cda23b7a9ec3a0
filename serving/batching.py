"""The requests that wait, as few passes through the model: similar inputs share one, bounded by padded tokens."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers.utils import logging

from ..configuration_vipolyqwen import TOWERS
from ..data.precision import check_dimensions, shorten
from ..images_vipolyqwen import image_size, load_image
from ..media_vipolyqwen import Limits
from ..waveforms_vipolyqwen import audio_length, load_audio
from .embedding import INPUT_ERRORS, Embedder, prompt_of, without_direction
from .loading import LoadedModel
from .requests import RequestError

logger = logging.get_logger(__name__)

# A text that is too long is refused, not cut; a text is never taken for a path.
REFUSE = {"chat_template": {"plain_text": True}, "text": {"truncation": False}}
BYTES_A_TOKEN = 3  # of text, as an estimate that sorts inputs


@dataclass(frozen=True)
class Job:
    """The inputs of one request.

    Attributes:
        inputs: the parts of each input, see `EmbeddingRequest`.
        prompt_name: as there.
        dimensions: as there.
    """

    inputs: list[list[dict[str, Any]]]
    prompt_name: str | None = None
    dimensions: int | None = None


@dataclass(frozen=True)
class Done:
    """The vectors of one request, (inputs, dimensions) float32, and the number of its tokens."""

    vectors: np.ndarray
    tokens: int


@dataclass
class _Item:
    """One input on its way: where it belongs, its conversation, its estimated tokens; then vector and tokens."""

    job: int
    place: str
    prompt: str | None
    message: list[dict[str, Any]]
    cost: int
    vector: np.ndarray | None = None
    tokens: int = 0


@dataclass
class Batcher:
    """Embeds the inputs of several requests together; a bad one costs no other request.

    Attributes:
        model: the model; one thread at a time uses it.
        max_tokens: padded tokens of a pass, estimated.
        max_pixels: pixels of an image; more are refused before they are decoded.
        max_decoded: bytes of the decoded media of a request; more are refused before anything is decoded, and no more
            are held at a time.
        threads: threads that decode images and audio.
    """

    model: LoadedModel
    max_tokens: int = 16_384
    max_pixels: int = 50_000_000
    max_decoded: int = 512 * 2**20
    threads: int = 4
    lock: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.threads)
        self._length = self.model.encoder.processor.tokenizer.model_max_length
        limits = limits_of(self.model.encoder.processor)
        self._limits = replace(limits, image_pixels=min(limits.image_pixels, self.max_pixels))
        config = self.model.encoder.transformers_model.config
        loads = vars(type(config)).get("loads")  # code of models published earlier always loads all towers
        self._kinds = [kind for kind in TOWERS if loads is None or loads(config, kind)]

    def run(self, jobs: Sequence[Job]) -> list[Done | RequestError]:
        """Returns the result of each job."""
        sizes = [sum(self._pool.map(self._decoded_bytes, job.inputs)) for job in jobs]
        results: list[Done | RequestError] = []
        for group in self._groups(sizes):
            if len(group) == 1 and sizes[group[0]] > self.max_decoded:
                limit = f"{self.max_decoded} bytes; send several requests, or smaller images and shorter audio."
                text = f"The images and audio take {sizes[group[0]]} bytes when they are decoded; the limit is {limit}"
                results.append(RequestError(400, text, "input"))
            else:
                results += self._run_together([jobs[number] for number in group])
        return results

    def _groups(self, sizes: Sequence[int]) -> list[list[int]]:
        """Groups jobs in their order so that the decoded media of a group stay within `max_decoded`."""
        groups: list[list[int]] = []
        for number, size in enumerate(sizes):
            if groups and sum(sizes[other] for other in groups[-1]) + size <= self.max_decoded:
                groups[-1].append(number)
            else:
                groups.append([number])
        return groups

    def _decoded_bytes(self, parts: list[dict[str, Any]]) -> int:
        """Returns the memory of an input's media by their headers; 0 for what cannot be read, or is a URL."""
        total = 0
        for part in parts:
            source = part[part["type"]]
            if isinstance(source, bytes) and part["type"] in self._kinds:
                with suppress(ValueError, OSError):
                    total += decoded_bytes(part["type"], source, self._limits)
        return total

    def _run_together(self, jobs: Sequence[Job]) -> list[Done | RequestError]:
        errors: dict[int, RequestError] = {}
        items = [item for number, job in enumerate(jobs) for item in self._load(number, job, errors)]
        with self.lock:
            for batch in self._batches([item for item in items if item.job not in errors]):
                self._embed(batch, errors)
        results: list[Done | RequestError] = []
        for number, job in enumerate(jobs):
            found = [item for item in items if item.job == number]
            results.append(errors[number] if number in errors else self._collect(job, found))
        return results

    def _collect(self, job: Job, items: list[_Item]) -> Done:
        vectors = np.stack([item.vector for item in items if item.vector is not None])
        return Done(shorten(vectors, job.dimensions), sum(item.tokens for item in items))

    def _load(self, number: int, job: Job, errors: dict[int, RequestError]) -> list[_Item]:
        """Decodes the media of a job, in threads; the first bad input is its error."""
        try:
            prompt = prompt_of(self.model.encoder, job.prompt_name)
            check_dimensions(job.dimensions, self.model.encoder.get_embedding_dimension())
        except ValueError as error:
            errors[number] = RequestError(400, str(error), "prompt_name" if "prompt" in str(error) else "dimensions")
            return []
        places = [f"input[{index}]" for index in range(len(job.inputs))]
        loads = [
            self._pool.submit(self._item, number, place, prompt, parts)
            for place, parts in zip(places, job.inputs, strict=True)
        ]
        items = []
        for place, load in zip(places, loads, strict=True):
            try:
                items.append(load.result())
            except INPUT_ERRORS as error:
                errors.setdefault(number, RequestError(400, f"{place}: {error}", place))
            except Exception:
                logger.exception(f"{place} cannot be decoded.")
                errors.setdefault(number, RequestError(500, f"{place} cannot be decoded.", place))
        return items

    def _item(self, job: int, place: str, prompt: str | None, parts: list[dict[str, Any]]) -> _Item:
        content, cost = [], 2
        for part in parts:
            kind = part["type"]
            if kind not in self._kinds:
                raise ValueError(f"it has {kind}; this server embeds {', '.join(self._kinds)} only: leave it out.")
            loaded = part[kind]
            if kind == "text":
                cost += len(loaded.encode("utf-8", "surrogatepass")) // BYTES_A_TOKEN
            elif kind == "image":
                loaded = load_image(loaded, self.model.encoder.processor.allow_urls, limits=self._limits)
                counted = self.model.encoder.processor._get_num_multimodal_tokens([loaded.size[::-1]])
                cost += counted["num_image_tokens"][0]
            else:
                allow_urls = self.model.encoder.processor.allow_urls
                samples, rate = load_audio(loaded, allow_urls=allow_urls, limits=self._limits)
                loaded = {"array": samples, "sampling_rate": rate}
            content.append({"type": kind, kind: loaded})
        if cost > BYTES_A_TOKEN * 2 * self._length:
            raise ValueError(f"the input has about {cost} tokens; the limit is {self._length}: split it.")
        return _Item(job, place, prompt, [{"role": "user", "content": content}], cost)

    def _batches(self, items: list[_Item]) -> list[list[_Item]]:
        """Groups items with one prompt and similar cost, so that count × longest stays within `max_tokens`."""
        batches: list[list[_Item]] = []
        for item in sorted(items, key=lambda item: (item.prompt or "", -item.cost)):
            last = batches[-1] if batches else []
            fits = last and last[0].prompt == item.prompt and last[0].cost * (len(last) + 1) <= self.max_tokens
            if fits:
                last.append(item)
            else:
                batches.append([item])
        return batches

    def _embed(self, batch: list[_Item], errors: dict[int, RequestError]) -> None:
        embedder = Embedder(self.model.encoder, batch[0].prompt, None, REFUSE, max_tokens=self._length)
        try:
            prepared = embedder.prepare([lambda item=item: item.message for item in batch])
            vectors = embedder.vectors(prepared.features)
        except Exception as error:  # of any library, or out of memory: this batch fails, the server answers others
            logger.exception("A batch failed.")
            for item in batch:
                errors.setdefault(item.job, RequestError(500, f"The batch failed: {type(error).__name__}."))
            return
        faults = {prepared.kept[row]: reason for row, reason in without_direction(vectors).items()}
        for position, reason in {**prepared.reasons, **faults}.items():
            item = batch[position]
            errors.setdefault(item.job, RequestError(400, f"{item.place}: {reason}", item.place))
        tokens = prepared.tokens()
        for row, position in enumerate(prepared.kept):
            batch[position].vector, batch[position].tokens = vectors[row], tokens[row]


def limits_of(processor: Any) -> Limits:
    """Returns the bounds that a processor puts on inputs, so that no more than it takes is decoded.

    Args:
        processor: of a checkpoint; those of earlier versions have no `limits`.
    """
    seconds = processor.max_audio_seconds * processor.max_audio_windows
    return replace(Limits.of(vars(processor).get("limits")), audio_seconds=seconds)


def decoded_bytes(kind: str, file: bytes, limits: Limits) -> int:
    """Returns the memory of a decoded image (RGB) or audio file (mono float32), by its header.

    Raises:
        ValueError: it cannot be read, or exceeds the limits.
    """
    if kind == "image":
        width, height = image_size(file, limits)
        return 3 * width * height
    samples, rate = audio_length(file, limits)
    return 4 * min(samples, int(limits.audio_seconds * rate))  # some headers state no length, but a huge number
