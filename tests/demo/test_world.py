"""The demo world: its language, its splits, its rows, its pictures and its sounds."""

import collections
import json
import unicodedata
from dataclasses import astuple
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageFont

from vipolyqwen.demo import world as demo_world
from vipolyqwen.demo.images import COLOURS, FONT_FOLDER, FONTS, SIDE, draw_scene, sign_lines
from vipolyqwen.demo.rows import BUILDERS, Built, Draft, Split, near_misses
from vipolyqwen.demo.scenes import (
    ATTRIBUTES,
    LANGUAGES,
    TEMPLATES,
    Scene,
    all_scenes,
    describe,
    generator,
    held_out_scenes,
    join_phrases,
    spoken_phrases,
    train_scenes,
)
from vipolyqwen.demo.speech import RATE, clips, say_scene

TASKS = {"text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio"}
SHARES = {"vi": 0.6, "en": 0.3, "zh": 0.1}


@cache
def training() -> list[Built]:
    split = Split("train", train_scenes(0))
    return [built for task in BUILDERS for built in demo_world.training_rows(task, split, 0, 1)]


@cache
def evaluation() -> list[Built]:
    return demo_world.evaluation_rows(Split("eval", held_out_scenes(0)), 0)


@cache
def scene_of_text() -> dict[str, Scene]:
    return {describe(s, lang, t): s for s in all_scenes() for lang in LANGUAGES for t in range(3)}


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_scenes_and_training_scenes_make_up_the_world_and_share_nothing(seed: int) -> None:
    hidden, known = set(held_out_scenes(seed)), set(train_scenes(seed))
    assert len(hidden) == 240
    assert not hidden & known
    assert hidden | known == set(all_scenes())
    seen = collections.Counter(
        (name, value) for s in known for name, value in zip(ATTRIBUTES, astuple(s), strict=True)
    )
    assert min(seen[name, value] for name, values in ATTRIBUTES.items() for value in values) > 100


def test_another_seed_holds_out_other_scenes() -> None:
    assert held_out_scenes(0) != held_out_scenes(1)


def test_each_description_fits_one_scene_only_and_is_nfc() -> None:
    assert len(scene_of_text()) == len(all_scenes()) * sum(map(len, TEMPLATES.values()))
    assert all(unicodedata.is_normalized("NFC", text) for text in scene_of_text())


def test_descriptions_read_as_written_by_hand() -> None:
    scene = Scene(3, "red", "star", "big", "grass")
    assert describe(scene, "vi") == "ba ngôi sao đỏ lớn trên bãi cỏ"
    assert describe(scene, "en", 2) == "There are three large red stars on the grass."
    assert describe(scene, "zh") == "草地上有三颗红色的大星星"
    assert describe(Scene(1, "blue", "umbrella", "small", "sea"), "en", 1) == (
        "In the sea there is one small blue umbrella."
    )


def test_a_caption_is_the_same_spoken_and_on_a_sign() -> None:
    for scene in all_scenes()[::7]:
        for language in LANGUAGES:
            caption = describe(scene, language)
            assert join_phrases(spoken_phrases(scene, language), language) == caption
            assert join_phrases(sign_lines(scene, language), language) == caption


def test_codes_name_scenes_and_wrong_codes_are_refused() -> None:
    assert Scene.from_code("3-red-star-big-grass").code == "3-red-star-big-grass"
    for code in ("3-red-star-big", "3-green-star-big-grass", "nine-red-star-big-grass"):
        with pytest.raises(ValueError, match=code):
            Scene.from_code(code)
    with pytest.raises(ValueError, match="klingon"):
        describe(all_scenes()[0], "klingon")


@pytest.mark.parametrize("rows", [training, evaluation])
def test_every_task_has_its_share_of_languages(rows: collections.abc.Callable[[], list[Built]]) -> None:
    counts = collections.Counter((row["task"], row["language"]) for row, _ in rows())
    assert {task for task, _ in counts} == TASKS
    for task in TASKS:
        total = sum(counts[task, language] for language in SHARES)
        assert all(abs(counts[task, language] / total - share) < 0.01 for language, share in SHARES.items())


@pytest.mark.parametrize("rows", [training, evaluation])
def test_scores_are_the_shared_attributes(rows: collections.abc.Callable[[], list[Built]]) -> None:
    scores = collections.Counter()
    for row, _ in rows():
        if row["task"] != "text_pair":
            assert row["score"] is None
            continue
        first, second = scene_of_text()[row["a"]], scene_of_text()[row["b"]]
        assert row["score"] == first.shared(second) / 5
        assert row["a"] != row["b"]
        scores[row["score"]] += 1
    assert sorted(scores) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert 0.55 < scores[1.0] / scores.total() < 0.8


@pytest.mark.parametrize("rows", [training, evaluation])
def test_rows_show_say_and_tell_of_scenes_of_their_own_split(rows: collections.abc.Callable[[], list[Built]]) -> None:
    own = set(train_scenes(0) if rows is training else held_out_scenes(0))
    for row, media in rows():
        assert Scene.from_code(row["scene"]) in own
        assert all(medium.scene in own for medium in media)
        assert [medium.path for medium in media] == row["images"] + [row["audio"]] * bool(row["audio"])
        for text in (row["a"], row["b"]):
            told = [scene_of_text()[end] for end in (text, *_endings(text)) if end in scene_of_text()]
            assert own.issuperset(told)
            assert told or row["task"] not in ("text_pair", "instr")


def _endings(text: str) -> list[str]:
    """What stands behind an instruction's colon or question mark."""
    return [text.split(mark, 1)[1].strip() for mark in (":", "：", "?") if mark in text]


def test_instructions_carry_the_sentence_they_work_on() -> None:
    for row, _ in training():
        if row["task"] == "instr":
            source = next(scene_of_text()[end] for end in _endings(row["a"]) if end in scene_of_text())
            assert scene_of_text()[row["b"]].code == row["scene"]
            assert source.shared(Scene.from_code(row["scene"])) >= 4


def test_evaluation_answers_of_a_task_are_all_different() -> None:
    answers = collections.defaultdict(list)
    for row, _ in evaluation():
        if row["score"] in (None, 1.0):
            answers[row["task"]].append(row["b"])
    assert {task: len(set(texts)) for task, texts in answers.items()} == dict.fromkeys(TASKS, 240)


def test_dialogues_on_two_pictures_mark_their_places() -> None:
    dialogues = [row for row, _ in training() if row["task"] == "vqa_multi"]
    for row in dialogues:
        assert row["a"].count("<image>") == (2 if len(row["images"]) == 2 else 0)
    assert 0.25 < sum(len(row["images"]) == 2 for row in dialogues) / len(dialogues) < 0.35


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_font_has_every_glyph_of_its_language(language: str) -> None:
    letters = {letter for scene in all_scenes() for line in sign_lines(scene, language) for letter in line} - {" "}
    for name in FONTS[language]:
        font = ImageFont.truetype(FONT_FOLDER / name, 40)
        missing = bytes(font.getmask("\uffff"))
        drawn = {letter: bytes(font.getmask(letter)) for letter in letters}
        assert missing not in drawn.values()
        assert len(set(drawn.values())) == len(letters)


def test_big_things_cover_more_than_small_ones_and_more_things_more_than_fewer() -> None:
    def covered(count: int, size: str) -> int:
        image = np.asarray(draw_scene(Scene(count, "red", "ball", size, "sky"), generator(0, "picture")), dtype=int)
        return int((np.abs(image - COLOURS["red"]).sum(axis=2) < 80).sum())

    assert covered(1, "big") > 2.5 * covered(1, "small")
    assert covered(4, "small") > 3 * covered(1, "small") > 0


def test_every_phrase_was_recorded_in_every_voice() -> None:
    for language in LANGUAGES:
        phrases = {phrase for scene in all_scenes() for phrase in spoken_phrases(scene, language)}
        assert len(clips()[language]) >= 2
        for recordings in clips()[language].values():
            assert set(recordings) == phrases
            assert all(0.08 < len(sound) / RATE < 1 and np.abs(sound).max() > 0.3 for sound in recordings.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_speech_is_finite_audible_and_about_two_seconds_long(language: str) -> None:
    seconds = []
    for scene in all_scenes()[::40]:
        sound = say_scene(scene, language, generator(0, scene.code))
        assert sound.dtype == np.float32
        assert np.isfinite(sound).all()
        assert 0.2 < np.abs(sound).max() <= 1
        assert sound.std() > 0.01
        seconds.append(len(sound) / RATE)
    assert min(seconds) > 1.2
    assert max(seconds) < 3.8
    assert 1.8 < np.mean(seconds) < 2.8


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    picked = {medium.kind: medium for _, media in evaluation() for medium in media}
    assert set(picked) == {"drawing", "sign", "ticket", "speech"}
    for medium in picked.values():
        made = []
        for number, seed in enumerate((0, 0, 1)):
            path = tmp_path / str(number) / medium.path
            path.parent.mkdir(parents=True, exist_ok=True)
            demo_world.make_medium(tmp_path / str(number), seed, medium)
            made.append(path.read_bytes())
        assert made[0] == made[1] != made[2]


def test_a_written_corpus_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_world, "train_scenes", lambda seed: train_scenes(seed)[::90])
    monkeypatch.setattr(demo_world, "held_out_scenes", lambda seed: held_out_scenes(seed)[::24])
    demo_world.write_corpus(tmp_path, seed=3, variations=2)
    rows = {path.stem: _read(path) for path in sorted(tmp_path.glob("**/*.jsonl"))}
    assert {name: len(found) for name, found in rows.items()} == {
        **dict.fromkeys((*BUILDERS, "image_caption", "image_audio"), 11 * 2),
        "eval": 10 * 7,
        "trimodal": 10,
    }
    for row in [row for task in (*BUILDERS, "eval") for row in rows[task]]:
        _check_media(tmp_path, row["images"], row["audio"])
    assert all(
        set(row) == {"id", "language", "scene", "image", "caption", "negatives"} for row in rows["image_caption"]
    )
    told = {file: row["scene"] for task in ("vqa_single", "audio") for row in rows[task]
            for file in (*row["images"], row["audio"])}  # fmt: skip
    for row in rows["image_audio"]:
        assert told[row["image"]] == told[row["audio"]] == row["scene"]
    for medium in ("image", "audio"):
        assert len({row[medium] for row in rows["image_audio"]}) == 11 * 2
    for row in rows["trimodal"]:
        assert set(row) == {"id", "language", "scene", "text", "image", "audio"}
        _check_media(tmp_path, [row["image"]], row["audio"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_near_misses_describe_training_scenes_that_differ_in_one_attribute(language: str) -> None:
    split = Split("train", train_scenes(0))
    texts = {describe(scene, language, 1): scene for scene in all_scenes()}
    for scene in split.scenes[::60]:
        found = near_misses(Draft("x", scene, language, split, generator(0, scene.code)), template=1)
        assert len(set(found)) == 2
        assert all(texts[text].shared(scene) == 4 and texts[text] in split.scenes for text in found)


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _check_media(folder: Path, images: list[str], audio: str | None) -> None:
    for image in images:
        with Image.open(folder / image) as opened:
            assert (opened.size, opened.mode) == ((SIDE, SIDE), "RGB")
    if audio is not None:
        info = soundfile.info(folder / audio)
        assert (info.samplerate, info.channels) == (RATE, 1)
