"""The demo world's grammar: 1152 scenes, each described in Vietnamese, English and Chinese.

A scene is count x colour x thing x size x place. The tables below are the whole language of the world; a new word is
a new table entry (and, for what is drawn, written and spoken, new assets: `demo/assets/make_assets.py`).
"""

import hashlib
import itertools
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache

import numpy as np

LANGUAGES = ("vi", "en", "zh")
LANGUAGE_CYCLE = ("vi", "en", "vi", "vi", "zh", "vi", "en", "vi", "en", "vi")  # 60 % vi, 30 % en, 10 % zh

ATTRIBUTES = {
    "count": (1, 2, 3, 4),
    "colour": ("red", "yellow", "blue", "purple", "white", "black"),
    "thing": ("star", "fish", "boat", "ball", "flower", "umbrella"),
    "size": ("big", "small"),
    "place": ("grass", "sea", "sky", "sand"),
}

# language -> attribute -> value -> word. English things are (singular, plural); Chinese things are (measure, noun).
VOCABULARY = {
    "vi": {
        "count": {1: "một", 2: "hai", 3: "ba", 4: "bốn"},
        "colour": {
            "red": "đỏ",
            "yellow": "vàng",
            "blue": "xanh dương",
            "purple": "tím",
            "white": "trắng",
            "black": "đen",
        },
        "thing": {
            "star": "ngôi sao",
            "fish": "con cá",
            "boat": "chiếc thuyền",
            "ball": "quả bóng",
            "flower": "bông hoa",
            "umbrella": "chiếc ô",
        },
        "size": {"big": "lớn", "small": "nhỏ"},
        "place": {"grass": "trên bãi cỏ", "sea": "dưới biển", "sky": "trên trời", "sand": "trên cát"},
    },
    "en": {
        "count": {1: "one", 2: "two", 3: "three", 4: "four"},
        "colour": {c: c for c in ATTRIBUTES["colour"]},
        "thing": {
            "star": ("star", "stars"),
            "fish": ("fish", "fish"),
            "boat": ("boat", "boats"),
            "ball": ("ball", "balls"),
            "flower": ("flower", "flowers"),
            "umbrella": ("umbrella", "umbrellas"),
        },
        "size": {"big": "big", "small": "small"},
        "place": {"grass": "on the grass", "sea": "in the sea", "sky": "in the sky", "sand": "on the sand"},
    },
    "zh": {
        "count": {1: "一", 2: "两", 3: "三", 4: "四"},
        "colour": {
            "red": "红色",
            "yellow": "黄色",
            "blue": "蓝色",
            "purple": "紫色",
            "white": "白色",
            "black": "黑色",
        },
        "thing": {
            "star": ("颗", "星星"),
            "fish": ("条", "鱼"),
            "boat": ("艘", "船"),
            "ball": ("个", "球"),
            "flower": ("朵", "花"),
            "umbrella": ("把", "伞"),
        },
        "size": {"big": "大", "small": "小"},
        "place": {"grass": "草地上", "sea": "海里", "sky": "天上", "sand": "沙滩上"},
    },
}
SECOND_SIZE = {  # for paraphrases
    "vi": {"big": "to", "small": "bé"},
    "en": {"big": "large", "small": "little"},
    "zh": VOCABULARY["zh"]["size"],
}

# Template 0 is the caption: what signs carry and voices say. The others are paraphrases. Fields: `words`.
TEMPLATES = {
    "vi": (
        "{count} {noun} {colour} {size} {place}",
        "{Place} có {count} {noun} {size} màu {colour}.",
        "Có {count} {noun} {size2}, màu {colour}, ở {place}.",
    ),
    "en": (
        "{count} {size} {colour} {noun} {place}",
        "{Place} there {be} {count} {size} {colour} {noun}.",
        "There {be} {count} {size2} {colour} {noun} {place}.",
    ),
    "zh": (
        "{place}有{count}{measure}{colour}的{size}{noun}",
        "有{count}{measure}{colour}的{size}{noun}在{place}。",
        "{place}有{count}{measure}{size}{noun}，{all}是{colour}的。",
    ),
}


@dataclass(frozen=True)
class Scene:
    """One scene; its values are those of `ATTRIBUTES`."""

    count: int
    colour: str
    thing: str
    size: str
    place: str

    @cached_property
    def code(self) -> str:
        """Short name of the scene, e.g. `3-red-star-big-grass`."""
        return "-".join(str(value) for value in astuple(self))

    @classmethod
    def from_code(cls, code: str) -> "Scene":
        """Inverse of `code`."""
        values = code.split("-")
        if len(values) != len(ATTRIBUTES) or not values[0].isdigit():
            raise ValueError(f"scene code {code!r} is not COUNT-COLOUR-THING-SIZE-PLACE, e.g. '3-red-star-big-grass'")
        scene = cls(int(values[0]), *values[1:])
        for (name, allowed), value in zip(ATTRIBUTES.items(), astuple(scene), strict=True):
            if value not in allowed:
                raise ValueError(f"scene code {code!r}: {name} {value!r} is none of {allowed}")
        return scene

    def shared(self, other: "Scene") -> int:
        """Number of attributes (0 to 5) that two scenes share; a pair's score is this / 5."""
        return sum(mine == theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))


@lru_cache
def all_scenes() -> tuple[Scene, ...]:
    """Every combination of `ATTRIBUTES`, in a fixed order."""
    return tuple(Scene(*values) for values in itertools.product(*ATTRIBUTES.values()))


HELD_OUT = 240


@lru_cache
def held_out_scenes(seed: int = 0) -> tuple[Scene, ...]:
    """The 240 combinations that no training row shows, describes or says."""
    picked = generator(seed, "held-out").permutation(len(all_scenes()))[:HELD_OUT]
    return tuple(all_scenes()[i] for i in sorted(picked))


@lru_cache
def train_scenes(seed: int = 0) -> tuple[Scene, ...]:
    """All scenes but the held-out ones."""
    hidden = set(held_out_scenes(seed))
    return tuple(scene for scene in all_scenes() if scene not in hidden)


def generator(seed: int, key: str) -> np.random.Generator:
    """Random numbers that depend on the seed and an item's name alone, so that order and processes do not matter."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def words(scene: Scene, language: str) -> dict[str, str]:
    """A scene's words in a language: the fields of every template, question, answer and instruction."""
    if language not in VOCABULARY:
        raise ValueError(f"unknown language {language!r}; the demo world speaks {', '.join(LANGUAGES)}")
    table = VOCABULARY[language]
    found = {name: table[name][value] for name, value in zip(ATTRIBUTES, astuple(scene), strict=True)}
    found["size2"] = SECOND_SIZE[language][scene.size]
    thing = found.pop("thing")
    if language == "vi":
        found["noun"] = thing
    elif language == "en":
        found |= _english_forms(thing, scene.count == 1)
    else:
        found |= {"measure": thing[0], "noun": thing[1], "all": "" if scene.count == 1 else "都"}
    return found | {name.capitalize(): capital(word) for name, word in found.items()}


def _english_forms(thing: tuple[str, str], single: bool) -> dict[str, str]:
    """What English changes with number: nouns, verbs, pronouns, articles."""
    one, many = thing
    article = "an" if one[0] in "aeiou" else "a"
    forms = {"another": f"another {one}", "one": f"one {one}"}
    if single:
        return forms | {"noun": one, "naming": f"{article} {one}", "be": "is", "it_is": "it is", "it": "it"}
    return forms | {"noun": many, "naming": many, "be": "are", "it_is": "they are", "it": "them"}


def capital(text: str) -> str:
    """Text with its first letter upper case, the rest untouched."""
    return text[:1].upper() + text[1:]


def describe(scene: Scene, language: str, template: int = 0) -> str:
    """A sentence that names all five attributes, and so no other scene.

    Args:
        scene: What to describe.
        language: `vi`, `en` or `zh`.
        template: 0 for the caption (as written on signs and as spoken), 1 and 2 for paraphrases.
    """
    fields = words(scene, language)
    return TEMPLATES[language][template].format_map(fields)


def spoken_phrases(scene: Scene, language: str) -> list[str]:
    """The caption (template 0) cut into the phrases that were recorded, in the order they are said."""
    w = words(scene, language)
    if language == "vi":
        return [w["count"], w["noun"], w["colour"], w["size"], w["place"]]
    if language == "en":
        return [w["count"], w["size"], w["colour"], w["noun"], w["place"]]
    return [w["place"] + "有", w["count"] + w["measure"], w["colour"] + "的", w["size"], w["noun"]]


def join_phrases(phrases: list[str], language: str) -> str:
    """Phrases as one line: Chinese is written without spaces."""
    return ("" if language == "zh" else " ").join(phrases)
