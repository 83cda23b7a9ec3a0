"""Does a run that is killed at any moment end, once resumed, with the weights of an uninterrupted one?

    python benchmarks/kill.py [--moments 20] [--seed 0]

SIGKILL at random moments, every second one while a checkpoint is being written, of a tiny model's training on CPU in
float32; then `--resume_from_checkpoint true`. A run that has ended before its moment does not count. Writes
benchmarks/results/kill.json.
"""

import argparse
import sys
import tempfile
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers import write_world
from killing import kills, same_weights, train_uninterrupted
from result_files import claim, write_result


def main() -> None:
    """Kills and resumes as often as wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = write_world(folder)
        duration = train_uninterrupted(recipe, folder / "straight")
        print(f"uninterrupted: {duration:.2f} s", flush=True)
        same = 0
        for left, resumed in islice(kills(recipe, folder, options.seed, duration), options.moments):
            equal = same_weights(folder / "straight", resumed)
            same += equal
            print(f"{left}: weights {'equal' if equal else 'DIFFER'}", flush=True)
    bar = options.moments
    write_result("kill", {"killed_runs_that_end_bit_identical": claim(same, bar, holds=same == bar)})


if __name__ == "__main__":
    main()
