"""Long audio: windows pass through the speech encoder one by one, the pooling sees the frames of all of them."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_tiny_model, random_audio, random_image, speech_config
from torch import Tensor
from torch.nn.functional import normalize

from vipolyqwen.audio_vipolyqwen import PaddedAudio
from vipolyqwen.configuration_vipolyqwen import POOLINGS
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor

WINDOW = 4000  # samples, 0.25 s


@pytest.fixture(scope="module")
def short(processor: ViPolyQwenProcessor) -> ViPolyQwenProcessor:
    """A processor with windows of 0.25 s, at most 8."""
    changed = copy.copy(processor)
    changed.max_audio_seconds, changed.max_audio_windows = 0.25, 8
    return changed


@pytest.fixture(scope="module")
def model(processor: ViPolyQwenProcessor) -> Any:
    return build_tiny_model(processor, speech_config())


def scaled(clip: dict) -> Tensor:
    """Zero mean and unit variance over the clip, in float64."""
    samples = torch.from_numpy(clip["array"]).double()
    return (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()


def test_long_audio_is_cut_into_windows_and_nothing_is_lost(short: Any, rng: np.random.Generator) -> None:
    clips = [random_audio(rng, 0.2), random_audio(rng, 0.6), random_audio(rng, 0.25)]
    batch = short(audio=clips, return_tensors="pt")
    assert batch["audio_windows"].tolist() == [1, 3, 1]
    assert batch["audio_features"].shape == batch["audio_attention_mask"].shape == (5, WINDOW)
    assert batch["audio_attention_mask"].sum(dim=1).tolist() == [3200, 4000, 4000, 1600, 4000]
    real = batch["audio_features"][batch["audio_attention_mask"].bool()]
    wanted = torch.cat([scaled(clip) for clip in clips])
    torch.testing.assert_close(real.double(), wanted, atol=1e-5, rtol=0)
    assert (batch["audio_features"][~batch["audio_attention_mask"].bool()] == 0).all()
    uncut = short(audio=clips, truncation=False, return_tensors="pt")
    assert torch.equal(uncut["audio_features"], batch["audio_features"])


def test_silence_completes_a_last_window_that_gives_no_frame(short: Any, model: Any) -> None:
    clip = {"array": np.sin(np.arange(WINDOW + 3) / 9).astype(np.float32), "sampling_rate": 16_000}
    batch = short(audio=clip, return_tensors="pt")
    least = short.min_audio_samples
    assert least > 3
    assert batch["audio_attention_mask"].sum(dim=1).tolist() == [WINDOW, least]
    assert (batch["audio_features"][1, 3:] == 0).all() and (batch["audio_features"][1, :3] != 0).all()
    weights = model(**batch, output_pooling_weights=True).audio_pooling_weights
    frames = model.audio_tower._get_feat_extract_output_lengths(torch.tensor([WINDOW, least]))
    assert weights.shape == (1, int(frames.sum())) and frames[1] == 1


def test_longer_audio_than_the_bound_is_refused(short: Any, rng: np.random.Generator) -> None:
    assert len(short(audio=random_audio(rng, 2.0))["audio_features"]) == 8
    with pytest.raises(ValueError, match="longer than 2 s, .*`max_audio_windows`"):
        short(audio=random_audio(rng, 2.1))


@torch.no_grad()
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_long_clip_s_vector_is_the_pooling_over_the_frames_of_its_windows(
    pooling: str, norm: str, short: Any, rng: np.random.Generator
) -> None:
    model = build_tiny_model(short, speech_config("hubert", norm), pooling=pooling)
    clip = random_audio(rng, 0.7)
    output = model(**short(audio=clip, return_tensors="pt"), output_pooling_weights=True)
    frames = []
    for values in scaled(clip).float().split(WINDOW):
        lengths, mask = torch.tensor([len(values)]), torch.ones(1, len(values))
        frames.append(model.audio_tower(PaddedAudio(values[None], lengths), attention_mask=mask).last_hidden_state[0])
    hidden = torch.cat(frames).double()  # (K, D_audio)
    scores = hidden @ model.audio_pooling.query.double() if pooling == "attention" else torch.zeros(len(hidden))
    if pooling == "last":
        scores[:-1] = float("-inf")
    weights = scores.softmax(dim=0)
    torch.testing.assert_close(output.audio_pooling_weights[0].double(), weights.double(), atol=1e-5, rtol=0)
    pooled = (weights.double() @ hidden).float()
    expected = normalize(model.audio_projection(pooled[None]), dim=-1)
    torch.testing.assert_close(output.embeddings, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_clip_within_the_window_is_encoded_as_before_bit_for_bit(
    short: Any, model: Any, processor: Any, rng: np.random.Generator
) -> None:
    clips = [random_audio(rng, 0.25), random_audio(rng, 0.13)]
    batch, before = short(audio=clips, return_tensors="pt"), processor(audio=clips, return_tensors="pt")
    assert batch.keys() == before.keys() == {"audio_features", "audio_attention_mask", "has_audio"}
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    wanted = model(**before).embeddings
    assert torch.equal(model(**batch, audio_windows=torch.tensor([1, 1])).embeddings, wanted)


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["mean", "attention"])
@pytest.mark.parametrize("at_once", [False, True])
def test_long_and_short_clips_get_the_same_vector_in_every_batch(
    fusion: str, at_once: bool, short: Any, rng: np.random.Generator
) -> None:
    model = build_tiny_model(short, speech_config(), audio_fusion=fusion)
    texts = ["Huế", "", "tiếng sóng", "", "biển"]
    clips = [None, random_audio(rng, 1.3), random_audio(rng, 0.9), random_audio(rng, 0.1), random_audio(rng, 0.3)]
    images = [[], [], [random_image(rng)], [], []]

    def embed(order: list[int]) -> Tensor:
        columns = ([column[i] for i in order] for column in (images, texts, clips))
        images_of, texts_of, clips_of = columns
        batch = short(images=images_of, text=texts_of, audio=clips_of, return_tensors="pt")
        return model(**batch, all_windows_at_once=at_once).embeddings

    alone = torch.cat([embed([i]) for i in range(5)])
    assert (alone @ alone.T - torch.eye(5)).max() < 0.999
    for order in ([4, 3, 2, 1, 0], [1, 3], [2, 0, 4], [0, 1, 2, 3, 4]):
        assert (embed(order) - alone[order]).abs().max() <= 1e-5


@torch.no_grad()
def test_as_many_windows_pass_at_a_time_as_there_are_clips_or_all(
    short: Any, model: Any, rng: np.random.Generator
) -> None:
    seen: list[int] = []
    hook = model.audio_tower.register_forward_pre_hook(lambda _, given: seen.append(len(given[0].values)))
    long, two = random_audio(rng, 1.0), random_audio(rng, 0.5)
    for clips, options, expected in (
        ([long], {}, [1, 1, 1, 1]),
        ([long], {"all_windows_at_once": True}, [4]),
        ([two, long], {"divide": False}, [2, 2, 2]),
        ([random_audio(rng, 0.2)] * 3, {"divide": False}, [3]),
        ([random_audio(rng, 0.2)] * 3, {}, [1]),  # equal clips are encoded once
        ([two, long], {"all_windows_at_once": True}, [6]),
    ):
        seen.clear()
        model(**short(audio=clips, return_tensors="pt"), **options)
        assert seen == expected
    hook.remove()


@pytest.mark.parametrize("windows", [[1, 1], [4, 0], [5, -1]])
def test_windows_that_do_not_match_the_features_are_an_error(windows: list[int], short: Any, model: Any) -> None:
    clips = [random_audio(np.random.default_rng(0), 0.5)] * 2
    batch = short(audio=clips, return_tensors="pt")
    with pytest.raises(ValueError, match=r"`audio_windows` is .*but `audio_features` has 4"):
        model(**{**batch, "audio_windows": torch.tensor(windows)})


def test_windows_learn_the_same_one_by_one_and_at_once(short: Any, rng: np.random.Generator) -> None:
    model = build_tiny_model(short, speech_config()).train()
    batch = short(audio=[random_audio(rng, 0.6)], return_tensors="pt")
    found = []
    for at_once in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        vectors = model(**batch, all_windows_at_once=at_once).embeddings
        (vectors * torch.randn(vectors.shape)).sum().backward()
        found.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-4, msg=name)
