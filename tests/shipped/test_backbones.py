"""`from_backbones`: the checkpoints as they lie on the Hub, key by key, into the right places or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import HUBERT_BASE_PARAMETERS, QWEN2_VL_2B_PARAMETERS, TEXTS, random_audio, random_image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, Qwen2VLConfig

from vipolyqwen.demo.tiny_base import QWEN2_VL_SPECIAL_TOKENS, train_tokenizer
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import TASK_PREFIXES
from vipolyqwen.training.build import build_model, build_processor

# config.json of Qwen/Qwen2-VL-2B-Instruct: the flat layout of 2024, which is still the Hub's.
QWEN2_VL_2B: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}

# config.json of facebook/hubert-base-ls960.
HUBERT_BASE: dict[str, Any] = {
    "architectures": ["HubertModel"],
    "model_type": "hubert",
    "activation_dropout": 0.1,
    "apply_spec_augment": True,
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "conv_bias": False,
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "do_stable_layer_norm": False,
    "eos_token_id": 2,
    "feat_extract_activation": "gelu",
    "feat_extract_dropout": 0.0,
    "feat_extract_norm": "group",
    "feat_proj_dropout": 0.1,
    "final_dropout": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "layerdrop": 0.1,
    "mask_feature_length": 10,
    "mask_feature_prob": 0.0,
    "mask_time_length": 10,
    "mask_time_prob": 0.05,
    "num_attention_heads": 12,
    "num_conv_pos_embedding_groups": 16,
    "num_conv_pos_embeddings": 128,
    "num_feat_extract_layers": 7,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "tokenizer_class": "Wav2Vec2CTCTokenizer",
    "transformers_version": "4.10.0.dev0",
    "vocab_size": 32,
}


def qwen2_vl_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight in a tied Qwen2-VL checkpoint on the Hub."""
    vision, width, inner = config["vision_config"], config["hidden_size"], config["intermediate_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    side, patch = vision["embed_dim"], vision["patch_size"]
    merged, mlp = side * vision["spatial_merge_size"] ** 2, side * vision["mlp_ratio"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
        "visual.patch_embed.proj.weight": (side, vision["in_chans"], vision["temporal_patch_size"], patch, patch),
        **layer("visual.merger.ln_q", side),
        **layer("visual.merger.mlp.0", merged, merged),
        **layer("visual.merger.mlp.2", vision["hidden_size"], merged),
    }
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        shapes |= layer(f"{name}.self_attn.q_proj", width, width) | layer(f"{name}.self_attn.k_proj", keys, width)
        shapes |= layer(f"{name}.self_attn.v_proj", keys, width)
        shapes |= {
            f"{name}.self_attn.o_proj.weight": (width, width),
            f"{name}.mlp.gate_proj.weight": (inner, width),
            f"{name}.mlp.up_proj.weight": (inner, width),
            f"{name}.mlp.down_proj.weight": (width, inner),
            f"{name}.input_layernorm.weight": (width,),
            f"{name}.post_attention_layernorm.weight": (width,),
        }
    for i in range(vision["depth"]):
        name = f"visual.blocks.{i}"
        shapes |= layer(f"{name}.norm1", side) | layer(f"{name}.norm2", side)
        shapes |= layer(f"{name}.attn.qkv", 3 * side, side) | layer(f"{name}.attn.proj", side, side)
        shapes |= layer(f"{name}.mlp.fc1", mlp, side) | layer(f"{name}.mlp.fc2", side, mlp)
    return shapes


def speech_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight in a HuBERT, wav2vec 2.0 or WavLM checkpoint of the base design on the Hub."""
    width, channels, kernels = config["hidden_size"], [1, *config["conv_dim"]], config["conv_kernel"]
    conv = "encoder.pos_conv_embed.conv"
    shapes: dict[str, tuple[int, ...]] = {
        "masked_spec_embed": (width,),
        f"{conv}.bias": (width,),
        f"{conv}.weight_g": (1, 1, config["num_conv_pos_embeddings"]),
        f"{conv}.weight_v": (
            width,
            width // config["num_conv_pos_embedding_groups"],
            config["num_conv_pos_embeddings"],
        ),
        **layer("feature_extractor.conv_layers.0.layer_norm", channels[1]),
        **layer("feature_projection.layer_norm", channels[-1]),
        **layer("feature_projection.projection", width, channels[-1]),
        **layer("encoder.layer_norm", width),
    }
    for i, kernel in enumerate(kernels):
        shapes[f"feature_extractor.conv_layers.{i}.conv.weight"] = (channels[i + 1], channels[i], kernel)
    for i in range(config["num_hidden_layers"]):
        name = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= layer(f"{name}.attention.{part}", width, width)
        shapes |= layer(f"{name}.layer_norm", width) | layer(f"{name}.final_layer_norm", width)
        shapes |= layer(f"{name}.feed_forward.intermediate_dense", config["intermediate_size"], width)
        shapes |= layer(f"{name}.feed_forward.output_dense", width, config["intermediate_size"])
        if config["model_type"] == "wavlm":  # gated relative position bias
            heads = config["num_attention_heads"]
            shapes |= layer(f"{name}.attention.gru_rel_pos_linear", 8, width // heads)
            shapes[f"{name}.attention.gru_rel_pos_const"] = (1, heads, 1, 1)
            if i == 0:
                shapes[f"{name}.attention.rel_attn_embed.weight"] = (config["num_buckets"], heads)
    return shapes


def layer(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """A layer with a weight of `shape` and a bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def our_name(name: str) -> str:
    """The parameter of `ViPolyQwenModel` in which a weight of the Hub's checkpoints ends."""
    if name.startswith("visual."):
        return f"vlm.{name}"
    if name.startswith("model."):
        return f"vlm.language_model.{name.removeprefix('model.')}"
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):  # torch's weight norm of before and since
        name = name.replace(f"pos_conv_embed.conv.{old}", f"pos_conv_embed.conv.parametrizations.weight.{new}")
    return f"audio_tower.{name}"


def new_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parts that no backbone has."""
    config, shapes = model.config, {}
    for route, width in (("", config.text_config.hidden_size), ("audio_", config.audio_config.hidden_size)):
        shapes[f"{route}pooling.query"] = (width,)
        shapes[f"{route}projection.dense.weight"] = (config.projection_dim, width)
        shapes |= layer(f"{route}projection.norm", config.projection_dim)
    return shapes


# --- full size ---------------------------------------------------------------------------------------------------


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


# --- tiny checkpoints in the Hub's layouts -----------------------------------------------------------------------

TINY_SPEECH = {
    "conv_dim": [16, 32, 32],
    "conv_kernel": [40, 8, 4],
    "conv_stride": [20, 4, 4],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 16,
    "num_feat_extract_layers": 3,
    "num_hidden_layers": 2,
}
SPEECH: dict[str, dict[str, Any]] = {
    "hubert": {**HUBERT_BASE, **TINY_SPEECH},
    "wav2vec2": {**HUBERT_BASE, **TINY_SPEECH, "model_type": "wav2vec2", "architectures": ["Wav2Vec2Model"]},
    "wavlm": {
        **{**HUBERT_BASE, **TINY_SPEECH, "model_type": "wavlm", "architectures": ["WavLMModel"]},
        **{"num_buckets": 32, "max_bucket_distance": 80},
    },
}
HUBERT_PREPROCESSOR = {
    "do_normalize": True,
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0,
    "return_attention_mask": False,
    "sampling_rate": 16000,
}
QWEN2_VL_PREPROCESSOR = {
    "min_pixels": 56 * 56,
    "max_pixels": 112 * 112,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
QWEN2_TOKENIZER = {
    "add_prefix_space": False,
    "additional_special_tokens": QWEN2_VL_SPECIAL_TOKENS,
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "model_max_length": 32768,
    "pad_token": "<|endoftext|>",
    "padding_side": "left",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}


def random_weights(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (0.1 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def save_safetensors(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_shards(folder: Path, weights: dict[str, Tensor], count: int = 2) -> None:
    names = sorted(weights)
    files = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: weights[name] for name in names if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(weight.nbytes for weight in weights.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": files})


def save_bin(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


Save = Callable[[Path, dict[str, Tensor]], None]


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


# --- the processor -----------------------------------------------------------------------------------------------


def write_processor_files(folder: Path, tokenizer: Any) -> None:
    """The tokenizer's and the image processor's files as Qwen/Qwen2-VL-2B-Instruct has them."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", QWEN2_TOKENIZER)
    write_json(folder / "preprocessor_config.json", QWEN2_VL_PREPROCESSOR)
    write_json(folder / "chat_template.json", {"chat_template": "{{ raise_exception('not ours') }}"})


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
