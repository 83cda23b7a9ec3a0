"""Does a run that is killed at any moment end, once resumed, with the weights of an uninterrupted one?

    python benchmarks/kill.py [--moments 20] [--seed 0]

SIGKILL at random moments, every second one while a checkpoint is being written, of a tiny model's training on CPU in
float32; then `--resume_from_checkpoint true`. Writes benchmarks/results/kill.json.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import write_world
from killing import draw_moments, kill_and_resume, same_weights, train_uninterrupted


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
        for number, moment in enumerate(draw_moments(options.moments, options.seed)):
            left = kill_and_resume(recipe, folder / str(number), moment, duration)
            equal = same_weights(folder / "straight", folder / str(number))
            same += equal
            print(f"{left}: weights {'equal' if equal else 'DIFFER'}", flush=True)
    result = {
        "claims": {
            "killed_runs_that_end_bit_identical": {
                "value": same,
                "bar": options.moments,
                "holds": same == options.moments,
            }
        },
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    path = Path(__file__).parent / "results" / "kill.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
