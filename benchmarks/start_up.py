"""Start-up: seconds of `--help` of each command, and of imports and loading against those of transformers.

    python benchmarks/start_up.py [--repeats 3]

Each run is a fresh interpreter, the runs in turn; the first round, which fills the caches of files, is not counted.
`load` imports a class and loads 100M parameters with it: this model without audio, or the `Qwen2VLModel` inside it.
Writes benchmarks/results/start_up.json.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from encode_speed import write_models
from result_files import claim, write_result
from timing import alternate, speedup

ROOT = Path(__file__).parent.parent
COMMANDS = ("train", "evaluate", "publish", "embed", "serve", "demo")
LONGEST_HELP = 3.0  # seconds
LONGEST_IMPORT = 1.5  # times as long as that of transformers
LONGEST_LOAD = 1.1  # times as long as that of `Qwen2VLModel`


def main() -> None:
    """Measures the commands and the imports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    runs = {f"{name} --help": [ROOT / f"{name}_vipolyqwen.py", "--help"] for name in COMMANDS}
    runs |= {f"import {name}": ["-c", f"import {name}"] for name in ("vipolyqwen", "transformers")}
    processor = "from vipolyqwen import ViPolyQwenModel, ViPolyQwenProcessor"
    runs |= {"our classes": ["-c", processor], "Qwen2VLModel": ["-c", "from transformers import Qwen2VLModel"]}
    with tempfile.TemporaryDirectory() as folder:
        write_models("mid", Path(folder))
        ours = "from vipolyqwen import ViPolyQwenModel as Model; "
        ours += f"model = Model.from_pretrained('{folder}/model', towers=['text', 'image'])"
        start(["-c", f"{ours}; model.vlm.save_pretrained('{folder}/vlm')"])
        stock = f"from transformers import Qwen2VLModel; Qwen2VLModel.from_pretrained('{folder}/vlm')"
        runs |= {"load ours": ["-c", ours], "load stock": ["-c", stock]}
        seconds = alternate(
            {name: lambda arguments=arguments: start(arguments) for name, arguments in runs.items()}, options.repeats
        )
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    claims = {
        name: claim(medians[name], LONGEST_HELP, medians[name] <= LONGEST_HELP) for name in list(runs)[: len(COMMANDS)]
    }
    ratio = speedup(seconds, "import transformers", "import vipolyqwen")["median"]
    claims["import vipolyqwen / transformers"] = claim(ratio, LONGEST_IMPORT, ratio <= LONGEST_IMPORT)
    ratio = round(1 / speedup(seconds, "load ours", "load stock")["median"], 3)
    claims["load ours / stock"] = claim(ratio, LONGEST_LOAD, ratio <= LONGEST_LOAD)
    write_result("start_up", claims, seconds=medians, repeats=options.repeats)


def start(arguments: list[str | Path]) -> None:
    """Runs a fresh interpreter to its end."""
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


if __name__ == "__main__":
    main()
