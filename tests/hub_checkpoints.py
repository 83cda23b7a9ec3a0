"""Checkpoints as the Hub has them: configurations, names and shapes of weights, files of every format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vipolyqwen.demo.tiny_base import QWEN2_VL_SPECIAL_TOKENS

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


def write_processor_files(folder: Path, tokenizer: Any) -> None:
    """The tokenizer's and the image processor's files as Qwen/Qwen2-VL-2B-Instruct has them."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", QWEN2_TOKENIZER)
    write_json(folder / "preprocessor_config.json", QWEN2_VL_PREPROCESSOR)
    write_json(folder / "chat_template.json", {"chat_template": "{{ raise_exception('not ours') }}"})
