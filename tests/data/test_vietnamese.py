"""Spelling rules against examples written by hand and properties over the syllables of the language."""

import re
import unicodedata
from collections import defaultdict
from itertools import product

import pytest

from vipolyqwen.data.vietnamese import (
    RULES,
    TONES,
    decompose,
    is_vietnamese,
    new_tone_placement,
    old_tone_placement,
    strip_diacritics,
    switch_code,
    switched_share,
    telex,
    vni,
)
from vipolyqwen.data.vietnamese_english import ENGLISH

ONSETS = "b c ch d đ g gh gi h k kh l m n ng ngh nh p ph qu r s t th tr v x".split() + [""]
# Endings of syllables; the tone stands on the letter after the dot (new style).
RIMES = (
    ".a .ac .ach .ai .am .an .ang .anh .ao .ap .at .au .ay .ăc .ăm .ăn .ăng .ăp .ăt .âc .âm .ân .âng .âp .ât "
    ".âu .ây .e .ec .em .en .eng .eo .ep .et .ê .êch .êm .ên .ênh .êp .êt .êu .i .ia .ich i.êc i.êm i.ên i.êng "
    "i.êp i.êt i.êu .im .in .inh .ip .it .iu .o .oc .oi .om .on .ong .op .ot o.oc o.ong .ô .ôc .ôi .ôm .ôn "
    ".ông .ôp .ôt .ơ .ơi .ơm .ơn .ơp .ơt o.a o.ac o.ach o.ai o.am o.an o.ang o.anh o.ao o.ap o.at o.ay o.ăc "
    "o.ăm o.ăn o.ăng o.ăt o.e o.em o.en o.eo o.et .u .ua .uc .ui .um .un .ung .up .ut u.âc u.ân u.âng u.ât "
    "u.ây u.ê u.êch u.ên u.ênh u.ôc u.ôi u.ôm u.ôn u.ông u.ôt u.ơ u.y u.ya u.ych u.yên u.yêt u.ynh u.yt u.yu "
    ".ư .ưa .ưc .ưi .ưng .ưt .ưu ư.ơc ư.ơi ư.ơm ư.ơn ư.ơng ư.ơp ư.ơt ư.ơu .y y.êm y.ên y.êt y.êu"
).split()
SENTENCES = [
    "Trên bãi cỏ có ba bông hoa lớn màu tím.",
    "Thuỷ thủ khoẻ mạnh hoà nhạc ở Huế; quý vị thuở ấy quỳ xuống!",
    "ĐẠI HỌC QUỐC GIA HÀ NỘI, Điện Biên Phủ 1954",
    "Email cho anh Nguyễn Văn Đạt: dat@example.com, deadline ngày 5/3.",
]
NOT_VIETNAMESE = ["The big red tin boat on the sand, to go.", "草地上有两朵紫色的小花", "", "a-b_c 42 <image> ∑ 🙂"]


def syllables() -> dict[str, tuple[str, str]]:
    """Syllable in the new style -> it without its tone, and the mark."""
    made = {}
    for onset, rime, mark in product(ONSETS, RIMES, ["", *TONES]):
        before, after = rime.split(".")
        if onset == "g" and (before + after)[0] == "i":
            continue  # `già`, written with the onset gi
        made[unicodedata.normalize("NFC", onset + before + after[0] + mark + after[1:])] = (
            onset + before + after,
            mark,
        )
    return made


SYLLABLES = syllables()


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("Trường Đại học Thuỷ lợi", "Truong Dai hoc Thuy loi"),
        ("đường phố ĐƯỜNG PHỐ", "duong pho DUONG PHO"),
        ("ở ặ ễ ỵ Ữ", "o a e y U"),
        ("Zürich, mañana, ça: họ đi", "Zürich, mañana, ça: ho di"),
    ],
)
def test_without_diacritics(text: str, bare: str) -> None:
    assert strip_diacritics(text) == bare
    assert strip_diacritics(decompose(text)) == bare


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ("hoà bình", "hòa bình"),
        ("khoẻ, loè xoè, toạ độ", "khỏe, lòe xòe, tọa độ"),
        ("thuý, tuỳ, uỷ ban, huỷ", "thúy, tùy, ủy ban, hủy"),
        ("HOÀ Hoà Oà THUỶ", "HÒA Hòa Òa THỦY"),
        ("hoá-học/thuỷ_tinh", "hóa-học/thủy_tinh"),
    ],
)
def test_tone_placement_in_both_directions(new: str, old: str) -> None:
    assert old_tone_placement(new) == old
    assert new_tone_placement(old) == new
    assert old_tone_placement(old) == old
    assert new_tone_placement(new) == new
    assert old_tone_placement(decompose(new)) == old


@pytest.mark.parametrize(
    "text",
    [
        "quý quỳ quỷ quá que quà",  # the u belongs to qu
        "hoàn toán hoạch thoát khoét huỳnh tuýt",  # a final consonant
        "ngoài ngoáo khoèo khuỷu xoáy",  # a third vowel
        "huế thuở thuê của mùa giá già thuyền chuyện",  # one placement only
        "gìn giữ gì oa hoe",
        "hoa tuy",  # no tone
    ],
)
def test_tone_placement_leaves_alone_what_has_only_one(text: str) -> None:
    assert old_tone_placement(text) == text
    assert new_tone_placement(text) == text


@pytest.mark.parametrize(
    ("text", "telex_keys", "vni_keys"),
    [
        ("tiếng Việt", "tieengs Vieetj", "tie6ng1 Vie6t5"),
        ("đường", "dduwowngf", "d9u7o7ng2"),
        ("Đà Nẵng", "Ddaf Nawngx", "D9a2 Na8ng4"),
        ("HÀ NỘI ĐÂU", "HAF NOOIJ DDAAU", "HA2 NO6I5 D9A6U"),
        ("Ở đó", "Owr ddos", "O73 d9o1"),
        ("nguyễn khuỷu giữ quỷ", "nguyeenx khuyur giuwx quyr", "nguye6n4 khuyu3 giu74 quy3"),
        ("hòa hoà", "hoaf hoaf", "hoa2 hoa2"),
        ("rơ moóc, mốc", "row mooocs, moocs", "ro7 mooc1, mo6c1"),
        ("gửi file PDF cho sếp", "guwir file PDF cho seeps", "gu7i3 file PDF cho se6p1"),
        ("naïve, résumé, đắt5", "naïve, résumé, ddawts5", "naïve, résumé, d9a8t15"),
    ],
)
def test_keys_of_telex_and_vni(text: str, telex_keys: str, vni_keys: str) -> None:
    assert telex(text) == telex_keys
    assert vni(text) == vni_keys
    assert telex(decompose(text)) == telex_keys


@pytest.mark.parametrize("method", [telex, vni])
def test_no_two_syllables_have_the_same_keys(method: object) -> None:
    owners = defaultdict(set)
    for syllable in SYLLABLES:
        if is_vietnamese(syllable):  # what is plain ASCII is not typed in another way
            owners[method(syllable)].add(syllable)
    assert len(SYLLABLES) > 20_000
    assert [names for names in owners.values() if len(names) > 1] == []


@pytest.mark.parametrize(
    ("method", "tones", "letters"),
    [
        (telex, dict(zip("fsrxj", TONES, strict=True)), dict(aa="â", ee="ê", oo="ô", aw="ă", ow="ơ", uw="ư", dd="đ")),
        (vni, dict(zip("21345", TONES, strict=True)), dict(a6="â", e6="ê", o6="ô", a8="ă", o7="ơ", u7="ư", d9="đ")),
    ],
)
def test_the_keys_can_be_read_back(method: object, tones: dict[str, str], letters: dict[str, str]) -> None:
    """The letters without tone and the tone come back; where the tone stands is the method's affair."""
    for syllable, (bare, mark) in SYLLABLES.items():
        if not is_vietnamese(syllable):
            continue
        keys = method(syllable)
        if mark:
            assert tones[keys[-1]] == mark
            keys = keys[:-1]
        if "oo" in bare:
            keys = keys.replace("ooo", "o.o") if method is telex else keys
        keys = re.sub("|".join(letters), lambda pair: letters[pair[0]], keys).replace(".", "")
        assert keys == bare


def test_placement_changes_nothing_but_the_place_of_the_tone() -> None:
    changed = set()
    for syllable, (bare, mark) in SYLLABLES.items():
        old = old_tone_placement(syllable)
        assert new_tone_placement(old) == syllable
        assert telex(old) == telex(syllable)
        assert strip_diacritics(old) == strip_diacritics(syllable)
        if old != syllable:
            assert mark
            changed.add(bare)
    endings = {bare[-2:] for bare in changed}
    assert endings == {"oa", "oe", "uy"}
    assert not any(bare.startswith("qu") for bare in changed)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_twice_is_a_rule_once(name: str) -> None:
    rule = RULES[name]
    for text in SENTENCES:
        assert rule(rule(text)) == rule(text)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_does_not_depend_on_the_unicode_form(name: str) -> None:
    for text in SENTENCES:
        assert RULES[name](decompose(text)) == RULES[name](text)


@pytest.mark.parametrize("name", RULES)
def test_other_languages_stay_as_they_are(name: str) -> None:
    for text in NOT_VIETNAMESE:
        assert RULES[name](text) == text
        assert not is_vietnamese(text)


def test_nfd_differs_in_form_and_in_nothing_else() -> None:
    for text in SENTENCES:
        assert decompose(text) != text
        assert unicodedata.normalize("NFC", decompose(text)) == text


def test_code_switching_replaces_content_words_and_leaves_the_frame() -> None:
    assert switch_code("hai chiếc thuyền vàng nhỏ trên cát") == "hai chiếc boat yellow small trên sand"
    assert switch_code("Bộ phim này ĐẸP lắm, mặt trời!") == "Movie này BEAUTIFUL lắm, sun!"
    assert switch_code("sức khỏe và sức khoẻ, tàu hỏa") == "health và health, train"
    assert switch_code("thuyềnx đỏng") == "thuyềnx đỏng"
    assert switched_share(["hai chiếc thuyền vàng", "sức khỏe"]) == pytest.approx(4 / 6)
    assert switched_share(["no word"]) == 0.0


def test_the_dictionary_is_one_to_one() -> None:
    assert len(set(ENGLISH.values())) == len(ENGLISH)
    for vietnamese, english in ENGLISH.items():
        assert switch_code(vietnamese) == english
        assert is_vietnamese(vietnamese)
        assert english.isascii()
