"""Evaluates a model: on suites of tasks, under spelling variants, with shorter vectors, or by inspecting its pooling.

    python evaluate_vipolyqwen.py MODEL [--suite papers|vietnamese|chinese|trimodal|demo|FILE.yaml] [--against MODEL …]
    python evaluate_vipolyqwen.py MODEL --robustness [PAIRS]
    python evaluate_vipolyqwen.py MODEL --dims 1024,512,256,128,64 [--precision float32,int8,binary] [--pairs PAIRS]
    python evaluate_vipolyqwen.py MODEL --explain [INPUT…] [--corpus PAIRS] [--failures PAIRS]

MODEL is a folder or the Hub id of any model that mteb or sentence-transformers loads. A suite runs through mteb and
writes to OUT mteb's results (`results/`, ready to submit; `custom/results/` for custom tasks), and for each suite and
model summary.md and summary.json with scores, prompts, speed and memory. PAIRS is a file of pairs, or a recipe with
`eval_data`. INPUT is a text, the path of an image or audio file, or JSON such as
'{"image": ["a.png", "b.png"], "text": "Which one?", "task": "vqa_single"}'.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vipolyqwen import __version__
from vipolyqwen.data.command_line import run_command
from vipolyqwen.data.precision import PRECISIONS

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEMO_PAIRS = Path("outputs/demo/recipe.yaml")


def main(argv: list[str] | None = None) -> int:
    """Runs the selected evaluation; returns the exit code: 1 if a task failed or does not resolve, else 0.

    What an evaluation takes is imported by it alone, so that `--help` loads no library.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = read_options(argv)
    if options.explain is not None:
        write_page(options)
    elif options.dims is not None:
        from vipolyqwen.evaluation.dimensions import measure_dimensions, write_dimensions

        result = measure_dimensions(load(options), options.pairs, options.dims, options.precision)
        command = shlex.join(["python", "evaluate_vipolyqwen.py", *argv])
        print(write_dimensions(result, options.out or Path("outputs/dimensions"), options.model, command))
    elif options.robustness is not None:
        from vipolyqwen.evaluation.robustness import robustness, write_result

        result = robustness(load(options), options.robustness)
        command = shlex.join(["python", "evaluate_vipolyqwen.py", *argv])
        write_result(result, options.out or Path("outputs/robustness"), command)
    else:
        try:
            import mteb  # noqa: F401, needed by suites only
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Suites need mteb; install it with: pip install -c constraints.txt -e '.[evaluate]'"
            ) from error
        from vipolyqwen.evaluation.run import run_suite

        options.out = options.out or Path("outputs/evaluation")
        return run_suite(options)
    return 0


def read_options(argv: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"vipolyqwen {__version__}")
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument(
        "--out", type=Path, help="default: outputs/evaluation, …/robustness, …/dimensions, …/explain.html"
    )
    parser.add_argument("--device", help="such as cuda or cpu")
    parser.add_argument("--trust_remote_code", action="store_true", help="run a model's code from the Hub")
    suites = parser.add_argument_group("suites")
    suites.add_argument("--suite", default="papers", help="name in recipes/suites, or a YAML file; default: papers")
    suites.add_argument("--against", nargs="+", default=[], help="more models; 'baselines': the suite's baselines")
    suites.add_argument("--check", action="store_true", help="check offline that every task resolves and runs")
    suites.add_argument("--save_vectors", action="store_true", help="write vectors; ignores cached results")
    suites.add_argument("--batch_size", type=int, default=32, help="rows per batch; default: 32")
    suites.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights; ignored for models registered in mteb",
    )
    spellings = parser.add_argument_group("Vietnamese spellings")
    spellings.add_argument(
        "--robustness", type=Path, nargs="?", const=DEMO_PAIRS, metavar="PAIRS", help=f"default: {DEMO_PAIRS}"
    )
    shorter = parser.add_argument_group("dimensions and precision")
    shorter.add_argument(
        "--dims", type=numbers, metavar="N,N,…", help="numbers of components to keep, such as 1024,256"
    )
    shorter.add_argument(
        "--precision",
        type=words,
        default=["float32", "int8", "binary"],
        metavar="NAME,…",
        help=f"of {', '.join(PRECISIONS)}; default: float32,int8,binary",
    )
    shorter.add_argument("--pairs", type=Path, default=DEMO_PAIRS, help=f"default: {DEMO_PAIRS}")
    inside = parser.add_argument_group("explanations")
    inside.add_argument("--explain", nargs="*", metavar="INPUT", help="inputs to explain")
    inside.add_argument("--corpus", type=Path, metavar="PAIRS", help="pairs whose sides are searched for neighbours")
    inside.add_argument("--failures", type=Path, metavar="PAIRS", help="pairs whose worst failures are listed")
    options = parser.parse_args(argv)
    if options.explain is None and (options.corpus or options.failures):
        parser.error("--corpus and --failures require --explain")
    chosen = {"explain": options.explain, "robustness": options.robustness, "dims": options.dims}
    if len(given := [f"--{name}" for name, value in chosen.items() if value is not None]) > 1:
        parser.error(f"{' and '.join(given)} are different evaluations; give one of them.")
    if options.explain == [] and options.failures is None:
        parser.error("--explain: give at least one INPUT, or --failures PAIRS")
    return options


def numbers(text: str) -> list[int]:
    """Reads numbers between commas."""
    return [int(word) for word in words(text)]


def words(text: str) -> list[str]:
    """Reads distinct words between commas."""
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def write_page(options: argparse.Namespace) -> None:
    """Writes the page of `--explain`."""
    from vipolyqwen.evaluation.explain import explain, read_input

    inputs = [read_input(text) for text in options.explain]
    page = explain(load(options), options.model, inputs, options.corpus, options.failures)
    out = options.out or Path("outputs/explain.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    print(f"{out}: {len(page) / 2**20:.1f} MiB")


def load(options: argparse.Namespace) -> "SentenceTransformer":
    """Loads the model; code in a folder may always run."""
    from sentence_transformers import SentenceTransformer

    may_run_code = options.trust_remote_code or Path(options.model).is_dir()
    return SentenceTransformer(options.model, device=options.device, trust_remote_code=may_run_code)


if __name__ == "__main__":
    run_command(main)
