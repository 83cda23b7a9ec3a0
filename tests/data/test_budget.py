import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import load_with_prefixes, random_image, save_tiny_model, write_pairs

from vipolyqwen.data.budget import BudgetBatches
from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.mixing import BATCHING
from vipolyqwen.data.row_costs import row_costs
from vipolyqwen.data.sampler import MixtureSampler
from vipolyqwen.data.sources import load_pairs

SIZES = [700, 90, 11]
RNG = np.random.default_rng(0)
COSTS = np.stack([RNG.lognormal(3, 1, sum(SIZES)), RNG.integers(0, 2, sum(SIZES)) * 1000], axis=1).astype(np.uint32)
BUDGETS = (400, 6000)
ROWS = 24


def shares(ranks: int, batching: str = "mixed", budgets: tuple = BUDGETS, drop_last: bool = False) -> list:
    return [
        BudgetBatches(
            MixtureSampler(SIZES, [1.0] * 3, 5, batching=batching, batch_rows=ROWS * ranks),
            ROWS,
            COSTS,
            budgets,
            rank,
            ranks,
            drop_last,
        )
        for rank in range(ranks)
    ]


def batches_of(parts: list, epoch: int = 0) -> list[list[list[int]]]:
    """The batches of an epoch, each with the rows of every rank."""
    for part in parts:
        part.sampler.set_epoch(epoch)
    return list(zip(*[[list(rows) for rows in part] for part in parts], strict=True))


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_once_and_no_part_beyond_its_budgets(batching: str, ranks: int) -> None:
    parts = shares(ranks, batching)
    for epoch in (0, 1):
        batches = batches_of(parts, epoch)
        assert sorted(row for batch in batches for part in batch for row in part) == list(range(sum(SIZES)))
        assert len(batches) == parts[0].begin(epoch)[2]
        for part in (part for batch in batches for part in batch):
            assert len(part) <= ROWS
            assert len(part) <= 1 or (COSTS[part].sum(axis=0) <= BUDGETS).all()
    assert len(parts[0]) == parts[0].begin(0)[2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_part_ends_only_where_the_next_row_would_exceed_a_budget(ranks: int) -> None:
    in_order = [part for batch in batches_of(shares(ranks)) for part in batch if part]
    for part, following in zip(in_order, in_order[1:], strict=False):
        with_next = [*part, following[0]]
        assert len(with_next) > ROWS or (COSTS[with_next].sum(axis=0) > BUDGETS).any()


def test_budgets_are_filled_by_hand() -> None:
    costs = np.array([[3, 0], [3, 0], [4, 0], [11, 0], [1, 1], [1, 1]], np.uint32)
    sampler = MixtureSampler([6], [1.0])
    sampler.visited = lambda first, last, epoch: np.arange(first, last)  # in their order
    parts = [list(rows) for rows in BudgetBatches(sampler, 4, costs, (10, 1))]
    assert parts == [[0, 1, 2], [3], [4], [5]]  # 3 + 3 + 4 = 10; 11 alone; then one pixel each


def test_planning_searches_the_sums_once_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    search = np.searchsorted
    monkeypatch.setattr(
        np, "searchsorted", lambda sums, *rest, **kw: searches.append(len(sums)) or search(sums, *rest, **kw)
    )
    (part,) = shares(1, budgets=(1, math.inf))
    assert len(part.plan(0)) == sum(SIZES)  # each row alone, of 801
    assert searches.count(sum(SIZES)) == 2


@pytest.mark.parametrize("budget", [10**20, math.inf, 1e300])
def test_a_budget_of_any_size_bounds_nothing(budget: float) -> None:
    (part,) = shares(1, budgets=(budget, budget))
    assert [len(rows) for rows in part] == [ROWS] * (sum(SIZES) // ROWS) + [sum(SIZES) % ROWS]


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (3, 2), (2, 3)])
def test_a_run_resumes_at_the_same_row_with_another_number_of_ranks(batching: str, before: int, after: int) -> None:
    first = shares(before, batching)
    seen = [row for batch in batches_of(first, 1)[:7] for part in batch for row in part]
    place = first[0].position(1, 7)
    second = shares(after, batching)
    for part in second:
        part.start_at(*place, accumulation=2)
        part.sampler.batch_rows = first[0].sampler.batch_rows  # `homogeneous` needs the same batch of all ranks
    row, counted, total = second[0].begin(1)
    batches = batches_of(second, 1)
    assert counted % 2 == 0 and len(batches) == total
    assert not any(part for batch in batches[:counted] for part in batch)
    assert sorted(seen + [row for batch in batches for part in batch for row in part]) == list(range(sum(SIZES)))
    assert first[0].position(1, len(first[0].plan(1))) == (2, 0)


def test_a_homogeneous_batch_stays_within_a_source() -> None:
    batches = batches_of(shares(2, "homogeneous"))
    full = sum(SIZES[source] // (2 * ROWS) for source in range(3)) * 2 * ROWS
    seen = 0
    for batch in batches:
        rows = [row for part in batch for row in part]
        seen += len(rows)
        if seen <= full:
            assert len(set(np.searchsorted(np.cumsum(SIZES), rows, side="right"))) == 1


def test_the_last_batch_without_a_row_for_every_rank_can_be_dropped() -> None:
    kept, dropped = shares(3), shares(3, drop_last=True)
    everything, complete = batches_of(kept), batches_of(dropped)
    assert everything[: len(complete)] == complete and len(everything) - len(complete) in (0, 1)
    assert all(part for batch in complete for part in batch)


def test_a_plan_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    one = shares(2)[0].plan(3).tolist()
    monkeypatch.setattr("vipolyqwen.data.budget.PLANNED", 30)
    assert shares(2)[0].plan(3).tolist() == one


# Costs


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")


def test_costs_are_those_of_the_collated_rows(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    write_pairs(tmp_path)
    _, processor, tasks = load_with_prefixes(tmp_path / "base")
    pairs = load_pairs([{"path": str(tmp_path / "pairs.jsonl")}], tasks, processor.min_audio_samples)
    costs = row_costs(pairs, processor)
    assert costs.shape == (len(pairs), 2)
    batch = MixedBatchCollator(processor, tasks, prefix_dropout=0.0)(pairs.__getitems__(range(len(pairs))))
    frames = np.zeros(2 * len(pairs))
    frames[batch["has_audio"].numpy()] = batch["audio_attention_mask"].sum(dim=1).numpy() // 320
    found = (batch["attention_mask"].sum(dim=1).numpy() + frames).reshape(2, -1).sum(axis=0)
    assert (costs[:, 0] - found >= 0).all() and (costs[:, 0] - found <= 3).all()  # no prefix; a part of a frame
    shown = batch["image_grid_thw"].prod(dim=1)[batch["image_indices"]].sum() * processor.image_processor.patch_size**2
    assert costs[:, 1].sum() == shown


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A folder with images of noise, and a processor of inputs of 120 tokens and of images of up to 400."""
    folder = tmp_path_factory.mktemp("wide")
    save_tiny_model(folder / "base")
    _, processor, tasks = load_with_prefixes(folder / "base")
    processor.tokenizer.model_max_length = 120
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 400 * 28 * 28}
    for name, size in {"large.png": (700, 500), "small.png": (60, 48)}.items():
        random_image(RNG, *size).save(folder / name)
    return folder, processor, tasks


@pytest.mark.parametrize(
    "row",
    [
        {"a": "một", "b": "hai", "images_a": ["large.png"]},  # shrunk to the tokens of an input
        {"a": "một", "b": "hai", "images_a": ["large.png"] * 4},
        {"a": "dài " * 200, "b": "hai", "images_a": ["small.png", "large.png"]},  # of which text keeps a quarter
        {"a": "<image> một <image> hai", "b": "ba", "images_a": ["small.png", "small.png"]},  # no text of the marks
        {
            "a": "một",
            "b": "hai",
            "negatives": [{"text": "[x]", "images": ["large.png"]}],
            "negative_images": "small.png",
        },
    ],
)
def test_images_cost_what_their_input_has_room_for(wide: tuple, tmp_path: Path, row: dict) -> None:
    folder, processor, tasks = wide
    write_rows(tmp_path / "pairs.jsonl", [row])
    source = {"path": str(tmp_path / "pairs.jsonl"), "task": "instr", "media_root": str(folder)}
    pairs = load_pairs([source], tasks, 400)
    ((tokens, pixels),) = row_costs(pairs, processor).tolist()
    batch = MixedBatchCollator(processor, tasks, prefix_dropout=0.0)([pairs[0]])
    inputs = len(batch["input_ids"])
    side = processor.image_processor.patch_size
    shown = int(batch["image_grid_thw"].prod(dim=1)[batch["image_indices"]].sum()) * side**2
    # without a prefix, an image may have a row of tokens more
    assert 0 <= tokens - int(batch["attention_mask"].sum()) <= inputs + 15 * (shown != pixels)
    assert shown <= pixels <= 1.15 * shown
    assert tokens <= inputs * 120


def test_another_mark_of_images_costs_other_tokens(wide: tuple, tmp_path: Path) -> None:
    folder, processor, tasks = wide
    write_rows(tmp_path / "pairs.jsonl", [{"a": "<image> một", "b": "hai", "images_a": "small.png"}])
    source = {"path": str(tmp_path / "pairs.jsonl"), "task": "instr", "media_root": str(folder)}
    marked, plain = (
        row_costs(load_pairs([source | more], tasks, 400), processor)[0, 0]
        for more in ({}, {"image_placeholder": "[x]"})
    )
    assert plain > marked


def test_a_url_costs_as_much_as_its_file(wide: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, processor, tasks = wide
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # fetched by no earlier run
    url = "https://example.org/small.png"
    rows = [{"a": "một", "b": "hai", "images_a": image} for image in (url, "small.png", url)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    source = {"path": str(tmp_path / "pairs.jsonl"), "task": "instr", "media_root": str(folder), "allow_urls": True}
    fetched = []
    monkeypatch.setattr(
        "vipolyqwen.data.row_costs.read_media",
        lambda path: fetched.append(path) or (folder / "small.png").read_bytes(),
    )
    of_url, of_file, again = row_costs(load_pairs([source], tasks, 400), processor).tolist()
    assert of_url == of_file == again and of_file[1] > 0
    assert fetched == [url]


def test_costs_are_measured_once_for_the_content_and_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "base")
    _, processor, tasks = load_with_prefixes(tmp_path / "base")
    file = tmp_path / "pairs.jsonl"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    measured = []
    monkeypatch.setattr("vipolyqwen.data.row_costs._measured", lambda *_: measured.append(1) or np.zeros((2, 2)))

    def measure() -> int:
        row_costs(load_pairs([{"path": str(file)}], tasks, 400), processor)
        return len(measured)

    write_rows(file, [{"task": "instr", "a": "một", "b": "hai"}, {"task": "instr", "a": "ba", "b": "bốn"}])
    assert measure() == measure() == 1
    processor.tokenizer.model_max_length = 77
    assert measure() == 2
    write_rows(file, [{"task": "instr", "a": "một", "b": "hai"}, {"task": "instr", "a": "ba", "b": "năm"}])
    assert measure() == 3


def test_a_row_of_random_lists_costs_as_much_as_its_largest_entry(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    _, processor, tasks = load_with_prefixes(tmp_path / "base")
    write_rows(tmp_path / "pairs.jsonl", [{"a": "một", "b": ["x", "y " * 30, "z"]}, {"a": "hai", "b": ["u"]}])
    source = {"path": str(tmp_path / "pairs.jsonl"), "task": "instr", "lists": {"b": "random"}}
    costs = row_costs(load_pairs([source], tasks, 400), processor)[:, 0]
    assert len(costs) == 2 and costs[0] > 30 > costs[1]
