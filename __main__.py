"""Console commands: `vipolyqwen COMMAND …`, or `python -m vipolyqwen COMMAND …`.

A command's own file stays the one place of its arguments; it runs here as it does by its path.
"""

import argparse
import importlib.util
import runpy
import sys
from dataclasses import dataclass

from vipolyqwen import __version__


@dataclass(frozen=True)
class Command:
    """A command: its module below `vipolyqwen.`, the extra that it takes (`None`: no extra), and its purpose."""

    module: str
    extra: str | None
    purpose: str


COMMANDS = {
    "data": Command("data.__main__", "train", "`data inspect RECIPE`: figures, faults and a page of all pairs"),
    "train": Command("train_vipolyqwen", "train", "trains a recipe"),
    "evaluate": Command("evaluate_vipolyqwen", "evaluate", "runs suites, spellings, explanations"),
    "publish": Command("publish_vipolyqwen", "publish", "a checkpoint to a repository on the Hub or in a folder"),
    "embed": Command("embed_vipolyqwen", "embed", "a corpus to Parquet shards of vectors"),
    "index": Command("serving.index", "search", "an index of these shards"),
    "search": Command("serving.search", "search", "searches it with a text, an image or audio"),
    "serve": Command("serve_vipolyqwen", "serve", "a server with OpenAI's /v1/embeddings"),
    "export": Command("export_vipolyqwen", "export", "the text route to ONNX"),
    "app": Command("app", "demo-app", "a page to try a model"),
    "doctor": Command("doctor", None, "checks a repository against its fingerprint"),
    "demo": Command("demo_vipolyqwen", "train", "trains a toy on a generated world, and searches with it"),
}


def main(argv: list[str] | None = None) -> None:
    """Runs a command; ends as it does."""
    name, rest = read_command(sys.argv[1:] if argv is None else argv)
    command = COMMANDS[name]
    sys.argv = [f"vipolyqwen {name}", *rest]
    try:
        runpy.run_module(f"vipolyqwen.{command.module}", run_name="__main__")
    except ModuleNotFoundError as error:
        if command.extra is None or error.name is None or error.name.split(".")[0] == "vipolyqwen" or is_there(error):
            raise
        sys.exit(
            f"error: `vipolyqwen {name}` needs {error.name!r}, which is not installed; install the extra: "
            f"pip install 'vipolyqwen[{command.extra}]', or in a checkout: pip install -e '.[{command.extra}]'"
        )


def read_command(argv: list[str]) -> tuple[str, list[str]]:
    """Returns the command's name and its arguments."""
    width = max(map(len, COMMANDS))
    purposes = "\n".join(f"  {name:{width}}  {command.purpose}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="vipolyqwen",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"commands:\n{purposes}\n\n`vipolyqwen COMMAND --help` lists the arguments of one.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vipolyqwen {__version__}")
    parser.add_argument("command", choices=COMMANDS, help="see above")
    return parser.parse_args(argv[:1]).command, argv[1:]


def is_there(error: ModuleNotFoundError) -> bool:
    """Whether the package of a missing module is installed, so that an extra would not help."""
    return importlib.util.find_spec(str(error.name).split(".")[0]) is not None


if __name__ == "__main__":
    main()
