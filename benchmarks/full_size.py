"""Speed and memory of the real size, Qwen2-VL-2B and HuBERT-base with random weights, on the available device.

    python benchmarks/full_size.py [--tokens 16384] [--lengths 128 512 2048 8192] [--image_sides 448 1120]
                                   [--audio_seconds 10] [--modes encode full lora] [--layers N] [--repeats 5]

A point of the table is one forward of as many equal rows as fit into `--tokens` (encode), or a training step of them:
symmetric InfoNCE between two halves, backward, AdamW, for all weights (full) or for LoRA of rank 16 on every linear
layer of the language model and the new parts (lora). On a CPU use `--layers 2 --tokens 512 --lengths 128 512`.

MFU is the model's FLOPs a second over the device's peak. FLOPs (`forward_flops`) are 2 for each weight of a linear
layer and token, and 4 · length² · width for the attention of a layer, nothing off for causality. A step of training
counts as 3 forwards; with LoRA 2 of the language model (no gradients of frozen weights) and 1 of the other towers.
Work done twice by gradient checkpointing does not count, nor do adapters, norms and activations. The peak is
the datasheet's (dense bfloat16), or measured with a large matrix product on other devices. Writes
benchmarks/results/full_size.json; on a CPU its claims do not apply.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from result_files import claim, write_result
from torch import nn
from torch.nn import functional as F
from transformers import HubertConfig, Qwen2VLConfig

from vipolyqwen.evaluation.memory import peak_memory, reset_peaks
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.packing_vipolyqwen import choose_attn_implementation
from vipolyqwen.training.build import build_model
from vipolyqwen.training.parts import new_parts

# Dense bfloat16 (float16 before Ampere), FLOPs a second, from NVIDIA's datasheets; the first name that fits counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
BARS = {"encode": 0.6, "full": 0.5, "lora": 0.5}
PARTS = ("language", "vision", "patches", "audio", "new")
FORWARDS = {  # that a step counts as: a backward takes one for the gradients of inputs and one for those of weights
    "encode": dict.fromkeys(PARTS, 1),
    "full": dict.fromkeys(PARTS, 3) | {"patches": 2},  # pixels need no gradient
    "lora": dict.fromkeys(PARTS, 1) | {"language": 2, "new": 3},
}
TEXT_BESIDE_AN_IMAGE = 32  # tokens
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Point:
    """Equal rows of one kind: text of a length, an image of a side with a short text, or a sound."""

    rows: int
    length: int = 0
    image_side: int = 0  # pixels, a multiple of 28
    audio_seconds: int = 0

    def name(self) -> str:
        """What the rows are."""
        if self.audio_seconds:
            return f"sounds of {self.audio_seconds} s"
        if self.image_side:
            return f"images of {self.image_side} x {self.image_side}"
        return f"texts of {self.length} tokens"

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_side // 14) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of a row in the language model; a token is four patches."""
        return self.length + self.patches // 4 + (2 if self.image_side else 0)


def main(argv: list[str] | None = None) -> None:
    """Builds the model once for each mode, measures every point and writes the claims."""
    options = read_options(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    peak, source = peak_flops(device, dtype)
    configs = full_size_configs(options.layers)
    tables = {mode: measure_mode(mode, configs, device, dtype, peak, options) for mode in options.modes}
    write_result(
        "full_size",
        {f"best_mfu_{mode}": best_mfu(rows, BARS[mode], device) for mode, rows in tables.items()},
        table=tables,
        peak_flops_per_second=peak,
        peak_from=source,
        settings=vars(options),
    )


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens (or frames of sound) of one forward")
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512, 2048, 8192])
    parser.add_argument("--image_sides", type=int, nargs="*", default=[448, 1120], help="pixels, multiples of 28")
    parser.add_argument("--audio_seconds", type=int, nargs="*", default=[10])
    parser.add_argument("--modes", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--layers", type=int, help="most layers of each tower; default: all of them")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(argv)


def full_size_configs(layers: int | None = None) -> tuple[Qwen2VLConfig, HubertConfig]:
    """Qwen/Qwen2-VL-2B-Instruct and facebook/hubert-base-ls960, with at most `layers` layers in each tower."""
    text, vision, audio = (min(depth, layers or depth) for depth in (28, 32, 12))
    vlm = Qwen2VLConfig(
        text_config={
            "vocab_size": 151_936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": text,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": vision, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
    )
    return vlm, HubertConfig(num_hidden_layers=audio)


def points(options: argparse.Namespace, tower: nn.Module) -> list[Point]:
    """The rows of the table; the speech encoder says how many frames a sound has."""
    kinds = [Point(1, length=length) for length in options.lengths]
    kinds += [Point(1, length=TEXT_BESIDE_AN_IMAGE, image_side=side) for side in options.image_sides]
    kinds += [Point(1, audio_seconds=seconds) for seconds in options.audio_seconds]
    frames = tower._get_feat_extract_output_lengths
    sizes = [kind.tokens or int(frames(kind.audio_seconds * 16_000)) for kind in kinds]
    rows = [max(options.tokens // size // 2, 1) * 2 for size in sizes]  # even, for the two halves
    return [
        Point(count, kind.length, kind.image_side, kind.audio_seconds) for count, kind in zip(rows, kinds, strict=True)
    ]


def measure_mode(
    mode: str,
    configs: tuple[Qwen2VLConfig, HubertConfig],
    device: torch.device,
    dtype: torch.dtype,
    peak: float,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for every point; where memory does not suffice it says so."""
    with device:
        model = build_model(*configs, dtype=dtype, attn_implementation=choose_attn_implementation(dtype, device.type))
    take = stepper(model, mode, options.gradient_checkpointing)
    rows = []
    for point in points(options, model.audio_tower):
        frames = model.audio_tower._get_feat_extract_output_lengths(point.audio_seconds * 16_000)
        tokens = point.tokens or int(frames)
        row = {"what": point.name(), "rows": point.rows, "tokens_a_row": tokens}
        try:
            row |= measure(take, make_batch(point, model, device, dtype), device, options.repeats)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            row["out_of_memory"] = str(error).splitlines()[0]
        else:
            flops = step_flops(mode, model, point)
            row |= {
                "samples_per_second": round(point.rows / row["seconds"], 3),
                "tokens_per_second": round(point.rows * tokens / row["seconds"], 1),
                "tera_flops": round(flops / 1e12, 4),
                "mfu": round(flops / row["seconds"] / peak, 4),
            }
        print(mode, json.dumps(row), flush=True)
        rows.append(row)
        free(device)
    del take, model
    free(device)
    return rows


def stepper(model: ViPolyQwenModel, mode: str, checkpointing: bool) -> Callable[[dict[str, torch.Tensor]], None]:
    """What is done with a batch: a forward, or a step of training."""
    if mode == "encode":
        model.eval()
        return torch.no_grad()(lambda batch: model(**batch))
    if mode == "lora":
        layers = r".*language_model\.layers\..*_proj"
        wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=layers))
        for name in new_parts(model):
            model.get_submodule(name).requires_grad_(True)
    else:
        wrapped = model
    wrapped.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def take(batch: dict[str, torch.Tensor]) -> None:
        try:
            a, b = wrapped(**batch).embeddings.chunk(2)
            logits = a @ b.T / TEMPERATURE
            targets = torch.arange(len(a), device=a.device)
            (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)).backward()
            optimizer.step()
        finally:
            optimizer.zero_grad(set_to_none=True)

    return take


def make_batch(
    point: Point, model: ViPolyQwenModel, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Random inputs of a point."""
    generator = torch.Generator().manual_seed(0)
    if point.audio_seconds:
        sound = torch.randn(point.rows, point.audio_seconds * 16_000, generator=generator)
        return {"audio_features": sound.to(device, dtype)}
    config = model.config
    ids = torch.randint(10, config.text_config.vocab_size // 2, (point.rows, point.tokens), generator=generator)
    batch = {}
    if point.image_side:
        ids[:, 0] = config.vision_start_token_id
        ids[:, 1 : 1 + point.patches // 4] = config.image_token_id
        side = point.image_side // 14
        batch["image_grid_thw"] = torch.tensor([[1, side, side]] * point.rows, device=device)
        values = model.vlm.visual.patch_embed.proj.weight[0].numel()
        pixels = torch.randn(point.rows * point.patches, values, generator=generator)
        batch["pixel_values"] = pixels.to(device, dtype)
    return batch | {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def measure(
    take: Callable[[dict[str, torch.Tensor]], None],
    batch: dict[str, torch.Tensor],
    device: torch.device,
    repeats: int,
) -> dict[str, float]:
    """Median seconds of a step after one that does not count, and the most memory that was taken."""
    seconds = []
    reset_peaks()
    for repeat in range(repeats + 1):
        started = now(device)
        take(batch)
        if repeat:
            seconds.append(now(device) - started)
    return {"seconds": statistics.median(seconds), "peak_gib": round(peak_memory() / 2**30, 2)}


def now(device: torch.device) -> float:
    """The time when the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the machine had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free(device: torch.device) -> None:
    """Frees unreferenced memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOPs a second that the device could do at best, and where the number is from."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        for part, peak in PEAKS.items():
            if part in name:
                return peak, f"datasheet of {part}"
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        started = now(device)
        a @ b
        seconds.append(now(device) - started)
    return 2 * size**3 / min(seconds), f"measured: a product of {size} x {size} {dtype} matrices"


def step_flops(mode: str, model: ViPolyQwenModel, point: Point) -> int:
    """Returns the FLOPs of a mode on all rows of a point."""
    return sum(FORWARDS[mode][part] * flops for part, flops in forward_flops(model, point).items())


def forward_flops(model: ViPolyQwenModel, point: Point) -> dict[str, int]:
    """FLOPs of a forward of all rows in each part of the model, by the sizes of its layers."""
    if point.audio_seconds:
        flops = audio_flops(model, point.audio_seconds * 16_000)
    else:
        flops = text_flops(model, point.tokens)
    if point.image_side:
        flops |= image_flops(model.vlm.visual, point.patches)
    return {part: point.rows * number for part, number in flops.items()}


def text_flops(model: ViPolyQwenModel, tokens: int) -> dict[str, int]:
    """FLOPs of one row of tokens."""
    layers, width = model.vlm.language_model.layers, model.config.text_config.hidden_size  # heads times their size
    attention = len(layers) * 4 * tokens**2 * width
    new = 4 * tokens * width + linear_flops(model.projection)  # pooling: scores and weighted sum
    return {"language": tokens * linear_flops(layers) + attention, "new": new}


def image_flops(visual: nn.Module, patches: int) -> dict[str, int]:
    """FLOPs of one image."""
    embedding = visual.patch_embed.proj.weight
    attention = len(visual.blocks) * 4 * patches**2 * embedding.shape[0]
    linear = patches * linear_flops(visual.blocks) + patches // 4 * linear_flops(visual.merger)
    return {"vision": linear + attention, "patches": patches * 2 * embedding.numel()}


def audio_flops(model: ViPolyQwenModel, samples: int) -> dict[str, int]:
    """FLOPs of one sound."""
    tower, flops, frames = model.audio_tower, 0, samples
    for layer in tower.feature_extractor.conv_layers:
        frames = (frames - layer.conv.kernel_size[0]) // layer.conv.stride[0] + 1
        flops += 2 * frames * layer.conv.weight.numel()
    positional, layers, width = tower.encoder.pos_conv_embed.conv, tower.encoder.layers, tower.config.hidden_size
    flops += 2 * (frames + 1 - positional.kernel_size[0] % 2) * positional.weight.numel()
    flops += frames * (linear_flops(tower.feature_projection) + linear_flops(layers))
    flops += len(layers) * 4 * frames**2 * width
    return {"audio": flops, "new": 4 * frames * width + linear_flops(model.audio_projection)}


def linear_flops(module: nn.Module) -> int:
    """FLOPs of all linear layers for one position; an adapted layer counts as its base layer."""
    names = {name for name, _ in module.named_modules() if ".lora_" in f".{name}"}
    layers = (layer for name, layer in module.named_modules() if name not in names)
    return sum(2 * layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))


def best_mfu(rows: list[dict[str, Any]], bar: float, device: torch.device) -> dict[str, Any]:
    """The claim of a mode: the highest MFU of its points."""
    values = [row["mfu"] for row in rows if "mfu" in row]
    value = max(values, default=0.0)
    if device.type != "cuda":
        return claim(value, bar, holds=False) | {"holds": None, "why": "not applicable: measured on a CPU"}
    return claim(value, bar, holds=value >= bar)


if __name__ == "__main__":
    main()
