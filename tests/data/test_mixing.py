from collections import Counter

import numpy as np
import pytest

from vipolyqwen.data.mixing import BATCHING, mixture_visits
from vipolyqwen.data.sampler import MixtureBatches, MixtureSampler

SIZES = [5000, 770, 61, 3]


def sources_of(rows: list[int]) -> np.ndarray:
    return np.searchsorted(np.cumsum(SIZES), rows, side="right")


def sampler(batching: str, epoch: int = 0, batch_rows: int = 16, seed: int = 0) -> MixtureSampler:
    made = MixtureSampler(SIZES, [1.0] * len(SIZES), seed, batching=batching, batch_rows=batch_rows)
    made.set_epoch(epoch)
    return made


def test_temperature_flattens_the_sizes() -> None:
    assert mixture_visits([1000, 10], [1, 1]) == [1000, 10]
    assert mixture_visits([900, 100], [1, 1], temperature=2) == [750, 250]  # √900 : √100 = 3 : 1 of 1,000
    assert mixture_visits([900, 100], [1, 1], temperature=float("inf")) == [500, 500]
    assert mixture_visits([900, 100], [1, 9], temperature=2) == [900, 900]


def test_caps_bound_the_visits_and_every_source_keeps_one() -> None:
    assert mixture_visits([1000, 10], [1, 0.001], caps=[50, None]) == [50, 1]
    assert mixture_visits([900, 100], [1, 1], temperature=2, caps=[None, 30]) == [750, 30]


@pytest.mark.parametrize("temperature", [0.5, 0.0, -1.0, float("nan")])
def test_a_temperature_below_one_is_an_error(temperature: float) -> None:
    with pytest.raises(ValueError, match="mixture_temperature"):
        mixture_visits([1], [1], temperature)


@pytest.mark.parametrize("batching", BATCHING)
def test_every_row_once_in_each_epoch_and_other_orders_in_each(batching: str) -> None:
    first, second, other = (
        list(sampler(batching, *given)) for given in ((0,), (1,), (0, 16, 7))
    )  # of two epochs, and of another seed
    assert sorted(first) == sorted(second) == sorted(other) == list(range(sum(SIZES)))
    assert first != second and first != other


@pytest.mark.parametrize("batching", BATCHING)
def test_any_stretch_is_computed_directly(batching: str) -> None:
    drawn = sampler(batching)
    rows = drawn.rows(0, len(drawn))
    for start, end in ((0, 1), (1000, 1040), (1023, 1025), (5000, len(drawn)), (len(drawn) - 1, len(drawn))):
        assert drawn.rows(start, end) == rows[start:end]
    assert drawn.rows(7, 7) == []


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_share_every_row_and_resume_in_the_middle(batching: str, ranks: int) -> None:
    shares = [MixtureBatches(sampler(batching, batch_rows=16 * ranks), 16, rank, ranks) for rank in range(ranks)]
    before = [row for share in shares for batch in list(share)[:50] for row in batch]
    for share in shares:
        share.start_at(*share.position(0, 50))
    after = [row for share in shares for batch in share for row in batch]
    assert sorted(before + after) == list(range(sum(SIZES)))


def test_a_homogeneous_batch_is_of_one_source_and_the_rest_comes_last() -> None:
    batches = list(MixtureBatches(sampler("homogeneous"), 16))
    kinds = [Counter(sources_of(batch).tolist()) for batch in batches]
    full = sum(size // 16 for size in SIZES)
    assert all(len(kind) == 1 for kind in kinds[:full])
    assert sum((Counter(kind) for kind in kinds[full:]), Counter()) == {
        number: size % 16 for number, size in enumerate(SIZES) if size % 16
    }
    order = [next(iter(kind)) for kind in kinds[:full]]
    assert len(set(order[:60])) > 1 and order != sorted(order)


def test_a_stratified_batch_has_the_share_of_each_source() -> None:
    shares = np.array(SIZES) / sum(SIZES)
    for batch in list(MixtureBatches(sampler("stratified"), 64))[:-1]:
        counts = np.bincount(sources_of(batch), minlength=len(SIZES))
        assert (np.abs(counts - 64 * shares) <= 2).all()


def test_batches_of_one_source_need_the_same_batch_size_to_resume() -> None:
    assert sampler("homogeneous").identity() != sampler("homogeneous", batch_rows=32).identity()
    assert sampler("stratified").identity() == sampler("stratified", batch_rows=32).identity()
    assert set(sampler("mixed").identity()) == {"lengths", "visits", "seed"}  # as earlier checkpoints have it


@pytest.mark.parametrize("batching", BATCHING)
def test_millions_of_rows_cost_no_more(batching: str) -> None:
    drawn = MixtureSampler([11_000_000, 200_000], [1.0, 1.0], batching=batching, batch_rows=64)
    rows = drawn.rows(8_000_000, 8_000_064)
    assert len(set(rows)) == 64 and max(rows) < 11_200_000


def test_an_unknown_batching_is_an_error() -> None:
    with pytest.raises(ValueError, match="batching is 'sorted'"):
        MixtureSampler([1], [1], batching="sorted")
