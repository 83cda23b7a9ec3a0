import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from helpers import random_audio, random_image
from PIL import Image

from vipolyqwen.data.__main__ import main
from vipolyqwen.data.duplicates import clusters, is_datasketch_available, near_images, near_texts
from vipolyqwen.data.faults import Fault, find_faults
from vipolyqwen.data.inspection import (
    SeenRow,
    excluded_as_negatives,
    guess_language,
    inspect_recipe,
    quantiles,
    task_table,
)
from vipolyqwen.data.media_facts import perceptual_hash
from vipolyqwen.data.recipes import read_data_recipe

LONG = "Hôm nay trời nắng đẹp, cả nhà tôi đi dạo quanh hồ Hoàn Kiếm"


def write_recipe(folder: Path, train: list[dict[str, Any]], held_out: list[dict[str, Any]] = ()) -> Path:
    """A recipe of these rows."""
    settings: dict[str, Any] = {}
    for key, rows in (("train_data", train), ("eval_data", held_out)):
        if rows:
            path = folder / f"{key}.jsonl"
            path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
            settings[key] = [{"path": str(path)}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "recipe.yaml"


def faults_of(recipe: Path, **options: Any) -> dict[str, Fault]:
    seen = inspect_recipe(read_data_recipe(recipe), **options)
    return {fault.title: fault for fault in find_faults(seen)}


def instr(number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "task": "instr", "a": f"hỏi {number}", "b": f"đáp {number}", **more}


def test_a_clean_recipe_has_no_faults(tmp_path: Path) -> None:
    assert faults_of(write_recipe(tmp_path, [instr(1), instr(2)], [instr(3)])) == {}


def test_the_table_counts_by_task_and_language(tmp_path: Path) -> None:
    rows = [instr(1, language="vi"), instr(2, language="en"), instr(3, language="vi")]
    rows.append({"task": "text_pair", "a": "天气很好", "b": "今天天气好", "score": 0.25})
    seen = inspect_recipe(read_data_recipe(write_recipe(tmp_path, rows)))
    table = {(row["task"], row["language"]): row for row in task_table(seen)}
    assert {key: row["rows"] for key, row in table.items()} == {
        ("instr", "vi"): 2,
        ("instr", "en"): 1,
        ("text_pair", "zh"): 1,
    }
    scored = table["text_pair", "zh"]
    assert scored["length_a"] == {"min": 4, "median": 4, "p95": 4, "max": 4}
    assert scored["histogram"] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_bad_rows_and_broken_files_are_found_and_stop_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    random_image(rng).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:400])
    (tmp_path / "empty.png").touch()
    vqa = {"task": "vqa_single", "a": "Cái gì?"}
    rows = [
        {**vqa, "id": name, "b": name, "images": [f"{name}"]}
        for name in ("good.jpg", "cut.jpg", "empty.png", "no.png")
    ]
    rows.append({"id": "odd", "task": "nonsense", "a": "x", "b": "y"})
    recipe = write_recipe(tmp_path, rows)
    with (tmp_path / "train_data.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('\n{"task": "instr", "a": "tr')
    found = faults_of(recipe)
    assert found["files of images or audio that cannot be read"].count == 2
    refused = found["rows that training refuses"]
    assert refused.count == 3 and "no.png" in refused.examples[0]
    assert "nonsense" in refused.examples[1] and "line 6" in refused.examples[2]


def test_flat_images_and_silence_are_found(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "grey").save(tmp_path / "grey.png")
    soundfile.write(tmp_path / "still.wav", np.zeros(8000, np.float32), 16_000)
    soundfile.write(tmp_path / "noise.wav", random_audio(np.random.default_rng(0))["array"], 16_000)
    rows = [{"task": "ocr", "a": "đọc", "b": "không", "images": ["grey.png"]}]
    rows += [{"task": "audio", "b": name, "audio": f"{name}.wav"} for name in ("still", "noise")]
    found = faults_of(write_recipe(tmp_path, rows))
    assert (found["images of one colour"].count, found["silent clips"].count) == (1, 1)


def test_leakage_between_train_and_eval(tmp_path: Path) -> None:
    random_image(np.random.default_rng(0)).save(tmp_path / "seen.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "seen.png").read_bytes())
    picture = {"task": "vqa_single", "a": "Gì đây?"}
    train = [instr(1, group="g"), {**picture, "b": "một", "images": ["seen.png"]}, instr(5, a=LONG)]
    held_out = [instr(1), instr(2, group="g"), {**picture, "b": "hai", "images": ["copy.png"]}, instr(6, a=LONG)]
    found = faults_of(write_recipe(tmp_path, train, held_out))
    assert found["held-out pairs that are also trained on"].count == 1
    assert found["held-out rows whose image is also trained on"].count == 1
    assert found["held-out rows whose `group` is also trained on"].count == 1
    assert found["held-out rows whose text of side a is also trained on"].count == 1


def test_repeated_contradicting_and_equal_sides(tmp_path: Path) -> None:
    scored = {"task": "text_pair", "a": "một", "b": "hai"}
    rows = [instr(1), instr(1), instr(2, b="hỏi 2"), {**scored, "score": 0.1}, {**scored, "score": 0.9}]
    found = faults_of(write_recipe(tmp_path, rows))
    assert found["ids that several rows of train share"].count == 1
    assert found["rows of train that repeat an earlier pair"].count == 2
    assert found["pairs that occur with scores more than 0.2 apart"].count == 1
    assert found["rows whose sides are equal"].count == 1


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("Ti\ufffdng Vi\ufffdt", "texts with the replacement character U+FFFD"),
        ("Tiáº¿ng Viá»‡t", "texts with UTF-8 read as Latin-1"),
        ("Tom &amp; Jerry", "texts with HTML"),
        ("a\u200bb", "texts with zero-width characters"),
        ("a\x07b", "texts with control characters"),
        ("Tie\u0302\u0301ng", "texts with decomposed letters (NFD)"),
    ],
)
def test_damaged_texts(text: str, title: str, tmp_path: Path) -> None:
    found = faults_of(write_recipe(tmp_path, [instr(1, a=text), instr(2, a="ĐÃ LÂU RỒI, 5 < 6 & 7 > 3")]))
    assert list(found) == [title] and found[title].count == 1


def test_rows_without_any_negative(tmp_path: Path) -> None:
    rows = [instr(number, group="all") for number in range(3)]
    rows += [{"task": "ocr", "a": str(number), "b": "có", "group": f"g{number}"} for number in range(2)]
    random_image(np.random.default_rng(0)).save(tmp_path / "x.png")
    rows[3:] = [{**row, "images": ["x.png"]} for row in rows[3:]]
    found = faults_of(write_recipe(tmp_path, rows))
    assert found["rows without any negative of their task"].count == 5


def test_excluded_negatives_are_counted_once() -> None:
    def row(group: str | None, a: int, b: int) -> SeenRow:
        return SeenRow("x", "train", "instr", "vi", "text-text", ("", ""), (a, b), (), (), None, group)

    rows = [row("g", 1, 1), row("g", 1, 1), row("g", 2, 2), row(None, 3, 1), row(None, 1, 4), row(None, 9, 9)]
    # of the first: both rows like it, the third by group, the fourth by b, the fifth by a
    assert excluded_as_negatives(rows).tolist() == [5, 5, 3, 3, 3, 1]


def test_images_that_look_alike() -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((300, 240))
    alike, other = picture.resize((150, 120)), random_image(rng, 300, 240)
    looks = np.stack([perceptual_hash(image) for image in (picture, other, alike)])
    assert near_images(looks) == [(0, 2)]


def test_pages_with_one_stroke_are_not_compared() -> None:
    pages = []
    for place in (20, 60):
        page = Image.new("L", (160, 120), "white")
        page.paste(0, (place, 30, place + 8, 60))
        pages.append(perceptual_hash(page))
    assert near_images(np.stack(pages)) == [] == near_images(np.stack([pages[0], pages[0]]))


@pytest.mark.skipif(not is_datasketch_available(), reason="needs datasketch")
def test_texts_that_nearly_agree(tmp_path: Path) -> None:
    assert near_texts([LONG, "ngắn", "một câu khác hẳn, nói về chuyện bếp núc", LONG + "!", LONG.upper()]) == [
        (0, 3),
        (0, 4),
    ]
    found = faults_of(write_recipe(tmp_path, [instr(1, a=LONG)], [instr(2, a=LONG + ".")]))
    assert found["held-out texts that nearly repeat one of training"].count == 1


def test_clusters_are_connected_groups() -> None:
    assert clusters([(4, 5), (0, 1), (1, 2)]) == [[0, 1, 2], [4, 5]]


def test_quantiles() -> None:
    assert quantiles([1, 2, 3]) == {"min": 1, "median": 2, "p95": 2.9, "max": 3}
    assert quantiles([]) is None


@pytest.mark.parametrize(
    ("text", "language"),
    [("Trời đẹp quá", "vi"), ("a nice day", "other"), ("天气 ok", "zh"), ("123", "none"), ("cafe\u0302 đá", "vi")],
)
def test_languages_are_guessed(text: str, language: str) -> None:
    assert guess_language(text) == language


def test_truncation_counts_the_lost_tokens(tmp_path: Path) -> None:
    recipe = read_data_recipe(write_recipe(tmp_path, [instr(1, a="a b c d e f")]))
    seen = inspect_recipe(recipe, count_tokens=lambda texts: [len(text.split()) for text in texts])
    *_, fault = find_faults(seen, max_length=4)
    assert fault.count == 1 and "2 of 8 tokens" in fault.remedy


def test_the_command_writes_a_page_that_escapes_its_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_image(np.random.default_rng(0)).save(tmp_path / "x.png")
    soundfile.write(tmp_path / "x.wav", random_audio(np.random.default_rng(0))["array"], 16_000)
    rows = [instr(1, a="<script>alert(1)</script>"), {"task": "audio", "b": "tiếng", "audio": "x.wav"}]
    rows.append({"task": "ocr", "a": "", "b": "chữ", "images": ["x.png"], "negatives": ["<i>sai</i>"]})
    recipe, page = write_recipe(tmp_path, rows * 2), tmp_path / "page.html"
    assert main(["inspect", str(recipe), "--page", str(page), "--max_rows", "5"]) == 0
    printed, html = capsys.readouterr().out, page.read_text(encoding="utf-8")
    assert "only the first 5 rows" in printed and "ocr" in printed
    assert "<script>" not in html and "&lt;script&gt;" in html and "<i>" not in html
    assert 'src="data:image/png' in html and 'src="data:audio/flac' in html
    assert "http://" not in html and "https://" not in html


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a: [", "not valid YAML"),
        ("[1]", "list"),
        ("learning_rate: 1", "train_data"),
        ("train_data: x.jsonl", "train_data"),
    ],
)
def test_a_recipe_without_data_is_an_error(content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        read_data_recipe(tmp_path / "r.yaml")
