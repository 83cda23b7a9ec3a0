"""What forward is given: a tensor that is missing, of another kind or shape, or ignored is refused by name."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_audio, random_image


@pytest.fixture(scope="module")
def batch(tiny: tuple) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = [[random_image(rng)], [random_image(rng)]]
    inputs = {"text": ["xin chào", "b"], "images": images, "audio": [None, random_audio(rng, 0.2)]}
    return dict(tiny[1](**inputs, return_tensors="pt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"has_audio": [False, True]}, "`has_audio` is a list; pass a tensor"),
        ({"has_audio": torch.tensor([[False, True]])}, r"`has_audio` has the shape \(1, 2\); it must have 1 dim"),
        ({"attention_mask": torch.ones(2, 99)}, r"`attention_mask` has the shape \(2, 99\) and `input_ids` \(2,"),
        ({"attention_mask": torch.ones(2, 1, 1)}, "`attention_mask` .* must have 2 dimensions"),
        ({"audio_attention_mask": torch.ones(1, 5)}, "`audio_attention_mask` has the shape .* and `audio_features`"),
        ({"input_ids": torch.zeros(2, 9)}, r"`input_ids` is of torch.float32; pass torch.long"),
        ({"input_ids": torch.zeros(9, dtype=torch.long)}, r"`input_ids` has the shape \(9,\)"),
        ({"pixel_values": torch.zeros(32, 1176, dtype=torch.uint8)}, "`pixel_values` is of torch.uint8; pass float"),
        ({"pixel_values": np.zeros((32, 1176), np.float32)}, "`pixel_values` is a ndarray"),
        ({"audio_features": torch.zeros(9)}, r"`audio_features` has the shape \(9,\)"),
        ({"audio_features": torch.zeros(1, 9), "audio_attention_mask": None}, "clips have 9 samples; .* at least"),
        ({"image_indices": torch.tensor([0, 7])}, r"`image_indices` is \[0, 7\], but 2 images were passed"),
        ({"image_indices": torch.tensor([0, -1])}, r"`image_indices` is \[0, -1\]"),
        ({"attention_mask": None}, "`input_ids` has padding, but no `attention_mask`"),
        ({"input_ids": None, "attention_mask": None}, "`pixel_values` was passed without `input_ids`"),
        (
            {"pixel_values": None, "image_grid_thw": None, "image_indices": torch.tensor([0, 1])},
            "`image_indices` was passed without `image_grid_thw`",
        ),
        (
            {"audio_features": None, "audio_attention_mask": None, "has_audio": None, "audio_windows": torch.ones(1)},
            "`audio_windows` is of torch.float32",
        ),
        (
            {"audio_features": None, "has_audio": None},
            "`audio_attention_mask` was passed without `audio_features` and would be ignored",
        ),
    ],
)
@torch.no_grad()
def test_a_tensor_that_does_not_fit_is_refused(
    changes: dict, message: str, batch: dict[str, Any], tiny: tuple
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny[0](**{**batch, **changes})


@torch.no_grad()
def test_images_beside_rows_without_tokens_are_refused(batch: dict[str, Any], tiny: tuple) -> None:
    masked = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    with pytest.raises(ValueError, match="`pixel_values` were passed, but no row has tokens|image tokens, but"):
        tiny[0](**masked)


@torch.no_grad()
def test_ids_without_padding_need_no_mask(tiny: tuple) -> None:
    model, processor = tiny
    batch = processor(text=["xin chào", "xin chào"], return_tensors="pt")
    expected = model(**batch).embeddings
    torch.testing.assert_close(model(input_ids=batch["input_ids"]).embeddings, expected)


def test_empty_texts_beside_audio_have_no_tokens(tiny: tuple) -> None:
    clip = random_audio(np.random.default_rng(0), 0.2)
    batch = tiny[1](text=["", ""], audio=[clip, clip], return_tensors="pt")
    assert "input_ids" not in batch and batch["has_audio"].tolist() == [True, True]
