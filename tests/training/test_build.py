"""`build_model` and `build_processor`: every key of the Hub's checkpoints in its place, or an error with its name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import HUBERT_BASE_PARAMETERS, QWEN2_VL_2B_PARAMETERS, TEXTS, random_audio, random_image
from hub_checkpoints import (
    HUBERT_BASE,
    HUBERT_PREPROCESSOR,
    QWEN2_VL_2B,
    QWEN2_VL_PREPROCESSOR,
    SPEECH,
    Save,
    new_shapes,
    our_name,
    qwen2_vl_shapes,
    random_weights,
    save_bin,
    save_safetensors,
    save_shards,
    speech_shapes,
    write_json,
    write_processor_files,
)
from torch import Tensor
from transformers import AutoConfig, Qwen2VLConfig

from vipolyqwen.demo.tiny_base import QWEN2_VL_SPECIAL_TOKENS, train_tokenizer
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import TASK_PREFIXES
from vipolyqwen.training.build import build_model, build_processor

# Full size


def test_the_full_size_model_has_exactly_the_weights_of_the_two_checkpoints(capsys: pytest.CaptureFixture) -> None:
    with torch.device("meta"):
        model = build_model(AutoConfig.for_model(**QWEN2_VL_2B), AutoConfig.for_model(**HUBERT_BASE))
    vlm, audio = qwen2_vl_shapes(QWEN2_VL_2B), speech_shapes(HUBERT_BASE)
    expected = {our_name(name): shape for name, shape in (vlm | audio).items()} | new_shapes(model)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == expected

    def count(shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(int(np.prod(shape)) for shape in shapes.values())

    assert (count(vlm), count(audio)) == (QWEN2_VL_2B_PARAMETERS, HUBERT_BASE_PARAMETERS)
    assert count(new_shapes(model)) == 1536 + 1536 * 1024 + 2 * 1024 + 768 + 768 * 1024 + 2 * 1024
    with capsys.disabled():
        total = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"\nfull size: {total:,} parameters = Qwen2-VL {count(vlm):,} + HuBERT {count(audio):,} "
            f"+ new {count(new_shapes(model)):,}"
        )
        assert total == count(expected)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS * 4, 400)


@pytest.fixture(scope="module")
def vlm_json(tokenizer: Any) -> dict[str, Any]:
    """A tiny Qwen2-VL's config.json in the flat layout."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN2_VL_SPECIAL_TOKENS}
    return {
        **QWEN2_VL_2B,
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_window_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 64},
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {
            **QWEN2_VL_2B["vision_config"],
            **{"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
        },
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "eos_token_id": ids["<|im_end|>"],
    }


@pytest.fixture
def write_vlm(tmp_path: Path, vlm_json: dict[str, Any]) -> Callable:
    """Writes a tiny Qwen2-VL checkpoint and returns its folder and its weights, bfloat16 as on the Hub."""

    def write(save: Save = save_safetensors, change: Callable | None = None) -> tuple[Path, dict[str, Tensor]]:
        folder = tmp_path / "vlm"
        folder.mkdir()
        weights = random_weights(qwen2_vl_shapes(vlm_json), torch.bfloat16)
        if change is not None:
            change(weights)
        write_json(folder / "config.json", vlm_json)
        save(folder, weights)
        return folder, weights

    return write


@pytest.fixture
def write_audio(tmp_path: Path) -> Callable:
    """Writes a tiny speech checkpoint and returns its folder and its weights."""

    def write(
        kind: str = "hubert", save: Save = save_safetensors, change: Callable | None = None
    ) -> tuple[Path, dict[str, Tensor]]:
        folder = tmp_path / "audio"
        folder.mkdir()
        weights = random_weights(speech_shapes(SPEECH[kind]), torch.float32, seed=1)
        if change is not None:
            change(weights)
        write_json(folder / "config.json", SPEECH[kind])
        write_json(folder / "preprocessor_config.json", HUBERT_PREPROCESSOR)
        save(folder, weights)
        return folder, weights

    return write


def assert_arrived(model: Any, *checkpoints: dict[str, Tensor]) -> None:
    """Every weight is in its place, and every parameter that is not new came from a checkpoint."""
    parameters, seen = dict(model.named_parameters()), set()
    for weights in checkpoints:
        for name, weight in weights.items():
            arrived = parameters[our_name(name)]
            assert arrived.dtype == torch.float32
            assert torch.equal(arrived, weight.float()), name
            seen.add(our_name(name))
    new = ("pooling.", "projection.", "audio_pooling.", "audio_projection.")
    assert {name for name in parameters if not name.startswith(new)} == seen


@pytest.mark.parametrize("save", [save_safetensors, save_shards, save_bin])
def test_qwen2_vl_in_the_layout_of_the_hub_arrives_weight_by_weight(save: Save, write_vlm: Callable) -> None:
    folder, weights = write_vlm(save)
    model = build_model(folder)
    assert_arrived(model, weights)
    text = model.config.text_config
    assert (text.hidden_size, text.rope_parameters["mrope_section"]) == (64, [2, 3, 3])
    assert text.rope_parameters["rope_theta"] == 1000000.0
    assert text.rms_norm_eps == 1e-6


@pytest.mark.parametrize("save", [save_safetensors, save_bin])
@pytest.mark.parametrize("kind", list(SPEECH))
def test_a_speech_encoder_in_the_layout_of_the_hub_arrives_weight_by_weight(
    kind: str, save: Save, write_vlm: Callable, write_audio: Callable
) -> None:
    vlm, vlm_weights = write_vlm()
    audio, audio_weights = write_audio(kind, save)
    model = build_model(vlm, str(audio))
    assert_arrived(model, vlm_weights, audio_weights)
    for config in (model.config.audio_config, model.audio_tower.config):
        assert (config.model_type, config.apply_spec_augment, config.layerdrop) == (kind, False, 0.0)


def test_the_parts_of_a_model_from_checkpoints_share_one_configuration(
    write_vlm: Callable, write_audio: Callable
) -> None:
    model = build_model(write_vlm()[0], write_audio()[0], attn_implementation="eager")
    assert model.audio_tower.config is model.config.audio_config
    assert model.vlm.language_model.config is model.config.text_config
    assert model.vlm.visual.config is model.config.vision_config
    assert {module.config._attn_implementation for module in model.modules() if "config" in vars(module)} == {"eager"}


def test_a_model_from_checkpoints_saves_and_loads_and_has_new_parts_of_the_right_size(
    write_vlm: Callable, write_audio: Callable, tmp_path: Path
) -> None:
    model = build_model(write_vlm()[0], write_audio()[0], projection_dim=48, pooling="attention", audio_fusion="audio")
    assert (model.config.projection_dim, model.config.audio_fusion) == (48, "audio")
    assert {name: tuple(model.get_parameter(name).shape) for name in new_shapes(model)} == new_shapes(model)
    assert 0.01 < model.pooling.query.std().item() < 0.03
    model.save_pretrained(tmp_path / "saved")
    loaded = ViPolyQwenModel.from_pretrained(tmp_path / "saved")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_the_dtype_is_what_was_asked_for(write_vlm: Callable, write_audio: Callable) -> None:
    model = build_model(write_vlm()[0], write_audio()[0], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16


def drop(name: str) -> Callable:
    return lambda weights: weights.pop(name)


def add(name: str) -> Callable:
    return lambda weights: weights.update({name: torch.zeros(3)})


def reshape(name: str) -> Callable:
    return lambda weights: weights.update({name: torch.cat([weights[name], weights[name]])})


VLM_FAULTS = [
    (drop("model.layers.1.mlp.up_proj.weight"), ["missing", "layers.1.mlp.up_proj.weight"]),
    (drop("model.embed_tokens.weight"), ["missing", "embed_tokens.weight"]),
    (drop("visual.merger.mlp.2.bias"), ["missing", "visual.merger.mlp.2.bias"]),
    (add("model.layers.2.mlp.up_proj.weight"), ["unexpected", "layers.2.mlp.up_proj.weight"]),
    (add("visual.blocks.0.attn.extra"), ["unexpected", "visual.blocks.0.attn.extra"]),
    (reshape("model.norm.weight"), ["mismatched", "norm.weight", "128", "64"]),
    (reshape("visual.blocks.1.mlp.fc1.weight"), ["mismatched", "visual.blocks.1.mlp.fc1.weight"]),
]
AUDIO_FAULTS = [
    (drop("encoder.layers.1.attention.q_proj.bias"), ["missing", "encoder.layers.1.attention.q_proj.bias"]),
    (drop("encoder.pos_conv_embed.conv.weight_g"), ["missing", "encoder.pos_conv_embed.conv"]),
    (drop("feature_extractor.conv_layers.0.conv.weight"), ["missing", "feature_extractor.conv_layers.0.conv.weight"]),
    (add("encoder.layers.2.layer_norm.weight"), ["unexpected", "encoder.layers.2.layer_norm.weight"]),
    (reshape("feature_projection.projection.weight"), ["mismatched", "feature_projection.projection.weight"]),
]


@pytest.mark.parametrize("save", [save_safetensors, save_shards])
@pytest.mark.parametrize(("fault", "words"), VLM_FAULTS)
def test_a_fault_in_the_qwen2_vl_checkpoint_is_an_error_that_lists_the_keys(
    fault: Callable, words: list[str], save: Save, write_vlm: Callable
) -> None:
    folder, _ = write_vlm(save, fault)
    with pytest.raises(ValueError) as error:
        build_model(folder)
    assert all(word in str(error.value) for word in [str(folder), *words])


@pytest.mark.parametrize("save", [save_safetensors, save_bin])
@pytest.mark.parametrize(("fault", "words"), AUDIO_FAULTS)
def test_a_fault_in_the_speech_checkpoint_is_an_error_that_lists_the_keys(
    fault: Callable, words: list[str], save: Save, write_vlm: Callable, write_audio: Callable
) -> None:
    folder, _ = write_audio("hubert", save, fault)
    with pytest.raises(ValueError) as error:
        build_model(write_vlm()[0], folder)
    assert all(word in str(error.value) for word in [str(folder), *words])


def test_every_missing_key_is_listed(write_vlm: Callable) -> None:
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("up", "down", "gate")]

    def fault(weights: dict[str, Tensor]) -> None:
        for name in names:
            del weights[name]

    folder, _ = write_vlm(save_safetensors, fault)
    with pytest.raises(ValueError) as error:
        build_model(folder)
    assert all(name.removeprefix("model.") in str(error.value) for name in names)


def test_a_checkpoint_of_another_architecture_is_refused(write_vlm: Callable, write_audio: Callable) -> None:
    vlm, audio = write_vlm()[0], write_audio()[0]
    with pytest.raises(ValueError, match="hubert|Hubert"):
        build_model(audio)
    with pytest.raises(ValueError, match="Qwen2VL|qwen2_vl"):
        build_model(vlm, vlm)


def test_a_wav2vec2_checkpoint_of_pretraining_names_its_heads(write_vlm: Callable, write_audio: Callable) -> None:
    """facebook/wav2vec2-base keeps its backbone under `wav2vec2.` and the pretraining heads beside it."""

    def prefix(weights: dict[str, Tensor]) -> None:
        backbone = {f"wav2vec2.{name}": weight for name, weight in weights.items()}
        weights.clear()
        weights.update(backbone)

    folder, weights = write_audio("wav2vec2", save_safetensors, prefix)
    model = build_model(write_vlm()[0], folder)
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(our_name(name.removeprefix("wav2vec2."))), weight)
    weights |= {"project_hid.weight": torch.zeros(4, 32), "quantizer.codevectors": torch.zeros(1, 8, 4)}
    save_safetensors(folder, weights)
    with pytest.raises(ValueError, match=r"unexpected keys: project_hid\.weight, quantizer\.codevectors"):
        build_model(folder.parent / "vlm", folder)


# The processor


def test_the_processor_of_the_backbones_feeds_their_model(
    write_vlm: Callable, write_audio: Callable, tokenizer: Any, rng: np.random.Generator
) -> None:
    vlm, audio = write_vlm()[0], write_audio()[0]
    write_processor_files(vlm, tokenizer)
    processor = build_processor(vlm, audio)
    model = build_model(vlm, audio).eval()
    assert processor.task_prefixes == TASK_PREFIXES
    assert processor.tokenizer.model_max_length == 8192
    assert processor.min_audio_samples == 40 + 7 * 20 + 3 * 4 * 20  # one frame of the tiny convolutional stack
    assert processor.feature_extractor.sampling_rate == 16000
    ids = processor.tokenizer.convert_tokens_to_ids(list(TASK_PREFIXES.values()))
    assert ids == list(range(len(tokenizer), len(tokenizer) + 6))
    assert max(ids) < model.get_input_embeddings().num_embeddings  # the padded table has room for them

    image, sound = random_image(rng, 400, 300), random_audio(rng, 0.2)
    rows = [{"text": "Huế"}, {"text": "biển", "images": [image]}, {"text": "", "audio": sound}]
    batch = processor(
        text=[row["text"] for row in rows],
        images=[row.get("images") for row in rows],
        audio=[row.get("audio") for row in rows],
        task=["instr", "ocr", None],
        return_tensors="pt",
    )
    pixels = batch["image_grid_thw"].prod().item() * 14 * 14
    assert pixels <= QWEN2_VL_PREPROCESSOR["max_pixels"]
    with torch.no_grad():
        assert model(**batch).embeddings.norm(dim=-1).tolist() == pytest.approx([1.0] * 3)


def test_a_frame_of_the_real_hubert_needs_400_samples(write_vlm: Callable, tokenizer: Any, tmp_path: Path) -> None:
    vlm, audio = write_vlm()[0], tmp_path / "audio"
    write_processor_files(vlm, tokenizer)
    audio.mkdir()
    write_json(audio / "config.json", HUBERT_BASE)
    write_json(audio / "preprocessor_config.json", HUBERT_PREPROCESSOR)
    assert build_processor(vlm, audio).min_audio_samples == 400


def test_the_flat_configuration_equals_the_nested_one(vlm_json: dict[str, Any]) -> None:
    flat = AutoConfig.for_model(**vlm_json)
    nested = Qwen2VLConfig.from_dict(flat.to_dict())
    assert nested.text_config.to_dict() == flat.text_config.to_dict()
    for config in (flat, nested):
        model_config = build_model(config).config
        assert model_config.text_config.num_key_value_heads == 2
        assert model_config.vision_config.embed_dim == 32
