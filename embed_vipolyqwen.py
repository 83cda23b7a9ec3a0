"""Embeds a corpus into Parquet shards of vectors; a second run continues where the first one ended.

    python embed_vipolyqwen.py MODEL INPUT --out DIR [--text COLUMN] [--precision int8] [--dimensions 256]
    accelerate launch --num_processes 8 embed_vipolyqwen.py MODEL INPUT --out DIR

INPUT is a JSONL, JSON, CSV, Parquet or Arrow file, a folder or glob of these, a folder written by `save_to_disk`, the
id of a Hub dataset, or a YAML file with the keys of one source of a recipe. A row is an input: its text, images and
audio. DIR/vectors/*.parquet holds ids and vectors, DIR/manifest.json the model's fingerprint, DIR/errors.parquet the
rows that cannot be embedded. Each rank of a launch takes its share of the units; so does each machine with --rank and
--ranks, or a Ray cluster with --ray_workers.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vipolyqwen import __version__
from vipolyqwen.data.command_line import run_command
from vipolyqwen.data.names import rename_old_keys
from vipolyqwen.data.precision import PRECISIONS
from vipolyqwen.data.yaml_files import read_yaml

if TYPE_CHECKING:
    from vipolyqwen.serving.corpus_run import CorpusOptions, Summary

COLUMNS = {"{}": "text", "images_{}": "images", "audio_{}": "audio", "id": "id"}  # of the schema, by side -> option


def main(argv: list[str] | None = None) -> int:
    """Embeds; returns the exit code: 0, also if some rows could not be embedded."""
    options = read_options(argv)
    from vipolyqwen.serving.corpus_run import CorpusOptions, embed_corpus  # after the arguments: they load torch
    from vipolyqwen.serving.loading import load_model

    corpus = CorpusOptions(
        source=read_source_keys(options),
        out=options.out,
        side=options.side,
        prompt_name=options.prompt_name,
        dimensions=options.dimensions,
        precision=options.precision,
        batch_size=options.batch_size,
        unit_rows=options.unit_rows,
        workers=options.workers,
        rank=options.rank,
        ranks=options.ranks,
    )
    names = ("device", "dtype", "revision", "trust_remote_code", "towers")
    model = {"source": options.model, **{name: getattr(options, name) for name in names}}
    if options.ray_workers is None:
        summary = embed_corpus(load_model(**model), corpus)
    else:
        from vipolyqwen.serving.ray_run import embed_with_ray

        summary = embed_with_ray(model, corpus, options.ray_workers, options.ray_gpus)
    print(describe(summary, corpus))
    return 0


def describe(summary: "Summary", corpus: "CorpusOptions") -> str:
    """Says what a run did."""
    bad = f", {summary.bad:,} bad ones in {corpus.out}/errors.parquet" if summary.bad else ""
    return (
        f"{corpus.out}: {summary.embedded:,} rows embedded in {summary.seconds:.1f} s, {summary.skipped:,} were "
        f"done before{bad}"
    )


def read_source_keys(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the keys of the source: those of INPUT if it is a YAML file, and the options."""
    from vipolyqwen.data.schema import OLD_COLUMNS

    source: dict[str, Any] = {"path": options.input}
    if Path(options.input).suffix in (".yaml", ".yml"):
        source = read_yaml(Path(options.input))
        if not isinstance(source, dict):
            raise ValueError(f"{options.input} holds {source!r:.80}; write the keys of one source: `path: …`.")
    columns = {name.format(options.side): getattr(options, option) for name, option in COLUMNS.items()}
    if columns := {name: column for name, column in columns.items() if column}:
        before = rename_old_keys(source.get("columns", {}), f"{options.input}: columns", OLD_COLUMNS)
        source["columns"] = {**before, **columns}
    given = {name: getattr(options, name) for name in ("media_root", "split", "name")}
    return {**source, **{name: value for name, value in given.items() if value is not None}}


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"vipolyqwen {__version__}")
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("input", help="file, folder, glob, Hub dataset, or YAML file with the keys of a source")
    parser.add_argument("--out", type=Path, required=True, help="folder of the vectors")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--text", help="column of the side's text; default: a, or text")
    rows.add_argument("--images", help="column of the image or images; default: images_a, images or image")
    rows.add_argument("--audio", help="column of the audio; default: audio_a or audio")
    rows.add_argument("--id", help="column of the ids; default: id, or FILE:ROW")
    rows.add_argument(
        "--side",
        choices=("a", "b"),
        default="a",
        help="side of pairs; default: a; for b, the columns are b, images_b, audio_b",
    )
    rows.add_argument("--media_root", help="folder of relative media paths; default: the folder of the file")
    rows.add_argument("--split", help="split of a Hub dataset or a folder; default: train")
    rows.add_argument("--name", help="configuration of a Hub dataset")
    vectors = parser.add_argument_group("vectors")
    vectors.add_argument("--prompt_name", help="prompt, such as a task's name; default: the general embedding")
    vectors.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    vectors.add_argument("--dimensions", type=int, help="components to keep, normalised again; default: all")
    run = parser.add_argument_group("run")
    run.add_argument("--batch_size", type=int, default=32, help="rows that pass the model together; default: 32")
    run.add_argument("--unit_rows", type=int, default=4096, help="rows of a shard at most; default: 4096")
    run.add_argument("--workers", type=int, default=0, help="processes that prepare batches ahead; default: 0")
    run.add_argument("--device", help="such as cuda or cpu; default: of the rank")
    run.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: as published"
    )
    run.add_argument(
        "--towers",
        nargs="+",
        choices=("text", "image", "audio"),
        help="towers to load, text among them; default: all of the model",
    )
    run.add_argument("--revision", help="branch, tag or commit of the model")
    run.add_argument("--trust_remote_code", action="store_true", help="run a model's code from the Hub")
    environment = os.environ
    run.add_argument("--rank", type=int, default=int(environment.get("RANK", 0)), help="default: of the launch, or 0")
    run.add_argument("--ranks", type=int, default=int(environment.get("WORLD_SIZE", 1)), help="default: as launched")
    ray = parser.add_argument_group("Ray")
    ray.add_argument("--ray_workers", type=int, help="actors on a Ray cluster, in place of ranks")
    ray.add_argument("--ray_gpus", type=float, default=0.0, help="GPUs of each actor; default: 0")
    options = parser.parse_args(argv)
    if options.device is None and "LOCAL_RANK" in environment:
        options.device = device_of_rank(int(environment["LOCAL_RANK"]))
    return options


def device_of_rank(local_rank: int) -> str | None:
    """Returns the GPU of a rank of a launch; `None`, the library's choice, without one."""
    import torch

    return f"cuda:{local_rank}" if torch.cuda.is_available() else None


if __name__ == "__main__":
    run_command(main)
