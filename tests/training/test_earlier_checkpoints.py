"""Checkpoints of the flat layout (before the rooms) load and resume to the same weights or are refused in words.

`first_release.tar.xz` is a checkpoint that commit 3ab4e3a wrote of such a run, with a projection of 32 dimensions, and
the vectors of that checkpoint and of the run's end by that commit. The literals below are copied from another one.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import PLAIN, TEXTS, train_run
from killing import same_weights
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.training.checkpoints import MANIFEST, UNFINISHED, publish_checkpoint
from vipolyqwen.training.resuming import SAMPLER_STATE
from vipolyqwen.training.run_settings import SETTINGS_FILE
from vipolyqwen.training.trainer import LOSS_STATE

RUN = [*PLAIN, "--learnable_temperature", "true", "--task_weighting", "uncertainty", "--loss_learning_rate", "0.1"]
POSITION = {
    "epoch": 0,
    "row": 16,
    "step": 2,
    "order": {"lengths": [24, 8], "visits": [24, 8], "seed": 42},
    "launch": "one process, or several with DDP",
}
LEARNED = ("log_temperatures", "weighting.log_variances")
LOSS_NAMES = {"discard.count", *(f"loss.{name}" for name in LEARNED)}
LOSS_NAMES |= {f"optimizer.{name}.{moment}" for name in LEARNED for moment in ("step", "exp_avg", "exp_avg_sq")}
LOSS_NAMES |= {f"start.{route}pooling.query" for route in ("", "audio_")}
LOSS_NAMES |= {
    f"start.{route}projection.{part}"
    for route in ("", "audio_")
    for part in ("dense.weight", "norm.weight", "norm.bias")
}
# The stock Trainer's pickle of the arguments names a class by its module, which has moved.
ARGUMENTS = b"cvipolyqwen.arguments_vipolyqwen\nViPolyQwenTrainingArguments\n."


@pytest.fixture(scope="module")
def straight(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of today's code that is not interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    train_run(world, folder, *RUN)
    return folder


@pytest.fixture(scope="module")
def first_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored checkpoint and its vectors."""
    folder = tmp_path_factory.mktemp("first_release")
    with tarfile.open(Path(__file__).parent / "first_release.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def vectors(repository: Path, world: Path) -> np.ndarray:
    """Encodes a text, an image, audio, and an image with a text: (4, dimensions)."""
    image, audio, other = (str(world / name) for name in ("0.png", "1.wav", "2.png"))
    inputs = [{"text": TEXTS[0]}, {"image": image}, {"audio": audio}, {"image": other, "text": TEXTS[1]}]
    model = SentenceTransformer(str(repository), trust_remote_code=True, device="cpu")
    return np.concatenate([model.encode([each]) for each in inputs])


def as_earlier(checkpoint: Path, folder: Path, position: dict) -> Path:
    """Rewrites a checkpoint in the format of the flat layout, tensor by tensor of the state of the loss."""
    written = folder / UNFINISHED / checkpoint.name
    shutil.copytree(checkpoint, written)
    state = load_file(written / LOSS_STATE)
    save_file({name: state[name] for name in LOSS_NAMES}, written / LOSS_STATE)
    (written / SAMPLER_STATE).write_text(json.dumps(position), encoding="utf-8")
    (written / "audio_vipolyqwen.py").unlink()  # was part of modeling_vipolyqwen.py
    (written / "training_args.bin").write_bytes(ARGUMENTS)
    (written / SETTINGS_FILE).unlink()
    (written / MANIFEST).unlink()
    publish_checkpoint(written, folder / checkpoint.name)
    return folder / checkpoint.name


def test_a_checkpoint_of_the_flat_layout_resumes_to_the_same_weights(
    world: Path, straight: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = as_earlier(straight / "checkpoint-2", tmp_path / "earlier", POSITION)
    train_run(world, tmp_path / "resumed", *RUN, "--resume_from_checkpoint", str(checkpoint))
    assert "earlier version" in caplog.text and "cannot be compared" in caplog.text
    assert same_weights(straight, tmp_path / "resumed")
    before, after = (load_file(folder / "checkpoint-4" / LOSS_STATE) for folder in (straight, tmp_path / "resumed"))
    assert before.keys() == after.keys() == LOSS_NAMES
    assert all(value.equal(after[name]) for name, value in before.items())


def test_a_checkpoint_without_its_launch_is_refused_in_words(world: Path, straight: Path, tmp_path: Path) -> None:
    position = {name: value for name, value in POSITION.items() if name != "launch"}
    checkpoint = as_earlier(straight / "checkpoint-2", tmp_path / "earlier", position)
    with pytest.raises(ValueError, match=r"checkpoint-2 was written by an earlier version .*`--model CHECKPOINT`"):
        train_run(world, tmp_path / "resumed", *RUN, "--resume_from_checkpoint", str(checkpoint))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task_weighting none", "loss_state.* holds the state of another loss .*log_variances.*`distil`"),
        ("--freeze vision", "state of the optimizer in .* does not fit this run.*`freeze`"),
        ("--pooling mean", "pooling +attention +mean.*`pooling` cannot change"),
    ],
)
def test_settings_that_do_not_fit_an_earlier_checkpoint_are_refused_in_words(
    world: Path, straight: Path, tmp_path: Path, flags: str, message: str
) -> None:
    checkpoint = as_earlier(straight / "checkpoint-2", tmp_path / "earlier", POSITION)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        train_run(world, tmp_path / "resumed", *RUN, *flags.split(), "--resume_from_checkpoint", str(checkpoint))


def test_no_pickle_of_a_checkpoint_names_a_module_of_the_package(straight: Path) -> None:
    pickles = [path for path in (straight / "checkpoint-2").iterdir() if path.suffix in (".pt", ".pth", ".bin")]
    assert {path.name for path in pickles} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert not [path.name for path in pickles if b"vipolyqwen" in path.read_bytes()]


def test_the_stored_checkpoint_of_the_first_release_gives_its_vectors(
    world: Path, first_release: Path, tmp_path: Path
) -> None:
    checkpoint = first_release / "checkpoint-2"
    expected = json.loads((first_release / "vectors.json").read_text(encoding="utf-8"))["checkpoint-2"]
    model = ViPolyQwenModel.from_pretrained(checkpoint)
    save_repository(model, ViPolyQwenProcessor.from_pretrained(checkpoint, config=model.config), tmp_path / "today")
    assert vectors(checkpoint, world) == pytest.approx(np.array(expected), abs=1e-5)  # by the code that lies in it
    assert vectors(tmp_path / "today", world) == pytest.approx(np.array(expected), abs=1e-5)


def test_the_stored_checkpoint_of_the_first_release_resumes_to_its_end(
    world: Path, first_release: Path, tmp_path: Path
) -> None:
    checkpoint = first_release / "checkpoint-2"
    known = json.loads((first_release / "vectors.json").read_text(encoding="utf-8"))
    flags = ["--model", str(checkpoint), "--freeze", "vision", "audio", "--prefix_sides", "a"]
    train_run(world, tmp_path / "run", *RUN, *flags, "--resume_from_checkpoint", str(checkpoint))
    assert np.abs(np.array(known["run"]) - known["checkpoint-2"]).max() > 0.01
    assert vectors(tmp_path / "run", world) == pytest.approx(np.array(known["run"]), abs=1e-4)
