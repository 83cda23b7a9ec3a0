"""A newcomer's first search, timed: 240 images and 240 recordings, a query in Vietnamese.

    python benchmarks/newcomer.py [--demo outputs/demo] [--query "bốn bông hoa đỏ lớn trên trời"]

DEMO is what `make demo` left. The console commands `vipolyqwen embed`, `index` and `search` run as they are typed,
each in another process, so that their starts count. Writes benchmarks/results/newcomer.json, with the seconds of the
processor and the load of the machine, which tell a slow path from a busy machine.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from result_files import claim, write_result

LIMIT = 60.0  # seconds
QUERY = "bốn bông hoa đỏ lớn trên trời"


def main(argv: list[str] | None = None) -> None:
    """Runs the three commands and writes what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("outputs/demo"), help="default: outputs/demo")
    parser.add_argument("--query", default=QUERY, help="default: %(default)s")
    options = parser.parse_args(argv)
    model = str(options.demo / "model")
    with tempfile.TemporaryDirectory() as name:
        corpus, vectors = Path(name) / "corpus.jsonl", str(Path(name) / "vectors")
        counts = write_corpus(options.demo / "corpus/media/eval/trimodal", corpus)
        seconds, found = {}, ""
        for command, *arguments in (
            ["embed", model, str(corpus), "--out", vectors],
            ["index", vectors],
            ["search", model, vectors, options.query, "--top", "5"],
        ):
            started = time.perf_counter()
            found = run(command, *arguments)
            seconds[command] = round(time.perf_counter() - started, 1)
    print(found)
    total, used = sum(seconds.values()), resource.getrusage(resource.RUSAGE_CHILDREN)
    write_result(
        "newcomer",
        {"seconds_to_the_first_result": claim(round(total, 1), LIMIT, total <= LIMIT)},
        rows=counts,
        seconds=seconds,
        processor_seconds=round(used.ru_utime + used.ru_stime, 1),
        load_average=os.getloadavg(),
        query=options.query,
        found=found.splitlines(),
    )


def write_corpus(media: Path, corpus: Path) -> dict[str, int]:
    """Writes a row for each image and each recording; returns how many there are.

    Raises:
        FileNotFoundError: the demo left none.
    """
    images, clips = sorted(media.glob("*.png")), sorted(media.glob("*.flac"))
    if not images or not clips:
        raise FileNotFoundError(
            f"{media} has {len(images)} images and {len(clips)} recordings; run `make demo` first."
        )
    rows = [{"id": path.name, "image": str(path.resolve())} for path in images]
    rows += [{"id": path.name, "audio": str(path.resolve())} for path in clips]
    corpus.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"images": len(images), "recordings": len(clips)}


def run(command: str, *arguments: str) -> str:
    """Runs a console command; returns what it prints.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "vipolyqwen", command, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"vipolyqwen {command} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


if __name__ == "__main__":
    main()
