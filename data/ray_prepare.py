"""Prepares a recipe on a Ray cluster: Ray Data hands out shares of the shards."""

from typing import Any

from .prepare import SHARES, PrepareOptions, finish, prepare_share

try:
    import ray.data  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("This needs Ray Data; install it with: pip install -e '.[ray]'") from error


def prepare_with_ray(options: PrepareOptions, workers: int) -> dict[str, Any]:
    """Prepares a recipe with tasks on the cluster that `RAY_ADDRESS` names, or on this machine.

    The shards are those of a run without Ray; all nodes see the recipe, its files and `options.out` under the same
    paths.

    Args:
        options: what to prepare.
        workers: tasks at a time.

    Returns:
        The report, see `prepare`.

    Raises:
        ValueError: `workers` is below 1, or as `prepare`.
    """
    if workers < 1:
        raise ValueError(f"ray_workers is {workers}; it must be at least 1.")
    shares = SHARES * workers

    def write(row: dict[str, Any]) -> dict[str, Any]:
        return {"names": prepare_share(options, int(row["id"]), shares)}

    done = ray.data.range(shares, override_num_blocks=shares).map(write, concurrency=workers).take_all()
    return finish(options, [name for row in done for name in row["names"]])
