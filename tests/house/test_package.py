"""The installed package: its version, its lazy exports, its files, and inference without the extras."""

import importlib
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.command.build_py import build_py
from setuptools.config.pyprojecttoml import apply_configuration

import vipolyqwen

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(path.stem for path in ROOT.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
EXTRAS = ["accelerate", "datasets", "mteb", "pandas", "peft", "pyarrow", "tensorboard"]
# Runs in another process, without any package of the extras.
READER = """
import importlib.util, sys
sys.path += sys.argv[1:3]
assert importlib.util.find_spec("datasets") is None
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
from vipolyqwen import ViPolyQwenModel, ViPolyQwenProcessor

folder = sys.argv[3]
inputs = ["Huế", Image.new("RGB", (60, 60)), {"array": np.zeros(8000, np.float32), "sampling_rate": 16000}]
vectors = SentenceTransformer(folder, trust_remote_code=True, device="cpu").encode(inputs)
model, processor = ViPolyQwenModel.from_pretrained(folder), ViPolyQwenProcessor.from_pretrained(folder)
text = model(**processor(text=["Huế"], return_tensors="pt")).embeddings.detach().numpy()
assert vectors.shape == (3, 1024) and np.abs(vectors[0] - text[0]).max() < 1e-5
"""


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs python in another process."""
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as `pip install .` would write it into site-packages."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        distribution = apply_configuration(Distribution({"script_name": "setup.py"}), "pyproject.toml")
        command = build_py(distribution)
        command.build_lib = str(folder)
        command.ensure_finalized()
        command.run()
    return folder


def test_the_package_loads_its_classes_only_when_asked() -> None:
    heavy = "{'torch', 'transformers', 'numpy'} & set(sys.modules)"
    done = run("-c", f"import sys, vipolyqwen; vipolyqwen.__version__, dir(vipolyqwen); assert not {heavy}, {heavy}")
    assert done.returncode == 0, done.stderr
    from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor

    assert vipolyqwen.ViPolyQwenProcessor is ViPolyQwenProcessor
    assert set(vipolyqwen.__all__) <= set(dir(vipolyqwen))
    for name in vipolyqwen.__all__:
        assert getattr(vipolyqwen, name) is not None
    with pytest.raises(AttributeError, match="ViPolyQwenTrainer"):
        vipolyqwen.ViPolyQwenTrainer  # noqa: B018


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_the_package_s_version(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [command, "--version"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"vipolyqwen.{command}").main()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"vipolyqwen {vipolyqwen.__version__}\n"


def test_every_folder_with_code_is_a_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    rooms = {f"vipolyqwen.{path.parent.name}" for path in ROOT.glob("*/__init__.py") if path.parent.name[0] != "."}
    assert set(settings["packages"]) == {"vipolyqwen", *rooms}


def test_the_built_package_holds_code_and_data_and_nothing_else(built: Path) -> None:
    found = {path.relative_to(built / "vipolyqwen").as_posix() for path in built.rglob("*") if path.is_file()}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {path for path in listed.split("\0") if (ROOT / path).is_file()}
    skipped = (
        "tests/*",
        "benchmarks/*",
        "docs/*",
        ".*",
        "*.md",
        "constraints*",
        "Makefile",
        "*.cff",
        "pyproject.toml",
    )
    wanted = {path for path in tracked if not any(fnmatch(path, pattern) for pattern in skipped)}
    assert found >= wanted, wanted - found
    assert not [path for path in found if path.startswith(("tests/", "benchmarks/", "docs/", "outputs/", "build/"))]


def test_the_built_package_works_in_another_folder(built: Path, tmp_path: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(built)!r}); import vipolyqwen; print(vipolyqwen.__file__);"
    program += "from vipolyqwen.evaluation.suite import SUITES, read_suite; print(len(read_suite('papers').entries))"
    done = run("-P", "-c", program, cwd=tmp_path)
    where, entries = done.stdout.splitlines() or ["", done.stderr]
    assert Path(where).parent == built / "vipolyqwen" and int(entries) > 0


def test_inference_needs_no_extra(tiny: tuple, built: Path, tmp_path: Path) -> None:
    from vipolyqwen.publishing.repository import save_repository

    save_repository(*tiny, tmp_path / "model")
    without = tmp_path / "site-packages"
    without.mkdir()
    for folder in {Path(path) for path in sys.path if path.endswith("site-packages")}:
        for path in folder.iterdir():
            if not re.match(rf"({'|'.join([*EXTRAS, 'vipolyqwen'])})\b", path.name):
                (without / path.name).symlink_to(path)
    done = run("-S", "-c", READER, str(without), str(built), tmp_path / "model")
    assert done.returncode == 0, done.stderr


def test_the_blocked_extras_are_those_of_pyproject() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    base = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for name in EXTRAS:
        assert name not in base
    for name in set(EXTRAS) - {"pandas", "pyarrow"}:  # these two come with `datasets`
        assert any(line.startswith(name) for room in ("train", "evaluate", "publish") for line in extras[room])
