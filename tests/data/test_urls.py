import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import random_image

from vipolyqwen.data import media_paths
from vipolyqwen.data.prepare import PrepareOptions, prepare
from vipolyqwen.data.recipes import read_data_recipe
from vipolyqwen.data.schema import RowError, declare_tasks
from vipolyqwen.data.sources import load_pairs

URL = "https://user:secret@example.org/a/0.png"


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Any]:
    rows = [{"id": str(n), "a": "?", "b": f"b{n}", "images": [URL.replace("0.png", f"{n}.png")]} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"path": str(tmp_path / "rows.jsonl"), "task": "vqa_single"}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs that were fetched; the second image cannot be."""
    urls: list[str] = []

    def download(url: str, allow_urls: bool | str, max_bytes: int, seconds: float) -> bytes:
        assert allow_urls is True and max_bytes > 0 and seconds > 0
        urls.append(url)
        if "1.png" in url:
            raise ValueError("'https://example.org/a/1.png' cannot be fetched: 404.")
        buffer = BytesIO()
        random_image(np.random.default_rng(0)).save(buffer, "PNG")
        return buffer.getvalue()

    monkeypatch.setattr(media_paths, "download", download)
    return urls


def test_urls_are_refused_by_default_and_passwords_not_shown(source: dict[str, Any], fetched: list[str]) -> None:
    with pytest.raises(RowError, match="allow_urls") as error:
        load_pairs([source], declare_tasks(), 400)
    assert "example.org" in str(error.value) and "secret" not in str(error.value) and fetched == []


def test_allowed_urls_are_fetched_when_their_row_is_read(source: dict[str, Any], fetched: list[str]) -> None:
    pairs = load_pairs([{**source, "allow_urls": True}], declare_tasks(), 400)
    assert fetched == []
    assert pairs[0]["images_a"][0].size == (60, 48) and fetched == [URL]
    with pytest.raises(RowError, match="404") as error:
        pairs[1]
    assert "secret" not in str(error.value)


def test_prepare_fetches_each_once(source: dict[str, Any], fetched: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "r.json.yaml"
    recipe.write_text(json.dumps({"train_data": [{**source, "allow_urls": True}]}), encoding="utf-8")
    report = prepare(PrepareOptions(str(recipe), str(tmp_path / "out")))
    assert (report["sources"][0]["rows"], report["sources"][0]["dropped"], len(fetched)) == (1, 1, 2)
    made = read_data_recipe(tmp_path / "out/recipe.yaml")
    assert load_pairs(made.settings["train_data"], made.tasks, 400)[0]["images_a"][0].size == (60, 48)
    assert len(fetched) == 2
