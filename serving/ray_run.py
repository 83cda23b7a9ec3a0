"""Embeds a corpus on a Ray cluster: Ray Data hands out shares of the units, each actor holds the model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .corpus_run import CorpusOptions, Summary, embed_corpus
from .loading import load_model

try:
    import ray.data  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("This needs Ray Data; install it with: pip install -e '.[ray]'") from error

SHARES = 4  # for each worker, so that a slow one is left with little at the end


class EmbedShare:
    """An actor: loads the model once and embeds one share of the units after the other."""

    def __init__(self, model: Mapping[str, Any], options: CorpusOptions) -> None:
        self.model = load_model(**model)
        self.options = options

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Embeds the share `row["id"]`; returns the counts of `Summary`."""
        return vars(embed_corpus(self.model, replace(self.options, rank=int(row["id"]))))


def embed_with_ray(model: Mapping[str, Any], options: CorpusOptions, workers: int, gpus: float = 0.0) -> Summary:
    """Embeds a corpus with actors on the cluster that `RAY_ADDRESS` names, or on this machine.

    The shards are those of a run without Ray; all nodes see the corpus and `options.out` under the same paths.

    Args:
        model: arguments of `load_model`.
        options: what to embed; ranks are set here.
        workers: number of actors.
        gpus: GPUs of each actor.

    Returns:
        The counts of all shares; the seconds are those of all actors together.

    Raises:
        ValueError: `workers` is below 1, or as `embed_corpus`.
    """
    if workers < 1:
        raise ValueError(f"ray_workers is {workers}; it must be at least 1.")
    shares = SHARES * workers
    # In memory: reading blocks would need a free CPU, and the actors may hold all of them.
    numbers = ray.data.from_items([{"id": share} for share in range(shares)], override_num_blocks=shares)
    done = numbers.map(
        EmbedShare,
        fn_constructor_args=(dict(model), replace(options, rank=0, ranks=shares)),
        concurrency=workers,
        num_gpus=gpus or None,
    ).take_all()
    return Summary(*(sum(row[name] for row in done) for name in ("embedded", "skipped", "bad", "seconds")))
