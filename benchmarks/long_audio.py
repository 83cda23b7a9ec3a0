"""Memory and time of long audio against one window: HuBERT-base at full size, random weights, noise.

    python benchmarks/long_audio.py [--seconds 30 60 720]

Measures the peak of memory that embedding one clip adds, without the tensors that grow with the clip by nature (its
samples, their mask, its frames). Writes benchmarks/results/long_audio.json.
"""

import argparse
import gc
import time
from typing import Any

import torch
from result_files import claim, write_result
from transformers import HubertConfig

from vipolyqwen.demo.tiny_base import tiny_vlm_config, train_tokenizer
from vipolyqwen.evaluation.memory import peak_memory, reset_peaks
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.training.build import build_model

RATE, WINDOW = 16_000, 30
BAR = 1.2  # of the memory of one window (issue: "≤ 1.2 × of a 30 s clip's")
COPIES = 3  # of the frames: of each window, joined, and in float32 for the pooling


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
    ratio = rows[-1]["working_mib"] / rows[0]["working_mib"]
    claims = {"memory_of_the_longest_over_the_first": claim(round(ratio, 3), BAR, holds=ratio <= BAR)}
    write_result("long_audio", claims, rows=rows, window_seconds=WINDOW)


@torch.no_grad()
def measure(model: ViPolyQwenModel, seconds: int, device: torch.device) -> dict[str, Any]:
    """Embeds a clip of noise and returns its time and the memory that it took, in MiB."""
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
    before, started = peak_memory(), time.perf_counter()
    output = model(**batch, output_pooling_weights=True)
    taken, peak = time.perf_counter() - started, peak_memory() - before
    frames = output.audio_pooling_weights.numel()
    of_frames = COPIES * frames * model.config.audio_config.hidden_size * 4
    return {
        "seconds": seconds,
        "windows": len(lengths),
        "frames": frames,
        "embedding_seconds": round(taken, 2),
        "peak_mib": round(peak / 2**20, 1),
        "working_mib": round((peak - of_frames) / 2**20, 1),
    }


if __name__ == "__main__":
    main()
