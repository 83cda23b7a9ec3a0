"""Builds the rows of the demo world: one builder for each of the six tasks."""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import cached_property

import numpy as np

from .phrasebook import (
    ABOUT,
    GOALS,
    INSTRUCTIONS,
    LANGUAGE_NAMES,
    QUESTIONS,
    READING,
    SPEAKERS,
    TWO_PICTURES,
)
from .scenes import ATTRIBUTES, LANGUAGES, TEMPLATES, Scene, capital, describe, words

Row = dict[str, str | float | list[str] | None]

REWORDINGS = ("translate", "rephrase")  # instructions that keep the scene; the others change that attribute of it
ALTERATIONS = ("colour", "size", "count", "place")
TWO_PICTURE_SHARE = 0.3
NEAR_MISSES = 2  # hard negatives of a row


@dataclass(frozen=True)
class Medium:
    """One file of the corpus: its path, and the scene that it shows or says."""

    path: str
    kind: str  # drawing, sign, ticket or speech
    scene: Scene
    language: str


@dataclass(frozen=True)
class Split:
    """The scenes that a file's rows may use."""

    name: str
    scenes: tuple[Scene, ...]

    @cached_property
    def _table(self) -> np.ndarray:
        """(scenes, 5) int, the number of each attribute's value."""
        values = list(ATTRIBUTES.values())
        return np.array([[v.index(x) for v, x in zip(values, astuple(s), strict=True)] for s in self.scenes])

    @cached_property
    def _members(self) -> frozenset[Scene]:
        return frozenset(self.scenes)

    def sharing(self, scene: Scene, shared: int, rng: np.random.Generator) -> Scene:
        """A scene of the split that shares so many attributes with the given one, or the nearest number to be had."""
        own = np.array([v.index(x) for v, x in zip(ATTRIBUTES.values(), astuple(scene), strict=True)])
        distance = np.abs((self._table == own).sum(1) - shared) + 9 * (self._table == own).all(1)
        nearest = np.flatnonzero(distance == distance.min())
        return self.scenes[nearest[rng.integers(len(nearest))]]

    def differing(self, scene: Scene, attribute: str) -> list[Scene]:
        """The split's scenes that differ from this one in that attribute alone (a count by one)."""
        values = ATTRIBUTES[attribute]
        if attribute == "count":
            values = tuple(n for n in values if abs(n - scene.count) == 1)
        changed = (replace(scene, **{attribute: value}) for value in values)
        return [other for other in changed if other != scene and other in self._members]


@dataclass
class Draft:
    """Input of a task's builder: the scene of the row, its language and a random generator."""

    id: str
    scene: Scene
    language: str
    split: Split
    rng: np.random.Generator

    def pick(self, options: tuple[str, ...]) -> str:
        """One of the options."""
        return options[self.rng.integers(len(options))]

    def row(self, task: str, a: str, b: str, score: float | None = None, media: tuple[Medium, ...] = ()) -> Row:
        """The finished row; `scene` is what b tells of."""
        return {
            "id": self.id,
            "task": task,
            "a": a,
            "b": b,
            "images": [medium.path for medium in media if medium.kind != "speech"],
            "audio": next((medium.path for medium in media if medium.kind == "speech"), None),
            "score": score,
            "language": self.language,
            "scene": self.scene.code,
        }

    def medium(self, kind: str, scene: Scene | None = None, number: int = 1) -> Medium:
        """An image or recording of the scene (or another) that belongs to this row."""
        ending = "flac" if kind == "speech" else "png"
        suffix = "" if number == 1 else f"-{number}"
        return Medium(f"media/{self.id}{suffix}.{ending}", kind, scene or self.scene, self.language)


Built = tuple[Row, tuple[Medium, ...]]


def same_scene_pair(draft: Draft) -> Built:
    """text_pair, score 1: a translation or a paraphrase."""
    ours = int(draft.rng.integers(3))
    a = describe(draft.scene, draft.language, ours)
    if draft.rng.random() < 0.3:
        b = _rephrased(draft, ours)
    else:
        b = describe(draft.scene, _other_language(draft), int(draft.rng.integers(3)))
    return draft.row("text_pair", a, b, score=1.0), ()


def graded_pair(draft: Draft) -> Built:
    """text_pair of two scenes, score = shared attributes / 5; b is of the draft's scene."""
    other = draft.split.sharing(draft.scene, int(draft.rng.integers(5)), draft.rng)
    language = _other_language(draft) if draft.rng.random() < 0.5 else draft.language
    a = describe(other, draft.language, int(draft.rng.integers(3)))
    b = describe(draft.scene, language, int(draft.rng.integers(3)))
    return draft.row("text_pair", a, b, score=draft.scene.shared(other) / 5), ()


def instr(draft: Draft) -> Built:
    """instr: a change to make to a sentence; b is the sentence after it."""
    sources = {change: draft.split.differing(draft.scene, change) for change in ALTERATIONS}
    change = draft.pick(REWORDINGS + tuple(change for change in ALTERATIONS if sources[change]))
    if change in REWORDINGS:
        return _rewording(draft, change)
    return _alteration(draft, change, sources[change][draft.rng.integers(len(sources[change]))])


def near_misses(draft: Draft, template: int = 0) -> list[str]:
    """Describes scenes of the split that differ from the draft's in one attribute: hard negatives of its text."""
    near = [scene for attribute in ATTRIBUTES for scene in draft.split.differing(draft.scene, attribute)]
    chosen = draft.rng.choice(len(near), min(NEAR_MISSES, len(near)), replace=False)
    return [describe(near[number], draft.language, template) for number in chosen]


def ocr(draft: Draft) -> Built:
    """Ocr: a sign or a ticket; b is its text, in one line."""
    style = draft.pick(("sign", "ticket"))
    media = (draft.medium(style),)
    question = draft.pick(READING[draft.language][style])
    return draft.row("ocr", question, describe(draft.scene, draft.language), media=media), media


def vqa_single(draft: Draft) -> Built:
    """vqa_single: a drawing and a question; b begins with the answer and describes the scene."""
    wordings, answer, _ = QUESTIONS[draft.language][draft.pick(tuple(QUESTIONS[draft.language]))]
    media = (draft.medium("drawing"),)
    b = answer.format_map(words(draft.scene, draft.language))
    return draft.row("vqa_single", draft.pick(wordings), b, media=media), media


def vqa_multi(draft: Draft) -> Built:
    """vqa_multi: a dialogue about one drawing, or about two with the last question on one of them."""
    return _two_pictures(draft) if draft.rng.random() < TWO_PICTURE_SHARE else _one_picture(draft)


def audio(draft: Draft) -> Built:
    """Audio: the caption spoken; b is the caption written."""
    media = (draft.medium("speech"),)
    return draft.row("audio", "", describe(draft.scene, draft.language), media=media), media


def image_audio(shown: Row, said: Row) -> Row:
    """Returns the drawing of one row with the recording of another of the same scene: a pair without text."""
    if shown["scene"] != said["scene"]:
        raise ValueError(
            f"{shown['id']} shows {shown['scene']!r}, but {said['id']} says {said['scene']!r}; pair others."
        )
    kept = {name: said[name] for name in ("language", "scene", "audio")}
    return {"id": f"{shown['id']} {said['id']}", **kept, "image": shown["images"][0]}


BUILDERS: dict[str, Callable[[Draft], Built]] = {
    "text_pair": same_scene_pair,
    "instr": instr,
    "ocr": ocr,
    "vqa_single": vqa_single,
    "vqa_multi": vqa_multi,
    "audio": audio,
}


def _other_language(draft: Draft) -> str:
    """Another language than the draft's; Chinese half the time, since few drafts begin in it."""
    first, last = (language for language in LANGUAGES if language != draft.language)
    return first if draft.rng.random() < 0.5 else last


def _rephrased(draft: Draft, template: int) -> str:
    """The scene in the draft's language by another template than the given one."""
    others = len(TEMPLATES[draft.language])
    return describe(draft.scene, draft.language, (template + int(draft.rng.integers(1, others))) % others)


def _rewording(draft: Draft, change: str) -> Built:
    """An instruction that keeps the scene."""
    ours = int(draft.rng.integers(3))
    text, target = describe(draft.scene, draft.language, ours), _other_language(draft)
    wording = draft.pick(INSTRUCTIONS[draft.language][change])
    if change == "rephrase":
        return draft.row("instr", wording.format(text=text), _rephrased(draft, ours)), ()
    b = describe(draft.scene, target, int(draft.rng.integers(3)))
    return draft.row("instr", wording.format(text=text, target=LANGUAGE_NAMES[draft.language][target]), b), ()


def _alteration(draft: Draft, change: str, source: Scene) -> Built:
    """An instruction that turns the source scene into the draft's."""
    if change == "size":
        change = "bigger" if draft.scene.size == "big" else "smaller"
    elif change == "count":
        change = "more" if draft.scene.count > source.count else "fewer"
    fields = words(source, draft.language)
    after = words(draft.scene, draft.language)
    fields |= {"colour": after["colour"], "place": after["place"], "goal": GOALS[draft.language][draft.scene.place]}
    text = describe(source, draft.language, int(draft.rng.integers(3)))
    wording = draft.pick(INSTRUCTIONS[draft.language][change])
    b = describe(draft.scene, draft.language, int(draft.rng.integers(3)))
    return draft.row("instr", wording.format_map(fields | {"text": text}), b), ()


def _turn(draft: Draft, kind: str, scene: Scene, about: str = "") -> tuple[str, str]:
    """One exchange on a scene: the user's line and the assistant's short answer."""
    user, assistant = SPEAKERS[draft.language]
    wordings, _, short = QUESTIONS[draft.language][kind]
    asked = draft.pick(wordings)
    asked = about + asked[0].lower() + asked[1:] if about else asked
    return user + asked, assistant + capital(short.format_map(words(scene, draft.language)))


def _one_picture(draft: Draft) -> Built:
    """A dialogue of two or three questions on one drawing."""
    kinds = draft.rng.permutation(list(QUESTIONS[draft.language]))[: draft.rng.integers(2, 4)].tolist()
    lines = [line for kind in kinds[:-1] for line in _turn(draft, kind, draft.scene)]
    lines.append(_turn(draft, kinds[-1], draft.scene)[0])
    media = (draft.medium("drawing"),)
    b = QUESTIONS[draft.language][kinds[-1]][1].format_map(words(draft.scene, draft.language))
    return draft.row("vqa_multi", "\n".join(lines), b, media=media), media


def _two_pictures(draft: Draft) -> Built:
    """A dialogue on two drawings: one question on the other scene, the last on the draft's."""
    other = draft.split.sharing(draft.scene, int(draft.rng.integers(4)), draft.rng)
    ours = int(draft.rng.integers(2))
    media = tuple(draft.medium("drawing", draft.scene if n == ours else other, n + 1) for n in (0, 1))
    first, last = draft.rng.choice(list(QUESTIONS[draft.language]), 2).tolist()
    about = ABOUT[draft.language]
    lines = [TWO_PICTURES[draft.language], *_turn(draft, first, other, about[1 - ours])]
    lines.append(_turn(draft, last, draft.scene, about[ours])[0])
    b = QUESTIONS[draft.language][last][1].format_map(words(draft.scene, draft.language))
    return draft.row("vqa_multi", "\n".join(lines), b, media=media), media
