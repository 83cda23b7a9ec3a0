"""What the real sizes take: parameters, memory, and the GPU hours of a million pairs, computed and not measured.

    python benchmarks/sizes.py [--gpu H100] [--mfu 0.4]

Models are built on the meta device, so that no weights are allocated. Memory is that of the weights (embedding,
bfloat16), or of weights, gradients and AdamW's moments (training: 16 bytes for each trained parameter, 2 for each
frozen one); activations come on top. Hours are the FLOPs of a training step (`full_size.py`) over the datasheet's peak
times the assumed MFU; `full_size.py` measures the MFU of a GPU. Writes benchmarks/results/sizes.json and sizes.md.
"""

import argparse
from typing import Any

import torch
from full_size import PEAKS, TEXT_BESIDE_AN_IMAGE, Point, full_size_configs, step_flops
from peft import LoraConfig, get_peft_model
from result_files import RESULTS, write_result
from transformers import HubertConfig, PreTrainedConfig, Qwen2VLConfig

from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.training.build import build_model
from vipolyqwen.training.parts import new_parts

TEXT = Point(1, length=128)
ANSWER = Point(1, length=32)
PAIRS = {  # both sides
    "text: 128 and 128 tokens": (TEXT, TEXT),
    "image: 448 × 448 with 32 tokens, and 32 tokens": (Point(1, TEXT_BESIDE_AN_IMAGE, image_side=448), ANSWER),
    "audio: 10 s, and 32 tokens": (Point(1, audio_seconds=10), ANSWER),
}
MILLION, HOUR, GIB = 10**6, 3600, 2**30
LORA = LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model\.layers\..*_proj")


def main(argv: list[str] | None = None) -> None:
    """Computes the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=PEAKS, default="H100")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak that training reaches")
    options = parser.parse_args(argv)
    if not 0 < options.mfu <= 1:
        parser.error(f"--mfu is {options.mfu}; choose one above 0 and at most 1.")
    rows = [describe(name, configs, PEAKS[options.gpu] * options.mfu) for name, configs in sizes().items()]
    write_result("sizes", {}, table=rows, computed=True, settings=vars(options))
    (RESULTS / "sizes.md").write_text(as_markdown(rows, options.gpu, options.mfu), encoding="utf-8")


def sizes() -> dict[str, tuple[PreTrainedConfig, PreTrainedConfig]]:
    """Returns name -> configurations of the backbones."""
    small = full_size_configs()
    large_audio = HubertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
    )
    text = small[0].text_config.to_dict() | {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    vision = small[0].vision_config.to_dict() | {"hidden_size": 3584}
    large = Qwen2VLConfig(text_config=text, vision_config=vision)
    return {"Qwen2-VL-2B + HuBERT base": small, "Qwen2-VL-7B + HuBERT large": (large, large_audio)}


def describe(name: str, configs: tuple[PreTrainedConfig, PreTrainedConfig], flops: float) -> dict[str, Any]:
    """Returns a row of the table.

    Args:
        name: of the backbones.
        configs: their configurations.
        flops: FLOPs a second that training reaches.
    """
    with torch.device("meta"):
        model = build_model(*configs)
    parameters = model.num_parameters()
    hours = {
        mode: {
            pair: round(MILLION * sum(step_flops(mode, model, side) for side in sides) / flops / HOUR, 1)
            for pair, sides in PAIRS.items()
        }
        for mode in ("full", "lora")
    }
    trained = lora_parameters(model)  # changes the model, so it comes last
    memory = {
        "embed": 2 * parameters,
        "full": 16 * parameters,
        "lora": 2 * (parameters - trained[1]) + 16 * sum(trained),
    }
    return {
        "model": name,
        "parameters": parameters,
        "gib": {mode: round(size / GIB, 1) for mode, size in memory.items()},
        "gpu_hours_of_a_million_pairs": hours,
    }


def lora_parameters(model: ViPolyQwenModel) -> tuple[int, int]:
    """Returns parameters of the adapters, and of the new parts, which train in full beside them."""
    new = sum(parameter.numel() for part in new_parts(model) for parameter in model.get_submodule(part).parameters())
    with torch.device("meta"):
        wrapped = get_peft_model(model, LORA)
    return sum(value.numel() for name, value in wrapped.named_parameters() if "lora_" in name), new


def as_markdown(rows: list[dict[str, Any]], gpu: str, mfu: float) -> str:
    """Returns the page."""
    lines = [
        f"Computed by `python benchmarks/sizes.py --gpu {gpu} --mfu {mfu}`, not measured. Memory is without",
        f"activations; hours are of one {gpu} at {mfu:.0%} of its peak. LoRA has rank 16 on every linear layer of the",
        "language model.",
        "",
        "| model | parameters | embed | train | train with LoRA |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        gib = " | ".join(f"{row['gib'][mode]} GiB" for mode in ("embed", "full", "lora"))
        lines.append(f"| {row['model']} | {row['parameters'] / 1e9:.2f} G | {gib} |")
    lines += ["", "| GPU hours of a million pairs | train | train with LoRA |", "|---|---|---|"]
    for row in rows:
        hours = row["gpu_hours_of_a_million_pairs"]
        lines += [f"| {row['model']}, {pair} | {hours['full'][pair]} | {hours['lora'][pair]} |" for pair in PAIRS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
