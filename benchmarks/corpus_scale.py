"""Cost of a corpus against its rows: indexing, opening, first batch, memory, rows a second.

    python benchmarks/corpus_scale.py --rows 10000 100000 1000000 11200000 --workers 2

Generates pairs in the papers' proportions (60 % Vietnamese, 30 % English, 10 % Chinese; six tasks), images and audio
by reference to a few files. Each size runs in new processes, so that each measures its memory alone: one indexes, one
opens the index and reads rows in the order of training. Memory is looked at every few batches, since pages of mapped
files come and go. Writes benchmarks/results/corpus_scale.json.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from result_files import RESULTS, claim, write_result

TASKS = {"text_pair": 0.40, "instr": 0.35, "ocr": 0.08, "vqa_single": 0.07, "vqa_multi": 0.04, "audio": 0.06}
WORDS = {
    "vi": "một người đàn ông đi bộ trên bãi biển lúc hoàng hôn với con chó nhỏ của mình và nghĩ về ngày mai".split(),
    "en": "a man walks along the beach at sunset with his small dog and thinks about what tomorrow may bring".split(),
    "zh": list("一个男人在日落时带着他的小狗走在沙滩上想着明天会发生什么事情"),
}
LANGUAGES, SHARES = ("vi", "en", "zh"), (0.6, 0.3, 0.1)
MEDIA = 64  # distinct images, and clips
ROWS_OF_FILE = 250_000
SAMPLED = 7  # batches between two looks at the memory, no divisor of those after which pages are given back
INDEXED = ("index_s", "index_cpu_s", "index_gib")  # figures of `index`


def text(rng: np.random.Generator, language: str, words: int) -> str:
    """Returns random words."""
    return ("" if language == "zh" else " ").join(rng.choice(WORDS[language], words))


def rows_of(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields pairs in the papers' proportions."""
    rng = np.random.default_rng(seed)
    tasks = rng.choice(list(TASKS), count, p=list(TASKS.values()))
    languages = rng.choice(LANGUAGES, count, p=SHARES)
    texts = {name: [text(rng, name, n) for n in rng.integers(5, 40, 2000)] for name in LANGUAGES}
    picks = rng.integers(0, 2000, (count, 2))
    for number in range(count):
        task, pool = tasks[number], texts[languages[number]]
        row = {"id": f"{seed}-{number}", "task": str(task), "a": f"{number} {pool[picks[number, 0]]}"}
        row |= {"b": f"{pool[picks[number, 1]]} {number}", "language": str(languages[number])}
        if task == "text_pair":
            row["score"] = float(picks[number, 0] % 101) / 100
        elif task == "audio":
            row |= {"a": "", "audio": f"media/{number % MEDIA}.wav"}
        elif task != "instr":
            row["images"] = [f"media/{number % MEDIA}.jpg"]
        yield row


def write_corpus(folder: Path, rows: int) -> None:
    """Writes the files of a corpus, of 250,000 rows each."""
    (folder / "media").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(MEDIA):
        pixels = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((320, 240)).save(folder / f"media/{number}.jpg")
        soundfile.write(folder / f"media/{number}.wav", rng.uniform(-0.5, 0.5, 32_000).astype(np.float32), 16_000)
    for file, start in enumerate(range(0, rows, ROWS_OF_FILE)):
        with (folder / f"train-{file:05d}.jsonl").open("w", encoding="utf-8") as lines:
            for row in rows_of(min(ROWS_OF_FILE, rows - start), file):
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def memory() -> tuple[float, float]:
    """Returns the resident memory of this process in GiB: its own, and pages of mapped files."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return tuple(int(fields[name].split()[0]) / 2**20 for name in ("RssAnon", "RssFile"))


def index(folder: Path, workers: int) -> dict[str, float]:
    """Reads, checks and stores all rows; returns seconds, those of all cores together, and peak memory."""
    from vipolyqwen.data.schema import declare_tasks
    from vipolyqwen.data.sources import load_pairs

    start, cpu = time.perf_counter(), sum(os.times()[:4])
    load_pairs([{"path": str(folder)}], declare_tasks(), 400, check_media=False, workers=workers)
    seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu
    usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"index_s": seconds, "index_cpu_s": cpu, "index_gib": max(usage) / 2**20}


def read(folder: Path, workers: int, batch_size: int, batches: int) -> dict[str, float]:
    """Opens the index, and reads rows in the order of training, without decoding media."""
    from vipolyqwen.data.sampler import MixtureBatches, MixtureSampler
    from vipolyqwen.data.schema import declare_tasks
    from vipolyqwen.data.sources import load_pairs

    start = time.perf_counter()
    pairs = load_pairs([{"path": str(folder)}], declare_tasks(), 400, check_media=False, workers=workers)
    opened = time.perf_counter() - start
    order = iter(MixtureBatches(MixtureSampler(pairs.source_lengths, pairs.source_weights), batch_size))
    first = pairs.__getitems__(next(order))
    assert len(first) == batch_size
    first_s = time.perf_counter() - start
    start, cpu = time.perf_counter(), time.process_time()
    count, found = 0, [memory()]
    for number, rows in enumerate(itertools.islice(order, batches), start=1):
        count += len(pairs._read(rows))
        if number % SAMPLED == 0:
            found.append(memory())
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    found.append(memory())
    totals = [sum(each) for each in found]
    middle = len(found) // 2  # the most of each half: pages of files come and go
    return {"open_s": opened, "first_batch_s": first_s, "gib_at_first": totals[0]} | {
        "gib_first_half": max(totals[: middle + 1]),
        "gib_second_half": max(totals[middle:]),
        "gib_of_own_at_first": found[0][0],
        "gib_of_own_at_last": found[-1][0],
        "batches": count / batch_size,
        "rows_per_s": count / seconds,
        "rows_per_cpu_s": count / cpu,
    }


def in_process(work: Any, *given: Any) -> dict[str, float]:
    """Runs a function in a new process, which may start others."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def claims(figures: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Compares the figures of the largest size; the time to index is that of 11.2 million rows at the same pace."""
    minutes = figures["index_s"] / 60 * 11.2e6 / figures["rows"]
    peak = max(figures["gib_first_half"], figures["gib_second_half"])
    grown = figures["gib_second_half"] / figures["gib_first_half"]
    return {
        "minutes to index 11.2M rows": claim(minutes, 6.0, minutes <= 6.0),
        "seconds to the first batch": claim(figures["first_batch_s"], 10.0, figures["first_batch_s"] <= 10.0),
        "GiB at most": claim(peak, 1.5, peak <= 1.5),
        "memory of the second half of the batches against the first": claim(grown, 1.05, grown <= 1.05),
    }


def main() -> None:
    """Measures each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=2, help="processes that index (default: 2)")
    parser.add_argument(
        "--reread", action="store_true", help="read the index of the last run; its cost is that of the result file"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=20_000, help="batches over which memory stays flat")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/corpus_scale"), help="of the corpora and the cache"
    )
    options = parser.parse_args()
    found = []
    former = json.loads((RESULTS / "corpus_scale.json").read_text(encoding="utf-8")) if options.reread else {}
    indexed = {size["rows"]: {name: size[name] for name in INDEXED} for size in former.get("sizes", [])}
    for rows in options.rows:
        corpus = options.folder / str(rows)
        os.environ["HF_DATASETS_CACHE"] = str((options.folder / f"cache{rows}").absolute())
        if not options.reread:
            shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
        if not corpus.is_dir():
            write_corpus(corpus, rows)
        figures: dict[str, float] = {"rows": rows}
        figures |= indexed[rows] if options.reread else in_process(index, corpus, options.workers)
        figures |= in_process(read, corpus, options.workers, options.batch_size, options.batches)
        print(json.dumps(figures), file=sys.stderr, flush=True)
        found.append(figures)
    write_result(
        "corpus_scale", claims(found[-1]), workers=options.workers, batch_size=options.batch_size, sizes=found
    )


if __name__ == "__main__":
    main()
