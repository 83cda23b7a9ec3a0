"""Fixtures that several tests of training share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base and pairs of `world`, laid out for `helpers.build_trainer`."""
    folder = tmp_path_factory.mktemp("corpus")
    for link, target in (("base", "base"), ("pairs.jsonl", "pairs.jsonl"), ("media", "")):
        (folder / link).symlink_to(world / target)
    return folder
