"""Runs mteb's mock tasks, which need no network, on a saved repository."""

import os
from pathlib import Path

import pytest
from helpers import TEXTS  # noqa: F401  # sets HF_HUB_OFFLINE before mteb reads it

mteb = pytest.importorskip("mteb")

from mteb.mocks import ALL_MOCK_TASK_TEST_GRID  # noqa: E402
from mteb.models import SentenceTransformerEncoderWrapper  # noqa: E402
from mteb.results import TaskResult  # noqa: E402

from vipolyqwen.publishing.repository import save_repository  # noqa: E402

AUDIO_MODULES = ("torchcodec.decoders", "torchaudio")  # mteb decodes with the one and resamples with the other


def loads(module: str) -> bool:
    """Whether a module that is built against one torch runs with the one that is here."""
    try:
        __import__(module)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


@pytest.mark.slow
def test_every_mock_task_of_mteb_runs(tiny: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    save_repository(*tiny, tmp_path / "model")
    model = SentenceTransformerEncoderWrapper(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    modalities = ["text", "image", *(["audio"] if all(map(loads, AUDIO_MODULES)) else [])]
    model.mteb_model_meta.modalities = modalities  # mteb reads them off a repository on the Hub, not off a folder

    results = mteb.mock_run(model)
    expected = {
        task.metadata.name for task in ALL_MOCK_TASK_TEST_GRID if set(task.metadata.modalities) <= set(modalities)
    }
    assert {name for name, result in results.items() if isinstance(result, TaskResult)} == expected, (
        results.to_markdown()
    )
    for modality in modalities:
        assert [row for row in results.modality_summary() if row[1] == modality and row[0].startswith("✓")]
