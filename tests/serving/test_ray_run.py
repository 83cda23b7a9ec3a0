from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vipolyqwen.serving.corpus_run import CorpusOptions, embed_corpus
from vipolyqwen.serving.loading import LoadedModel

pytest.importorskip("ray.data")

import ray  # pyright: ignore[reportMissingImports]

from vipolyqwen.serving.ray_run import embed_with_ray


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.mark.slow
def test_two_workers_write_the_shards_of_one_process(
    model: LoadedModel, corpus: Path, tmp_path: Path, cluster: None
) -> None:
    given: dict[str, Any] = {"source": {"path": str(corpus)}, "unit_rows": 2, "batch_size": 2}
    embed_corpus(model, CorpusOptions(**given, out=tmp_path / "alone"), report=lambda line: None)
    options = CorpusOptions(**given, out=tmp_path / "ray")
    summary = embed_with_ray({"source": model.source, "device": "cpu"}, options, workers=2)
    assert (summary.embedded, summary.skipped, summary.bad) == (11, 0, 3)
    for path in (tmp_path / "alone").rglob("*"):
        if path.is_file():
            assert (tmp_path / "ray" / path.relative_to(tmp_path / "alone")).read_bytes() == path.read_bytes()


def test_no_workers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ray_workers is 0"):
        embed_with_ray({}, CorpusOptions(source={}, out=tmp_path), workers=0)
