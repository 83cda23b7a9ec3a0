"""Takes pairs out of records of other shapes: nested columns, lists, several columns of one kind, conversations."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cleaning import json_list, listed

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
TOOL = "tool"  # what a tool was asked and what it gave: of the dialogue, neither question nor answer
ROLES = {
    **dict.fromkeys(("user", "human", "question", "prompter"), USER),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", "bing", "answer"), ASSISTANT),
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("tool", "function", "function_call", "function_response", "tool_call", "tool_response"), TOOL),
    "observation": TOOL,
}
ALL, FIRST, LAST, RANDOM, JOIN = "all", "first", "last", "random", "join"
PICKS = (ALL, FIRST, RANDOM, JOIN)  # of a column with a list: a pair for each entry, one entry, or all as one text
TURNS = (ALL, FIRST, LAST)  # answers of a conversation that become pairs
NEXT = object()  # a message part that stands for the next image of the record
MEDIA_KEYS = ("image", "image_url", "audio", "audio_url", "input_audio", "url", "path", "bytes")
COMBINATIONS = 1000  # of a record, of lists in several columns; each is checked and stored


class ShapeError(ValueError):
    """Raised for a record whose shape gives no pair: the column, its value, and the problem with its remedy."""

    def __init__(self, column: str, value: Any, problem: str, cause: str = "invalid conversation") -> None:
        super().__init__(column, value, problem)
        self.column, self.value, self.problem, self.cause = column, value, problem, cause


def take(record: Mapping[str, Any], column: str | Sequence[str]) -> Any:
    """Returns the value of a column; of several columns, the list of their values.

    Args:
        record: column -> value.
        column: a name; a path such as `answers.text`, where a list gives the list of its entries' values and a number
            an entry; or several of these, whose missing and empty values are left out.
    """
    if not isinstance(column, str):
        values = [take(record, each) for each in column]
        listed = [value if isinstance(value, list) else [value] for value in values if value not in (None, "")]
        return [each for value in listed for each in value if each not in (None, "")]
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        value = _part(value, part)
    return value


def _part(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(name)
    if isinstance(value, list) and value and all(isinstance(each, tuple) and len(each) == 2 for each in value):
        return dict(value).get(name)  # a map of Arrow
    if isinstance(value, list) and name.isdigit():
        return value[int(name)] if int(name) < len(value) else None
    return [_part(each, name) for each in value] if isinstance(value, list) else None


def pick_lists(values: dict[str, Any], picks: Mapping[str, str]) -> list[list[dict[str, Any]]]:
    """Returns the pairs of a record, each as the records of which `random` draws one.

    Args:
        values: column of the schema -> value.
        picks: column -> one of `PICKS`. A list gives several pairs with `all`, and several records of one pair with
            `random`; lists of several columns give every combination.

    Raises:
        ShapeError: they give more than `COMBINATIONS`.
    """
    choices: dict[str, list[Any]] = {}
    for column, pick in picks.items():
        value = values.get(column)
        value = (json_list(value) or value) if isinstance(value, str) else value
        entries = [each for each in value if each not in (None, "")] if isinstance(value, list) else [value]
        if pick == JOIN and all(isinstance(each, str) for each in entries):
            entries = ["\n".join(entries)]
        choices[column] = (entries if pick in (ALL, RANDOM) else entries[:1]) or [None]
    _check_combinations(choices)
    drawn = {column: choices.pop(column) for column, pick in picks.items() if pick == RANDOM}
    return [[{**values, **pair, **draw} for draw in _combinations(drawn)] for pair in _combinations(choices)]


def _check_combinations(choices: Mapping[str, list[Any]]) -> None:
    sizes = {column: len(entries) for column, entries in choices.items() if len(entries) > 1}
    count = math.prod(sizes.values())
    if len(sizes) > 1 and count > COMBINATIONS:
        shown = " and ".join(f"{size} in {column}" for column, size in sizes.items())
        raise ShapeError(
            max(sizes, key=lambda column: sizes[column]),
            shown,
            f"lists of these lengths give {count} combinations of a record; the limit is {COMBINATIONS}. Take `first` "
            "or `join` of one of the columns (`lists`), or write the pairs as records.",
            "too many combinations",
        )


def _combinations(choices: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(choices, chosen, strict=True)) for chosen in itertools.product(*choices.values()))


def pick_one(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns one of the records of a pair; which one depends on their values alone."""
    if len(records) == 1:
        return records[0]
    digest = hashlib.blake2b(repr(records).encode("utf-8", "replace"), digest_size=8).digest()
    return records[int.from_bytes(digest) % len(records)]


@dataclass(frozen=True)
class ConversationShape:
    """Says how conversations become pairs.

    Attributes:
        column: the column with the turns: `from` and `value` (LLaVA, ShareGPT), `role` and `content` (OpenAI, Hub), or
            `user` and `assistant`.
        pairs: the answers that become pairs, of `TURNS`.
        system: whether the system turns belong to side a.
    """

    column: str
    pairs: str = ALL
    system: bool = False


@dataclass
class _Turn:
    role: str
    text: str = ""
    images: list[Any] = field(default_factory=list)
    audio: list[Any] = field(default_factory=list)

    def add(self, other: "_Turn") -> None:
        """Adds a following turn."""
        self.text = "\n".join(text for text in (self.text, other.text) if text)
        self.images += other.images
        self.audio += other.audio


def conversation_pairs(
    turns: Any, values: dict[str, Any], shape: ConversationShape, placeholder: str
) -> list[dict[str, Any]]:
    """Returns a record for each answer: side a is the dialogue before it, one line a turn, side b the answer.

    Args:
        turns: the conversation.
        values: column of the schema -> value of the other columns; `images_a` holds the images of the conversation.
        shape: which answers become pairs.
        placeholder: marks an image in the text of a turn; without marks the images belong to the first turn.

    Returns:
        Records with `task` where `values` has none: of images `vqa_single` for the first answer and `vqa_multi` for
        later ones, `audio` with audio, otherwise `instr`.

    Raises:
        ShapeError: a turn has an unknown form, the marks do not fit the images, or there is no answer.
    """
    joined = _place_images(_read_turns(turns, shape.column, placeholder), values.get("images_a"), shape, placeholder)
    records = list(_answers(joined, values, shape))
    if not records:
        raise ShapeError(shape.column, turns, "no answer follows a question; drop the row.")
    if shape.pairs != ALL:
        records = records[:1] if shape.pairs == FIRST else records[-1:]
    return records


def _answers(turns: list[_Turn], values: dict[str, Any], shape: ConversationShape) -> Iterator[dict[str, Any]]:
    before, asked, answered = _Turn(USER), False, 0
    for turn in turns:
        if turn.role == SYSTEM and not shape.system and (turn.images or turn.audio):
            raise ShapeError(shape.column, turn.text, "a system turn has images or audio; set `system: true`.")
        if turn.role == ASSISTANT and asked and (turn.text or turn.images or turn.audio):
            record = {**values, "a": before.text, "images_a": list(before.images), "b": turn.text}
            record |= {"images_b": turn.images} if turn.images else {}
            record |= {"audio_a": before.audio[-1]} if before.audio else {}
            record |= {"audio_b": turn.audio[-1]} if turn.audio else {}
            if not values.get("task"):
                record["task"] = _task(record, answered)
            yield record
            answered += 1
        asked = asked or turn.role == USER
        if turn.role != SYSTEM or shape.system:
            before.add(turn)


def _task(record: Mapping[str, Any], answered: int) -> str:
    if record["images_a"]:
        return "vqa_multi" if answered else "vqa_single"
    return "audio" if record.get("audio_a") else "instr"


def _read_turns(turns: Any, column: str, placeholder: str) -> list[_Turn]:
    """Returns the turns, those of one role in a row joined."""
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise ShapeError(
                column, turns, f"it is neither a list of turns nor its JSON: {error}; repair it."
            ) from error
    if isinstance(turns, Mapping):  # as `datasets` stores a list of structs
        turns = _rows_of(turns, column)
    if not isinstance(turns, list):
        raise ShapeError(column, turns, "a conversation is a list of turns; correct `conversation` or drop the row.")
    joined: list[_Turn] = []
    for turn in (each for message in turns for each in _message(message, column, placeholder)):
        if joined and joined[-1].role == turn.role:
            joined[-1].add(turn)
        else:
            joined.append(turn)
    return joined


def _rows_of(turns: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """Returns the turns of columns of equal length."""
    lengths = {len(part) if isinstance(part, list) else -1 for part in turns.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise ShapeError(column, turns, "its columns are no lists of equal length; correct or drop the row.")
    return [dict(zip(turns, parts, strict=True)) for parts in zip(*turns.values(), strict=True)]


def _message(message: Any, column: str, placeholder: str) -> Iterator[_Turn]:
    if isinstance(message, Mapping) and {USER, ASSISTANT} <= set(message):
        yield from (_turn(role, message[role], column, placeholder) for role in (USER, ASSISTANT))
        return
    if not isinstance(message, Mapping) or not {"role", "from"} & set(message):
        raise ShapeError(column, message, "a turn has `from` and `value`, or `role` and `content`; correct the row.")
    role = message.get("role") or message.get("from")
    name = str(role).strip().lower()
    if name not in ROLES:
        raise ShapeError(column, role, f"the role of a turn is unknown; known: {', '.join(ROLES)}. Drop the row.")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    yield _turn(ROLES[name], content, column, placeholder)


def _turn(role: str, content: Any, column: str, placeholder: str) -> _Turn:
    turn = _Turn(role)
    if isinstance(content, Mapping):
        content = [content]
    for part in content if isinstance(content, list) else [content]:
        if part is None:
            continue
        if isinstance(part, str):
            turn.text += part
            turn.images += [None] * part.count(placeholder)  # filled in from the images of the record
        else:
            _add_part(turn, part, column, placeholder)
    turn.text = turn.text.strip()
    return turn


def _add_part(turn: _Turn, part: Any, column: str, placeholder: str) -> None:
    """Adds a part of a message: text, image or audio."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        text = part.get("text") or ""
        turn.text += text
        turn.images += [None] * text.count(placeholder)
    elif kind in ("image", "image_url"):
        turn.text += placeholder
        turn.images.append(_source(part) or (part["index"] if type(part.get("index")) is int else NEXT))
    elif kind in ("audio", "audio_url", "input_audio"):
        turn.audio.append(_source(part))
    else:
        raise ShapeError(
            column, part, "a part of a turn is a text, an image or audio with its `type`; correct the row."
        )


def _source(part: Mapping[str, Any]) -> Any:
    """Returns the path or bytes that a part names; `None` for the next image of the record."""
    source = next((part[key] for key in MEDIA_KEYS if part.get(key) is not None), None)
    return source.get("url", source) if isinstance(source, Mapping) else source


def _place_images(turns: list[_Turn], images: Any, shape: ConversationShape, placeholder: str) -> list[_Turn]:
    """Gives the marks of the turns the images of the record, in their order."""
    given = listed(images)
    if numbered := [(turn, at) for turn in turns for at, image in enumerate(turn.images) if type(image) is int]:
        return _place_numbered(turns, numbered, given, shape)
    marks = [(turn, at) for turn in turns for at, image in enumerate(turn.images) if image in (None, NEXT)]
    first = next((turn for turn in turns if turn.role == USER), None)
    if not given:
        _drop_marks(marks, shape)
    elif marks and len(marks) != len(given):
        problem = f"{len(marks)} marks {placeholder} for {len(given)} images; write one mark for each image, or none."
        raise ShapeError(shape.column, [turn.text for turn in turns], problem)
    elif not marks and first is not None:
        others = any(turn.images for turn in turns)
        first.text = placeholder * len(given) + first.text if others else first.text
        first.images = [*given, *first.images]
    for (turn, at), image in zip(marks, given, strict=False):
        turn.images[at] = image
    return turns


def _place_numbered(
    turns: list[_Turn], numbered: list[tuple[_Turn, int]], given: list[Any], shape: ConversationShape
) -> list[_Turn]:
    """Gives the parts that have an `index` the image of that number."""
    for turn, at in numbered:
        index = turn.images[at]
        if not 0 <= index < len(given):
            raise ShapeError(
                shape.column, index, f"a part names this image, of {len(given)}; correct the row or map `images_a`."
            )
        turn.images[at] = given[index]
    if any(image is None or image is NEXT for turn in turns for image in turn.images):
        raise ShapeError(shape.column, turns[0].text, "some of its images have an `index` and some have none.")
    return turns


def _drop_marks(marks: list[tuple[_Turn, int]], shape: ConversationShape) -> None:
    """Leaves the marks of a record without images as text."""
    for turn, _ in marks:
        if NEXT in turn.images:
            problem = (
                "a part of a turn stands for an image that the row does not have; map `images_a` or drop the row."
            )
            raise ShapeError(shape.column, turn.text, problem)
        turn.images = [image for image in turn.images if image is not None]
