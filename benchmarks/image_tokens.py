"""Tokens and time of images by their bound of pixels: computed for Qwen2-VL-2B, not measured.

    python benchmarks/image_tokens.py [--gpu H100] [--mfu 0.4]

FLOPs are those of `full_size.py` for one forward of the image alone; time is FLOPs over the datasheet's peak times the
assumed MFU. Writes benchmarks/results/image_tokens.json.
"""

import argparse
from typing import Any

import torch
from full_size import PEAKS, full_size_configs, image_flops, text_flops
from result_files import write_result
from transformers import Qwen2VLImageProcessorPil

from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.training.build import build_model

BOUNDS = (401_408, 1_003_520, 3_211_264, 12_845_056)  # `max_pixels`; the last one is Qwen2-VL's
SIZES = {
    "640 x 480": (480, 640),
    "1920 x 1080": (1080, 1920),
    "4032 x 3024": (3024, 4032),
    "2480 x 3508": (3508, 2480),
}
MIN_PIXELS = 56 * 56
PATCHES = 4  # of a token


def main(argv: list[str] | None = None) -> None:
    """Computes the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=PEAKS, default="H100")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak that encoding reaches")
    options = parser.parse_args(argv)
    if not 0 < options.mfu <= 1:
        parser.error(f"--mfu is {options.mfu}; choose one above 0 and at most 1.")
    with torch.device("meta"):
        model = build_model(*full_size_configs())
    rows = [describe(model, bound, PEAKS[options.gpu] * options.mfu) for bound in BOUNDS]
    write_result("image_tokens", {}, table=rows, computed=True, settings=vars(options))
    for row in rows:
        print(row)


def describe(model: ViPolyQwenModel, bound: int, flops: float) -> dict[str, Any]:
    """Returns the tokens, TFLOPs and milliseconds of each size; `flops` a second are reached."""
    row: dict[str, Any] = {"max_pixels": bound}
    processor = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=bound)
    for name, size in SIZES.items():
        patches = processor.get_number_of_image_patches(*size, {"min_pixels": MIN_PIXELS, "max_pixels": bound})
        tokens = patches // PATCHES
        parts = image_flops(model.vlm.visual, patches) | text_flops(model, tokens + 3)  # its borders and the end token
        needed = sum(parts.values())
        row[name] = {"tokens": tokens, "tflops": round(needed / 1e12, 2), "ms": round(1000 * needed / flops, 1)}
    return row


if __name__ == "__main__":
    main()
