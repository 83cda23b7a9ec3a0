"""Runs that learn nothing say so, with the remedy, before the first step or after a few steps without gradient."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import build_trainer, train_run

from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.data.sources import load_pairs
from vipolyqwen.train_vipolyqwen import main
from vipolyqwen.training.learning import PATIENCE, LearningCallback, check_that_it_learns
from vipolyqwen.training.losses import TaskLoss
from vipolyqwen.training.mixed_loss import MixedLoss
from vipolyqwen.training.trainer import ViPolyQwenTrainer


def rows(number: int = 3, **same: object) -> list[dict]:
    """Different pairs of texts, but for what is the same in all."""
    made = [{"a": f"câu {n}", "b": f"text {n}", "task": "text_pair", "score": n / 10} for n in range(number)]
    return [{**row, **same} for row in made]


def start(tmp_path: Path, made: list[dict], batch: int = 4, trained: bool = True, **settings: object) -> None:
    """What a run of these pairs does before its first step."""
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    tasks = declare_tasks(None)
    pairs = load_pairs([{"path": str(tmp_path / "pairs.jsonl")}], tasks, 400)
    components = {name: settings.pop(name) for name in ("nce", "mse", "rank", "cosine") if name in settings}
    losses = dict.fromkeys(tasks, TaskLoss(**(components or {"nce": 1.0})))
    check_that_it_learns([0.1] if trained else [0.0], trained, MixedLoss(losses, **settings), pairs, batch)


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (rows(), {"batch": 1}, "`per_device_train_batch_size` is 1.*InfoNCE of text_pair is 0.*`embed_chunk: 1`"),
        (rows(), {"batch": 1, "nce": 1.0, "mse": 1.0}, "`per_device_train_batch_size` is 1"),
        (rows(), {"trained": False}, "Every parameter is frozen.*`freeze`"),
        (rows(), {"nce_min_score": 0.5}, "all scores are at most 0.2, below `nce_min_score` 0.5"),
        (rows(score=1.0, b="có"), {}, "side b of all rows is the same.*`mask_duplicates`"),
        (rows(score=1.0, a="hỏi"), {}, "side a of all rows is the same.*`mask_duplicates`"),
        (rows(score=1.0, group="g"), {}, "all rows have one `group`.*`mask_groups`"),
        (rows(1, score=1.0), {}, "there is one pair"),
        (rows(score=0.1), {"rank": 1.0}, "no component of its loss"),
    ],
)
def test_what_cannot_learn_is_refused_with_the_remedy(
    tmp_path: Path, made: list[dict], settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(tmp_path, made, **settings)


@pytest.mark.parametrize(
    ("made", "settings"),
    [
        (rows(), {"nce_min_score": 0.2}),
        (rows(), {"nce_min_score": None}),
        (rows(), {"mse": 1.0}),
        (rows(), {"rank": 1.0}),
        (rows(), {"batch": 1, "mse": 1.0}),
        (rows(score=1.0, b="có"), {"mask_duplicates": False}),
        (rows(score=1.0, b="có"), {"nce": 1.0, "cosine": 1.0}),
        (rows(score=1.0, b="có", negatives=["không"]), {"batch": 1}),
        (rows(2, score=1.0, group="g") + rows(1, a="khác", score=1.0), {}),
    ],
)
def test_what_can_learn_starts(tmp_path: Path, made: list[dict], settings: dict) -> None:
    start(tmp_path, made, **settings)


def test_a_task_that_teaches_nothing_among_others_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(tmp_path, [*rows(), *({**row, "task": "instr"} for row in rows(score=1.0))])
    assert "text_pair teaches nothing: all scores are at most 0.2" in caplog.text and "instr" not in caplog.text


def test_steps_without_gradient_end_a_run_and_later_ones_do_not() -> None:
    for gradients, ends in (
        ([0.0] * PATIENCE, True),
        ([0.0] * 3 + [1.0] + [0.0] * 30, False),
        ([float("nan")], False),
    ):
        callback = LearningCallback()
        callback.on_train_begin(None, SimpleNamespace(global_step=0), None)

        def steps(callback: LearningCallback = callback, gradients: list[float] = gradients) -> None:
            for gradient in gradients:
                embeddings = torch.ones(2, 3, requires_grad=True) * 1.0
                callback.watch(embeddings)
                (embeddings * gradient).sum().backward()
                callback.on_step_end(None, None, None)
            callback.check()

        if ends:
            with pytest.raises(ValueError, match=f"first {PATIENCE} steps was exactly 0.*`mask_duplicates`"):
                steps()
        else:
            steps()


def test_a_run_watches_the_gradient_of_its_embeddings(corpus: Path) -> None:
    trainer, pairs = build_trainer(corpus, "--embed_chunk", "4")
    batch = trainer.data_collator([pairs[number] for number in range(8)])
    trainer.training_step(trainer.model, batch)
    assert bool(trainer.learning.has_moved)
    with torch.no_grad():
        trainer.mixed_loss.weights.zero_()
    trainer.learning.has_moved = None
    trainer.training_step(trainer.model, batch)
    assert not bool(trainer.learning.has_moved)


def test_a_run_without_data_is_an_error_and_creates_nothing(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`train_data` and `eval_data` are both missing.*recipe"):
        main(["--model", str(world / "base"), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"])
    assert not (tmp_path / "out").exists()


def test_the_end_of_a_run_says_where_the_model_is_and_rates_leave_out_evaluations(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("vipolyqwen.training.callbacks.time.perf_counter", lambda: clock[0])
    step, evaluation = ViPolyQwenTrainer.training_step, ViPolyQwenTrainer.evaluation_loop

    def timed(method: object, seconds: float) -> object:
        def run(*args: object, **kwargs: object) -> object:
            clock[0] += seconds
            return method(*args, **kwargs)

        return run

    monkeypatch.setattr(ViPolyQwenTrainer, "training_step", timed(step, 2.0))
    monkeypatch.setattr(ViPolyQwenTrainer, "evaluation_loop", timed(evaluation, 1000.0))
    flags = ["--max_steps", "2", "--eval_steps", "1", "--save_steps", "1"]
    log = train_run(world, tmp_path, *flags)
    assert [entry["pairs_per_second"] for entry in log if "loss" in entry] == [4.0, 4.0]  # 8 pairs in 2 s
    [end] = [entry for entry in log if "train_samples_per_second" in entry]
    assert (end["train_samples_per_second"], end["train_steps_per_second"]) == (4.0, 0.5)
    said = capsys.readouterr().out
    best = json.loads((tmp_path / "trainer_state.json").read_text())["best_global_step"]
    assert f"Trained to step 2. The model is in {tmp_path}, with the weights of step {best}, the best by" in said
    assert "Checkpoints of steps" in said
