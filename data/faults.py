"""Faults of a recipe's pairs that an inspection found: each with its number, examples and a remedy."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .duplicates import clusters, is_datasketch_available, near_images, near_texts
from .inspection import Inspection, SeenRow, by_key, excluded_as_negatives

EXAMPLES = 5
COMMON = 0.02  # share of a task's rows with one side b, above which it is named
SHOWN = 90  # characters of a text in an example
UNREAD = 0  # key of a file that cannot be read
SUSPICIOUS = {
    "the replacement character U+FFFD": re.compile("\ufffd"),
    "zero-width characters": re.compile("[\u200b\u2060\ufeff]"),
    "UTF-8 read as Latin-1": re.compile("á[»º]|Ã[\x80-\xbf]|Ä[‘\x91]|Æ°|â€"),
    "HTML": re.compile(r"&(amp|lt|gt|quot|nbsp|#\d+);|</?(p|br|div|span|b|i|a)\b[^<>]*>"),
    "control characters": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"),
}


@dataclass
class Fault:
    """One kind of fault.

    Attributes:
        title: what is wrong.
        count: rows (or files) that have it.
        remedy: what to do, or why it may be intended.
        examples: a few, each one line.
    """

    title: str
    count: int
    remedy: str
    examples: list[str]


def find_faults(seen: Inspection, max_length: int | None = None) -> list[Fault]:
    """Returns the faults that occur.

    Args:
        seen: the rows.
        max_length: tokens of an input, beyond which a text is cut; needs the token counts of the inspection.
    """
    finders = (_refused, _broken, _empty_media, _leaks, _repeated_ids, _repeated_pairs, _contradictions, _same_sides)
    finders += (_near_images, _near_texts, _suspicious_texts, _without_negatives, _common_answers)
    found = [fault for finder in finders for fault in finder(seen)]
    if max_length is not None and seen.tokens:
        found += _truncated(seen, max_length)
    return [fault for fault in found if fault.count]


def _fault(title: str, items: Iterable[Any], remedy: str, show: Callable[[Any], str]) -> Fault:
    items = list(items)
    return Fault(title, len(items), remedy, [show(item) for item in items[:EXAMPLES]])


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _refused(seen: Inspection) -> Iterator[Fault]:
    yield _fault(
        "rows that training refuses",
        seen.bad,
        "repair or drop them; the message gives the remedy",
        lambda each: f"{each[0]}: {each[1].error}",
    )


def _broken(seen: Inspection) -> Iterator[Fault]:
    yield _fault(
        "files of images or audio that cannot be read",
        seen.broken,
        "restore the files, or drop their rows",
        lambda each: f"{each[0]}: {each[1]}: {each[2]}",
    )


def _empty_media(seen: Inspection) -> Iterator[Fault]:
    empty = [(seen.files[key], facts) for key, facts in seen.media.items() if facts.is_empty]
    for title, kind in (("images of one colour", True), ("silent clips", False)):
        items = [each for each in empty if (each[1].width > 0) == kind]
        yield _fault(title, items, "look at the file: it may have failed to export", lambda each: each[0])


def _leaks(seen: Inspection) -> Iterator[Fault]:
    """Finds held-out rows that training has seen in part."""
    train, held_out = seen.of_split("train"), seen.of_split("eval")
    if not train or not held_out:
        return
    kinds: dict[str, Callable[[SeenRow], Iterable[Any]]] = {
        "held-out pairs that are also trained on": lambda row: [(row.keys, row.score)],
        "held-out rows whose image is also trained on": lambda row: row.images,
        "held-out rows whose audio is also trained on": lambda row: row.clips,
        "held-out rows whose `group` is also trained on": lambda row: [] if row.group is None else [row.group],
        "held-out rows whose text of side a is also trained on": lambda row: _long_text(row.texts[0]),
    }
    for title, keys in kinds.items():
        known = by_key(train, keys)
        items = [
            (row, known[key][0])
            for row in held_out
            for key in [next((k for k in keys(row) if k in known), None)]
            if key
        ]
        yield _fault(
            title,
            items,
            "move them to one side of the split, else the measurement is too good",
            lambda pair: f"{pair[0].name} ↔ {pair[1].name}: {_cut(' | '.join(pair[0].texts))}",
        )


def _first_known(keys: Iterable[Any], known: Mapping[Any, Any]) -> list[Any]:
    return [key for key in keys if key in known and key != UNREAD][:1]


def _long_text(text: str) -> list[str]:
    plain = unicodedata.normalize("NFC", text).strip()
    return [plain] if len(plain) >= 20 else []  # shorter ones recur by themselves


def _repeated_ids(seen: Inspection) -> Iterator[Fault]:
    for split in ("train", "eval"):
        repeated = {
            name: rows for name, rows in by_key(seen.of_split(split), lambda row: [row.name]).items() if len(rows) > 1
        }
        yield _fault(
            f"ids that several rows of {split} share",
            repeated.items(),
            "give each row its id, so that an error names one row",
            lambda each: f"{each[0]}: {len(each[1])} rows",
        )


def _repeated_pairs(seen: Inspection) -> Iterator[Fault]:
    for split in ("train", "eval"):
        copies = by_key(seen.of_split(split), lambda row: [(row.task, row.keys)])
        items = [(rows[0], row) for rows in copies.values() for row in rows[1:]]
        yield _fault(
            f"rows of {split} that repeat an earlier pair",
            items,
            "drop them, or give the source a `weight` if repetition is intended",
            lambda pair: f"{pair[1].name} repeats {pair[0].name}: {_cut(' | '.join(pair[1].texts))}",
        )


def _contradictions(seen: Inspection) -> Iterator[Fault]:
    """Finds the same two sides with scores that differ."""
    scored = by_key(
        (row for row in seen.rows if row.score is not None), lambda row: [(row.task, tuple(sorted(row.keys)))]
    )
    items = [
        rows
        for rows in scored.values()
        if max(row.score or 0 for row in rows) - min(row.score or 0 for row in rows) > 0.2
    ]
    yield _fault(
        "pairs that occur with scores more than 0.2 apart",
        items,
        "keep one score",
        lambda rows: (
            f"{', '.join(f'{row.name}: {row.score:g}' for row in rows[:3])}: {_cut(' | '.join(rows[0].texts))}"
        ),
    )


def _same_sides(seen: Inspection) -> Iterator[Fault]:
    items = [row for row in seen.rows if row.keys[0] == row.keys[1]]
    yield _fault(
        "rows whose sides are equal",
        items,
        "drop them: they teach nothing",
        lambda row: f"{row.name}: {_cut(row.texts[0])}",
    )


def _near_images(seen: Inspection) -> Iterator[Fault]:
    keys = [key for key, facts in seen.media.items() if facts.look is not None]
    if len(keys) < 2:
        return
    looks = np.stack([look for key in keys if (look := seen.media[key].look) is not None])
    pairs = near_images(looks)
    yield _fault(
        "groups of different image files that look alike",
        clusters(pairs),
        "give their rows one `group`, so that they are not negatives of each other",
        lambda group: " ≈ ".join(seen.files[keys[number]] for number in group[:3]) + f" ({len(group)} files)",
    )
    splits = {key: set() for key in keys}
    for row in seen.rows:
        for key in row.images:
            splits.get(key, set()).add(row.split)
    across = [
        (first, second)
        for pair in pairs
        for first, second in [(keys[pair[0]], keys[pair[1]])]
        if len(splits[first] | splits[second]) > 1 and not splits[first] & splits[second]
    ]
    yield _fault(
        "held-out images that look like an image of training",
        across,
        "move them to one side of the split",
        lambda pair: f"{seen.files[pair[0]]} ≈ {seen.files[pair[1]]}",
    )


def _near_texts(seen: Inspection) -> Iterator[Fault]:
    if not is_datasketch_available():
        remedy = "install datasketch for it: pip install -c constraints.txt -e '.[data]'"
        yield Fault("near-duplicate texts were not looked for", 1, remedy, [])
        return
    ordered = seen.of_split("train") + seen.of_split("eval")
    places: dict[str, SeenRow] = {}
    for row in ordered:
        for text in row.texts:
            places.setdefault(text, row)
    texts = list(places)
    near = [(texts[first], texts[second]) for first, second in near_texts(texts)]
    within = [pair for pair in near if places[pair[0]].split == places[pair[1]].split]
    across = [pair for pair in near if places[pair[0]].split != places[pair[1]].split]
    for title, items, remedy in (
        ("texts that nearly repeat an earlier one", within, "drop copies; of templates, give the rows one `group`"),
        ("held-out texts that nearly repeat one of training", across, "move them to one side of the split"),
    ):
        yield _fault(
            title,
            items,
            remedy,
            lambda pair: f"{places[pair[1]].name}: {_cut(pair[1])} ≈ {places[pair[0]].name}: {_cut(pair[0])}",
        )


def _suspicious_texts(seen: Inspection) -> Iterator[Fault]:
    kinds: dict[str, list[SeenRow]] = {}
    for row in seen.rows:
        text = "\n".join(row.texts)
        names = [name for name, pattern in SUSPICIOUS.items() if pattern.search(text)]
        names += ["decomposed letters (NFD)"] if not unicodedata.is_normalized("NFC", text) else []
        for name in names:
            kinds.setdefault(name, []).append(row)
    for name, rows in kinds.items():
        yield _fault(
            f"texts with {name}",
            rows,
            "clean the text where it was exported; NFD is read as NFC and needs nothing",
            lambda row: f"{row.name}: {_cut(' | '.join(map(repr, row.texts)))}",
        )


def _without_negatives(seen: Inspection) -> Iterator[Fault]:
    rows = seen.of_split("train")
    if not rows:
        return
    sizes = Counter(row.task for row in rows)
    excluded = excluded_as_negatives(rows)
    alone = [row for row, number in zip(rows, excluded.tolist(), strict=True) if number >= sizes[row.task]]
    yield _fault(
        "rows without any negative of their task",
        alone,
        "every other row of the task has their `group`, side a or side b: correct the column `group`",
        lambda row: f"{row.name}: task {row.task}, group {row.group!r}",
    )
    groups = Counter((row.task, row.group) for row in rows if row.group is not None)
    large = [
        (task, group, count) for (task, group), count in groups.most_common() if count > max(8, COMMON * sizes[task])
    ]
    yield _fault(
        f"groups with more than {COMMON:.0%} of their task's rows",
        large,
        "none of these rows is a negative of another: make the groups finer if that is not meant",
        lambda each: f"{each[0]}: group {each[1]!r} has {each[2]} of {sizes[each[0]]} rows",
    )


def _common_answers(seen: Inspection) -> Iterator[Fault]:
    rows = seen.of_split("train")
    sizes = Counter(row.task for row in rows)
    answers = Counter((row.task, row.keys[1]) for row in rows)
    texts = {(row.task, row.keys[1]): row.texts[1] for row in rows}
    common = [each for each in answers.most_common() if each[1] > max(8, COMMON * sizes[each[0][0]])]
    yield _fault(
        f"sides b shared by more than {COMMON:.0%} of their task's rows",
        common,
        "a model can guess them without reading side a; copies are never negatives (`mask_duplicates`)",
        lambda each: f"{each[0][0]}: {_cut(texts[each[0]])!r} in {each[1]} of {sizes[each[0][0]]} rows",
    )


def _truncated(seen: Inspection, max_length: int) -> Iterator[Fault]:
    cut = [(seen.rows[place // 2], tokens) for place, tokens in enumerate(seen.tokens) if tokens > max_length]
    lost = sum(tokens - max_length for _, tokens in cut)
    yield _fault(
        f"texts that truncation at {max_length} tokens would cut (prefix and images not counted)",
        cut,
        f"raise `max_length`, or split them: {lost:,} of {sum(seen.tokens):,} tokens are lost",
        lambda each: f"{each[0].name}: {each[1]} tokens",
    )
