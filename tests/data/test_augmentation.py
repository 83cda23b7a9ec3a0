"""Epochs of training: Vietnamese spellings by row and epoch, every row once, rows that turn bad."""

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers import random_image
from torch.utils.data import DataLoader

from vipolyqwen.data.augmentation import Augmentation
from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.sampler import MixtureBatches, MixtureSampler
from vipolyqwen.data.schema import TASKS
from vipolyqwen.data.sources import BadRow, PairDataset, load_pairs
from vipolyqwen.data.vietnamese import RULES
from vipolyqwen.training.bad_rows import ReplacedRows

TEXT = "Thời tiết ở Huế hôm nay đẹp, hoà thuận."


def row(number: int, epoch: int = 0, **given: Any) -> dict[str, Any]:
    base = {"id": str(number), "source": 0, "epoch": epoch, "task": "instr", "a": TEXT, "b": TEXT}
    return {**base, "image_placeholder": "<image>", **given}


def augmentation(rules: dict, sides: str = "a", seed: int = 0) -> Augmentation:
    return Augmentation.of(rules, sides, TASKS, seed)


@pytest.mark.parametrize("rule", list(RULES))
def test_each_rule_of_robustness_respells_side_a(rule: str) -> None:
    written = rule.replace(" ", "_").upper()
    changed = augmentation({"all": {written: 1.0}}).respell(row(1))
    assert (changed["a"], changed["b"]) == (RULES[rule](TEXT), TEXT)


def test_rules_are_drawn_at_their_rates_for_each_task() -> None:
    respelled = augmentation({"all": {"telex": 0.3, "vni": 0.2}, "ocr": {}, "instruction": {"NFD": 1.0}})
    found = Counter(respelled.respell(row(number, task="vqa_single"))["a"] for number in range(2000))
    assert abs(found[RULES["Telex"](TEXT)] - 600) < 80 and abs(found[RULES["VNI"](TEXT)] - 400) < 70
    assert respelled.respell(row(1, task="ocr"))["a"] == TEXT
    assert respelled.respell(row(1))["a"] == unicodedata.normalize("NFD", TEXT)


def test_row_epoch_side_and_seed_decide_and_nothing_else() -> None:
    half = augmentation({"all": {"no diacritics": 0.5}}, "both")
    first = [half.respell(row(number))["a"] for number in range(200)]
    assert first == [half.respell(row(number))["a"] for number in range(200)]
    others = [
        [half.respell(row(number, epoch=1))["a"] for number in range(200)],
        [half.respell(row(number))["b"] for number in range(200)],
        [augmentation({"all": {"no diacritics": 0.5}}, seed=1).respell(row(number))["a"] for number in range(200)],
    ]
    for other in others:
        assert 60 < sum(one == two for one, two in zip(first, other, strict=True)) < 140


def test_marks_and_other_languages_stay() -> None:
    every = augmentation({"all": {"VNI": 1.0}}, "both")
    marked = every.respell(row(1, a="Đây <ảnh> là gì?", b="The 红色 café", image_placeholder="<ảnh>"))
    assert (marked["a"], marked["b"]) == ("D9a6y <ảnh> la2 gi2?", RULES["VNI"]("The 红色 café"))


@pytest.mark.parametrize(
    ("rules", "sides", "message"),
    [
        ({"sts": {"Telex": 0.1}}, "a", "unknown task 'sts'; known: all, text_pair"),
        ({"all": {"telexx": 0.1}}, "a", "all: unknown rule 'telexx'; known: no diacritics.*Did you mean 'Telex'"),
        ({"all": {"Telex": 1.1}}, "a", "all.Telex is 1.1; a probability"),
        ({"all": {"Telex": True}}, "a", "all.Telex is True"),
        ({"all": {"Telex": 0.6, "VNI": 0.6}}, "a", "sum to 1.2"),
        ({"all": 0.1}, "a", "augment_vietnamese.all is 0.1; write"),
        (0.1, "a", "`augment_vietnamese` is 0.1"),
        ({}, "c", "`augment_sides` is 'c'; write one of a, b, both"),
    ],
)
def test_a_wrong_setting_is_named(rules: Any, sides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augmentation(rules, sides)
    assert augmentation({}) is None


# An epoch


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PairDataset:
    """61 pairs, of 64 rows three of which cannot be used and are skipped."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"id": str(number), "a": TEXT, "b": "" if number in (5, 20, 63) else "y"} for number in range(64)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [{"path": str(tmp_path / "a.jsonl"), "task": "instr"}]
    return load_pairs(sources, TASKS, 400, on_bad_row="skip", max_bad_rows=0.1)


def epoch_of(
    pairs: PairDataset, collate: Any, epoch: int, ranks: int, workers: int, resumed_at: int = 0
) -> tuple[list[str], dict[str, Any]]:
    """Returns the ids of an epoch of all ranks, and what `collate` gives of each."""
    ids, found = [], {}
    for rank in range(ranks):
        sampler = MixtureSampler(pairs.source_lengths, pairs.source_weights, seed=3)
        sampler.set_epoch(epoch)
        batches = MixtureBatches(sampler, 4, rank, ranks)
        batches.start_at(epoch, resumed_at)
        for batch in DataLoader(pairs, batch_sampler=batches, collate_fn=collate, num_workers=workers):
            ids += [each["id"] for each in batch]
            found |= {each["id"]: each["a"] for each in batch}
    return ids, found


class Respell:
    """Respells the rows of a batch; a class, so that workers can unpickle it."""

    def __init__(self) -> None:
        self.augmentation = augmentation({"all": {"no diacritics": 0.5}})

    def __call__(self, rows: list[dict]) -> list[dict]:
        return [self.augmentation.respell(each) for each in rows]


def test_every_row_of_an_epoch_comes_once_and_spelled_alike_over_ranks_workers_and_a_resume(
    pairs: PairDataset,
) -> None:
    assert [bad.id for bad in pairs.bad_rows] == ["5", "20", "63"]
    good = sorted(str(number) for number in range(64) if number not in (5, 20, 63))
    _, spelled = epoch_of(pairs, Respell(), 1, 1, 0)
    assert len(set(spelled.values())) == 2
    for ranks, workers in ((1, 0), (1, 2), (2, 0), (2, 2), (3, 0), (3, 2)):
        ids, found = epoch_of(pairs, Respell(), 1, ranks, workers)
        assert sorted(ids) == good and found == spelled
        before = MixtureSampler(pairs.source_lengths, pairs.source_weights, seed=3)
        before.set_epoch(1)
        half = 4 * ranks * 2
        seen = [pairs.row(number).id for number in before.rows(0, half)]
        for after in {1, ranks, 2}:  # also with another number of ranks
            ids, found = epoch_of(pairs, Respell(), 1, after, workers if after == ranks else 0, resumed_at=half)
            assert sorted(seen + ids) == good and found.items() <= spelled.items()
    assert epoch_of(pairs, Respell(), 0, 1, 0)[1] != spelled


def test_keys_stay_those_of_the_text_as_written(pairs: PairDataset, tiny: tuple) -> None:
    plain = MixedBatchCollator(tiny[1], TASKS, prefix_dropout=0.0)
    respelled = MixedBatchCollator(tiny[1], TASKS, 0.0, augmentation=augmentation({"instr": {"Telex": 1.0}}))
    rows = pairs.__getitems__([0, 1])
    one, two = plain(rows), respelled(rows)
    assert torch.equal(one["a_keys"], two["a_keys"])
    assert one["input_ids"].shape != two["input_ids"].shape or not torch.equal(one["input_ids"], two["input_ids"])
    assert rows[0]["a"] == TEXT


# Rows that turn bad


def test_a_row_that_turns_bad_is_replaced_by_a_certain_other_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: tuple
) -> None:

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)
    for number in range(6):
        random_image(rng).save(tmp_path / f"{number}.png")
    rows = [{"id": str(number), "a": "x", "b": f"y{number}", "images": f"{number}.png"} for number in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [{"path": str(tmp_path / "a.jsonl"), "task": "ocr"}]
    strict, lenient = (load_pairs(sources, TASKS, 400, on_bad_row=policy) for policy in ("error", "skip"))
    (tmp_path / "2.png").unlink()
    (tmp_path / "4.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2.png': it cannot be read"):
        strict[2]
    found = [lenient[number] for number in range(6)]
    assert [each["replaces"] and each["replaces"].id for each in found] == [None, None, "2", None, "4", None]
    assert [found[number]["replaces"].cause for number in (2, 4)] == ["missing images_a", "unreadable images_a"]
    assert found[2]["id"] in "0135" and found[2]["id"] == lenient[2]["id"]
    batch = MixedBatchCollator(tiny[1], TASKS)(found)
    assert (len(batch["ids"]), [bad.id for bad in batch["replaced"]]) == (6, ["2", "4"])
    for workers in (0, 2):
        loaded = [each["id"] for rows in DataLoader(lenient, 3, num_workers=workers, collate_fn=list) for each in rows]
        assert loaded == [each["id"] for each in found]
    for number in range(6):
        (tmp_path / f"{number}.png").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="0.png': it cannot be read"):
        lenient[0]


def test_replaced_rows_are_counted_once_and_stop_a_run_above_the_limit(pairs: PairDataset) -> None:

    replaced = ReplacedRows.of(pairs, 0.1)
    gone = [BadRow("a.jsonl", number, str(number), "missing images_a", f"row {number} is gone") for number in range(4)]
    replaced.add(gone[:3])
    assert replaced.summary() == {"bad_rows": 6, "bad_rows/invalid b": 3, "bad_rows/missing images_a": 3}
    replaced.add(gone[:2])
    assert replaced.summary()["bad_rows"] == 6
    replaced.add(gone[3:])
    with pytest.raises(ValueError, match=r"(?s)7 of 64 rows .*4 missing images_a, 3 invalid b.*row 3 is gone"):
        replaced.summary()
