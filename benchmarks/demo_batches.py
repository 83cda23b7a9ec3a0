"""Batches of the demo corpus and an untrained tiny model, for benchmarks that time single steps."""

from pathlib import Path
from typing import Any

import torch

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.sampler import MixtureSampler
from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.data.sources import load_pairs
from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.demo.world import read_rows
from vipolyqwen.demo_vipolyqwen import BASE_SIZES
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel

TASKS = ("text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio")


def model_and_batches(corpus: Path, count: int, size: int) -> tuple[ViPolyQwenModel, list[dict[str, Any]]]:
    """`count` collated batches of `size` pairs of all six tasks, shuffled, and a model that takes them."""
    torch.manual_seed(0)
    sources = [{"path": str(corpus / f"train/{task}.jsonl"), "media_root": str(corpus)} for task in TASKS]
    texts = [row["b"] for source in sources for row in read_rows(Path(source["path"]))]
    model, processor = build_tiny_base(texts, **BASE_SIZES)
    tasks = declare_tasks(None)
    pairs = load_pairs(sources, tasks, processor.min_audio_samples, check_media=False)
    collate = MixedBatchCollator(processor, tasks)
    order = list(MixtureSampler(pairs.source_lengths, pairs.source_weights))
    return model, [collate([pairs[row] for row in order[i * size : (i + 1) * size]]) for i in range(count)]
