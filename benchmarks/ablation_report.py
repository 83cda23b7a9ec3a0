"""What the ablation study's figures say: tables, a plot, one sentence for each hypothesis, from the figures alone."""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ablation_runs import VARIANTS
from paired_statistics import Comparison, Hits, compare, interval, spread

from vipolyqwen.evaluation.charts import interval_chart

NGRAMS = "character n-grams"
KEEPS_UP = 0.05  # recall that a claim of "keeps up with" may lose
FIRST_LANGUAGE = "vi"
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A claim that one measurement is above another one, or below it by less than a margin.

    Attributes:
        hypothesis: which one it belongs to.
        claim: the statement that is tested.
        ours: variant and view ("own": prefixes as trained, "bare": no prefix).
        theirs: the same of the variant it is compared with.
        tasks: all (that both were trained on), text, audio, others than audio, or a task's name.
        margin: loss of recall that still passes.
    """

    hypothesis: str
    claim: str
    ours: tuple[str, str]
    theirs: tuple[str, str]
    tasks: str = "all"
    margin: float = 0.0


BASE = ("base", "own")
QUESTIONS = (
    Question("H1", "attention pooling finds more than the mean of all positions", BASE, ("mean pooling", "own")),
    Question("H1", "attention pooling finds more than the last position", BASE, ("last token", "own")),
    Question("H2", "a loss for each task finds more than InfoNCE alone", BASE, ("NCE only", "own")),
    Question(
        "H3", "one vector for all keeps up with a model of texts alone", BASE, ("text only", "own"), "text", KEEPS_UP
    ),
    Question("H3", "one vector for all keeps up with character n-grams", BASE, (NGRAMS, "own"), "text", KEEPS_UP),
    Question("H5", "with sounds in training, sounds are found", BASE, ("no audio", "own"), "audio"),
    Question("H5", "sounds in training help the other tasks", BASE, ("no audio", "own"), "others than audio"),
    Question("H6", "training with prefixes finds more than without any", BASE, ("no prefix", "own")),
    Question("H6", "one model finds more with its prefixes than without", BASE, ("base", "bare")),
    Question("H6", "OCR's prefix helps OCR", BASE, ("no OCR prefix", "own"), "ocr"),
    Question("H6", "prefix dropout helps inputs without prefix", ("base", "bare"), ("no prefix dropout", "bare")),
    Question("H7", "a loss for each task finds more than one fixed sum", BASE, ("fixed sum", "own")),
    Question("STW", "the published weights find more than equal ones", ("STW weights", "own"), BASE),
    Question(
        "Fixes", "the two fixes of the losses find more than the papers' losses", BASE, ("faithful losses", "own")
    ),
)


def write_report(results: Results, out: Path) -> None:
    """Writes OUT.json, OUT.svg and OUT.md."""
    answers = answer(results)
    out.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        "answers": [asdict(question) | as_json(found, question.margin) for question, found in answers],
        "recall@1": {
            name: {cell: [recall(run["own"]["ranks"][cell]) for run in runs] for cell in runs[0]["own"]["ranks"]}
            for name, runs in results["runs"].items()
        },
        **{name: value for name, value in results.items() if name not in ("runs", "ngrams")},
        "seconds": {name: [run["seconds"] for run in runs] for name, runs in results["runs"].items()},
    }
    text = json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False)
    out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    out.with_suffix(".svg").write_text(plot(results), encoding="utf-8")
    text = page(results, answers, out.name)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def as_json(found: Comparison, margin: float) -> dict[str, Any]:
    """A comparison and its verdict; one seed has no interval."""
    alone = {"seeds": None, "p_seeds": None} if len(found.by_seed) == 1 else {}
    return asdict(found) | alone | {"difference": found.difference, "verdict": verdict(found, margin)}


def answer(results: Results) -> list[tuple[Question, Comparison]]:
    """Answers every question whose runs exist."""
    answers = []
    for question in QUESTIONS:
        if {question.ours[0], question.theirs[0]} - {NGRAMS} <= set(results["runs"]):
            chosen = cells_of(results, question)
            if chosen:
                sides = [hits(results, *side, chosen) for side in (question.ours, question.theirs)]
                answers.append((question, compare(*sides)))
    return answers + languages(results)


def cells_of(results: Results, question: Question) -> list[str]:
    """The cells, "task/group", that a question is about."""
    missing = {task for name, _ in (question.ours, question.theirs) for task in results["left_out"].get(name, ())}
    kinds = results["tasks"]
    wanted = {
        "all": [task for task in kinds if task not in missing],
        "text": [task for task in kinds if kinds[task]["text"]],
        "audio": [task for task in kinds if kinds[task]["audio"]],
        "others than audio": [task for task in kinds if not kinds[task]["audio"]],
    }.get(question.tasks, [question.tasks])
    return [cell for cell in results["chance"] if cell.split("/")[0] in wanted]


def hits(results: Results, name: str, view: str, chosen: list[str]) -> Hits:
    """1 for each query whose right answer comes first, else 0: seeds, cells, (queries,)."""
    runs = results["runs"]["base"] if name == NGRAMS else results["runs"][name]
    ranks = [results["ngrams"] if name == NGRAMS else run[view]["ranks"] for run in runs]
    return [[(np.array(of_run[cell]) == 1).astype(float) for cell in chosen] for of_run in ranks]


def languages(results: Results) -> list[tuple[Question, Comparison]]:
    """H4: the first language against each other one, in tasks where both search equally many candidates."""
    count = results["candidates"]
    groups = list(dict.fromkeys(cell.split("/", 1)[1] for cell in count))
    answers = []
    for other in groups if FIRST_LANGUAGE in groups else ():
        pairs = [(f"{task}/{FIRST_LANGUAGE}", f"{task}/{other}") for task in results["tasks"]]
        pairs = [pair for pair in pairs if set(pair) <= set(count) and 0.9 <= count[pair[0]] / count[pair[1]] <= 1.1]
        if other != FIRST_LANGUAGE and pairs:
            tasks = ", ".join(cell.split("/")[0] for cell, _ in pairs)
            claim = f"{FIRST_LANGUAGE} is found as well as {other}"
            question = Question("H4", claim, BASE, BASE, tasks, KEEPS_UP)
            sides = [hits(results, *BASE, list(side)) for side in zip(*pairs, strict=True)]
            answers.append((question, compare(*sides, same_queries=False)))
    return answers


def verdict(found: Comparison, margin: float) -> str:
    """Held, did NOT hold, or not shown, by the interval over seeds."""
    low, high = found.seeds
    if low > -margin:
        return "held"
    return "did NOT hold" if high < -margin else "not shown"


def sentence(question: Question, found: Comparison) -> str:
    """The answer to a question with all that it rests on."""
    said, seeds = verdict(found, question.margin), len(found.by_seed)
    said = f"{said} with {seeds} seed{'s' * (seeds > 1)}" if said == "not shown" else said
    low, high = found.seeds
    over_seeds = (
        "no interval from one seed"
        if seeds == 1
        else (f"95 % interval {low:+.3f} … {high:+.3f} over seeds (paired t, p = {found.p_seeds:.3f})")
    )
    signs = "" if found.p_queries is None else f"; random signs, p = {found.p_queries:.4f}"
    tasks = "" if question.tasks == "all" else f", tasks: {question.tasks}"
    allowed = f", may lose {question.margin:.2f}" if question.margin else ""
    text = (
        f"**{question.hypothesis}**, {question.claim}: **{said}**. recall@1 {found.ours:.3f} against "
        f"{found.theirs:.3f}{tasks}{allowed}: {found.difference:+.3f}, {over_seeds}, "
        f"{found.queries[0]:+.3f} … {found.queries[1]:+.3f} over queries (bootstrap{signs})."
    )
    clear = found.queries[0] > -question.margin or found.queries[1] < -question.margin
    if verdict(found, question.margin) == "not shown" and clear:
        text += " On other queries these very models would differ likewise; models of other seeds may not."
    return text


def recall(ranks: list[int], k: int = 1) -> float:
    """Share of queries whose right answer is among the first k."""
    return statistics.mean(rank <= k for rank in ranks)


def trained_cells(results: Results, name: str) -> list[str]:
    """The cells of the tasks that a variant was trained on."""
    return [cell for cell in results["chance"] if cell.split("/")[0] not in results["left_out"][name]]


def means(results: Results, name: str, view: str, chosen: list[str]) -> list[float]:
    """recall@1 of each seed, the mean over cells."""
    return [statistics.mean(float(cell.mean()) for cell in cells) for cells in hits(results, name, view, chosen)]


def changes(results: Results, name: str) -> list[float]:
    """recall@1 less the base's of the same seed, over the tasks that the variant was trained on."""
    chosen = trained_cells(results, name)
    both = (means(results, which, "own", chosen) for which in (name, "base"))
    return [own - base for own, base in zip(*both, strict=True)]


def plot(results: Results) -> str:
    """Each variant's change of recall@1 with its interval over seeds."""
    rows = {}
    for name in results["runs"]:
        if name != "base":
            change = changes(results, name)
            rows[name] = (statistics.mean(change), *interval(change))
    return interval_chart(rows, f"recall@1 less the base's, 95 % over {len(results['runs']['base'])} seeds")


def page(results: Results, answers: list[tuple[Question, Comparison]], name: str) -> str:
    """The report as markdown."""
    seeds = len(results["runs"]["base"])
    lines = [
        "# Ablations: claims of the papers and measurements",
        "",
        f"`{results['command']}`: {seeds} seeds, {results['minutes']:.1f} minutes on {results['machine']}, torch "
        f"{results['versions']['torch']}, transformers {results['versions']['transformers']}. {how(results)} "
        f"{speed(results)}",
        "",
        "recall@1 of side b by side a within each task and language, the mean of all of these; against the base of "
        "the same seed, over the tasks that a variant was trained on. own: with the prefixes of training; bare: "
        "without any. ± is the standard deviation over seeds, […] the 95 % interval of the mean by Student's t. "
        "p-values are not corrected for the number of questions.",
        "",
        f"![change of recall@1]({name}.svg)",
        "",
        *variant_table(results),
        "",
        "recall@1 by task (own), mean over seeds and languages:",
        "",
        *task_table(results),
        "",
        "recall@1 of the base by language, mean over seeds:",
        "",
        *language_table(results),
        "",
        "## Hypotheses",
        "",
        *(f"- {sentence(question, found)}" for question, found in sorted(answers, key=lambda pair: order(pair[0]))),
        "",
        "Not measured here: multi-vector models and pretrained models of a single purpose (H3), spoken and written "
        "Vietnamese of real data (H4), other prefixes than OCR's one by one (H6).",
        "",
    ]
    return "\n".join(lines)


def order(question: Question) -> tuple[bool, str]:
    """Sorts hypotheses by number, other questions last."""
    return not question.hypothesis.startswith("H"), question.hypothesis


def how(results: Results) -> str:
    """How the models were trained."""
    steps = results["steps"]
    warm = [f"{steps['text']} on texts alone"] * bool(steps["text"]) + [f"{steps['warm']} on everything"] * bool(
        steps["warm"]
    )
    length = f"{steps['run']} steps" if steps["run"] else "the recipe's epochs"
    text = (
        f"Each variant: {length} of {results['batch_size']} pairs at learning rate "
        f"{results['learning_rate']:g}, the same rows in the same order"
    )
    if warm:
        text += (
            f", after a warm-up of {' and '.join(warm)} steps on InfoNCE without prefixes. The warm-up is common to "
            "all variants but those of the pooling and of the tasks that are left out, which have their own: pooling "
            "and tasks hold from the first step on"
        )
    text += (
        ". A variant that leaves tasks out has smaller batches, so that it sees the other tasks' rows equally often "
        "(and fewer negatives)."
    )
    if results["demo"]:
        text += " Data: the demo world, untrained tiny bases, held-out scenes, the same ones in every language."
    return text


def speed(results: Results) -> str:
    """How fast, and in how much memory."""
    runs = [run for of_name in results["runs"].values() for run in of_name]
    pairs = 2 * results["pairs"] / statistics.median(run["seconds_of_embedding"] for run in runs)
    trained = sum(run["seconds"] for run in runs) / 60
    return (
        f"All runs and warm-ups took {trained:.1f} minutes when they were made; embedding {pairs:.0f} pairs/s; peak "
        f"memory {results['peak_memory_mib']:.0f} MiB."
    )


def variant_table(results: Results) -> list[str]:
    """One row a variant."""
    lines = [
        "| variant | differs by | tasks | recall@1 own | against the base | recall@1 bare | ρ text_pair |",
        "|---" * 7 + "|",
    ]
    total = len(results["tasks"])
    for name, runs in results["runs"].items():
        chosen = trained_cells(results, name)
        variant = VARIANTS[name]
        setting = f"`{variant.recipe}.yaml`" if variant.recipe else f"no {variant.leaves_out}" * (name != "base")
        change = changes(results, name)
        low, high = interval(change)
        against = "" if name == "base" else f"{statistics.mean(change):+.3f} [{low:+.3f} … {high:+.3f}]"
        rho = [run["own"]["spearman"].get("text_pair", math.nan) for run in runs]
        views = [spread(means(results, name, view, chosen), 3) for view in ("own", "bare")]
        tasks = f"{total - len(set(results['left_out'][name]) & set(results['tasks']))} of {total}"
        shown = "-" if math.isnan(rho[0]) else spread(rho, 3)
        lines.append(f"| {name} | {setting} | {tasks} | {views[0]} | {against} | {views[1]} | {shown} |")
    return lines


def task_table(results: Results) -> list[str]:
    """One row a variant, one column a task; untrained tasks in brackets."""
    tasks = list(results["tasks"])
    lines = [f"| variant | {' | '.join(tasks)} |", "|---" * (1 + len(tasks)) + "|"]
    of_task = {task: [cell for cell in results["chance"] if cell.split("/")[0] == task] for task in tasks}
    for name in results["runs"]:
        numbers = [f"{statistics.mean(means(results, name, 'own', of_task[task])):.3f}" for task in tasks]
        untrained = [task in results["left_out"][name] for task in tasks]
        shown = [f"({number})" if out else number for number, out in zip(numbers, untrained, strict=True)]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    counted = [
        f"{statistics.mean(recall(results['ngrams'][cell]) for cell in of_task[task]):.3f}"
        if results["tasks"][task]["text"]
        else "-"
        for task in tasks
    ]
    chance = [f"{statistics.mean(results['chance'][cell] for cell in of_task[task]):.3f}" for task in tasks]
    return [*lines, f"| {NGRAMS} | {' | '.join(counted)} |", f"| chance | {' | '.join(chance)} |"]


def language_table(results: Results) -> list[str]:
    """One row a group of the held-out pairs, one column a task."""
    tasks = list(results["tasks"])
    groups = list(dict.fromkeys(cell.split("/", 1)[1] for cell in results["chance"]))
    lines = [f"| language | {' | '.join(tasks)} |", "|---" * (1 + len(tasks)) + "|"]
    for group in groups:
        cells = [f"{task}/{group}" for task in tasks]
        shown = [
            f"{statistics.mean(means(results, *BASE, [cell])):.3f} of {results['candidates'][cell]}"
            if cell in results["chance"]
            else "-"
            for cell in cells
        ]
        lines.append(f"| {group} | {' | '.join(shown)} |")
    return lines
