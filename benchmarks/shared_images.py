"""Images that rows share: a training step that encodes each image once against one that does so for every row.

    python benchmarks/shared_images.py [--pairs 32] [--sharing 4] [--repeats 5]

A tiny model of the real classes and pairs of visual questions, some about the same image, made in memory. Seconds are
the median over steps of both kinds in turn. Sharing saves at most the vision tower's part, so the result also has an
estimate of it, parameters × positions of the layers: 0.66 for Qwen2-VL-2B. Writes
benchmarks/results/shared_images.json.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cached_gradients import WORDS, build_trainer, collator
from PIL import Image
from result_files import claim, write_result
from torch import nn

from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.microbatches_vipolyqwen import members
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.training.trainer import ViPolyQwenTrainer

SIZES = {"hidden_size": 256, "layers": 4, "vision_size": 160, "audio_size": 32, "image_side": 224}


def main() -> None:
    """Times both and writes the claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--sharing", type=int, default=4, help="rows that show one picture")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        torch.manual_seed(0)
        save_repository(*build_tiny_base([" ".join(WORDS)] * 4, vocab_size=400, **SIZES), model)
        shared = collator(model)(make_pairs(options.pairs, options.sharing))
        trainer = build_trainer(model, None)
        seconds = step_times(trainer, {"shared": shared, "unshared": unshare(shared)}, options.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["shared"] / medians["unshared"]
    write_result(
        "shared_images",
        {"step_time_over_unshared": claim(round(ratio, 3), 1.0, holds=ratio <= 1.0)},
        median_seconds_of_a_step={name: round(value, 3) for name, value in medians.items()},
        images_encoded={"shared": len(shared["image_grid_thw"]), "unshared": len(shared["image_indices"])},
        vision_part_of_an_image=round(vision_part(trainer.model.vlm), 2),
        settings=vars(options),
    )


def vision_part(vlm: nn.Module) -> float:
    """How much of the work on an image is the vision tower's, by parameters of the layers times positions."""
    patches = vlm.config.vision_config.spatial_merge_size**2  # of each token
    vision, language = (
        sum(parameter.numel() for parameter in layers.parameters())
        for layers in (vlm.visual.blocks, vlm.language_model.layers)
    )
    return patches * vision / (patches * vision + language)


def make_pairs(pairs: int, sharing: int) -> list[dict[str, Any]]:
    """Visual questions and their answers as a `PairDataset` gives them; `sharing` in a row are about one picture."""
    rng = np.random.default_rng(0)
    rows, side = [], SIZES["image_side"]
    for number in range(pairs):
        if number % sharing == 0:
            picture = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        rows.append(
            {
                "id": str(number),
                "task": "vqa_single",
                "a": " ".join(rng.choice(WORDS, rng.integers(4, 25))),
                "b": " ".join(rng.choice(WORDS, rng.integers(1, 9))),
                "images_a": [picture],
                "image_placeholder": "<image>",
                "audio_a": None,
                "images_b": [],
                "audio_b": None,
                "score": None,
                "group": None,
                "negatives": [],
                "a_key": 2 * number,
                "b_key": 2 * number + 1,
            }
        )
    return rows


def unshare(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with every picture as often as it is shown."""
    shown = batch["image_indices"]
    return batch | {
        "pixel_values": batch["pixel_values"][members(batch["image_grid_thw"].prod(dim=-1), shown)],
        "image_grid_thw": batch["image_grid_thw"][shown],
        "image_indices": torch.arange(len(shown)),
    }


def step_times(trainer: ViPolyQwenTrainer, batches: dict[str, dict[str, Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of steps of each batch, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for repeat in range(repeats + 1):
        for name in sorted(batches, reverse=repeat % 2 == 0):
            trainer.model.zero_grad()
            trainer.state.global_step = 1  # a step without monitors, as nine of ten are
            started = time.perf_counter()
            trainer.training_step(trainer.model, batches[name])
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
