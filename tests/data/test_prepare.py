import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from helpers import random_audio, random_image
from PIL import Image

from vipolyqwen.data import prepare as prepare_module
from vipolyqwen.data.__main__ import main
from vipolyqwen.data.prepare import PrepareOptions, cause_of, prepare, prepare_share
from vipolyqwen.data.prepared_media import prepare_audio, prepare_image
from vipolyqwen.data.recipes import read_data_recipe
from vipolyqwen.data.sources import load_pairs


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Ten good rows of several tasks and four bad ones."""
    rng = np.random.default_rng(0)
    random_image(rng, 300, 200).save(tmp_path / "large.png")
    random_image(rng, 40, 30).save(tmp_path / "small.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "small.jpg").read_bytes()[:300])
    soundfile.write(tmp_path / "x.wav", random_audio(rng, 0.5, 8000)["array"], 8000)
    soundfile.write(tmp_path / "short.wav", np.zeros(10, np.float32), 16_000)
    rows: list[dict[str, Any]] = [
        {"kind": "instr", "q": f"hỏi {number}", "b": f"đáp {number}", "set": number % 2} for number in range(6)
    ]
    rows += [{"kind": "sts", "q": "Tie\u0302\u0301ng", "b": "tiếng", "rating": 4}]
    rows += [
        {"kind": "ocr", "q": "đọc", "b": name, "images": [name]} for name in ("large.png", "small.jpg", "cut.jpg")
    ]
    rows += [{"kind": "audio", "b": name, "audio": name} for name in ("x.wav", "short.wav", "gone.wav")]
    rows += [
        {
            "kind": "ocr",
            "q": "sai",
            "b": "đúng",
            "images": ["small.jpg"],
            "negatives": ["sai", {"images": ["large.png"]}],
        }
    ]
    rows += [{"kind": "instr", "q": "", "b": "?"}]
    lines = [json.dumps({"id": str(number), **row}, ensure_ascii=False) for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = {
        "path": str(tmp_path / "rows.jsonl"),
        "task_column": "kind",
        "map": {"sts": "text_pair"},
        "columns": {"a": "q", "score": "rating", "group": "set"},
        "score_range": [0, 5],
        "weight": 2.0,
    }
    settings = {"train_data": [source], "eval_data": [source], "max_length": 64}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path / "recipe.yaml"


def options_of(recipe: Path, out: Path) -> PrepareOptions:
    return PrepareOptions(str(recipe), str(out), max_pixels=10_000, unit_rows=4)


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; the recipe names the folder itself."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "recipe.yaml"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_prepared_pairs_are_the_pairs(recipe: Path, tmp_path: Path) -> None:
    report = prepare(options_of(recipe, tmp_path / "out"))
    made = read_data_recipe(tmp_path / "out/recipe.yaml")
    assert made.settings["max_length"] == 64
    pairs = load_pairs(made.settings["train_data"], made.tasks, 400)
    assert pairs.source_weights == [2.0]
    rows = {row["id"]: row for row in map(pairs.__getitem__, range(len(pairs)))}
    assert sorted(rows, key=int) == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "10", "13"]
    assert (rows["6"]["a"], rows["6"]["score"], rows["6"]["task"]) == ("Tiếng", 0.8, "text_pair")
    assert [rows[name]["group"] for name in "123"] == ["1", "0", "1"]
    width, height = rows["7"]["images_a"][0].size
    assert width * height <= 10_000 and abs(width / height - 1.5) < 0.05
    audio = rows["10"]["audio_a"]
    assert audio["sampling_rate"] == 16_000 and len(audio["array"]) == 8000
    assert [each["text"] for each in rows["13"]["negatives"]] == ["sai", ""]
    assert rows["13"]["negatives"][1]["images"][0].size == (width, height)
    (train, _) = report["sources"]
    assert (train["rows"], train["dropped"], train["duplicates"]) == (11, 4, 0)


def test_dropped_rows_are_counted_by_cause(recipe: Path, tmp_path: Path) -> None:
    causes = prepare(options_of(recipe, tmp_path / "out"))["sources"][0]["causes"]
    assert sum(cause["rows"] for cause in causes.values()) == 4 == len(causes)
    examples = " ".join(cause["example"] for cause in causes.values())
    for part in ("cut.jpg", "short.wav", "gone.wav", "id '14'"):
        assert part in examples


def test_two_processes_write_the_same(recipe: Path, tmp_path: Path) -> None:
    prepare(options_of(recipe, tmp_path / "one"))
    for share in range(3):  # what the processes of a pool do
        names = prepare_share(options_of(recipe, tmp_path / "two"), share, 3)
        assert len(names) == len(set(names)) > 0
    prepare(options_of(recipe, tmp_path / "two"))
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


def test_a_second_run_writes_only_what_changed(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    prepare(options_of(recipe, out))
    first, written = content_of(out), []
    write = prepare_module._write_shard
    monkeypatch.setattr(
        prepare_module, "_write_shard", lambda given, shard: written.append(shard.name) or write(given, shard)
    )
    prepare(options_of(recipe, out))
    assert written == [] and content_of(out) == first
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:4], *rows[5:12]]), encoding="utf-8")
    prepare(options_of(recipe, out))
    assert "train/000/0000000" not in written and "train/000/0000001" in written
    assert {path.stem for path in (out / "train/000").iterdir()} == {"0000000", "0000001", "0000002"}
    assert pq.read_table(out / "train/000")["id"].to_pylist() == ["0", "1", "2", "3", "5", "6", "7", "8", "10"]


def run_and_die(options: PrepareOptions) -> None:
    """Prepares the first two shards, and is killed while it writes the third."""
    write, numbers = prepare_module.pq.write_table, iter(range(100))

    def die(table: Any, where: Any, **given: Any) -> None:
        if next(numbers) == 2:
            Path(where).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        write(table, where, **given)

    prepare_module.pq.write_table = die
    prepare(options)


@pytest.fixture
def killed(recipe: Path) -> Callable[[Path], None]:
    """Leaves a folder as a killed run does."""

    def leave(out: Path) -> None:
        process = multiprocessing.get_context("fork").Process(target=run_and_die, args=(options_of(recipe, out),))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert list(out.rglob("_unfinished/*")) and not (out / "report.json").exists()

    return leave


def test_a_killed_run_continues(recipe: Path, tmp_path: Path, killed: Callable[[Path], None]) -> None:
    killed(tmp_path / "out")
    prepare(options_of(recipe, tmp_path / "out"))
    prepare(options_of(recipe, tmp_path / "plain"))
    assert content_of(tmp_path / "out") == content_of(tmp_path / "plain")


@pytest.fixture
def cluster() -> Iterator[None]:
    pytest.importorskip("ray.data")  # a folder called ray beside the checkout is a `ray` too
    import ray  # pyright: ignore[reportMissingImports]

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_cluster_that_continues_a_killed_run_equals_the_plain_run(
    recipe: Path, tmp_path: Path, killed: Callable[[Path], None], cluster: None
) -> None:
    from vipolyqwen.data.ray_prepare import prepare_with_ray

    killed(tmp_path / "out")
    prepare_with_ray(options_of(recipe, tmp_path / "out"), workers=2)
    prepare(options_of(recipe, tmp_path / "plain"))
    assert content_of(tmp_path / "out") == content_of(tmp_path / "plain")


def test_the_command(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["prepare", str(recipe), "--out", str(out), "--workers", "1", "--max_pixels", "10000"]) == 0
    assert "11 rows" in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["settings"]["max_pixels"] == 10_000


def test_a_source_without_good_rows_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"task": "instr", "a": "", "b": ""}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl.*report\.json"):
        prepare(PrepareOptions(str(tmp_path / "rows.jsonl"), str(tmp_path / "out")))


@pytest.mark.parametrize("name", ["max_pixels", "max_seconds", "min_samples", "unit_rows"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        PrepareOptions("r", "o", **{name: 0})


def encoded(image: Image.Image, **given: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, **given)
    return buffer.getvalue()


def test_a_small_plain_image_keeps_its_bytes_and_others_become_plain() -> None:
    image = random_image(np.random.default_rng(0), 40, 30)
    plain = encoded(image, format="JPEG")
    assert prepare_image(plain, 1200) == plain
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = prepare_image(encoded(image, format="JPEG", exif=exif), 1200)
    assert Image.open(BytesIO(turned)).size == (30, 40)
    for mode, kind, wanted in (
        ("CMYK", "JPEG", "JPEG"),
        ("RGBA", "PNG", "PNG"),
        ("P", "GIF", "PNG"),
        ("RGB", "WEBP", "JPEG"),
    ):
        done = Image.open(BytesIO(prepare_image(encoded(image.convert(mode), format=kind), 1200)))
        assert (done.format, done.mode, done.size) == (wanted, "RGB", (40, 30))


@pytest.mark.parametrize(("size", "limit"), [((1000, 5), 100), ((300, 300), 1), ((33, 31), 1022)])
def test_scaled_images_respect_the_limit(size: tuple[int, int], limit: int) -> None:
    done = Image.open(BytesIO(prepare_image(encoded(Image.new("RGB", size), format="PNG"), limit)))
    assert done.width * done.height <= max(limit, done.width)


def test_audio_becomes_flac_of_the_models_rate() -> None:
    samples = random_audio(np.random.default_rng(0))["array"]
    content, seconds = prepare_audio({"array": samples, "sampling_rate": 16_000})
    read, rate = soundfile.read(BytesIO(content), dtype="float32")
    assert rate == 16_000 and seconds == 0.5 and np.abs(read - samples).max() <= 1 / 2**15


def test_errors_of_one_cause_are_counted_together() -> None:
    errors = [
        f"/data/r.jsonl, row {row} (id 'x: {row}'), column 'images' is '/a/b{row}.png': it has {row} pixels: crop it."
        for row in (1, 20)
    ]
    assert len({cause_of(error) for error in errors}) == 1
    assert cause_of("/d/r.jsonl, line 6: invalid JSON: x at char 3.") == "invalid JSON: x at char #"
