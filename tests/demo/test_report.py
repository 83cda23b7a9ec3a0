"""The demo's judge on a corpus of a few scenes and an untrained model."""

import json
import re
from pathlib import Path

import pytest
from helpers import save_tiny_model

from vipolyqwen.demo import world as demo_world
from vipolyqwen.demo.report import STAGES, judge, loss_series
from vipolyqwen.demo.scenes import held_out_scenes, train_scenes
from vipolyqwen.evaluation.search import read_pairs, read_sides


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a demo of ten held-out scenes."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_world, "train_scenes", lambda seed: train_scenes(seed)[::90])
        patch.setattr(demo_world, "held_out_scenes", lambda seed: held_out_scenes(seed)[::24])
        demo_world.write_corpus(folder / "corpus", variations=1)
    save_tiny_model(folder / "model")
    for stage, steps in zip(STAGES, (10, 20, 10), strict=True):
        (folder / stage).mkdir()
        history = [{"step": step, "loss": 4.0 / step, "loss/ocr": 2.0, "loss/ocr/nce": 1.0} for step in (5, steps)]
        state = {"global_step": steps, "log_history": history}
        (folder / stage / "trainer_state.json").write_text(json.dumps(state))
    judge(folder)
    return folder


def test_metrics_hold_six_directions_and_six_tasks_and_nothing_else(judged: Path) -> None:
    metrics = json.loads((judged / "metrics.json").read_text())
    pairs = {f"{a}->{b}" for a in ("text", "image", "audio") for b in ("text", "image", "audio") if a != b}
    assert set(metrics) == {"directions", "tasks"}
    assert set(metrics["directions"]) == pairs
    assert set(metrics["tasks"]) == {"text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio"}
    for values in (*metrics["directions"].values(), *metrics["tasks"].values()):
        assert set(values) == {"recall@1", "recall@10", "candidates", "chance"}
        assert values["candidates"] == 10
        assert values["chance"] == pytest.approx(0.1)
        assert values["recall@10"] == 1.0


def test_the_report_carries_its_pictures_and_sounds(judged: Path) -> None:
    page = (judged / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert page.count("data:audio/flac;base64,") >= 9
    assert page.count("data:image/png;base64,") >= 9
    assert page.count("<polyline") == 2  # all tasks together, and ocr
    assert "text-&gt;image" in page
    assert page.count("Σα = ") == 4  # the texts' route twice, the picture and the sound


def test_losses_put_the_stages_one_after_the_other(judged: Path) -> None:
    series = loss_series([judged / stage / "trainer_state.json" for stage in STAGES])
    assert list(series) == ["loss", "ocr"]
    assert [step for step, _ in series["loss"]] == [5, 10, 15, 30, 35, 40]
    assert series["loss"][-1] == (40, 0.4)


def test_placeholders_become_images_in_their_places(judged: Path) -> None:
    scene = json.loads((judged / "corpus" / "trimodal.jsonl").read_text().splitlines()[0])
    row = {"id": "two", "task": "vqa_multi", "a": "one <image> two <image>\nwhich?", "b": "b"}
    row["images"] = [str(judged / "corpus" / scene["image"])] * 2
    (judged / "two.jsonl").write_text(json.dumps(row))
    [(_, side, _)] = read_sides(read_pairs(judged / "two.jsonl")[0])
    content = side.as_input()[0]["content"]
    assert [part["type"] for part in content] == ["text", "image", "text", "image", "text"]
    assert content[4]["text"] == "\nwhich?"
