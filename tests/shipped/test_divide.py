"""Division of a batch in inference: the same vectors, less padding, equal inputs once."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_tiny_model, random_audio, random_image, speech_config
from torch import Tensor

from vipolyqwen.microbatches_vipolyqwen import INFERENCE_COST, divide_batch, first_equal, inference_cost
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor

TOLERANCE = 1e-5  # largest absolute difference in float32
LONG = "Trên biển ghi gì? 沙滩上有四个绿色的小方块。 " * 8


@pytest.fixture(scope="module")
def model(processor: ViPolyQwenProcessor) -> ViPolyQwenModel:
    return build_tiny_model(processor, speech_config(), audio_fusion="attention")


class Passes:
    """Notes the shape of every pass through the language model and the speech encoder."""

    def __init__(self, model: ViPolyQwenModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[tuple[int, int]] = []
        self.patches: list[int] = []
        self.windows: list[tuple[int, int]] = []
        self.masks: list[bool] = []
        vlm, tower, images = model.vlm.forward, model.audio_tower.forward, model.vlm.get_image_features

        def text(*args: Any, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            self.texts.append(tuple(inputs_embeds.shape[:2]))
            self.masks.append(attention_mask is not None)
            return vlm(*args, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

        def audio(padded: Any, **kwargs: Any) -> Any:
            self.windows.append(tuple(padded.values.shape))
            return tower(padded, **kwargs)

        def image(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.patches.append(len(pixel_values))
            return images(pixel_values, *args, **kwargs)

        monkeypatch.setattr(model.vlm, "forward", text)
        monkeypatch.setattr(model.audio_tower, "forward", audio)
        monkeypatch.setattr(model.vlm, "get_image_features", image)


@pytest.fixture
def passes(model: ViPolyQwenModel, monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(model, monkeypatch)


def tensors(processor: ViPolyQwenProcessor, rows: list[dict[str, Any]], side: str = "right") -> dict[str, Tensor]:
    def column(name: str) -> list | None:
        return [row.get(name) for row in rows] if any(name in row for row in rows) else None

    texts = [row.get("text", "") for row in rows]
    given = {"images": column("images"), "audio": column("audio"), "padding_side": side}
    return processor(text=texts, **given, return_tensors="pt")


def mixture(rng: np.random.Generator) -> list[dict[str, Any]]:
    image, other, clip = random_image(rng, 60, 48), random_image(rng, 90, 40), random_audio(rng, 0.4)
    return [
        {"text": "Huế"},
        {"text": LONG, "images": [image]},
        {"audio": clip},
        {"text": LONG},
        {"images": [other, image]},
        {"text": "tiếng sóng", "audio": random_audio(rng, 0.1)},
        {"text": "Huế", "images": [image]},
        {"text": LONG[:60], "images": [other], "audio": clip},
        {"audio": random_audio(rng, 0.05)},
        {"text": "Huế"},
        {"audio": clip},
        {"text": "Huế", "images": [image]},
    ]


def both(model: ViPolyQwenModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return model(**batch).embeddings, model(**batch, divide=False).embeddings


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_divided_mixture_gets_the_vectors_of_one_pass(
    side: str, model: ViPolyQwenModel, processor: ViPolyQwenProcessor, rng: np.random.Generator
) -> None:
    divided, joint = both(model, tensors(processor, mixture(rng), side))
    assert (divided - joint).abs().max() <= TOLERANCE
    assert torch.equal(divided[0], divided[9])
    assert torch.equal(divided[2], divided[10])
    assert torch.equal(divided[6], divided[11])
    assert not torch.allclose(divided[0], divided[6], atol=1e-2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_division_suits_every_attention_and_pooling(
    attention: str, pooling: str, processor: ViPolyQwenProcessor, rng: np.random.Generator
) -> None:
    model = build_tiny_model(processor, None, attn=attention, pooling=pooling)
    rows = [
        {"text": "a" * 3},
        {"text": LONG},
        {"text": "b", "images": [random_image(rng, 60, 48)]},
        {"text": LONG[:99]},
    ]
    for side in ("right", "left"):
        divided, joint = both(model, tensors(processor, rows, side))
        assert (divided - joint).abs().max() <= TOLERANCE


def test_long_and_short_texts_share_no_pass(
    model: ViPolyQwenModel, processor: ViPolyQwenProcessor, passes: Passes
) -> None:
    batch = tensors(processor, [{"text": LONG}, *({"text": f"Huế {number}"} for number in range(7))])
    with torch.inference_mode():
        model(**batch)
    assert sorted(rows for rows, _ in passes.texts) == [1, 7]
    assert min(length for _, length in passes.texts) < 20 < max(length for _, length in passes.texts)
    assert passes.masks == [False, False]
    assert passes.patches == passes.windows == []


def test_short_and_long_clips_share_no_pass(
    model: ViPolyQwenModel, processor: ViPolyQwenProcessor, passes: Passes, rng: np.random.Generator
) -> None:
    clips = [{"audio": random_audio(rng, seconds)} for seconds in (8.0, 0.1, 0.1, 0.1)]
    with torch.inference_mode():
        model(**tensors(processor, clips))
    assert sorted(rows for rows, _ in passes.windows) == [1, 3]
    assert passes.texts == []


def test_equal_inputs_are_encoded_once(
    model: ViPolyQwenModel, processor: ViPolyQwenProcessor, passes: Passes, rng: np.random.Generator
) -> None:
    image, clip = random_image(rng, 60, 48), random_audio(rng, 0.2)
    batch = tensors(processor, [{"text": "Huế"}, {"images": [image]}, {"audio": clip}] * 4)
    with torch.inference_mode():
        model(**batch)
    assert sum(rows for rows, _ in passes.texts) == 2
    assert sum(passes.patches) * 4 == len(batch["pixel_values"])
    assert sum(rows for rows, _ in passes.windows) == 1


def test_rows_that_show_one_image_encode_it_once(
    model: ViPolyQwenModel, processor: ViPolyQwenProcessor, passes: Passes, rng: np.random.Generator
) -> None:
    image = random_image(rng, 60, 48)
    batch = tensors(processor, [{"text": text, "images": [image]} for text in ("a", LONG, "c")])
    with torch.inference_mode():
        model(**batch)
    assert sum(passes.patches) * 3 == len(batch["pixel_values"])


@pytest.mark.parametrize("request_", ["output_hidden_states", "output_pooling_weights"])
def test_outputs_of_each_position_keep_their_shape(
    request_: str, model: ViPolyQwenModel, processor: ViPolyQwenProcessor, passes: Passes
) -> None:
    batch = tensors(processor, [{"text": LONG}, *({"text": f"Huế {number}"} for number in range(7))])
    with torch.inference_mode():
        output = model(**batch, **{request_: True})
    assert passes.texts == [tuple(batch["input_ids"].shape)]
    found = output.hidden_states[-1] if request_ == "output_hidden_states" else output.pooling_weights
    assert found.shape[:2] == batch["input_ids"].shape


def test_a_batch_with_gradient_is_not_divided(
    model: ViPolyQwenModel, processor: ViPolyQwenProcessor, passes: Passes
) -> None:
    batch = tensors(processor, [{"text": LONG}, *({"text": f"Huế {number}"} for number in range(7))])
    assert model(**batch).embeddings.requires_grad
    assert passes.texts == [tuple(batch["input_ids"].shape)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"has_audio": torch.tensor([True, False, False])}, "has_audio"),
        ({"attention_mask": torch.tensor([[1, 1], [1, 0], [0, 0]])}, "1 of the 3 rows"),
        ({"pixel_values": torch.zeros(4, 1176), "image_grid_thw": torch.tensor([[1, 2, 2]])}, "image"),
        ({"audio_features": torch.zeros(2, 800)}, "2 clips"),
        (
            {
                "audio_features": torch.zeros(3, 800),
                "audio_attention_mask": torch.tensor([[1] * 800, *[[1] + [0] * 799] * 2]),
            },
            r"Clips \[1, 2\] of the 3",
        ),
    ],
)
def test_inputs_that_contradict_each_other_stay_an_error(
    change: dict[str, Tensor], named: str, model: ViPolyQwenModel
) -> None:
    ids = torch.full((3, 2), 40)
    with torch.inference_mode(), pytest.raises(ValueError, match=named):
        model(**{"input_ids": ids, "attention_mask": torch.ones_like(ids), **change})


def test_windows_of_long_audio_stay_together(
    model: ViPolyQwenModel, processor: ViPolyQwenProcessor, rng: np.random.Generator
) -> None:
    features = torch.from_numpy(rng.standard_normal((6, 4000)).astype(np.float32))
    mask = torch.ones_like(features, dtype=torch.long)
    features[5, 900:], mask[5, 900:] = 0, 0
    batch = {"audio_features": features, "audio_attention_mask": mask, "audio_windows": torch.tensor([3, 1, 2])}
    divided, joint = both(model, batch)
    assert (divided - joint).abs().max() <= TOLERANCE


def test_audio_that_differs_in_padding_alone_is_not_equal() -> None:
    features, masks = torch.zeros(2, 800), torch.ones(2, 800, dtype=torch.long)
    masks[1, 700:] = 0
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "image_indices", "audio_windows")
    inputs = dict.fromkeys((*names, "has_audio")) | {"audio_features": features, "audio_attention_mask": masks}
    assert divide_batch(inputs, 5, 2, 20).sources == [0, 1]
    assert divide_batch(inputs | {"audio_attention_mask": None}, 5, 2, 20).sources == [0, 0]


def test_tensors_of_equal_sum_are_told_apart() -> None:
    items = [torch.tensor(values) for values in ([1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [float("nan"), 0.0])]
    assert first_equal(items, [0, 0, 0, 0]) == [0, 1, 0, 3]
    assert first_equal(items[:1] * 2, [[1, 2, 2], [1, 4, 1]]) == [0, 1]


def test_a_single_text_takes_no_mask_and_gets_the_same_vector(
    model: ViPolyQwenModel, processor: ViPolyQwenProcessor, passes: Passes
) -> None:
    alone = tensors(processor, [{"text": LONG}])
    padded = processor(
        text=[LONG], padding="max_length", max_length=len(alone["input_ids"][0]) + 5, return_tensors="pt"
    )
    with torch.inference_mode():
        vectors = [model(**batch).embeddings for batch in (alone, padded)]
        vectors.append(model(**alone, is_causal=False).embeddings)
    assert passes.masks == [False, True, True]
    assert (vectors[0] - vectors[1]).abs().max() <= 1e-6
    assert (vectors[0] - vectors[2]).abs().max() > 1e-3


def test_texts_whose_padding_costs_less_than_a_pass_share_one(
    model: ViPolyQwenModel, processor: ViPolyQwenProcessor, passes: Passes
) -> None:
    batch = tensors(processor, [{"text": f"Huế {'1' * number}"} for number in range(5)])
    assert 0 < int((batch["attention_mask"] == 0).sum()) <= INFERENCE_COST
    with torch.inference_mode():
        model(**batch)
    assert [rows for rows, _ in passes.texts] == [5]


@pytest.mark.parametrize(
    "change", [{"image_indices": torch.tensor([0])}, {"image_grid_thw": torch.tensor([[1, 2, 2]])}]
)
def test_images_without_pixels_stay_an_error(change: dict[str, Tensor], model: ViPolyQwenModel) -> None:
    ids = torch.full((2, 3), 40)
    with torch.inference_mode(), pytest.raises((ValueError, TypeError)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **change)


def test_setting_the_mode_reaches_a_module_that_differs(model: ViPolyQwenModel) -> None:
    model.pooling.train()
    assert model.eval() is model
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())
    model.eval()


def test_the_cost_of_a_pass_falls_with_the_width_of_the_model() -> None:
    costs = [inference_cost(width, torch.device("cpu")) for width in (128, 640, 1536)]
    assert costs == [203, 51, 46]  # 128: 45 + 2,600,000 // 16,384
    assert inference_cost(128, torch.device("cuda")) == 1024


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_modules_are_named_as_torch_does(model: ViPolyQwenModel, remove_duplicate: bool) -> None:
    model.twice = model.projection  # a module with two names
    try:
        given = {"remove_duplicate": remove_duplicate}
        found = list(model.named_modules(prefix="x", **given))
        assert found == list(torch.nn.Module.named_modules(model, prefix="x", **given))
        outer = torch.nn.ModuleList([model.pooling, model])  # a part that was seen before
        names = [name for name, _ in outer.named_modules(**given)]
        assert ("1.pooling" in names) is not remove_duplicate and "1.projection" in names
    finally:
        del model.twice
