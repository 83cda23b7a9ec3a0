"""`vipolyqwen COMMAND …`: finds the command, passes its arguments and its exit code, and names a missing extra."""

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from vipolyqwen import embed_vipolyqwen, publish_vipolyqwen, serve_vipolyqwen
from vipolyqwen.__main__ import COMMANDS, main
from vipolyqwen.configuration_vipolyqwen import TOWERS
from vipolyqwen.publishing.repository import MAX_SHARD_SIZE

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_command_at_the_root_has_a_name() -> None:
    named = {command.module for command in COMMANDS.values()}
    files = {path.stem for path in ROOT.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert files - {"__main__"} <= named
    for module in named:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()


def test_the_installed_script_is_the_dispatcher_and_extras_exist() -> None:
    assert PROJECT["scripts"] == {"vipolyqwen": "vipolyqwen.__main__:main"}
    assert {command.extra for command in COMMANDS.values()} - {None} <= set(PROJECT["optional-dependencies"])


def test_it_starts_without_torch_and_from_any_folder(tmp_path: Path) -> None:
    program = "import sys; from vipolyqwen.__main__ import read_command; read_command(['embed', '--help'])"
    program += "; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("command", "unloaded"),
    [(name, {"torch", "transformers"}) for name in ("evaluate", "publish", "embed", "serve", "demo")]
    + [
        (
            "train",
            {"datasets", "sentence_transformers", "peft.config", "transformers.processing_utils", "scipy.signal"},
        )
    ],
)
def test_help_loads_no_library_that_the_run_alone_needs(command: str, unloaded: set[str]) -> None:
    program = f"import sys, runpy; sys.argv = ['{command}', '--help']\ntry: runpy.run_module("
    program += f"'vipolyqwen.{command}_vipolyqwen', run_name='__main__')\nexcept SystemExit: pass\n"
    program += f"assert not {unloaded!r} & sys.modules.keys(), {unloaded!r} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    assert "usage" in done.stdout


def test_choices_and_defaults_of_commands_are_those_of_the_modules_they_load_late() -> None:
    embedding = embed_vipolyqwen.read_options(["model", "rows", "--out", "vectors", "--towers", *TOWERS])
    serving = serve_vipolyqwen.read_options(["model", "--towers", *TOWERS])
    assert embedding.towers == serving.towers == list(TOWERS)
    assert publish_vipolyqwen.read_options(["run", "--out", "folder"]).max_shard_size == MAX_SHARD_SIZE


def test_a_command_gets_its_arguments_and_ends_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["vipolyqwen", "publish", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "usage: vipolyqwen publish" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["doctor", "no/such/folder"])
    assert end.value.code == 2


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["emebd"], 2), (["--help"], 0), (["--version"], 0)])
def test_what_is_no_command_is_answered(arguments: list[str], code: int, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr()
    assert end.value.code == code
    assert "--version" in arguments or "embed" in printed.out + printed.err


@pytest.mark.parametrize(
    ("name", "missing", "caught"),
    [("train", "not_installed_accelerate", True), ("train", "vipolyqwen.gone", False), ("doctor", "gone", False)],
)
def test_a_missing_package_names_the_extra(
    name: str, missing: str, caught: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: str, run_name: str) -> dict[str, Any]:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(runpy, "run_module", fail)
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit if caught else ModuleNotFoundError, match=missing) as end:
        main([name])
    assert not caught or "[train]" in str(end.value)
