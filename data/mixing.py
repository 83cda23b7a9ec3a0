"""Mixes sources: visits of each in an epoch, and the order of the visits, computed for any stretch of it."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from .permutation import draw, permute

BATCHING = ("mixed", "homogeneous", "stratified")
Order = Callable[[int, int], np.ndarray]  # positions [first, last) of an epoch -> their visits, int64
STRETCH = 1024  # mean visits of a stretch of the stratified order, which is sorted as a whole


def mixture_visits(
    lengths: Sequence[int],
    weights: Sequence[float],
    temperature: float = 1.0,
    caps: Sequence[int | None] | None = None,
) -> list[int]:
    """Returns the visits of each source in an epoch, at least one of each.

    Of temperature T, the share of a source of n rows and weight w is proportional to (w·n)^(1/T) (Devlin et al. 2018,
    multilingual BERT, exponent 1/T): 1 keeps the sizes, ∞ makes all sources equal. An epoch has Σ w·n visits before
    the caps, whatever the temperature.

    Args:
        lengths: rows of each source.
        weights: visits of each row at temperature 1.
        temperature: at least 1.
        caps: most visits of each source in an epoch, `None` for no limit.

    Raises:
        ValueError: the temperature is below 1.
    """
    if not temperature >= 1.0:
        raise ValueError(f"mixture_temperature is {temperature}; it must be at least 1, which keeps the sizes.")
    sizes = np.array(weights, np.float64) * np.array(lengths, np.float64)
    shares = sizes if temperature == 1.0 else sizes ** (1 / temperature)
    visits = shares if temperature == 1.0 else shares * (sizes.sum() / shares.sum())
    limits = [math.inf] * len(lengths) if caps is None else [math.inf if cap is None else cap for cap in caps]
    return [max(1, round(min(number, limit))) for number, limit in zip(visits.tolist(), limits, strict=True)]


def mixed_order(visits: Sequence[int], key: np.ndarray) -> Order:
    """Returns the order in which all visits are shuffled together.

    Visits are numbered source by source: those of the first are [0, visits[0]).

    Args:
        visits: visits of each source.
        key: (1,) uint64, selects the order.
    """
    total = np.int64(sum(visits))
    return lambda first, last: permute(np.arange(first, last), total, key)


def homogeneous_order(visits: Sequence[int], key: np.ndarray, batch_rows: int) -> Order:
    """Returns the order in which each stretch of `batch_rows` is of one source, the rest of all sources at the end.

    Full batches of all sources are shuffled; fewer than `batch_rows` visits of each source remain, which come mixed.

    Args:
        visits: visits of each source.
        key: (1,) uint64, selects the order.
        batch_rows: rows of a batch of all ranks.
    """
    numbers = np.array(visits, np.int64)
    starts = np.cumsum(numbers) - numbers
    full = numbers // batch_rows
    ends, rests = np.cumsum(full), numbers - full * batch_rows
    rest_ends = np.cumsum(rests)

    def order(first: int, last: int) -> np.ndarray:
        places = np.arange(first, last)
        batch, row = places // batch_rows, places % batch_rows
        is_full = batch < ends[-1]
        found = np.empty(len(places), np.int64)
        if is_full.any():
            chosen = permute(batch[is_full], ends[-1], key)
            source = np.searchsorted(ends, chosen, side="right")
            number = chosen - (ends[source] - full[source])
            found[is_full] = starts[source] + number * batch_rows + row[is_full]
        if not is_full.all():
            chosen = permute(places[~is_full] - ends[-1] * batch_rows, rest_ends[-1], key)
            source = np.searchsorted(rest_ends, chosen, side="right")
            number = chosen - (rest_ends[source] - rests[source])
            found[~is_full] = starts[source] + full[source] * batch_rows + number
        return found

    return order


def stratified_order(visits: Sequence[int], key: np.ndarray) -> Order:
    """Returns the order in which any stretch has close to the same share of each source.

    Visit k of a source of n visits has the time (k + u)/n, u drawn for each source; visits stand in the order of time.
    Between two times, a source has its share of the visits, up to one.

    Args:
        visits: visits of each source.
        key: (1,) uint64, selects the order.
    """
    numbers = np.array(visits, np.int64)
    starts, total = np.cumsum(numbers) - numbers, int(numbers.sum())
    shifts = draw(key, len(numbers))
    stretches = -(-total // STRETCH)

    def counts(stretch: int) -> np.ndarray:
        """Returns the visits of each source before a stretch."""
        if stretch >= stretches:
            return numbers
        return np.clip(np.ceil(numbers * (stretch / stretches) - shifts), 0, numbers).astype(np.int64)

    def sorted_visits(stretch: int) -> np.ndarray:
        before, after = counts(stretch), counts(stretch + 1)
        source = np.repeat(np.arange(len(numbers)), after - before)
        place = np.concatenate([np.arange(*ends) for ends in zip(before, after, strict=True)])
        times = (place + shifts[source]) / numbers[source]
        return (starts[source] + place)[np.lexsort((source, times))]

    def order(first: int, last: int) -> np.ndarray:
        stretch = _last_before(first, stretches, lambda each: int(counts(each).sum()))
        start, found = int(counts(stretch).sum()), [np.empty(0, np.int64)]
        end = start
        while end < last:
            found.append(sorted_visits(stretch))
            end, stretch = end + len(found[-1]), stretch + 1
        return np.concatenate(found)[first - start : last - start]

    return order


def _last_before(position: int, stretches: int, rows_before: Callable[[int], int]) -> int:
    """Returns the last stretch that begins at `position` or earlier."""
    low, high = 0, stretches
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if rows_before(middle) <= position else (low, middle)
    return low
