"""The speech encoder: the stock vectors without padding, and the same ones with it."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_tiny_model, random_audio, shake, speech_config
from transformers import AutoConfig, AutoModel

from vipolyqwen.audio_vipolyqwen import PaddedAudio, PaddingInvariantFeatureEncoder, receptive_field
from vipolyqwen.configuration_vipolyqwen import ViPolyQwenConfig
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel


@pytest.mark.parametrize(("kind", "norm"), product(["hubert", "wav2vec2", "wavlm"], ["group", "layer"]))
@torch.no_grad()
def test_a_single_clip_goes_through_the_speech_encoder_as_through_the_stock_one(kind: str, norm: str) -> None:
    torch.manual_seed(0)
    tower = shake(AutoModel.from_config(speech_config(kind, norm))).eval()
    clip, longer = torch.randn(1, 5000), torch.zeros(1, 8000)
    longer[:, :5000] = clip
    stock = tower(clip).last_hidden_state
    tower.feature_extractor = PaddingInvariantFeatureEncoder(tower.feature_extractor)
    ours = tower(PaddedAudio(clip, torch.tensor([5000])), attention_mask=torch.ones(1, 5000)).last_hidden_state
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    padded = tower(PaddedAudio(longer, torch.tensor([5000])), attention_mask=(longer != 0).long()).last_hidden_state
    torch.testing.assert_close(padded[:, : stock.shape[1]], stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("unispeech", {}),
        ("unispeech-sat", {}),
        ("data2vec-audio", {"feat_extract_norm": "layer"}),
        ("sew", {}),
        ("wav2vec2-conformer", {}),
        ("hubert", {"conv_pos_batch_norm": True}),
        ("wav2vec2", {"add_adapter": True, "output_hidden_size": 48}),
        ("wavlm", {"add_adapter": True}),
    ],
)
def test_any_other_speech_encoder_is_blind_to_padding_or_refused(
    kind: str, fields: dict, processor: Any, rng: np.random.Generator
) -> None:
    try:
        model = build_tiny_model(processor, speech_config(kind, **fields))
    except ValueError as error:
        assert kind in str(error)
        return
    clips = [random_audio(rng, seconds) for seconds in (0.31, 0.5, 0.13)]
    with torch.no_grad():
        together, *alone = (
            model(**processor(audio=given, return_tensors="pt")).embeddings for given in (clips, *([c] for c in clips))
        )
    assert (together - torch.cat(alone)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["whisper", "bert"])
def test_a_model_that_takes_no_waveforms_is_refused_as_speech_encoder(kind: str, processor: Any) -> None:
    audio_config = AutoConfig.for_model(kind)
    with torch.device("meta"), pytest.raises(ValueError, match="use a speech encoder such as hubert"):
        ViPolyQwenModel(ViPolyQwenConfig(audio_config=audio_config))


def test_a_speech_encoder_with_one_attention_only_keeps_it(processor: Any, tmp_path: Path) -> None:
    model = build_tiny_model(processor, speech_config("wavlm"), attn="sdpa")  # WavLM has eager attention only
    model.save_pretrained(tmp_path)
    for built in (model, ViPolyQwenModel.from_pretrained(tmp_path, attn_implementation="sdpa")):
        assert built.vlm.language_model.config._attn_implementation == "sdpa"
        assert built.vlm.visual.config._attn_implementation == "sdpa"
        assert built.audio_tower.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("kernels", "strides", "samples"),
    [
        ([10, 3], [5, 2], 20),  # 10 + 5 · (3 - 1)
        ([10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2], 400),  # HuBERT-base
    ],
)
def test_the_receptive_field_is_the_fewest_samples_that_give_a_frame(
    kernels: list[int], strides: list[int], samples: int
) -> None:
    count = len(kernels)
    config = speech_config(
        conv_kernel=kernels, conv_stride=strides, conv_dim=[32] * count, num_feat_extract_layers=count
    )
    tower = AutoModel.from_config(config).eval()
    assert receptive_field(config) == samples
    assert tower(torch.randn(1, samples)).last_hidden_state.shape[1] == 1
    assert tower._get_feat_extract_output_lengths(torch.tensor([samples - 1])).item() == 0
