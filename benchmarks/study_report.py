"""What a study's figures say: tables, a plot and one sentence for each question, with interval, seeds and power."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paired_statistics import interval, paired_t, power, seeds_needed, spread
from scipy.stats import binomtest

from vipolyqwen.evaluation.charts import interval_chart

EFFECT = 0.01  # the difference that a study should be able to show
POWER = 0.8
AT_CHANCE = 0.01  # p above which the hits of a cell could be those of a random order
Results = Mapping[str, Any]


MEASURES = {
    "recall": "recall@1",
    "rho": "ρ",
    "directions": "recall@1 of six directions",
    "rivals": "share nearer to the answer than to the other task's",
}


@dataclass(frozen=True)
class Question:
    """A claim that one variant measures more than another one.

    Attributes:
        hypothesis: which one it belongs to.
        claim: the statement that is tested.
        ours: a variant.
        theirs: the variant that it is compared with.
        ours_view: own (prefixes as trained) or bare (no prefix).
        theirs_view: likewise.
        figure: recall (recall@1), rho (Spearman), directions (recall@1 between modalities) or rivals (share of queries
            nearer to their side b than to that of the other task on the same image).
        tasks: whose cells count; empty: all.
        groups: parts of the names of groups that count; empty: all.
    """

    hypothesis: str
    claim: str
    ours: str
    theirs: str
    ours_view: str = "own"
    theirs_view: str = "own"
    figure: str = "recall"
    tasks: Sequence[str] = ()
    groups: Sequence[str] = ()

    def concerns(self, cell: str) -> bool:
        """Whether a cell, "task/group", counts."""
        task, _, group = cell.partition("/")
        return (not self.tasks or task in self.tasks) and (
            not self.groups or any(part in group for part in self.groups)
        )


@dataclass(frozen=True)
class Answer:
    """What the seeds say: differences of ours and theirs, and how much they could have shown."""

    ours: float
    theirs: float
    by_seed: list[float]
    low: float | None
    high: float | None
    p: float | None
    deviation: float
    power: float
    seeds_needed: int | None
    excluded: list[str]
    verdict: str


def answer(results: Results, question: Question) -> Answer | None:
    """Answers a question; `None` if no cell is left to answer it on."""
    cells, excluded = _cells(results, question)
    if not cells:
        return None
    sides = ((question.ours, question.ours_view), (question.theirs, question.theirs_view))
    ours, theirs = (
        [value(run[view], question.figure, cells) for run in results["runs"][name]] for name, view in sides
    )
    by_seed = [one - other for one, other in zip(ours, theirs, strict=True)]
    several = len(by_seed) > 1
    low, high = interval(by_seed) if several else (None, None)
    deviation = statistics.stdev(by_seed) if several else math.nan
    return Answer(
        statistics.mean(ours),
        statistics.mean(theirs),
        by_seed,
        low,
        high,
        paired_t(by_seed) if several else None,
        deviation,
        power(deviation, len(by_seed), EFFECT) if several else 0.0,
        seeds_needed(deviation, EFFECT, POWER) if several else None,
        excluded,
        verdict(low, high),
    )


def verdict(low: float | None, high: float | None) -> str:
    """Reads a 95 % interval of the difference; `None` where one seed gives none."""
    if low is None or high is None:
        return "not answered: one seed has no interval"
    if low > 0:
        return "held"
    if high < 0:
        return "contradicted: significant in the other direction"
    if -EFFECT < low and high < EFFECT:
        return f"no difference of {EFFECT} or more"
    return "not shown"


def value(view: Mapping[str, Any], figure: str, cells: Sequence[str]) -> float:
    """The figure of one run, the mean over cells."""
    if figure == "directions":
        return statistics.mean(view["directions"].values())
    if figure in ("rho", "rivals"):
        return statistics.mean(view[figure][cell] for cell in cells)
    return statistics.mean(recall(view["ranks"][cell]) for cell in cells)


def recall(ranks: Sequence[int]) -> float:
    """Share of queries whose right answer comes first."""
    return sum(rank == 1 for rank in ranks) / len(ranks)


def _cells(results: Results, question: Question) -> tuple[list[str], list[str]]:
    """The cells that a question is answered on, and those at chance under both variants."""
    runs = results["runs"]
    if question.figure == "directions":
        return ["all"], []
    if question.figure in ("rho", "rivals"):
        return [cell for cell in runs[question.ours][0]["own"][question.figure] if question.concerns(cell)], []
    chosen = [cell for cell in results["chance"] if question.concerns(cell)]
    sides = ((question.ours, question.ours_view), (question.theirs, question.theirs_view))
    at_chance = [cell for cell in chosen if all(is_at_chance(results, name, view, cell) for name, view in sides)]
    return [cell for cell in chosen if cell not in at_chance], at_chance


def is_at_chance(results: Results, name: str, view: str, cell: str) -> bool:
    """Whether the hits of a middling seed could be those of a random order (one-sided binomial test)."""
    hits = statistics.median_low(sum(rank == 1 for rank in run[view]["ranks"][cell]) for run in results["runs"][name])
    return binomtest(hits, results["queries"][cell], results["chance"][cell], "greater").pvalue > AT_CHANCE


def write_report(results: Results, out: Path) -> None:
    """Writes OUT.json, OUT.svg and OUT.md."""
    answers = [(question, answer(results, question)) for question in map(_question, results["questions"])]
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: found for name, found in results.items() if name not in ("runs", "questions")}
    figures = {
        "answers": [asdict(question) | ({} if found is None else asdict(found)) for question, found in answers],
        **kept,
        "seeds": len(next(iter(results["runs"].values()))),
        "runs": {name: [_without_ranks(run) for run in runs] for name, runs in results["runs"].items()},
    }
    text = json.dumps(rounded(figures), indent=1, ensure_ascii=False)
    out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    out.with_suffix(".svg").write_text(plot(results), encoding="utf-8")
    page = "\n".join(markdown(results, answers, out.name))
    out.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


def _question(given: Mapping[str, Any]) -> Question:
    return Question(**given)


def _without_ranks(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run with recall@1 in place of all ranks."""
    views = {
        view: {name: found for name, found in run[view].items() if name != "ranks"}
        | {"recall@1": {cell: recall(ranks) for cell, ranks in run[view]["ranks"].items()}}
        for view in ("own", "bare")
    }
    return {**run, **views}


def rounded(found: Any) -> Any:
    """Five digits; NaN, which JSON does not have, as null."""
    if isinstance(found, float):
        return round(found, 5) if math.isfinite(found) else None
    if isinstance(found, Mapping):
        return {name: rounded(one) for name, one in found.items()}
    return [rounded(one) for one in found] if isinstance(found, list | tuple) else found


def plot(results: Results) -> str:
    """Change of recall@1 of each variant against the first, with its interval over seeds."""
    first, *others = results["runs"]
    cells = list(results["chance"])
    rows = {}
    for name in others:
        pairs = zip(results["runs"][name], results["runs"][first], strict=True)
        change = [value(one["own"], "recall", cells) - value(other["own"], "recall", cells) for one, other in pairs]
        rows[name] = (statistics.mean(change), *interval(change))
    return interval_chart(rows, f"recall@1 less that of {first}, 95 % over {len(results['runs'][first])} seeds")


def markdown(results: Results, answers: Sequence[tuple[Question, Answer | None]], name: str) -> list[str]:
    """The report."""
    seeds = len(next(iter(results["runs"].values())))
    trained = {
        "heads": "new poolings and projections on frozen towers",
        "all": "all parameters",
    }[results["train"]]
    steps = results["steps"]
    return [
        f"# {results['title']}",
        "",
        f"`{results['command']}`: {seeds} seeds, {results['minutes']:.1f} minutes of training and measuring on "
        f"{results['machine']}, torch {results['versions']['torch']}. Base: {', '.join(results['bases'])}; trained: "
        f"{trained}, {steps} steps of {results['batch_size']} pairs at learning rate {results['learning_rate']:g}.",
        "",
        "recall@1 of side b by side a within each task and group, the mean of all; ρ: Spearman, the mean of the cells "
        "with graded scores. own: prefixes as trained; bare: none. ± is the standard deviation over seeds.",
        "",
        f"![change of recall@1]({name}.svg)",
        "",
        *_variants(results),
        "",
        *_by_part(results, 0),
        "",
        *_by_part(results, 1),
        "",
        *_directions(results),
        *_balance(results),
        *_geometry(results),
        "## Answers",
        "",
        f"Power: the chance of a paired t-test at 5 % to show a true difference of {EFFECT} with this spread and "
        "these seeds. p-values are not corrected for the number of questions.",
        "",
        *(f"- {sentence(question, found)}" for question, found in answers),
        "",
    ]


def sentence(question: Question, found: Answer | None) -> str:
    """The answer to a question with all that it rests on."""
    head = f"**{question.hypothesis}**, {question.claim}"
    if found is None:
        return f"{head}: **not answered**, every cell is at chance."
    measure = MEASURES[question.figure]
    text = (
        f"{head}: **{found.verdict}**. {measure} {found.ours:.3f} against {found.theirs:.3f}: "
        f"{found.ours - found.theirs:+.4f}"
    )
    if found.low is not None and found.high is not None and found.p is not None:
        text += (
            f", 95 % {found.low:+.4f} … {found.high:+.4f} over {len(found.by_seed)} seeds (p = {found.p:.4f}); power "
            f"{found.power:.0%}, seeds for {POWER:.0%}: {found.seeds_needed or 'over 1000'}"
        )
    if found.excluded:
        text += f"; at chance and left out: {', '.join(found.excluded)}"
    return text + "."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def _variants(results: Results) -> list[str]:
    """One row a variant: recall and ρ, with prefixes and without."""
    cells = list(results["chance"])
    rows = []
    for name, runs in results["runs"].items():
        row = [name]
        for view in ("own", "bare"):
            row.append(spread([value(run[view], "recall", cells) for run in runs], 3))
            graded = list(runs[0][view]["rho"])
            row.append(spread([value(run[view], "rho", graded) for run in runs], 3) if graded else "-")
        rows.append(row)
    return _table(["variant", "recall@1 own", "ρ own", "recall@1 bare", "ρ bare"], rows)


def _by_part(results: Results, part: int) -> list[str]:
    """recall@1 (own) by task or by group; ρ in brackets where scores are graded."""
    names = list(dict.fromkeys(cell.split("/", 1)[part] for cell in results["chance"]))

    def shown(runs: Sequence[Mapping[str, Any]], name: str) -> str:
        cells = [cell for cell in results["chance"] if cell.split("/", 1)[part] == name]
        found = f"{statistics.mean(value(run['own'], 'recall', cells) for run in runs):.3f}"
        graded = [cell for cell in cells if cell in runs[0]["own"]["rho"]]
        if graded:
            found += f" ({statistics.mean(value(run['own'], 'rho', graded) for run in runs):.3f})"
        return found

    rows = [[variant, *(shown(runs, name) for name in names)] for variant, runs in results["runs"].items()]
    chances = []
    for name in names:
        of_name = [chance for cell, chance in results["chance"].items() if cell.split("/", 1)[part] == name]
        chances.append(f"{statistics.mean(of_name):.3f}")
    return [
        f"recall@1 (own; ρ in brackets) by {('task', 'group')[part]}, means over seeds:",
        "",
        *_table([("task", "group")[part], *names], [*rows, ["chance", *chances]]),
    ]


def _means(results: Results, find: Callable[[Mapping[str, Any]], Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Means over seeds of named figures, by variant."""
    found = {}
    for name, runs in results["runs"].items():
        of_runs = [find(run) for run in runs]
        keys = [key for key in of_runs[0] if all(key in run and run[key] is not None for run in of_runs)]
        found[name] = {key: statistics.mean(run[key] for run in of_runs) for key in keys}
    return found


def _directions(results: Results) -> list[str]:
    """recall@1 of the six directions."""
    found = _means(results, lambda run: run["own"].get("directions", {}))
    names = list(next(iter(found.values())))
    if not names:
        return []
    rows = [[variant, *(f"{values[name]:.3f}" for name in names)] for variant, values in found.items()]
    return ["recall@1 of the six directions:", "", *_table(["variant", *names], rows), ""]


def _balance(results: Results) -> list[str]:
    """Raw loss of each task at the beginning, and share of the gradient at the beginning and at the end."""
    first = _means(results, lambda run: run.get("losses", {}).get("first", {}))
    last = _means(results, lambda run: run.get("losses", {}).get("last", {}))
    starts = next(iter(first.values()))
    tasks = [name.split("/")[1] for name in starts if name.startswith("gradient_share/")]
    if not tasks:
        return []
    rows = []
    for variant in first:
        raw = [f"{first[variant].get(f'loss/{task}', math.nan):.2f}" for task in tasks]
        rows.append([f"{variant}: loss", *raw, ""])
        for when, values in (("first", first[variant]), ("last", last[variant])):
            shares = [values.get(f"gradient_share/{task}", math.nan) for task in tasks]
            cosines = [found for name, found in values.items() if name.startswith("gradient_cosine/")]
            mean = f"{statistics.mean(cosines):+.3f}" if cosines else "-"
            rows.append([f"{variant}: gradient share, {when} steps", *(f"{share:.3f}" for share in shares), mean])
    header = ["", *tasks, "mean gradient cosine of tasks"]
    title = "Unweighted loss of a row and share of the weighted gradient, first and last steps:"
    return [title, "", *_table(header, rows), ""]


def _geometry(results: Results) -> list[str]:
    """Alignment, uniformity and gap, the means of the tasks."""
    rows = []
    for variant, runs in results["runs"].items():
        found = [run["own"]["geometry"].values() for run in runs]
        means = [
            statistics.mean(statistics.mean(task[name] for task in tasks) for tasks in found)
            for name in ("alignment", "uniformity", "gap")
        ]
        rows.append([variant, *(f"{mean:.3f}" for mean in means)])
    header = ["variant", "alignment ‖a − b‖² (low is close)", "uniformity (low is even)", "gap of sides"]
    return ["Geometry of the space, means over tasks:", "", *_table(header, rows), ""]
