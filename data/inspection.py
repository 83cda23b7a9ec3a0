"""Looks at all pairs of a recipe: figures of each task and language, and the faults that training would not show."""

import itertools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .media_facts import MediaFacts, MediaReader, content_hash
from .pair_units import PairRow, read_pair_rows
from .recipes import DataRecipe
from .schema import MODALITIES, Content, modality_pair, show_media
from .units import BadRow

SAMPLES = 4  # pairs of each task and language that are shown
CountTokens = Callable[[Sequence[str]], list[int]]
CHUNK = 1000  # texts that are tokenized at once


@dataclass
class SeenRow:
    """What is kept of a pair.

    Attributes:
        name: id, as errors name it.
        split: "train" or "eval".
        task: its task.
        language: value of the column that rows are grouped by, or a guess.
        modalities: entry of `MODALITY_PAIRS`.
        texts: of both sides.
        keys: content hash of each side: its text and the bytes of its media.
        images: keys of the images of both sides.
        clips: keys of the audio of both sides.
        score: in [0, 1], or `None`.
        group: `None` for none.
    """

    name: str
    split: str
    task: str
    language: str
    modalities: str
    texts: tuple[str, str]
    keys: tuple[int, int]
    images: tuple[int, ...]
    clips: tuple[int, ...]
    score: float | None
    group: str | None


@dataclass
class Inspection:
    """All rows of a recipe, as far as they are kept.

    Attributes:
        rows: the good rows.
        bad: the rows that training would refuse, with their split.
        broken: rows with a file that cannot be read: name, path, reason.
        media: key -> facts of every distinct file.
        files: key -> one name of that file.
        samples: (task, language) -> a few pairs to show.
        tokens: token count of each text, in the order of `rows` and sides; empty without a tokenizer.
        limits: source -> rows after which reading stopped.
    """

    rows: list[SeenRow] = field(default_factory=list)
    bad: list[tuple[str, BadRow]] = field(default_factory=list)
    broken: list[tuple[str, str, str]] = field(default_factory=list)
    media: dict[int, MediaFacts] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)
    samples: dict[tuple[str, str], list[PairRow]] = field(default_factory=lambda: defaultdict(list))
    tokens: list[int] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)

    def of_split(self, split: str) -> list[SeenRow]:
        """Returns the rows of "train" or "eval"."""
        return [row for row in self.rows if row.split == split]


def inspect_recipe(
    recipe: DataRecipe,
    group_by: str = "language",
    max_rows: int | None = None,
    count_tokens: CountTokens | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Inspection:
    """Reads every row of a recipe and opens every file once.

    Args:
        recipe: the recipe.
        group_by: a column of the language, or of anything by which rows are told apart; without it the language is
            guessed from the script.
        max_rows: rows of each source to read, from its beginning; `None`: all.
        count_tokens: texts -> number of tokens of each.
        progress: wraps the iterator of rows.
    """
    seen, media = Inspection(), MediaReader()
    for split, row in progress(_rows(recipe, group_by, max_rows, seen)):
        if isinstance(row, BadRow):
            seen.bad.append((split, row))
        else:
            _add(seen, split, row, group_by, media)
    if count_tokens is not None:
        texts = [text for row in seen.rows for text in row.texts]
        for start in range(0, len(texts), CHUNK):
            seen.tokens += count_tokens(texts[start : start + CHUNK])
    return seen


def _rows(
    recipe: DataRecipe, group_by: str, max_rows: int | None, seen: Inspection
) -> Iterator[tuple[str, PairRow | BadRow]]:
    for split, sources in recipe.sources.items():
        for source in sources:
            rows = read_pair_rows(source, recipe.tasks, (group_by,))
            for row in itertools.islice(rows, max_rows):
                yield split, row
            if max_rows is not None and next(rows, None) is not None:
                seen.limits[source.path] = max_rows


def _add(seen: Inspection, split: str, pair: PairRow, group_by: str, media: MediaReader) -> None:
    row, keys, images, clips, is_broken = pair.row, [], [], [], False
    for side in ("a", "b"):
        content = row.side(side)
        facts = list(_media_facts(content, media))
        keys.append(_side_key(content, [each for _, _, each in facts]))
        for kind, source, each in facts:
            (images if kind == "image" else clips).append(each.key)
            if each.error is not None:
                seen.broken.append((row.id, _shown(source), each.error))
                is_broken = True
            seen.media.setdefault(each.key, each)
            seen.files.setdefault(each.key, _shown(source))
    for negative in row.negatives:
        for _, source, each in _media_facts(negative, media):
            if each.error is not None:
                seen.broken.append((row.id, _shown(source), each.error))
    given = pair.extra.get(group_by)
    language = guess_language(f"{row.a} {row.b}") if given in (None, "") else str(given)
    modalities = modality_pair(row.side("a").modalities, row.side("b").modalities)
    kept = (tuple(keys), tuple(images), tuple(clips), row.score, row.group)
    seen.rows.append(SeenRow(row.id, split, row.task, language, modalities, (row.a, row.b), *kept))
    samples = seen.samples[row.task, language]
    if len(samples) < SAMPLES and not is_broken:
        samples.append(pair)


def _media_facts(content: Content, media: MediaReader) -> Iterator[tuple[str, Any, MediaFacts]]:
    for image in content.images:
        yield MODALITIES[1], image, media.image(image)
    if content.audio is not None:
        yield MODALITIES[2], content.audio, media.audio(content.audio)


def _side_key(content: Content, facts: Sequence[MediaFacts]) -> int:
    text = unicodedata.normalize("NFC", content.text).strip()
    return content_hash(repr((text, [each.key for each in facts])).encode())


def _shown(source: Any) -> str:
    return show_media(source) if isinstance(source, str) else "(inside the file)"


def guess_language(text: str) -> str:
    """Returns "zh" for Han characters, "vi" for Vietnamese letters, "other" for other letters, "none" without any."""
    letters = Counter(_script(letter) for letter in unicodedata.normalize("NFC", text) if letter.isalpha())
    if not letters:
        return "none"
    if letters["zh"] * 2 > letters.total() - letters["zh"]:
        return "zh"
    return "vi" if letters["vi"] * 20 >= letters.total() else "other"


def _script(letter: str) -> str:
    if "\u3400" <= letter <= "\u9fff":
        return "zh"
    return "vi" if letter.lower() in "ăâđêôơưảẩẫấầậẳẵắằặẻểễếềệỉĩịỏổỗốồộởỡớờợủũụửữứừựỷỹỵạẹọẽ" else "other"


def excluded_as_negatives(rows: Sequence[SeenRow]) -> np.ndarray:
    """Returns the number of rows of the same task that are no negatives of each row, itself among them, (rows,) int64.

    No negatives are rows of the same group and those with the same side a or the same side b
    (docs/training.md, negatives and temperature).
    """
    marks = [
        (
            (row.task, "group", row.group if row.group is not None else f"\0{number}"),
            (row.task, "a", row.keys[0]),
            (row.task, "b", row.keys[1]),
        )
        for number, row in enumerate(rows)
    ]
    subsets = [chosen for size in (1, 2, 3) for chosen in itertools.combinations(range(3), size)]
    counts = [Counter(tuple(mark[place] for place in chosen) for mark in marks) for chosen in subsets]
    excluded = np.zeros(len(rows), np.int64)
    for chosen, count in zip(subsets, counts, strict=True):  # inclusion and exclusion
        found = [count[tuple(mark[place] for place in chosen)] for mark in marks]
        excluded += (-1) ** (len(chosen) + 1) * np.array(found, np.int64).reshape(-1)
    return excluded


def task_table(seen: Inspection) -> list[dict[str, Any]]:
    """Returns the figures of each split, task and language, in this order."""
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for number, row in enumerate(seen.rows):
        groups[row.split, row.task, row.language].append(number)
    return [_figures(seen, key, groups[key]) for key in sorted(groups, key=lambda key: (key[0] != "train", key[1:]))]


def _figures(seen: Inspection, key: tuple[str, str, str], numbers: list[int]) -> dict[str, Any]:
    rows = [seen.rows[number] for number in numbers]
    images = [seen.media[image] for row in rows for image in row.images if seen.media[image].error is None]
    clips = [seen.media[clip] for row in rows for clip in row.clips if seen.media[clip].error is None]
    scores = [row.score for row in rows if row.score is not None]
    tokens = [seen.tokens[2 * number + side] for number in numbers for side in (0, 1)] if seen.tokens else []
    return {
        "split": key[0],
        "task": key[1],
        "language": key[2],
        "rows": len(rows),
        "modalities": dict(Counter(row.modalities for row in rows).most_common()),
        "length_a": quantiles([len(row.texts[0]) for row in rows if row.texts[0]]),
        "length_b": quantiles([len(row.texts[1]) for row in rows if row.texts[1]]),
        "tokens": quantiles(tokens),
        "pixels": quantiles([image.width * image.height for image in images]),
        "sizes": [f"{w}×{h}" for (w, h), _ in Counter((each.width, each.height) for each in images).most_common(3)],
        "seconds": quantiles([clip.seconds for clip in clips]),
        "rates": dict(Counter(clip.rate for clip in clips).most_common(4)),
        "score": quantiles(scores),
        "histogram": np.histogram(scores, bins=10, range=(0.0, 1.0))[0].tolist() if scores else [],
        "groups": len({row.group for row in rows if row.group is not None}),
    }


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Returns minimum, median, 95 % quantile and maximum; `None` without values."""
    if not values:
        return None
    low, middle, high, most = np.quantile(np.array(values, np.float64), [0.0, 0.5, 0.95, 1.0]).tolist()
    return {"min": low, "median": middle, "p95": high, "max": most}


def by_key(rows: Iterable[SeenRow], keys: Callable[[SeenRow], Iterable[Any]]) -> Mapping[Any, list[SeenRow]]:
    """Returns each key -> the rows that have it, in their order."""
    found: dict[Any, list[SeenRow]] = defaultdict(list)
    for row in rows:
        for key in keys(row):
            found[key].append(row)
    return found
