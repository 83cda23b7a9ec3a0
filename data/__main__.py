"""Tools for the data of a recipe: python -m vipolyqwen.data COMMAND RECIPE.

    check RECIPE [--reachable]            the mixture: sources, shares, licences; which can be reached
    inspect RECIPE [--page FILE.html]     what the pairs are, and the faults in them
    prepare RECIPE --out DIR              checked rows with their media, decoded and scaled, as Parquet shards
    mine RECIPE --model M --out DIR       hard negatives: wrong answers that the model M finds close

RECIPE is a YAML file with `train_data`, `eval_data` and `tasks`, or a file of pairs. `COMMAND --help` lists options.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .command_line import run_command
from .faults import find_faults
from .folder_lock import lock_folder
from .inspection import inspect_recipe
from .inspection_report import terminal_report, write_page
from .mining_options import MiningOptions
from .prepare import PrepareOptions, prepare
from .reachable import OK, first_of_hub, shapes_of, table_of
from .recipes import DataRecipe, read_data_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options = _parser().parse_args(argv)
    return options.run(read_data_recipe(options.recipe), options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vipolyqwen.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_check(commands.add_parser("check", help="sources of the mixture, shares, licences; which can be reached"))
    _add_inspect(commands.add_parser("inspect", help="table and page of the pairs, and the faults in them"))
    _add_prepare(commands.add_parser("prepare", help="checked rows with their media, as Parquet shards"))
    _add_mine(commands.add_parser("mine", help="fills `negatives` with wrong answers that a model finds close"))
    return parser


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="recipe")
    parser.add_argument(
        "--reachable", action="store_true", help="read the first row of each source, also from the Hub"
    )
    parser.set_defaults(run=_check)


def _check(recipe: DataRecipe, options: argparse.Namespace) -> int:
    shapes = shapes_of(recipe, first_of_hub if options.reachable else None)
    print(table_of(shapes))
    return int(any(shape.state == "on" and shape.reached not in ("", OK) for shape in shapes))


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="recipe, or file of pairs")
    parser.add_argument("--page", type=Path, help="HTML file to write (default: inspection.html)", metavar="FILE")
    parser.add_argument("--group_by", default="language", help="column of the language (default: language)")
    parser.add_argument("--max_rows", type=int, default=100_000, help="rows of each source (default: 100000)")
    parser.add_argument("--model", help="counts tokens as this model does (default: `model` of the recipe, if local)")
    parser.add_argument("--max_length", type=int, help="tokens of an input (default: that of the recipe, or 8192)")
    parser.set_defaults(run=_inspect)


def _inspect(recipe: DataRecipe, options: argparse.Namespace) -> int:
    if options.max_rows < 1:
        raise ValueError(f"max_rows is {options.max_rows}; read at least 1 row of each source.")
    model = options.model or recipe.settings.get("model")
    counter = _token_counter(model) if options.model or os.path.isdir(str(model)) else None
    seen = inspect_recipe(recipe, options.group_by, options.max_rows, counter, _bar)
    limit = options.max_length or recipe.settings.get("max_length", 8192)
    faults = find_faults(seen, limit)
    print(terminal_report(seen, faults))
    page = options.page or Path("inspection.html")
    write_page(seen, faults, options.recipe.name, page)
    print(f"\nPage: {page}")
    return 0


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="recipe, or file of pairs")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an unfinished run is continued")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--ray_workers", type=int, help="tasks on a Ray cluster, in place of processes")
    parser.add_argument("--max_pixels", type=int, help="of an image (default: that of the recipe, or 1003520)")
    parser.add_argument("--unit_rows", type=int, default=1024, help="rows of a shard at most (default: 1024)")
    parser.set_defaults(run=_prepare)


def _prepare(recipe: DataRecipe, options: argparse.Namespace) -> int:
    given = {name: recipe.settings.get(name) for name in ("max_audio_seconds", "max_audio_windows")}
    seconds = (given["max_audio_seconds"] or 30.0) * (given["max_audio_windows"] or 120)
    pixels = options.max_pixels or recipe.settings.get("max_pixels") or 1280 * 28 * 28
    wanted = PrepareOptions(str(options.recipe), str(options.out), pixels, seconds, unit_rows=options.unit_rows)
    with lock_folder(options.out, "prepare"):
        if options.ray_workers is not None:
            from .ray_prepare import prepare_with_ray

            report = prepare_with_ray(wanted, options.ray_workers)
        else:
            report = prepare(wanted, options.workers, _bar)
    for source in report["sources"]:
        rows, dropped, copies = (f"{source[name]:,}" for name in ("rows", "dropped", "duplicates"))
        print(f"{source['folder']}: {rows} rows ({copies} repeat another), {dropped} dropped, of {source['path']}")
        for cause, found in source["causes"].items():
            print(f"    {found['rows']:,}  {cause}\n           {found['example']}")
    print(f"Train with: python train_vipolyqwen.py {options.out / 'recipe.yaml'}")
    return 0


def _add_mine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="recipe, or file of pairs")
    parser.add_argument("--model", required=True, help="sentence-transformers model: a folder or the id of one")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an unfinished run is continued")
    parser.add_argument("--batch_size", type=int, default=32, help="inputs that pass the model together (default: 32)")
    parser.add_argument("--count", type=int, default=5, help="negatives of a row at most (default: 5)")
    parser.add_argument("--skip", type=int, default=0, help="nearest candidates to leave out (default: 0)")
    parser.add_argument("--within", type=int, default=100, help="last rank that is considered (default: 100)")
    parser.add_argument("--margin", type=float, default=0.05, help="cosine below the right answer (default: 0.05)")
    parser.add_argument("--same", type=float, default=0.95, help="cosine to side b of its equals (default: 0.95)")
    parser.add_argument("--min_score", type=float, default=0.5, help="of rows that get negatives (default: 0.5)")
    parser.add_argument("--unit_rows", type=int, default=1024, help="rows of a shard at most (default: 1024)")
    parser.set_defaults(run=_mine)


def _mine(recipe: DataRecipe, options: argparse.Namespace) -> int:
    from .mining import mine
    from .sides import encoder_of

    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(MiningOptions)}
    encode, state = encoder_of(options.model, options.batch_size)
    with lock_folder(options.out, "mine"):
        counts = mine(recipe, options.out, state, encode, MiningOptions(**given), _bar)
    print(f"{counts['mined']:,} of {counts['rows']:,} rows have {counts['negatives']:,} mined negatives.")
    print(f"Train with: python train_vipolyqwen.py {options.out / 'recipe.yaml'}")
    return 0


def _bar(rows: Iterable[Any]) -> Iterable[Any]:
    return tqdm(rows, disable=None)


def _token_counter(model: str) -> Callable[[Sequence[str]], list[int]]:
    from ..processing_vipolyqwen import ViPolyQwenProcessor

    tokenizer = ViPolyQwenProcessor.from_pretrained(model).tokenizer

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    return count


if __name__ == "__main__":
    run_command(main)
