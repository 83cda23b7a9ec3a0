"""Rows a second through reader and collator, against the bare tokenizer and decoders on the same content.

    python benchmarks/reader_speed.py [--workers 2] [--repeats 5]

Reads texts, images with a question, and clips with a transcription in the order of training, in WORKERS processes side
by side, as the workers of a data loader. The other alternative has all texts and the bytes of all files in memory, and
calls the stock tokenizer, Pillow with the image processor, and soundfile with the feature extractor on the same
batches; the third leaves out what prepares images and clips for a model. They take turns. Writes
benchmarks/results/reader_speed.json.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from corpus_scale import LANGUAGES, SHARES, text
from PIL import Image
from result_files import claim, write_result

ROWS = {"text": 32_000, "image": 640, "audio": 1_280}  # of all workers together
BATCH = 64
RATE = 16_000  # Hz
SETUP: dict[str, Any] = {}  # what each worker holds


def write_pairs(folder: Path) -> None:
    """Writes the pairs of each kind, every image and clip another one."""
    rng = np.random.default_rng(0)
    (folder / "media").mkdir()
    for kind, count in ROWS.items():
        with (folder / f"{kind}.jsonl").open("w", encoding="utf-8") as lines:
            for number in range(count):
                language = str(rng.choice(LANGUAGES, p=SHARES))
                row = {name: text(rng, language, int(rng.integers(5, 30))) for name in "ab"}
                lines.write(json.dumps({**row, **write_media(kind, number, folder, rng)}, ensure_ascii=False) + "\n")


def write_media(kind: str, number: int, folder: Path, rng: np.random.Generator) -> dict[str, Any]:
    """Writes the file of a row; returns the columns that differ by kind."""
    name = f"media/{number}.{'jpg' if kind == 'image' else 'flac'}"
    if kind == "image":
        pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480)).save(folder / name, quality=90)
        return {"task": "vqa_single", "images": [name]}
    if kind == "audio":
        wave = 0.3 * np.sin(np.cumsum(rng.uniform(0.05, 0.5, 5 * RATE)))
        soundfile.write(folder / name, wave, RATE)
        return {"task": "audio", "a": "", "audio": name}
    return {"task": "instr"}


def prepare(folder: Path, workers: int, barrier: Any, numbers: Any) -> None:
    """Builds the processor, opens the pairs and reads all content into memory, in each worker."""
    import torch

    from vipolyqwen.data.collator import MixedBatchCollator
    from vipolyqwen.data.schema import declare_tasks
    from vipolyqwen.data.sources import load_pairs
    from vipolyqwen.demo.tiny_base import build_tiny_base

    torch.set_num_threads(1)
    tasks = declare_tasks()
    rows = {kind: list(map(json.loads, (folder / f"{kind}.jsonl").open(encoding="utf-8"))) for kind in ROWS}
    texts = (row[side] for row in rows["text"] for side in "ab")
    processor = build_tiny_base(texts, hidden_size=64, layers=1, vision_size=32, audio_size=32, vocab_size=8000)[1]
    processor.tokenizer.model_max_length = 512
    number = numbers.get()
    SETUP.update(barrier=barrier, collator=MixedBatchCollator(processor, tasks), processor=processor, order={})
    SETUP.update(pairs={kind: load_pairs([{"path": str(folder / f"{kind}.jsonl")}], tasks, 400) for kind in ROWS})
    SETUP.update(rows=rows, files={path.name: path.read_bytes() for path in (folder / "media").iterdir()})
    for kind, count in ROWS.items():
        order = np.random.default_rng(1).permutation(count)[number::workers]
        SETUP["order"][kind] = [order[start : start + BATCH].tolist() for start in range(0, len(order), BATCH)]


def read(kind: str) -> None:
    """Passes all batches of a kind through reader and collator."""
    pairs, collator = SETUP["pairs"][kind], SETUP["collator"]
    for batch in SETUP["order"][kind]:
        collator(pairs.__getitems__(batch))


def bare(kind: str, prepared: bool) -> None:
    """Passes the same content through the tokenizer and the decoders; `prepared`: also what a model needs of media."""
    processor, rows = SETUP["processor"], SETUP["rows"][kind]
    for batch in SETUP["order"][kind]:
        records = [rows[number] for number in batch]
        texts = [text for side in "ab" for row in records if (text := row[side])]
        processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        files = [SETUP["files"][Path(name).name] for row in records for name in _media(row)]
        if kind == "image":
            images = [Image.open(io.BytesIO(content)).convert("RGB") for content in files]
            if prepared:
                processor.image_processor(images, return_tensors="pt")
        elif kind == "audio":
            clips = [soundfile.read(io.BytesIO(content), dtype="float32")[0] for content in files]
            if prepared:
                processor.feature_extractor(clips, sampling_rate=RATE, padding=True, return_tensors="pt")


def _media(row: dict[str, Any]) -> list[str]:
    return row.get("images") or ([row["audio"]] if row.get("audio") else [])


RUNS: dict[str, Callable[[str], None]] = {
    "reader and collator": read,
    "bare": lambda kind: bare(kind, prepared=True),
    "decoders alone": lambda kind: bare(kind, prepared=False),
}


def timed(task: tuple[str, str]) -> float:
    """Returns the seconds of one run in this worker; all workers start together."""
    kind, name = task
    SETUP["barrier"].wait()
    start = time.perf_counter()
    RUNS[name](kind)
    return time.perf_counter() - start


def measure(folder: Path, workers: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Returns rows a second of each kind and alternative, one figure a round, after one round to warm up."""
    context = multiprocessing.get_context("spawn")
    numbers = context.Manager().Queue()
    for number in range(workers):
        numbers.put(number)
    given = (folder, workers, context.Barrier(workers), numbers)
    found: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in RUNS} for kind in ROWS}
    with context.Pool(workers, prepare, given) as pool:
        for repeat in range(repeats + 1):
            for kind, rows in ROWS.items():
                for name in list(RUNS)[:: 1 if repeat % 2 else -1]:
                    seconds = max(pool.map(timed, [(kind, name)] * workers, chunksize=1))
                    if repeat:
                        found[kind][name].append(round(rows / seconds, 1))
    return found


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="processes side by side (default: 2)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        write_pairs(Path(place))
        found = measure(Path(place), options.workers, options.repeats)
    medians = {kind: {name: statistics.median(of) for name, of in runs.items()} for kind, runs in found.items()}
    shares = {kind: ratio(runs, "bare") for kind, runs in found.items()}
    claims = {f"share of the bare rate, {kind}": claim(share, 0.8, share >= 0.8) for kind, share in shares.items()}
    rate = medians["text"]["reader and collator"]
    claims["text, rows a second"] = claim(rate, 20_000, rate >= 20_000)
    alone = {kind: ratio(runs, "decoders alone") for kind, runs in found.items()}
    write_result(
        "reader_speed",
        claims,
        workers=options.workers,
        rows_per_s=medians,
        share_of_decoders_alone=alone,
        rounds=found,
    )


def ratio(runs: dict[str, list[float]], name: str) -> float:
    """Returns the median over the rounds of the rate of reader and collator, as a share of another's."""
    ours = runs["reader and collator"]
    return round(statistics.median(one / other for one, other in zip(ours, runs[name], strict=True)), 3)


if __name__ == "__main__":
    main()
