"""Does a long run of mixed training stay as fast and as small as it began?

    python benchmarks/long_run.py [--minutes 120]

Trains a tiny model of the real classes on all tasks until SIGTERM ends it, with a checkpoint every 200 steps, and
compares the second half of the run with its first: memory of the process, processor time a step, size of the output
folder; pairs a second, which other work on the machine changes, is reported beside them. The first tenth does not
count. Writes benchmarks/results/long_run.json.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers import write_world
from result_files import claim, write_result

ROOT = Path(__file__).parents[1]
MEMORY_BAR, TIME_BAR, SIZE_BAR = 1.05, 1.05, 1.5  # second half over first
FLAGS = ["--max_steps", "1000000", "--save_steps", "200", "--save_total_limit", "2", "--logging_steps", "50"]
FLAGS += ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--dataloader_num_workers", "1"]


def main() -> None:
    """Trains, samples and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "run"
        command = [sys.executable, ROOT / "train_vipolyqwen.py", write_world(Path(scratch)), "--output_dir", output]
        with open(Path(scratch) / "log.txt", "wb") as log:
            run = subprocess.Popen([*command, *FLAGS], stdout=log, stderr=subprocess.STDOUT)
            samples = sample(run, output, 60 * options.minutes)
            run.send_signal(signal.SIGTERM)
            status = run.wait()
        state = newest_state(output)
        printed = (Path(scratch) / "log.txt").stat().st_size
    logged = [entry["pairs_per_second"] for entry in state["log_history"] if "pairs_per_second" in entry]
    memory, files = (halves([each[name] for each in samples]) for name in ("rss_mib", "folder_mib"))
    step_time = halves(seconds_a_step(samples))
    claims = {
        "memory_of_the_second_half_over_the_first": claim(memory, MEMORY_BAR, holds=memory <= MEMORY_BAR),
        "processor_time_a_step_of_the_second_half_over_the_first": claim(step_time, TIME_BAR, step_time <= TIME_BAR),
        "size_of_the_folder_of_the_second_half_over_the_first": claim(files, SIZE_BAR, holds=files <= SIZE_BAR),
    }
    figures = {"minutes": options.minutes, "steps": state["global_step"], "exit_status": status}
    figures["processor_minutes"] = round(samples[-1]["cpu_seconds"] / 60, 1)
    figures["pairs_per_second_of_the_second_half_over_the_first"] = halves(logged)
    write_result("long_run", claims, **figures, printed_bytes=printed, samples=samples[:: max(1, len(samples) // 60)])


def sample(run: subprocess.Popen, output: Path, seconds: float) -> list[dict[str, float]]:
    """Memory, processor time, steps and size of the output folder, every five seconds from the first checkpoint on."""
    samples, begun = [], time.monotonic()
    while time.monotonic() - begun < seconds and run.poll() is None:
        time.sleep(5)
        if list(output.glob("checkpoint-*")):
            measured = {"seconds": round(time.monotonic() - begun), "rss_mib": resident(run.pid)}
            measured |= {"cpu_seconds": processor_time(run.pid), "step": step_of(newest_checkpoint(output))}
            samples.append(measured | {"folder_mib": round(size(output) / 2**20, 2)})
    return samples


def resident(process: int) -> float:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def size(folder: Path) -> int:
    """Bytes of all files below a folder, those that vanish meanwhile left out."""
    total = 0
    for path in list(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def processor_time(process: int) -> float:
    """Seconds of processor time of a process, all threads, its children left out."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime


def seconds_a_step(samples: list[dict[str, float]]) -> list[float]:
    """Processor time a step from each new checkpoint to the next."""
    firsts = {sample["step"]: sample["cpu_seconds"] for sample in reversed(samples)}
    steps = sorted(firsts)
    return [(firsts[after] - firsts[before]) / (after - before) for before, after in itertools.pairwise(steps)]


def newest_checkpoint(output: Path) -> Path:
    """The checkpoint of the largest step."""
    return max(output.glob("checkpoint-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_state(output: Path) -> dict:
    """The state of the trainer in the newest checkpoint."""
    return json.loads((newest_checkpoint(output) / "trainer_state.json").read_text(encoding="utf-8"))


def halves(values: list[float]) -> float:
    """Median of the second half over that of the first, after the first tenth."""
    kept = values[len(values) // 10 :]
    middle = len(kept) // 2
    return round(median(kept[middle:]) / median(kept[:middle]), 4)


if __name__ == "__main__":
    main()
