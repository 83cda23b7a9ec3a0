"""Resuming: killed runs, truncated and damaged checkpoints, another number of ranks, frozen towers."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers import PLAIN, train_run
from killing import kills, same_weights, train_uninterrupted
from packaging import version
from safetensors.torch import load_file

from vipolyqwen.data.permutation import permute
from vipolyqwen.data.sampler import MixtureBatches, MixtureSampler
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.training.arguments import ModelArguments
from vipolyqwen.training.balance import paper_steps
from vipolyqwen.training.checkpoints import (
    MANIFEST,
    UNFINISHED,
    DamagedCheckpointError,
    check_checkpoint,
    delete_old_checkpoints,
    find_faults,
    newest_intact_checkpoint,
    publish_checkpoint,
)
from vipolyqwen.training.parts import NEW_PARTS, TOWERS, freeze_towers
from vipolyqwen.training.resuming import SAMPLER_STATE, ResumingTrainer

ROOT = Path(__file__).parents[2]
PARTS = set(NEW_PARTS) - {"audio_fusion"}  # the base fuses by the mean


# The order of rows


def test_a_keyed_order_holds_every_number_once() -> None:
    for length in [*range(1, 130), 1000, 4095, 4096, 4097, 65_537]:
        for key in range(3):
            order = permute(np.arange(length), np.int64(length), np.uint64([key]))
            assert np.array_equal(np.sort(order), np.arange(length))


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_all_orders_of_a_small_set_are_equally_likely(length: int) -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, (20_000, 1), dtype=np.uint64)
    orders = permute(np.tile(np.arange(length), (len(keys), 1)), np.int64(length), keys)
    seen = np.array(list(Counter(map(tuple, orders.tolist())).values()))
    cells = int(np.prod(np.arange(1, length + 1)))
    expected = len(keys) / cells
    chi_square = ((seen - expected) ** 2).sum() / expected + (cells - len(seen)) * expected
    assert abs(chi_square - (cells - 1)) < 4 * np.sqrt(2 * (cells - 1))  # its mean and standard deviation


def test_neighbours_do_not_stay_together() -> None:
    order = permute(np.arange(20_000), np.int64(20_000), np.uint64([5]))
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
    assert not np.array_equal(order, permute(np.arange(20_000), np.int64(20_000), np.uint64([6])))


def test_a_slice_of_an_epoch_equals_that_of_the_full_epoch() -> None:
    sampler = MixtureSampler([5000, 77, 1], [1, 0.3, 40.0], seed=4)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == 5000 + 23 + 40
        assert sampler.rows(4090, 4110) == rows[4090:4110]
        assert [row for place in range(300) for row in sampler.rows(place, place + 1)] == rows[:300]


def test_row_ten_million_is_found_without_the_rows_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = MixtureSampler([11_000_000], [1], seed=0)
    computed = []
    monkeypatch.setattr(sampler, "rows", lambda first, last: computed.append((first, last)) or [first])
    batches = MixtureBatches(sampler, 8)
    batches.start_at(0, 10_000_000)
    assert next(batch for batch in batches if batch) == [10_000_000]
    assert computed == [(10_000_000, 10_000_008)]


# Batches of several ranks


def visited(batches: list[MixtureBatches], epoch: int, limit: int | None = None) -> list[int]:
    """Rows that all ranks visit in an epoch, or in its first batches."""
    for share in batches:
        share.sampler.set_epoch(epoch)
    return [row for share in batches for batch in [batch for batch in share if batch][:limit] for row in batch]


def shares(processes: int, size: int, seed: int = 0) -> list[MixtureBatches]:
    return [MixtureBatches(MixtureSampler([53], [1], seed), size, rank, processes) for rank in range(processes)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_ranks_split_an_epoch_without_repeating_a_row(processes: int) -> None:
    batches = shares(processes, 8)
    assert sorted(visited(batches, 0)) == list(range(53))
    sizes = [[len(batch) for batch in share] for share in batches]
    assert {len(of_one) for of_one in sizes} == {len(batches[0])}
    assert all(max(of_all) - min(of_all) <= 1 for of_all in zip(*sizes, strict=True))


@pytest.mark.parametrize(
    ("before", "after"), [((1, 8), (2, 8)), ((2, 5), (1, 3)), ((3, 4), (2, 6)), ((1, 13), (2, 7))]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_another_number_of_ranks_resumes_at_the_same_row(
    before: tuple[int, int], after: tuple[int, int], accumulation: int
) -> None:
    first, second = shares(*before), shares(*after)
    seen = visited(first, 1, limit=2)
    epoch, row = first[0].position(1, 2)
    assert (epoch, row) == (1, len(seen))
    for share in second:
        share.start_at(epoch, row, accumulation)
    assert sorted(seen + visited(second, 1)) == list(range(53))
    start, counted, total = second[0].begin(1)
    assert start == row and counted % accumulation == 0 and counted <= row / second[0].joined < total
    batches = list(second[0])
    assert len(batches) == total and not any(batches[:counted]) and all(batches[counted:])
    assert sorted(visited(second, 2)) == list(range(53))


def test_the_position_after_the_last_batch_is_the_next_epoch() -> None:
    batches = MixtureBatches(MixtureSampler([10], [1]), 4)
    assert [batches.position(5, number) for number in range(4)] == [(5, 0), (5, 4), (5, 8), (6, 0)]
    batches.drop_last = True
    assert [batches.position(5, number) for number in range(3)] == [(5, 0), (5, 4), (6, 0)]


# Checkpoints


def write_checkpoint(folder: Path, content: str = "weights") -> Path:
    """A checkpoint of two files, one of them in a folder."""
    written = folder.parent / UNFINISHED / folder.name
    (written / "shards").mkdir(parents=True)
    (written / "model.safetensors").write_text(content)
    (written / "shards" / "optimizer.pt").write_text("moments")
    publish_checkpoint(written, folder)
    return folder


def test_a_complete_checkpoint_has_no_faults_and_replaces_another(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint-1")
    assert find_faults(folder) == []
    write_checkpoint(folder, "other weights")
    assert find_faults(folder) == [] and (folder / "model.safetensors").read_text() == "other weights"
    assert not list((tmp_path / UNFINISHED).iterdir())


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_text("weig"), "model.safetensors has 4 bytes of 7"),
        (lambda folder: (folder / "shards/optimizer.pt").write_text("Moments"), "shards/optimizer.pt has changed"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text('{"mod'), "manifest.json is not valid JSON"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_previous_one_chosen(
    tmp_path: Path, damage: object, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    damage(tmp_path / "checkpoint-10")
    with pytest.raises(DamagedCheckpointError, match=f"checkpoint-10 is damaged: .*{named}"):
        check_checkpoint(tmp_path / "checkpoint-10")
    assert newest_intact_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    damage(tmp_path / "checkpoint-2")
    with pytest.raises(DamagedCheckpointError, match="All checkpoints in .* damaged: checkpoint-10, checkpoint-2"):
        newest_intact_checkpoint(tmp_path)


def test_the_newest_and_the_best_checkpoint_are_never_deleted(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    os.utime(folders[3], (0, 0))  # a clock that went backwards
    delete_old_checkpoints(tmp_path, 2, {folders[0], folders[3]})
    assert sorted(tmp_path.glob("checkpoint-*")) == [folders[0], folders[3]]
    delete_old_checkpoints(tmp_path, 1, {folders[0], folders[3]})
    assert sorted(tmp_path.glob("checkpoint-*")) == [folders[0], folders[3]]


def test_checkpoints_are_deleted_by_step_whatever_their_times(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path / f"checkpoint-{step}") for step in (900, 1000, 1100)]
    os.utime(folders[0], (4e9, 4e9))  # copied later than the others
    delete_old_checkpoints(tmp_path, 2, {folders[2]})
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-1000", "checkpoint-1100"]


@pytest.mark.parametrize(
    ("every", "length", "kept"),
    [
        (500, 20_000, [1000, 2000, 5000, 10_000, 19_500, 20_000]),  # of a full run
        (500, 6250, [500, 1000, 2500, 5000, 6000]),  # steps scaled by half; 5500 and 6000 are the last two
        (300, 5000, [600, 900, 2100, 4200, 4500, 4800]),  # scaled by 0.4: 400, 800, 2000, 4000, at or after
    ],
)
def test_the_papers_checkpoints_survive_the_limit(tmp_path: Path, every: int, length: int, kept: list[int]) -> None:
    for step in range(every, length + 1, every):
        written = write_checkpoint(tmp_path / f"checkpoint-{step}")
        delete_old_checkpoints(tmp_path, 2, {written}, paper_steps(length))
    found = sorted(int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*"))
    assert found == sorted({*kept, *range(every, length + 1, every)[-2:]})


def test_a_run_keeps_the_papers_checkpoints_beside_the_newest(world: Path, tmp_path: Path) -> None:
    flags = ["--save_steps", "1", "--max_steps", "12", "--save_total_limit", "1", "--eval_strategy", "no"]
    train_run(world, tmp_path, *flags, "--load_best_model_at_end", "false", "--per_device_train_batch_size", "4")
    found = {int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*")}
    assert found == {*paper_steps(12), 12} == {1, 2, 5, 10, 12}


# Runs


@pytest.fixture(scope="module")
def straight(world: Path) -> tuple[Path, list[dict]]:
    """A run of two epochs of three steps, with its log."""
    output = world / "straight"
    return output, train_run(world, output, *PLAIN, *EPOCHS)


EPOCHS = ["--max_steps", "-1", "--num_train_epochs", "2", "--per_device_train_batch_size", "6", "--save_steps", "1"]
EPOCHS += ["--gradient_accumulation_steps", "2", "--eval_strategy", "epoch"]  # 32 rows: 6 batches, 3 steps an epoch


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_resumed_inside_or_at_the_end_of_an_epoch_ends_with_the_same_weights(
    world: Path, straight: tuple[Path, list[dict]], tmp_path: Path, step: int
) -> None:
    flags = ["--resume_from_checkpoint", str(straight[0] / f"checkpoint-{step}")]
    log = train_run(world, tmp_path, *PLAIN, *EPOCHS, *flags)
    assert same_weights(straight[0], tmp_path)
    random_states = [
        torch.load(folder / "checkpoint-6" / "rng_state.pth", weights_only=False) for folder in (straight[0], tmp_path)
    ]
    assert torch.equal(random_states[0]["cpu"], random_states[1]["cpu"])
    assert np.array_equal(random_states[0]["numpy"][1], random_states[1]["numpy"][1])
    rates = {entry["step"]: entry["learning_rate"] for entry in straight[1] if "learning_rate" in entry}
    assert rates == {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    assert [entry["epoch"] for entry in log if "loss" in entry] == (
        [entry["epoch"] for entry in straight[1] if "loss" in entry]
    )


def test_a_run_resumed_at_its_end_takes_no_further_step(world: Path, tmp_path: Path) -> None:
    flags = [*PLAIN, "--max_steps", "3"]  # inside an epoch
    train_run(world, tmp_path, *flags)
    before = load_file(tmp_path / "model.safetensors")
    log = train_run(world, tmp_path, *flags, "--resume_from_checkpoint", "true")
    assert max(entry["step"] for entry in log) == 3
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_batches_after_resuming_still_visit_every_row_of_the_epoch_once(
    world: Path, straight: tuple[Path, list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = MixtureSampler.rows
    taken: list[tuple[int, int]] = []

    def record(sampler: MixtureSampler, first: int, last: int) -> list[int]:
        taken.extend((sampler.epoch, place) for place in range(first, last))
        return rows(sampler, first, last)

    monkeypatch.setattr(MixtureSampler, "rows", record)
    flags = ["--resume_from_checkpoint", str(straight[0] / "checkpoint-1"), "--per_device_train_batch_size", "5"]
    log = train_run(world, tmp_path, *PLAIN, *EPOCHS, *flags)
    assert taken == [(0, place) for place in range(12, 32)] + [(1, place) for place in range(32)]
    assert max(entry["step"] for entry in log) == 1 + 2 + 4  # 4 batches are left of 5, and 7 make an epoch
    place = json.loads((tmp_path / "checkpoint-3" / SAMPLER_STATE).read_text(encoding="utf-8"))
    assert (place["epoch"], place["row"]) == (1, 0)


def test_a_run_without_checkpoint_starts_and_other_data_are_refused(
    world: Path, straight: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    train_run(world, tmp_path, *PLAIN, *EPOCHS, "--resume_from_checkpoint", "true")
    assert same_weights(straight[0], tmp_path)
    flags = ["--resume_from_checkpoint", str(straight[0] / "checkpoint-1"), "--seed", "7"]
    with pytest.raises(ValueError, match=r"checkpoint-1 was written by a run on .*'seed': 42.*'seed': 7"):
        train_run(world, tmp_path / "other", *PLAIN, *EPOCHS, *flags)
    with pytest.raises(FileNotFoundError, match="The checkpoint .*checkpoint-99 does not exist"):
        train_run(world, tmp_path, *PLAIN, "--resume_from_checkpoint", str(tmp_path / "checkpoint-99"))


def test_a_truncated_checkpoint_is_skipped_and_rewritten(
    world: Path, straight: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    train_run(world, tmp_path, *PLAIN, *EPOCHS, "--save_total_limit", "2")
    newest = tmp_path / "checkpoint-6"
    with (newest / "optimizer.pt").open("r+b") as file:
        file.truncate(1000)
    train_run(world, tmp_path, *PLAIN, *EPOCHS, "--save_total_limit", "2", "--resume_from_checkpoint", "true")
    assert same_weights(straight[0], tmp_path)
    assert find_faults(newest) == []


def test_the_best_checkpoint_is_recorded_under_its_final_path(world: Path, tmp_path: Path) -> None:
    train_run(world, tmp_path, "--save_total_limit", "1")
    [kept] = tmp_path.glob("checkpoint-*")
    state = json.loads((kept / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_model_checkpoint"] == str(kept)
    assert same_weights(kept, tmp_path)


FIRST_IS_BEST = ["--metric_for_best_model", "text_pair_candidates", "--save_steps", "1", "--eval_steps", "1"]


def test_the_best_checkpoint_survives_a_moved_folder_and_another_spelling_of_its_path(
    world: Path, tmp_path: Path
) -> None:
    flags = [*FIRST_IS_BEST, "--save_total_limit", "2", "--per_device_train_batch_size", "2"]
    train_run(world, tmp_path / "run", *flags, "--max_steps", "2")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    os.utime(tmp_path / "moved" / "checkpoint-1", (9e9, 9e9))
    resume = ["--resume_from_checkpoint", "true", "--max_steps", "4"]
    train_run(world, tmp_path / "moved" / ".." / "link", *flags, *resume)
    state = json.loads((tmp_path / "moved" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_global_step"] == 1 and Path(state["best_model_checkpoint"]).samefile(
        tmp_path / "moved" / "checkpoint-1"
    )
    assert same_weights(tmp_path / "moved", tmp_path / "moved" / "checkpoint-1")
    assert newest_intact_checkpoint(tmp_path / "moved") == tmp_path / "moved" / "checkpoint-4"


@pytest.mark.parametrize("changed", [set(), {"eval_data"}])
def test_a_best_checkpoint_that_is_lost_or_not_comparable_is_forgotten_in_words(
    tmp_path: Path, changed: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    state = SimpleNamespace(best_global_step=1, best_metric=0.5, best_model_checkpoint="gone/checkpoint-1")
    if changed:
        (tmp_path / "checkpoint-1").mkdir()
    args = SimpleNamespace(output_dir="elsewhere")
    run = SimpleNamespace(state=state, changed=changed, args=args, _began_from=tmp_path / "checkpoint-2")
    ResumingTrainer._find_best(run)
    assert state.best_metric is state.best_global_step is state.best_model_checkpoint is None
    assert "checkpoint-1" in caplog.text and ("not comparable" if changed else "elsewhere") in caplog.text


# Frozen towers

FROZEN = [*PLAIN, "--freeze", "vision,audio", "--per_device_train_batch_size", "7", "--max_steps", "4"]


@pytest.fixture(scope="module")
def frozen(world: Path) -> Path:
    """Most of an epoch on one rank with two frozen towers and gradient checkpointing."""
    train_run(world, world / "frozen", *FROZEN, "--save_steps", "1", "--gradient_checkpointing", "true")
    return world / "frozen"


def moved_parts(world: Path, folder: Path) -> set[str]:
    """Returns the parts of the model that a run has changed."""
    base, trained = (load_file(path / "model.safetensors") for path in (world / "base", folder))
    same_shape = [name for name in base if base[name].shape == trained[name].shape]  # the embedding has grown
    moved = [name for name in same_shape if not torch.equal(base[name], trained[name])]
    return {name.removeprefix("vlm.").split(".")[0] for name in moved}


def test_frozen_towers_do_not_change_and_other_parts_learn(world: Path, frozen: Path) -> None:
    assert moved_parts(world, frozen) == {"language_model", *PARTS}
    record = json.loads((frozen / "training.json").read_text(encoding="utf-8"))
    assert record["settings"]["freeze"] == ["vision", "audio"]


def test_poolings_and_projections_learn_on_frozen_towers_alone(world: Path, tmp_path: Path) -> None:
    train_run(world, tmp_path, *FROZEN, "--freeze", "vision, audio, language", "--save_strategy", "no")
    assert moved_parts(world, tmp_path) == PARTS


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("names", [["vision", "audio"], ["language"], ["vision", "audio", "language"]])
def test_a_frozen_tower_after_frozen_inputs_builds_no_graph(
    world: Path, names: list[str], checkpointing: bool
) -> None:
    model = ViPolyQwenModel.from_pretrained(world / "base").train()
    freeze_towers(model, names)
    if checkpointing:
        model.gradient_checkpointing_enable()
    builds = {}
    for name, path in TOWERS.items():
        model.get_submodule(path).register_forward_hook(
            lambda module, inputs, output, name=name: builds.update({name: output[0].requires_grad})
        )
    vectors = model(
        input_ids=torch.tensor([[model.config.image_token_id, 5, 6]]),
        pixel_values=torch.randn(4, 1176),
        image_grid_thw=torch.tensor([[1, 2, 2]]),
        audio_features=torch.randn(1, 4000),
    ).embeddings
    assert builds == {name: name not in names or names == ["language"] for name in TOWERS}
    vectors[:, 0].sum().backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("masked_spec_embed"):  # used only with SpecAugment
            assert (parameter.grad is not None) == parameter.requires_grad, name


def test_an_unknown_tower_is_named_with_the_known_ones(world: Path) -> None:
    with pytest.raises(ValueError, match="`freeze` names 'visoin'.*vision, language, audio"):
        ModelArguments(model="x", freeze="audio,visoin")
    config = ViPolyQwenModel.config_class.from_pretrained(world / "base")
    config.audio_config = None
    with pytest.raises(ValueError, match="no speech encoder"):
        freeze_towers(ViPolyQwenModel(config), ModelArguments(model="x", freeze=["audio"]).freeze)


@pytest.mark.slow
@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="older Trainers cannot load an optimizer into several processes on CPU (device cpu:0)",
)
def test_two_ranks_resume_from_a_checkpoint_of_one(world: Path, frozen: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, ROOT / "train_vipolyqwen.py", world / "recipe.yaml", "--output_dir", tmp_path, *FROZEN]
    command += ["--max_steps", "-1", "--num_train_epochs", "1", "--ddp_backend", "gloo", "--save_steps", "1"]
    command += ["--resume_from_checkpoint", frozen / "checkpoint-1", "--per_device_train_batch_size", "4"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    newest = newest_intact_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-5"  # 7 of 32 rows were visited: 8, 8, 8 and 1 are left
    place = json.loads((newest / SAMPLER_STATE).read_text(encoding="utf-8"))
    assert (place["epoch"], place["row"], place["step"]) == (1, 0, 5)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= json.loads((newest / MANIFEST).read_text()).keys()
    assert moved_parts(world, newest) == {"language_model", *PARTS}
    assert not same_weights(newest, frozen / "checkpoint-1")


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_weights_of_the_uninterrupted_one(
    world: Path, tmp_path: Path
) -> None:
    duration = train_uninterrupted(world / "recipe.yaml", tmp_path / "straight")
    runs = kills(world / "recipe.yaml", tmp_path, seed=1, duration=duration)
    for left, resumed in islice(runs, 2):  # benchmarks/kill.py: 20
        assert same_weights(tmp_path / "straight", resumed), left
