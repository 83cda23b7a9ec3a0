"""Means, intervals and paired tests of measurements that were repeated with several seeds on the same queries."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import nct, permutation_test, t, ttest_1samp

RESAMPLES = 4999
Hits = Sequence[Sequence[np.ndarray]]  # seeds, each of cells, each (queries,) float


@dataclass(frozen=True)
class Comparison:
    """One measurement against another one.

    Attributes:
        ours: mean over seeds of the mean over cells.
        theirs: the same of the other.
        by_seed: the differences, one a seed.
        seeds: 95 % interval of their mean by Student's t: the spread over seeds.
        p_seeds: paired t-test over the seeds, two-sided; NaN with one seed.
        queries: 95 % bootstrap interval of the difference between these very models on other queries.
        p_queries: two-sided test by random signs of the queries' differences; `None` if the queries are not the same.
    """

    ours: float
    theirs: float
    by_seed: list[float]
    seeds: tuple[float, float]
    p_seeds: float
    queries: tuple[float, float]
    p_queries: float | None

    @property
    def difference(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.by_seed)


def compare(ours: Hits, theirs: Hits, same_queries: bool = True) -> Comparison:
    """Compares two measurements, paired by seed and, unless told otherwise, by query; all cells count alike."""
    means = [[statistics.mean(float(cell.mean()) for cell in cells) for cells in side] for side in (ours, theirs)]
    by_seed = [one - other for one, other in zip(*means, strict=True)]
    averages = [[np.mean(cell, axis=0) for cell in zip(*side, strict=True)] for side in (ours, theirs)]
    if same_queries:
        differences = [one - other for one, other in zip(*averages, strict=True)]
        drawn, p_queries = bootstrap(differences), sign_flips(differences)
    else:
        drawn, p_queries = bootstrap(averages[0], seed=1) - bootstrap(averages[1], seed=2), None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Comparison(
        *(statistics.mean(side) for side in means),
        by_seed,
        interval(by_seed),
        paired_t(by_seed),
        (float(low), float(high)),
        p_queries,
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean, by Student's t."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def power(deviation: float, seeds: int, effect: float) -> float:
    """Chance that the paired t-test at 5 %, two-sided, shows a true mean difference, by the noncentral t.

    Args:
        deviation: standard deviation of the differences over seeds; without any, every effect is shown.
        seeds: number of differences; fewer than two show nothing.
        effect: the true mean difference.
    """
    if seeds < 2:
        return 0.0
    if deviation == 0:
        return 1.0
    critical = t.ppf(0.975, seeds - 1)
    shift = effect / deviation * math.sqrt(seeds)
    tails = (nct.sf(critical, seeds - 1, shift), nct.cdf(-critical, seeds - 1, shift))
    return float(np.nansum(tails))  # scipy gives NaN for a far tail, which is 0


def seeds_needed(deviation: float, effect: float, wanted: float = 0.8, most: int = 1000) -> int | None:
    """Returns the fewest seeds whose power reaches `wanted`; `None` if `most` are too few."""
    return next((seeds for seeds in range(2, most + 1) if power(deviation, seeds, effect) >= wanted), None)


def paired_t(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t-test; NaN for one pair; without any spread 1 if there is no difference, else 0."""
    if len(differences) < 2:
        return math.nan
    if max(differences) == min(differences):
        return 0.0 if differences[0] else 1.0
    return float(ttest_1samp(differences, 0.0).pvalue)


def bootstrap(cells: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
    """(resamples,) means over cells of the means of queries drawn anew within each cell."""
    rng = np.random.default_rng(seed)
    drawn = [cell[rng.integers(len(cell), size=(RESAMPLES, len(cell)))].mean(axis=1) for cell in cells]
    return np.mean(drawn, axis=0)


def sign_flips(cells: Sequence[np.ndarray]) -> float:
    """Two-sided p of the mean over cells if each query's difference had either sign with equal chance."""
    weighted = np.concatenate([cell / len(cell) for cell in cells])
    weighted = weighted[weighted != 0]  # most queries, and they have no sign to turn
    if len(weighted) < 2:  # one query alone is as far from 0 with either sign
        return 1.0
    result = permutation_test(
        (weighted,),
        lambda values, axis: values.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{sign}.{digits}f} ± {deviation:.{digits}f}"
