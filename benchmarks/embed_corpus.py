"""Is an embedded corpus the same after kills, as fast as `encode`, and of constant memory?

    python benchmarks/embed_corpus.py [--model MODEL] [--rows 100000] [--kills 3] [--seed 0] [--ray_workers 2]

Embeds generated texts with embed_vipolyqwen.py in a process without interruption, in processes that get SIGKILL at
random moments, and with --ray_workers on a Ray cluster of this machine; compares the folders byte for byte. A folder
whose manifest has another fingerprint must be refused and left as it is. Then measures, side by side in this process,
the rows a second of `encode` and of `embed_corpus`, and the peak of memory at a tenth of the rows and at all. Without
--model, a tiny untrained one. All runs have one thread, which Ray gives its workers too: sums of another number of
threads differ in their last bits. Writes benchmarks/results/embed_corpus.json.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers import TEXTS, save_tiny_model
from result_files import claim, write_result

from vipolyqwen.evaluation.memory import peak_host, reset_peaks
from vipolyqwen.fingerprint_vipolyqwen import write_fingerprint
from vipolyqwen.serving.corpus_run import CorpusOptions, embed_corpus
from vipolyqwen.serving.loading import LoadedModel, load_model
from vipolyqwen.serving.shards import MANIFEST

ROUNDS = 5
SPEED_ROWS = 4096
COMMAND = Path(__file__).parent.parent / "embed_vipolyqwen.py"


def write_texts(path: Path, rows: int, seed: int) -> list[str]:
    """Writes texts of 3 to 40 words as JSONL; returns them."""
    rng = random.Random(seed)
    words = " ".join(TEXTS).split()
    texts = [" ".join(rng.choices(words, k=rng.randint(3, 40))) for _ in range(rows)]
    lines = (json.dumps({"id": str(row), "text": text}, ensure_ascii=False) for row, text in enumerate(texts))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return texts


def start(model: str, corpus: Path, out: Path, *options: str) -> subprocess.Popen:
    """Starts the command."""
    command = [sys.executable, COMMAND, model, corpus, "--out", out, "--device", "cpu", "--unit_rows", "1024"]
    return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(process: subprocess.Popen) -> None:
    """Waits; a failed run ends the benchmark."""
    if process.wait() != 0:
        raise RuntimeError(f"embed_vipolyqwen.py ended with exit code {process.returncode}.")


def wait_for_shard(process: subprocess.Popen, out: Path) -> None:
    """Waits until a process has written one more shard, however long the model loads."""
    before = shards(out)
    while shards(out) == before:
        if process.poll() is not None:
            raise RuntimeError("A run ended before it was killed; give more --rows.")
        time.sleep(0.02)


def shards(out: Path) -> int:
    """Returns the number of shards that were written."""
    return len(list((out / "vectors").glob("*.parquet")))


def embed_at_once(model: str, corpus: Path, out: Path) -> float:
    """Embeds without interruption; returns the seconds after the first shard."""
    process = start(model, corpus, out)
    wait_for_shard(process, out)
    begin = time.monotonic()
    finish(process)
    return time.monotonic() - begin


def embed_with_kills(model: str, corpus: Path, out: Path, kills: int, seconds: float, seed: int) -> int:
    """Kills runs at random moments while they write, then lets one end; returns the number of shards kept by kills."""
    rng = random.Random(seed)
    for _ in range(kills):
        process = start(model, corpus, out)
        wait_for_shard(process, out)
        time.sleep(rng.uniform(0, seconds / (2 * kills)))
        process.kill()
        process.wait()
    kept = shards(out)
    finish(start(model, corpus, out))
    return kept


def refuses_another_model(model: str, corpus: Path, folder: Path) -> bool:
    """Returns whether a folder with another fingerprint in its manifest is refused and stays as it is."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, "fingerprint": "0" * 16}), encoding="utf-8")
    before = content(folder)
    return start(model, corpus, folder).wait() != 0 and content(folder) == before


def content(folder: Path) -> dict[str, bytes]:
    """Returns name -> bytes of every file but those of killed writes."""
    files = (path for path in folder.rglob("*") if path.is_file() and "_unfinished" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def rates(model: LoadedModel, texts: list[str], corpus: Path, scratch: Path) -> tuple[list[float], list[float]]:
    """Returns rows a second of `encode` and of `embed_corpus`, alternating."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 1):
        begin = time.perf_counter()
        model.encoder.encode(texts, batch_size=32, show_progress_bar=False)
        middle = time.perf_counter()
        options = CorpusOptions(source={"path": str(corpus)}, out=scratch / f"speed{number}")
        embed_corpus(model, options, report=lambda line: None)
        end = time.perf_counter()
        if number:  # the first round warms up
            found[0].append(len(texts) / (middle - begin))
            found[1].append(len(texts) / (end - middle))
    return found


def peak(model: LoadedModel, corpus: Path, out: Path) -> int:
    """Returns the peak of this process while it embeds, in bytes."""
    reset_peaks()
    embed_corpus(model, CorpusOptions(source={"path": str(corpus)}, out=out, unit_rows=1024), report=lambda line: None)
    return peak_host()


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id; default: a tiny untrained one")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray_workers", type=int, default=0, help="also embed through Ray; default: not")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source = options.model or str(scratch / "tiny")
        if options.model is None:
            save_tiny_model(scratch / "tiny")
            write_fingerprint(scratch / "tiny")
        texts = write_texts(scratch / "all.jsonl", options.rows, options.seed)
        write_texts(scratch / "tenth.jsonl", options.rows // 10, options.seed)
        claims, figures = identical_bytes(source, scratch, options)
        model = load_model(source, device="cpu")
        speed_claims, speed = compare_speed(model, texts, scratch, options.seed)
        small = peak(model, scratch / "tenth.jsonl", scratch / "small")
        large = peak(model, scratch / "all.jsonl", scratch / "large")
    claims |= speed_claims
    claims["peak_memory_of_ten_times_the_rows"] = claim(round(large / small, 3), 1.1, large / small <= 1.1)
    settings = {"model": options.model or "tiny, untrained", "rows": options.rows, "kills": options.kills}
    write_result("embed_corpus", claims, **settings, seed=options.seed, **figures, **speed, peak_bytes=[small, large])


def identical_bytes(
    source: str, scratch: Path, options: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Embeds without interruption, with kills and through Ray; returns claims and figures."""
    corpus, unbroken, broken = scratch / "all.jsonl", scratch / "unbroken", scratch / "broken"
    seconds = embed_at_once(source, corpus, unbroken)
    kept = embed_with_kills(source, corpus, broken, options.kills, seconds, options.seed)
    same = content(broken) == content(unbroken)
    claims = {"same_bytes_after_kills": claim(int(same), 1, same)}
    if options.ray_workers:
        through_ray = scratch / "ray"
        finish(start(source, corpus, through_ray, "--ray_workers", str(options.ray_workers)))
        same = content(through_ray) == content(unbroken)
        claims["same_bytes_through_ray"] = claim(int(same), 1, same)
    refused = refuses_another_model(source, corpus, broken)
    claims["another_fingerprint_refused"] = claim(int(refused), 1, refused)
    figures = {"seconds_unbroken": round(seconds, 1), "shards_kept_by_kills": kept}
    return claims, {**figures, "ray_workers": options.ray_workers}


def compare_speed(
    model: LoadedModel, texts: list[str], scratch: Path, seed: int
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Measures `embed_corpus` beside `encode`; returns the claim and the rows a second of each round."""
    write_texts(scratch / "speed.jsonl", SPEED_ROWS, seed)
    of_encode, of_corpus = rates(model, texts[:SPEED_ROWS], scratch / "speed.jsonl", scratch)
    ratio = statistics.median(of_corpus) / statistics.median(of_encode)
    return {"rows_a_second_over_encode": claim(round(ratio, 3), 0.95, ratio >= 0.95)}, {
        "rows_a_second_encode": [round(rate) for rate in of_encode],
        "rows_a_second_corpus": [round(rate) for rate in of_corpus],
    }


if __name__ == "__main__":
    main()
