"""Memory of long audio against one window: HuBERT-base at full size, random weights, noise.

    python benchmarks/long_audio.py [--seconds 30 60 720]

Measures the peak of memory that embedding one clip adds to the model and the clip's samples; its frames count. Writes
benchmarks/results/long_audio.json.
"""

import argparse
import gc
from typing import Any

import torch
from result_files import claim, write_result
from transformers import HubertConfig

from vipolyqwen.demo.tiny_base import tiny_vlm_config, train_tokenizer
from vipolyqwen.evaluation.memory import peak_memory, reset_peaks
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.training.build import build_model

RATE, WINDOW = 16_000, 30
BAR = 1.2  # largest memory relative to that of the first length


def main() -> None:
    """Embeds clips of each length in turn and compares their memory with that of the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, nargs="+", default=[30, 60, 720], help="lengths; the first is the bar")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = train_tokenizer(["một hai ba"] * 4, 300)
    speech = HubertConfig(apply_spec_augment=False, layerdrop=0.0)
    model = build_model(tiny_vlm_config(tokenizer, 64, 1, 32), speech).to(device).eval()
    measure(model, options.seconds[0], device)  # warm-up
    rows = [measure(model, seconds, device) for seconds in options.seconds]
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Writes the result file: rows of `measure`, the first of one window."""
    ratio = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
    claims = {"memory_of_the_longest_over_the_first": claim(round(ratio, 3), BAR, holds=ratio <= BAR)}
    write_result("long_audio", claims, rows=rows, window_seconds=WINDOW)


@torch.no_grad()
def measure(model: ViPolyQwenModel, seconds: int, device: torch.device) -> dict[str, Any]:
    """Embeds a clip of noise and returns the memory that it took, in MiB."""
    lengths = [min(WINDOW, seconds - start) * RATE for start in range(0, seconds, WINDOW)]
    features = torch.zeros(len(lengths), max(lengths))
    mask = torch.zeros(features.shape, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for row, length in enumerate(lengths):
        features[row, :length] = torch.randn(length, generator=generator)
        mask[row, :length] = 1
    batch = {"audio_features": features, "audio_attention_mask": mask, "audio_windows": torch.tensor([len(lengths)])}
    batch = {name: value.to(device) for name, value in batch.items()}
    gc.collect()
    reset_peaks()
    before = peak_memory()
    output = model(**batch, output_pooling_weights=True)
    peak = peak_memory() - before
    return {
        "seconds": seconds,
        "windows": len(lengths),
        "frames": output.audio_pooling_weights.numel(),
        "peak_mib": round(peak / 2**20, 1),
    }


if __name__ == "__main__":
    main()
