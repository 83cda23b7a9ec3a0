"""`--check`: the loaders of the shipped suites are reached without network, and stand-ins go through the model."""

from pathlib import Path

import pytest
import yaml

pytest.importorskip("mteb")

from vipolyqwen.evaluate_vipolyqwen import main  # noqa: E402
from vipolyqwen.evaluation.dry_run import check_task, reach_loader  # noqa: E402
from vipolyqwen.evaluation.loading import load_encoder  # noqa: E402
from vipolyqwen.evaluation.suite import read_suite  # noqa: E402


def mteb_tasks(name: str) -> list:
    suite = read_suite(name)
    return [task for entry in suite.entries if "name" not in entry for task in suite.tasks(entry)]


@pytest.mark.parametrize("suite", ["papers", "vietnamese", "chinese"])
def test_every_loader_is_reached_and_names_its_data_set(suite: str) -> None:
    for task in mteb_tasks(suite):
        said, found = reach_loader(task)
        assert found, said
        assert f"{task.metadata.dataset['path']} at {task.metadata.dataset['revision']}" in said


@pytest.mark.slow
def test_every_kind_of_task_of_the_suites_runs_on_a_stand_in(world: Path) -> None:
    kinds = {}
    for task in (task for suite in ("papers", "vietnamese", "chinese") for task in mteb_tasks(suite)):
        own_columns = type(task).__mro__[1].__name__, task.metadata.type, task.metadata.category
        kinds.setdefault(own_columns, task)
    assert {task.metadata.category for task in kinds.values()} >= {"t2t", "i2t", "t2i", "a2t", "t2a", "a2c"}
    encoder = load_encoder(str(world / "base"), {}, "cpu", None, False)
    for task in kinds.values():
        row = check_task(encoder, task)
        assert row["status"] == "ok", row
        assert "stand-in rows embedded" in row["encode"]


def test_the_exit_code_tells_of_a_task_that_does_not_resolve(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"tasks": ["BIOSSES-VN", "BornholmBitextMining"]}), encoding="utf-8")
    assert main([str(world / "base"), "--suite", str(path), "--check", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "ok      BIOSSES-VN: STS t2c, text, 1 subsets" in said
    assert "failed  BornholmBitextMining" in said and "no stand-in for AbsTaskBitextMining" in said
    assert "2 tasks: 1 ok, 1 failed" in said
