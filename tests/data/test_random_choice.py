"""Lists of which each epoch draws one entry: by row, epoch and seed, over ranks, workers and a resume."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import random_image
from PIL import Image
from torch.utils.data import DataLoader

from vipolyqwen.data.sampler import MixtureBatches, MixtureSampler
from vipolyqwen.data.schema import TASKS
from vipolyqwen.data.sources import PairDataset, content_key, load_pairs
from vipolyqwen.training import teacher
from vipolyqwen.training.teacher import teach_pairs

CAPTIONS = 3
ROWS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of pairs with `CAPTIONS` captions, and one pair without a list."""
    folder = tmp_path_factory.mktemp("choices")
    rows = [
        {"id": str(row), "a": f"x{row}", "b": [f"{row} {caption}" for caption in range(CAPTIONS)]}
        for row in range(ROWS)
    ]
    rows.append({"id": str(ROWS), "a": "alone", "b": f"{ROWS} 0"})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def png_bytes(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def load(path: Path, **settings: Any) -> PairDataset:
    bad = {name: settings.pop(name) for name in ("on_bad_row", "max_bad_rows") if name in settings}
    return load_pairs([{"path": str(path), "task": "instr", "lists": {"b": "random"}, **settings}], TASKS, 400, **bad)


@pytest.fixture(scope="module")
def pairs(folder: Path) -> PairDataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        return load(folder / "a.jsonl")


def epoch_of(
    pairs: PairDataset, epoch: int, ranks: int = 1, workers: int = 0, resumed_at: int = 0, seed: int = 3
) -> dict[str, str]:
    """Returns the caption of each row of an epoch, each of which comes once."""
    found: list[tuple[str, str]] = []
    for rank in range(ranks):
        sampler = MixtureSampler(pairs.source_lengths, pairs.source_weights, seed=seed)
        sampler.set_epoch(epoch)
        batches = MixtureBatches(sampler, 4, rank, ranks)
        batches.start_at(epoch, resumed_at)
        for batch in DataLoader(pairs, batch_sampler=batches, collate_fn=list, num_workers=workers):
            found.extend((row["id"], row["b"]) for row in batch)
    assert len(dict(found)) == len(found) == len(pairs) - resumed_at
    return dict(found)


def test_a_row_has_one_caption_in_an_epoch_over_ranks_workers_and_a_resume(pairs: PairDataset) -> None:
    assert len(pairs) == ROWS + 1
    whole = epoch_of(pairs, 1)
    assert all(caption.split()[0] == row for row, caption in whole.items())
    for ranks, workers in ((1, 2), (2, 0), (2, 2), (3, 0), (3, 2)):
        assert epoch_of(pairs, 1, ranks, workers) == whole
        assert epoch_of(pairs, 1, ranks, workers, resumed_at=4 * ranks).items() < whole.items()


def test_epochs_and_seeds_draw_every_caption_alike(pairs: PairDataset) -> None:
    epochs = [epoch_of(pairs, epoch) for epoch in range(20)]
    counts = Counter(caption.split()[1] for drawn in epochs for row, caption in drawn.items() if row != str(ROWS))
    assert all(abs(count - 20 * ROWS / CAPTIONS) < 60 for count in counts.values()) and len(counts) == CAPTIONS
    assert len({caption for drawn in epochs for caption in drawn.values()}) == ROWS * CAPTIONS + 1
    same = sum(epochs[0][row] == epochs[1][row] for row in epochs[0])
    assert same < ROWS * 0.6
    assert epoch_of(pairs, 0, seed=4) != epochs[0]


def test_without_an_epoch_a_row_is_that_of_epoch_0(pairs: PairDataset) -> None:
    first = epoch_of(pairs, 0, seed=0)
    assert [pairs[row]["b"] for row in range(len(pairs))] == [first[str(row)] for row in range(len(pairs))]


def test_an_unusable_caption_is_left_out_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    rows = [{"id": "i", "a": "x", "b": [7, "good", {"no": "text"}, "fine"]}, {"id": "j", "a": "y", "b": [{"no": 1}]}]
    (folder / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load(folder / "bad.jsonl", on_bad_row="skip", max_bad_rows=1.0)
    assert len(found) == 1 and {bad.id for bad in found.bad_rows} == {"i", "j"}
    assert {"good", "fine"} <= {epoch_of(found, epoch)["i"] for epoch in range(30)} <= {"7", "good", "fine"}
    with pytest.raises(ValueError, match="no"):
        load(folder / "bad.jsonl")


def test_every_caption_counts_for_a_changed_file_and_is_taught(
    folder: Path, pairs: PairDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    text = (folder / "a.jsonl").read_text()
    (folder / "changed.jsonl").write_text(text.replace("47 2", "47 two"))
    changed = load(folder / "changed.jsonl")
    assert changed.fingerprints() != pairs.fingerprints()
    assert sorted(b for _, b in pairs.texts()) == sorted(
        [f"{row} {caption}" for row in range(ROWS) for caption in range(CAPTIONS)] + [f"{ROWS} 0"]
    )
    monkeypatch.setattr(teacher, "load_teacher", lambda *_: lambda texts: np.ones((len(texts), 5)))
    assert teach_pairs(changed, ["instr"], "json:dumps", None, torch.device("cpu")) == 5
    assert not changed.teacher.lacks(np.array([content_key(b) for _, b in changed.texts()])).any()


def test_media_of_a_table_are_those_of_their_choice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    images = [random_image(rng) for _ in range(3)]
    rows = [{"id": "i", "a": "", "images_a": [png_bytes(each) for each in images], "b": ["u", "v"], "c": "w"}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    settings = {"task": "ocr", "lists": {"images_a": "random", "b": "all"}}
    found = load(folder / "images.parquet", **settings)
    assert [found[row]["b"] for row in range(2)] == ["u", "v"]
    seen = set()
    for epoch in range(20):
        sampler = MixtureSampler(found.source_lengths, found.source_weights)
        sampler.set_epoch(epoch)
        for batch in DataLoader(found, batch_sampler=MixtureBatches(sampler, 2), collate_fn=list):
            seen |= {(row["b"], np.asarray(row["images_a"][0]).tobytes()) for row in batch}
    assert seen == {(b, np.asarray(image).tobytes()) for b in "uv" for image in images}


@pytest.mark.parametrize("pick", ["all", "random"])
def test_lists_of_several_columns_have_a_limit_of_combinations(tmp_path: Path, pick: str) -> None:
    rows = [{"a": ["x"] * 32, "b": [str(n) for n in range(32)]}, {"a": "y", "b": [str(n) for n in range(1025)]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(tmp_path / "a.jsonl"), "task": "instr", "lists": {"a": pick, "b": pick}}
    with pytest.raises(ValueError, match=r"32 in a and 32 in b.*1024 combinations.*limit is 1000.*`first`"):
        load_pairs([source], TASKS, 400)
    pairs = load_pairs([source], TASKS, 400, on_bad_row="skip", max_bad_rows=1)
    assert [bad.cause for bad in pairs.bad_rows] == ["too many combinations"]
    assert len(pairs) == (1025 if pick == "all" else 1)  # one list alone has no limit
