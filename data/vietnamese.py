"""Respells Vietnamese as people really type it: spelling rules as pure functions from text to text.

A rule accepts text in any Unicode form and returns NFC (except `decompose`). Words without a Vietnamese letter beyond
ASCII stay unchanged, and so do English words and Chinese sentences. A word is a run of letters: in Vietnamese one
syllable.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping

from .vietnamese_english import ENGLISH

TONES = {"\u0300": "f2", "\u0301": "s1", "\u0309": "r3", "\u0303": "x4", "\u0323": "j5"}  # mark -> Telex, VNI key
SHAPES = {  # marked letter -> its base, Telex key, VNI key
    "â": "aa6",
    "ê": "ee6",
    "ô": "oo6",
    "ă": "aw8",
    "ơ": "ow7",
    "ư": "uw7",
    "đ": "dd9",
}
VOWELS = "aăâeêioôơuưy"
WORD = re.compile(r"[^\W\d_]+")
MOVABLE = (
    "oa",
    "oe",
    "uy",
)  # rimes that carry the tone on the first letter in the old style, on the second in the new


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


# Every vowel with a tone, upper and lower case -> the vowel and the mark.
TONED = {
    case(_nfc(vowel + mark)): (case(vowel), mark)
    for vowel in VOWELS
    for mark in TONES
    for case in (str.lower, str.upper)
}
BASES = {case(letter): case(keys[0]) for letter, keys in SHAPES.items() for case in (str.lower, str.upper)}
MARKED = frozenset({*TONED, *BASES})  # letters that distinguish Vietnamese from English
BARE = str.maketrans({letter: BASES.get(vowel, vowel) for letter, (vowel, _) in TONED.items()} | BASES)


def is_vietnamese(text: str) -> bool:
    """Returns whether a text has a letter of Vietnamese that English lacks (é in a French name counts, too)."""
    return not MARKED.isdisjoint(_nfc(text))


def strip_diacritics(text: str) -> str:
    """Removes diacritics (`không dấu`): each letter becomes its base, đ becomes d.

    Source: Unicode Standard Annex #15: the base is the first character of the canonical decomposition. đ (U+0111) has
    none and is typed as d. Letters of other languages (ü, ñ, ç) keep their marks.
    """
    return _nfc(text).translate(BARE)


def decompose(text: str) -> str:
    """Converts to NFD, as macOS file names and some keyboards do: base letters and combining marks that look the same.

    Source: Unicode Standard Annex #15, Normalization Form D.
    """
    return unicodedata.normalize("NFD", text)


def old_tone_placement(text: str) -> str:
    """Converts `hoà`, `khoẻ`, `thuý` to `hòa`, `khỏe`, `thúy`: the tone moves to the first vowel of oa, oe and uy.

    With a final consonant or a third vowel (`hoàn`, `ngoài`, `khuỷu`) both styles agree; the u of qu belongs to the
    consonant (`quý`).

    Source: the "old style" (`kiểu cũ`) of Launchpad's and GNOME's Vietnamese translators,
    help.launchpad.net/Translations/Vietnamese/Spelling: on the last vowel but one if no consonant follows.
    """
    return WORD.sub(lambda word: _place_tone(word[0], 0), _nfc(text))


def new_tone_placement(text: str) -> str:
    """Converts `hòa`, `khỏe`, `thúy` to `hoà`, `khoẻ`, `thuý`: the inverse of `old_tone_placement`.

    Source: decision 1989/QĐ-BGDĐT of the Vietnamese Ministry of Education and Training (25 May 2018), article 8: the
    tone stands on the main vowel (`hoà nhạc, thuỷ thủ, mạnh khoẻ`).
    """
    return WORD.sub(lambda word: _place_tone(word[0], 1), _nfc(text))


def telex(text: str) -> str:
    """Returns the keystrokes of Telex, as they appear with the input method off: `tiếng Việt` is `tieengs Vieetj`.

    aa, ee, oo, aw, ow, uw, dd make the letters; s, f, r, x, j, the tones, are typed at the end of the syllable. Two
    plain vowels that would make one letter are typed with a third (`moóc` is `mooocs`). The second key is a capital
    only in a word of capitals. `hòa` and `hoà` have the same keys. A word with two tones, or with a letter that is
    neither ASCII nor Vietnamese, stays unchanged.

    Source: TCVN 5712:1993; the tables of en.wikipedia.org/wiki/Telex_(input_method) and of Keyman's Vietnamese Telex.
    """
    return WORD.sub(lambda word: _type(word[0], method=0), _nfc(text))


def vni(text: str) -> str:
    """Returns the keystrokes of VNI, as they appear with the input method off: `tiếng Việt` is `tie6ng1 Vie6t5`.

    1 to 5 are the tones, typed at the end of the syllable, 6 the circumflex, 7 the horn, 8 the breve, 9 the bar of đ.

    Source: the table of vietunicode.sourceforge.net/inputmethod.html.
    """
    return WORD.sub(lambda word: _type(word[0], method=1), _nfc(text))


def switch_code(text: str) -> str:
    """Replaces content words by English ones: `bộ phim này đẹp` becomes `movie này beautiful`.

    Every word of `vietnamese_english.ENGLISH` that occurs is replaced, the longest first; order, numerals, classifiers
    and all other words stay Vietnamese. Homographs are not distinguished, and no inflection is added.

    Source: that the frame stays in one language and content words come from the other is the matrix language frame of
    Myers-Scotton (1997), a simplification of what bilinguals say (CanVEC, Nguyen & Bryant 2020).
    """
    return SWITCHED.sub(_in_english, _nfc(text))


def switched_share(texts: list[str]) -> float:
    """Returns the share of the texts' syllables that `switch_code` replaces, in [0, 1]."""
    every = sum(len(WORD.findall(_nfc(text))) for text in texts)
    switched = sum(len(WORD.findall(match[0])) for text in texts for match in SWITCHED.finditer(_nfc(text)))
    return switched / every if every else 0.0


def _split_tone(word: str) -> tuple[str, str, int] | None:
    """Returns a word without its tone, the mark and its position; `None` unless the word has exactly one tone."""
    toned = [place for place, letter in enumerate(word) if letter in TONED]
    if len(toned) != 1:
        return None
    place = toned[0]
    vowel, mark = TONED[word[place]]
    return word[:place] + vowel + word[place + 1 :], mark, place


def _place_tone(word: str, offset: int) -> str:
    """Returns the word with its tone on the first (0) or second (1) letter of its rime, where styles differ."""
    split = _split_tone(word)
    if split is None:
        return word
    bare, mark, place = split
    start = len(bare) - 2
    before = bare[start - 1].lower() if start > 0 else ""
    if place < start or bare[start:].lower() not in MOVABLE or (before and before in "q" + VOWELS):
        return word
    at = start + offset
    return bare[:at] + _nfc(bare[at] + mark) + bare[at + 1 :]


def _type(word: str, method: int) -> str:
    """Returns the keystrokes of a word by Telex (0) or VNI (1)."""
    if any(not letter.isascii() and letter not in MARKED for letter in word):
        return word
    if word.isascii() or sum(letter in TONED for letter in word) > 1:
        return word
    bare, mark, _ = _split_tone(word) or (word, "", 0)
    keys = [_letter_keys(letter, before, method) for before, letter in zip(" " + bare, bare, strict=False)]
    if word.isupper() and len(word) > 1:
        keys = [key.upper() for key in keys]
    tone = TONES[mark][method] if mark else ""
    return "".join(keys) + (tone.upper() if word.isupper() and len(word) > 1 else tone)


def _letter_keys(letter: str, before: str, method: int) -> str:
    if letter in BASES:
        return BASES[letter] + SHAPES[letter.lower()][1 + method]
    would_merge = method == 0 and letter.lower() == before.lower() and letter.lower() in "aeo"
    return letter * 2 if would_merge else letter


def _in_english(match: re.Match) -> str:
    """Returns the English word, capitalised like the Vietnamese one."""
    vietnamese = match[0]
    english = ENGLISH_OF[re.sub(r"\s+", " ", vietnamese.lower())]
    if vietnamese.isupper():
        return english.upper()
    return english[0].upper() + english[1:] if vietnamese[0].isupper() else english


ENGLISH_OF = {placed(vi): en for vi, en in ENGLISH.items() for placed in (old_tone_placement, new_tone_placement)}
SWITCHED = re.compile(
    r"(?<!\w)(" + "|".join(vi.replace(" ", r"\s+") for vi in sorted(ENGLISH_OF, key=len, reverse=True)) + r")(?!\w)",
    re.IGNORECASE,
)

RULES: Mapping[str, Callable[[str], str]] = {
    "no diacritics": strip_diacritics,
    "NFD": decompose,
    "old tone placement": old_tone_placement,
    "new tone placement": new_tone_placement,
    "Telex": telex,
    "VNI": vni,
    "code-switching": switch_code,
}
