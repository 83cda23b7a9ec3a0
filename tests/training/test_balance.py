"""The balance of a run in its log and on its page; hard negatives; losses that are not finite."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import train_run
from safetensors.torch import load_file

from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.training.balance import (
    paper_checkpoints,
    phase,
    scaled,
    share_ratio,
    solved_tasks,
    verdict,
    volatility,
    write_page,
)
from vipolyqwen.training.callbacks import balance
from vipolyqwen.training.trainer import ViPolyQwenTrainer

ROOT = Path(__file__).parents[2]
TASKS = ("text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio", "caption")
BRIEF = ["--eval_strategy", "no", "--load_best_model_at_end", "false"]
LOSSES = [3, 1, 2, 2, 2, 1, 1, 1]  # of the entries that `history` makes


def history(losses: list[float], shares: tuple[float, float] = (0.5, 0.5), volatilities: float = 0.1) -> list[dict]:
    """A log with one entry every 2500 steps."""
    return [
        {
            "step": 2500 * (number + 1),
            "loss": loss,
            "loss/ocr": loss,
            "gradient_share/ocr": shares[0],
            "gradient_share/instr": shares[1],
            "volatility/loss": volatilities / (number + 1),
        }
        for number, loss in enumerate(losses)
    ]


# --- figures


def test_phases_are_those_of_the_paper_and_scale_with_a_short_run() -> None:
    assert [phase(step, 100_000) for step in (0, 1999, 2000, 9999, 10_000)] == [
        "exploration",
        "exploration",
        "stabilisation",
        "stabilisation",
        "optimisation",
    ]
    assert scaled(2000, 1250) == 200 and scaled(10_000, 1250) == 1000
    assert phase(199, 1250) == "exploration" and phase(1000, 1250) == "optimisation"


def test_volatility_is_the_standard_deviation_over_the_mean() -> None:
    assert volatility([1.0, 3.0]) == pytest.approx(math.sqrt(2) / 2)
    assert volatility([2.0, 2.0, 2.0]) == 0.0
    assert volatility([5.0]) == 0.0


def test_checkpoints_of_the_paper_are_seen_not_seen_or_not_measured() -> None:
    entries = [{**entry, "step": entry["step"] // 10} for entry in history([4, 3.9, 3.9, 3.5, 3.0, 2, 2, 2, 2, 2])]
    # a run of 2500 steps: the checkpoints stand at 200, 400, 1000 and 2000
    found = {c.step: c.seen for c in paper_checkpoints(entries, 2500)}
    assert found == {200: None, 400: None, 1000: True, 2000: True}
    falling = [{"step": step, "loss": 10 - step / 500, "volatility/loss": 0.1} for step in range(50, 2501, 50)]
    assert {c.step: c.seen for c in paper_checkpoints(falling, 2500)} == {
        200: True,
        400: False,
        1000: None,
        2000: False,
    }
    assert paper_checkpoints([], 2500) == []


def test_a_starved_task_is_named_with_its_share() -> None:
    starved = history(LOSSES, shares=(0.95, 0.05))
    assert share_ratio(starved) == pytest.approx(19)
    shown = "instr is starved: ocr has 95.0% of the gradient, instr 5.0%: 19.0× less by task."
    assert verdict(starved, {}) == shown
    assert verdict(history(LOSSES, shares=(0.6, 0.4)), {}).startswith("Balanced: ocr has 60.0%")
    assert share_ratio(history(LOSSES, shares=(1.0, 0.0))) == math.inf
    assert verdict([{"step": 1, "loss": 1.0}], {}) == "No gradients were measured (monitor_steps: 0)."


def test_a_small_share_with_a_small_loss_is_solved_and_with_a_high_loss_starved() -> None:
    shares = {"ocr": 0.90, "instr": 0.06, "audio": 0.04}
    by_row = {"ocr": 0.5, "instr": 0.3, "audio": 0.2}
    losses = {"ocr": 2.0, "instr": 1.8, "audio": 0.138}
    start = {"ocr": 3.0, "instr": 2.0, "audio": 2.5}
    entry = {"step": 1, "loss": 1.0} | {f"loss/{task}": loss for task, loss in losses.items()}
    entry |= {f"gradient_share/{task}": share for task, share in shares.items()}
    entry |= {f"gradient_share_per_row/{task}": share for task, share in by_row.items()}
    assert solved_tasks([entry], start) == {"audio"}
    assert verdict([entry], start) == (
        "instr is starved: ocr has 90.0% of the gradient, instr 6.0%: 15.0× less by task, 1.7× by row. Its loss "
        "stands at 90% of the start. Small share, but solved: audio (loss 2.5 → 0.138)."
    )
    ended = verdict([entry | {"loss/instr": 0.9}], start)
    assert ended.startswith("Balanced: ") and "solved: audio (loss 2.5 → 0.138), instr (loss 2 → 0.9)." in ended
    assert share_ratio([entry], without={"audio"}) == pytest.approx(15)
    assert balance(entry, start) == ", balance 15.0× by task, 1.7× by row (instr)"
    assert balance(entry, {}) == ", balance 22.5× by task, 2.5× by row (audio)"


def test_a_solved_task_does_not_unbalance_the_checkpoint_of_balance() -> None:
    entries = history([4, 4, 4, 4, 4, 4, 1, 1], shares=(0.1, 0.9))  # of ocr, whose gradient has become small
    (balanced,) = (found for found in paper_checkpoints(entries, 50_000) if found.step == 5000)
    assert balanced.seen is False  # its loss is still the initial one
    solved = [{**entry, "step": entry["step"] // 4} for entry in entries]  # so that the loss has fallen by step 5000
    (balanced,) = (found for found in paper_checkpoints(solved, 50_000) if found.step == 5000)
    assert balanced.seen is True and "of unsolved tasks 1.0" in balanced.figure


def test_the_progress_bar_shows_the_task_with_the_smallest_gradient_share() -> None:
    logs = {"gradient_share/ocr": 0.8, "gradient_share/instr": 0.2}
    assert balance(logs, {}) == ", balance 4.0× by task (instr)"
    assert balance({"loss": 1.0}, {}) == ""


def test_the_page_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    entries = [{**entry, "loss/<b>x": 1.0} for entry in history(LOSSES)]
    write_page(entries, 20_000, tmp_path / "balance.html")
    page = (tmp_path / "balance.html").read_text(encoding="utf-8")
    assert "Balanced: " in page and "the tasks are in balance" in page and "<polyline" in page
    assert not re.search(r"https?://|<script|<link", page)
    assert "<b>x" not in page


# --- in a run


@pytest.fixture(scope="module")
def monitored(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A run that measures gradients in every second step."""
    folder = tmp_path_factory.mktemp("monitored")
    return folder, train_run(world, folder, "--monitor_steps", "2", "--per_device_train_batch_size", "32", *BRIEF)


def test_a_run_logs_shares_gradients_cosines_volatility_drift_and_phase(monitored: tuple[Path, list[dict]]) -> None:
    entries = [entry for entry in monitored[1] if "loss" in entry]
    measured = [any(name.startswith("gradient_norm/") for name in entry) for entry in entries]
    assert measured == [True, False, True, False]
    for name in ("share", "share_per_row", "gradient_share", "gradient_share_per_row"):
        assert sum(value for key, value in entries[0].items() if key.startswith(f"{name}/")) == pytest.approx(1.0)
    assert all(entries[0][f"gradient_norm/{task}"] > 0 for task in TASKS)
    assert sum(entries[0][f"rows/{task}"] for task in TASKS) == 32
    per_row = {task: entries[0][f"gradient_norm/{task}"] / entries[0][f"rows/{task}"] for task in TASKS}
    for task in TASKS:
        share = per_row[task] / sum(per_row.values())
        assert entries[0][f"gradient_share_per_row/{task}"] == pytest.approx(share, rel=1e-4)
    assert -1 <= entries[0]["gradient_cosine/text_pair/instr"] <= 1
    drifts = [entry["drift/pooling"] for entry in entries]
    assert 0 < drifts[0] < drifts[-1]
    assert entries[-1]["drift/audio_projection"] > 0 and entries[-1]["volatility/loss"] > 0
    norms = [entry["grad_norm"] for entry in entries]
    assert entries[-1]["volatility/gradient_norm"] == pytest.approx(volatility(norms), rel=1e-4)
    assert [entry["phase"] for entry in entries] == [1.0, 1.0, 2.0, 2.0]  # 4 steps: the bounds are 1 and 3
    assert entries[-1]["skipped_steps"] == 0


def test_a_run_writes_the_page(monitored: tuple[Path, list[dict]]) -> None:
    page = (monitored[0] / "balance.html").read_text(encoding="utf-8")
    assert all(task in page for task in TASKS) and "Drift of the new parts" in page


@pytest.mark.parametrize(
    "flags",
    [
        ["--task_weighting", "inverse_loss", "--task_weighting_options", '{"baseline": "ema"}'],
        ["--task_weighting", "uncertainty", "--loss_learning_rate", "0.1", "--learnable_temperature", "true"],
        ["--task_weighting", "gradnorm", "--task_weighting_options", '{"learning_rate": 0.2}'],
    ],
    ids=lambda flags: flags[1],
)
def test_a_resumed_run_has_the_same_task_weights(world: Path, tmp_path: Path, flags: list[str]) -> None:
    straight = train_run(world, tmp_path / "straight", *flags, *BRIEF)
    first = str(tmp_path / "straight" / "checkpoint-2")
    resumed = train_run(world, tmp_path / "resumed", *flags, *BRIEF, "--resume_from_checkpoint", first)
    states = [
        load_file(tmp_path / name / "checkpoint-4" / "loss_state.safetensors") for name in ("straight", "resumed")
    ]
    assert any(name.startswith("loss.") for name in states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    moments = {name for name in states[0] if name.startswith("optimizer.")}
    assert bool(moments) == ("uncertainty" in flags) and moments <= states[1].keys()
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    weights = [{k: v for k, v in log[-2].items() if k.startswith("weight/")} for log in (straight, resumed)]
    assert weights[0] == weights[1] and len(set(weights[0].values())) > 1
    assert straight[-2]["drift/pooling"] == resumed[-2]["drift/pooling"]  # against the start of the first run


def test_a_checkpoint_without_the_state_of_the_loss_is_refused(world: Path, tmp_path: Path) -> None:
    train_run(world, tmp_path, "--max_steps", "2", "--save_only_model", "true")
    with pytest.raises(FileNotFoundError, match="loss_state.safetensors is missing"):
        train_run(world, tmp_path, "--resume_from_checkpoint", "true")


# --- hard negatives


def test_negatives_of_a_row_become_candidates(world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (world / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{**row, "task": "caption", "images": [row["picture"]], "b": row["said"]} for row in rows]
    losses = []
    for name, extra in (("without", {}), ("with", {"negatives": ["một hình 9", "a picture 9"]})):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({**row, **extra}) for row in rows), encoding="utf-8")
        sources = json.dumps([{"path": str(path), "media_root": str(world)}])
        flags = ["--train_data", sources, "--max_steps", "1", "--save_strategy", "no", "--prefix_dropout", "0"]
        losses.append(train_run(world, tmp_path / name, *flags, *BRIEF)[0]["loss/caption/nce"])
    assert losses[1] > losses[0] + 0.1  # 8 pairs and 16 further candidates of the first direction


# --- losses that are not finite


@pytest.fixture
def broken_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step's first row gets a vector of NaN."""
    embed, calls = ViPolyQwenTrainer.embed, []

    def broken(self: ViPolyQwenTrainer, *args: object) -> torch.Tensor:
        calls.append(None)
        vectors = embed(self, *args)
        return torch.cat([vectors[:1] * math.nan, vectors[1:]]) if len(calls) == 2 else vectors

    monkeypatch.setattr(ViPolyQwenTrainer, "embed", broken)


def test_a_loss_that_is_not_finite_names_step_task_and_rows(world: Path, tmp_path: Path, broken_step: None) -> None:
    one_row = r"by these rows: \w+: (pairs|captions)-\d+\. Lower"
    with pytest.raises(FloatingPointError, match=rf"Step 1: the loss is nan, {one_row}.*`on_nan: skip`"):
        train_run(world, tmp_path, *BRIEF)


def test_an_unknown_policy_for_losses_that_are_not_finite_is_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`on_nan` is 'ignore'; it must be error or skip"):
        train_run(world, tmp_path, "--on_nan", "ignore")


def test_a_skipped_step_changes_no_weight_and_is_counted(world: Path, tmp_path: Path, broken_step: None) -> None:
    flags = ["--on_nan", "skip", "--max_steps", "3", "--learnable_temperature", "true", *BRIEF]
    log = train_run(world, tmp_path, *flags, "--save_steps", "1")
    for file, moving in (("model", ""), ("loss_state", "optimizer.log_temperatures.")):
        one, two, three = (load_file(tmp_path / f"checkpoint-{n}" / f"{file}.safetensors") for n in (1, 2, 3))
        names = [name for name in one if name != "discard.count"]
        assert all(torch.equal(one[name], two[name]) for name in names)
        assert any(not torch.equal(two[name], three[name]) for name in names if name.startswith(moving))
    entries = [entry for entry in log if "loss" in entry]
    assert [entry["skipped_steps"] for entry in entries] == [0, 1, 1]
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    resume = ("--resume_from_checkpoint", str(tmp_path / "checkpoint-2"))
    again = train_run(world, tmp_path, *flags, *resume)
    assert [entry["skipped_steps"] for entry in again if entry.get("step") == 3 and "loss" in entry] == [1]


BROKEN_IN_TWO_PROCESSES = """
import sys, math, torch
from vipolyqwen.training.trainer import ViPolyQwenTrainer
from vipolyqwen.train_vipolyqwen import main
embed, calls = ViPolyQwenTrainer.embed, []
def broken(self, *args):
    calls.append(None)
    vectors = embed(self, *args)
    spoilt = len(calls) == 2 and self.args.process_index == 0
    return torch.cat([vectors[:1] * math.nan, vectors[1:]]) if spoilt else vectors
ViPolyQwenTrainer.embed = broken
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_ranks_skip_the_same_step_and_agree_on_gradnorm_and_negatives(world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [
        json.dumps(row | {"group": f"g{number % 5}", "negatives": [f"no {number}"] * (number % 3)})
        for number, row in enumerate(rows)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sources = json.dumps([{"path": str(tmp_path / "pairs.jsonl"), "media_root": str(world)}])
    flags = [str(world / "recipe.yaml"), "--train_data", sources, *BRIEF, "--save_steps", "1", "--max_steps", "3"]
    flags += ["--on_nan", "skip", "--task_weighting", "gradnorm", "--prefix_dropout", "0", "--optim", "sgd"]
    (tmp_path / "broken.py").write_text(BROKEN_IN_TWO_PROCESSES, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [str(tmp_path / "broken.py"), *flags]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    commands = {
        "one": [sys.executable, *script, "--per_device_train_batch_size", "8"],
        "two": [*launcher, *script, "--per_device_train_batch_size", "4", "--ddp_backend", "gloo"],
    }
    for name, command in commands.items():
        done = subprocess.run(
            [*command, "--output_dir", str(tmp_path / name)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    states = {
        (name, step): load_file(tmp_path / name / f"checkpoint-{step}" / "model.safetensors")
        for name in ("one", "two")
        for step in (1, 2, 3)
    }
    for key in states["one", 1]:
        assert torch.equal(states["two", 1][key], states["two", 2][key])
        assert torch.allclose(states["one", 3][key], states["two", 3][key], atol=1e-5)
    weights = [load_file(tmp_path / name / "checkpoint-3" / "loss_state.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(weights[0]["loss.weighting.weights"], weights[1]["loss.weighting.weights"])


def test_the_saved_model_of_a_monitored_run_still_loads(monitored: tuple[Path, list[dict]]) -> None:
    assert ViPolyQwenModel.from_pretrained(monitored[0]).config.projection_dim == 1024
