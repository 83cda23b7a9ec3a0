"""Which candidates become hard negatives."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MiningOptions:
    """Which candidates become negatives.

    Attributes:
        count: negatives of a row at most.
        skip: nearest candidates that are left out, as the likeliest right answers.
        within: rank of the last candidate that is considered.
        margin: a negative's cosine to side a is lower than that of side b by at least this.
        same: cosine of a candidate to side b from which on it is taken for the same answer.
        min_score: rows scored lower get no negatives, because their side b is no right answer.
        unit_rows: rows of a shard at most.
    """

    count: int = 5
    skip: int = 0
    within: int = 100
    margin: float = 0.05
    same: float = 0.95
    min_score: float = 0.5
    unit_rows: int = 1024

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.skip < self.within:
            raise ValueError(
                f"count is {self.count}, skip {self.skip} and within {self.within}; count must be at least 1, and "
                "skip at least 0 and below within."
            )
        for name, low in (("margin", -2.0), ("same", -1.0)):
            if not low <= getattr(self, name) <= 2.0:
                raise ValueError(f"{name} is {getattr(self, name)}; a cosine or a difference of two is expected.")
        if self.unit_rows < 1:
            raise ValueError(f"unit_rows is {self.unit_rows}; it must be at least 1.")
