"""Collates pairs: both sides of a mixed batch as one set of model inputs."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .augmentation import Augmentation
from .positions import token_positions
from .schema import MODALITY_PAIRS, Task, modality_pair, present_modalities
from .sources import content_key


@dataclass
class MixedBatchCollator:
    """Collates B pairs into a batch of 2B model inputs: rows [0, B) are the sides a, rows [B, 2B) the sides b.

    Rows reach the processor as conversations because `SentenceTransformer.encode` passes its inputs in this form too:
    training and inference share one code path, so an input and a prefix give the same tokens in both.

    The trimodal paper (§4.4) has a tensor for each side; here one holds both. Its `input_ids_a` are the first B rows
    of `input_ids`, its `input_ids_b` the next B (likewise `attention_mask`, `has_image`, `has_audio`); its
    `pixel_values_b` and `audio_features_b` are the images and clips of those rows, which `take_rows` selects.

    Prefix dropout is a hash of the seed, the ids of the batch and the position in it. It is therefore reproducible for
    any number of workers and after a resume; it changes with the epoch because shuffling changes the batches.

    Attributes:
        processor: the model's processor; it must know the prefix of every task.
        tasks: the tasks in the order of their task ids; each says which sides carry its prefix.
        prefix_dropout: probability of dropping the prefix of a pair, which trains the general embedding f(x, None);
            0 in evaluation.
        seed: seed of the prefix dropout.
        with_negatives: whether to include hard negatives; evaluation does not need them.
        extra_parts: message parts of one extra row after the pairs, so that every tower takes part in every batch.
        augmentation: respells Vietnamese texts of pairs, not of hard negatives; `None` leaves them.
        teacher_width: dimensions of the teacher's vectors to add, for distillation; 0 for none.
    """

    processor: Any
    tasks: Mapping[str, Task]
    prefix_dropout: float = 0.1
    seed: int = 0
    with_negatives: bool = True
    extra_parts: Sequence[dict[str, Any]] = ()
    teacher_width: int = 0
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.prefix_dropout <= 1.0:
            raise ValueError(f"prefix_dropout is {self.prefix_dropout}; a probability is in [0, 1].")
        for name, task in self.tasks.items():
            if self.processor.task_prefixes.get(name) != task.prefix:
                raise ValueError(
                    f"The processor knows no prefix {task.prefix!r} of {name!r}; call "
                    f"`processor.add_task({name!r}, {task.prefix!r})` first."
                )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collates B rows of a `PairDataset`; with `extra_parts` B may be 0, when other ranks have the last rows.

        Returns:
            `input_ids`, `attention_mask` (2B, tokens) long; if there are images `pixel_values` (patches, patch values)
            float and `image_grid_thw` (images, 3) long of each distinct image, and `image_indices` (slots,)
            long, the image of each image slot, and `position_ids` (3, 2B, tokens) long; `audio_features` (clips,
            samples) float, `audio_attention_mask` (clips, samples) long and `has_audio` (2B,) bool if a row has audio;
            `images_per_row` (2B,) long, `has_image` (2B,) bool; `data_type` (B,) long task ids, `similarity_scores`
            (B,) float32 in [0, 1], NaN for a pair without score, `a_keys`, `b_keys` (B,) long, `groups` (B,) long, 0
            for none, `modalities` (B,) long (positions in `MODALITY_PAIRS`), the list `ids`, and the
            list `replaced` of the `BadRow`s in whose place rows stand. Hard
            negatives are N rows after the sides b, with `negative_owners` (N,) long, their pairs, and
            `negative_keys` (N,) long; `extra_parts` add one row after those. With `teacher_width` W,
            `teacher_vectors` (M, W) float32 and `teacher_sides` (M,) long, their rows in [0, 2B).
        """
        if self.augmentation is not None:
            rows = [self.augmentation.respell(row) for row in rows]
        prefixes = self._prefixes([row["id"] for row in rows], [row["task"] for row in rows])
        on_both = [self.tasks[row["task"]].prefix_sides == "both" for row in rows]
        on_b = [prefix if both else None for prefix, both in zip(prefixes, on_both, strict=True)]
        conversations = [
            *(_conversation(prefix, _side(row, "a")) for prefix, row in zip(prefixes, rows, strict=True)),
            *(_conversation(prefix, _side(row, "b")) for prefix, row in zip(on_b, rows, strict=True)),
        ]
        negatives = [(row, each) for row, pair in enumerate(rows) if self.with_negatives for each in pair["negatives"]]
        conversations += [
            _conversation(
                on_b[row], message_parts(each["text"], each["images"], each["audio"], rows[row]["image_placeholder"])
            )
            for row, each in negatives
        ]
        if self.extra_parts:
            conversations.append(_conversation(None, list(self.extra_parts)))
        batch = dict(
            self.processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                plain_text=True,
                share_images=True,
            )
        )
        if "image_indices" in batch:
            batch["position_ids"] = self._positions(batch)
        task_ids = {name: task_id for task_id, name in enumerate(self.tasks)}
        images_per_row = _long(
            [sum(part["type"] == "image" for part in turns[-1]["content"]) for turns in conversations]
        )
        scores = [float("nan") if row["score"] is None else row["score"] for row in rows]
        return {
            **batch,
            "images_per_row": images_per_row,
            "has_image": images_per_row > 0,
            "data_type": _long([task_ids[row["task"]] for row in rows]),
            "similarity_scores": torch.tensor(scores, dtype=torch.float32),
            "a_keys": _long([row["a_key"] for row in rows]),
            "b_keys": _long([row["b_key"] for row in rows]),
            "groups": _long([0 if row["group"] is None else content_key(row["group"]) for row in rows]),
            "modalities": _long([MODALITY_PAIRS.index(_modality_pair(row)) for row in rows]),
            "negative_owners": _long([row for row, _ in negatives]),
            "negative_keys": _long([each["key"] for _, each in negatives]),
            "ids": [row["id"] for row in rows],
            "replaced": [row["replaces"] for row in rows if row.get("replaces") is not None],
            **(self._teaching(rows) if self.teacher_width else {}),
        }

    def _positions(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the positions of the tokens, which the model would read back from the device to compute."""
        grids = batch["image_grid_thw"][batch["image_indices"]].tolist()
        merge_size = self.processor.image_processor.merge_size
        tokens = (batch["input_ids"], batch["attention_mask"])
        return token_positions(*tokens, grids, self.processor.image_token_id, merge_size)

    def _teaching(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns the teacher's vectors of the sides that have one, and these sides."""
        vectors = [row[name] for name in ("teacher_a", "teacher_b") for row in rows]
        taught = [side for side, vector in enumerate(vectors) if vector is not None]
        stacked = np.array([vectors[side] for side in taught], np.float32).reshape(len(taught), self.teacher_width)
        return {"teacher_vectors": torch.from_numpy(stacked), "teacher_sides": _long(taught)}

    def _prefixes(self, ids: list[str], tasks: list[str]) -> list[str | None]:
        """Returns the prefix of each pair; `None` if it is dropped."""
        batch = hashlib.blake2b(repr((self.seed, ids)).encode(), digest_size=16)
        prefixes: list[str | None] = []
        for place, name in enumerate(tasks):
            drawn = batch.copy()
            drawn.update(place.to_bytes(8))
            uniform = int.from_bytes(drawn.digest()[:8]) / 2**64  # in [0, 1)
            dropped = uniform < self.prefix_dropout or self.tasks[name].prefix_sides == "none"
            prefixes.append(None if dropped else self.tasks[name].prefix)
        return prefixes


def _long(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)  # dtype also for an empty list


def _modality_pair(row: Mapping[str, Any]) -> str:
    """Returns the entry of `MODALITY_PAIRS` of a pair."""
    a, b = (present_modalities(row[side], row[f"images_{side}"], row[f"audio_{side}"]) for side in ("a", "b"))
    return modality_pair(a, b)


def _conversation(prefix: str | None, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = [] if prefix is None else [{"role": "system", "content": [_text(prefix)]}]
    return [*system, {"role": "user", "content": parts, "keep_order": True}]


def _side(row: Mapping[str, Any], side: str) -> list[dict[str, Any]]:
    return message_parts(row[side], row[f"images_{side}"], row[f"audio_{side}"], row["image_placeholder"])


def message_parts(text: str, images: Sequence[Any], audio: Any, placeholder: str) -> list[dict[str, Any]]:
    """Returns the message parts of a side: text with its images, see `interleave`, then audio if not `None`."""
    parts = interleave(text, images, placeholder)
    if audio is not None:
        parts.append({"type": "audio", "audio": audio})
    return parts


def interleave(text: str, images: Sequence[Any], placeholder: str) -> list[dict[str, Any]]:
    """Returns message parts: texts and images in their order.

    Args:
        text: a text with one placeholder for each image; with any other number of placeholders the images come first
            and the text is left unchanged.
        images: sources of images, in their order.
        placeholder: marks the position of an image in the text.
    """
    places = [{"type": "image", "image": image} for image in images]
    pieces = text.split(placeholder) if images else [text]
    if len(pieces) != len(images) + 1:
        return [*places, *([_text(text)] if text else [])]
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        parts += [_text(piece)] if piece else []
        parts += places[number : number + 1]
    return parts


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
