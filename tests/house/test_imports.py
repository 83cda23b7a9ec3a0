"""The order of the rooms, read from the imports: who may import whom, how it is spelled, and no circle.

Only reads the sources, so that nothing is imported and an arrow inside a function or under TYPE_CHECKING counts too.
"""

import ast
import graphlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = re.compile(
    r"(arguments|audio|configuration|conversations|download|fingerprint|headers|images|linear|media|microbatches|modeling"
    r"|packing|pooling|processing|tasks|vision|waveforms)_vipolyqwen"
)
COMMANDS = re.compile(r"(train|evaluate|publish|embed|serve|demo|export)_vipolyqwen|doctor|app|__main__")
ROOMS = ["data", "evaluation", "publishing", "training", "serving", "demo"]
PROJECT_FILES = re.compile(
    r"[A-Z]+(\.md)?|Makefile|pyproject\.toml|(requirements|constraints)[\w-]*\.txt|py\.typed|\.gitignore|CITATION\.cff|__init__\.py"
)
FOLDERS = {*ROOMS, "docs", "recipes", "benchmarks", "tests", ".ci", ".github"}
# Under TYPE_CHECKING, for transformers' hash of the configuration's code alone; see there.
HASHED_TOGETHER = ("configuration_vipolyqwen", "modeling_vipolyqwen")
# Room -> the rooms, or the modules of a room, that it may import besides itself.
MAY_IMPORT = {
    "shipped": [],
    "data": ["package", "shipped"],
    "evaluation": ["package", "shipped", "data"],
    "publishing": ["package", "shipped", "data.markdown"],
    "training": ["package", "shipped", "data", "publishing.repository", "evaluation.metrics", "evaluation.charts"],
    "serving": ["package", "shipped", "data"],
    "demo": ["package", "shipped", "data", "evaluation", "publishing", "training", "serving"],
    "command": ["package", "shipped", *ROOMS],
    "package": ["shipped"],  # the exports of the root's __init__.py
}


def module_name(path: Path) -> str:
    """Returns the module of a path below the root: `training.trainer`; `data` or "" of an `__init__.py`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Returns the room of a module that is named without `vipolyqwen.`."""
    top = module.split(".")[0]
    if top in ROOMS:
        return top
    if not top:
        return "package"
    if SHIPPED.fullmatch(top):
        return "shipped"
    if COMMANDS.fullmatch(top):
        return "command"
    raise ValueError(f"{module!r} is in no room: neither a folder of {ROOMS} nor a shipped file nor a command.")


def package_files(root: Path) -> dict[str, Path]:
    """Returns module -> file of everything in the package; rooms are flat."""
    paths = [*root.glob("*.py"), *(path for room in ROOMS for path in (root / room).glob("*.py"))]
    return {module_name(path.relative_to(root)): path for path in paths}


def imports_of(path: Path, package: str, modules: set[str]) -> list[tuple[str, bool, int]]:
    """Returns module, whether the import is relative, and line of every import of this package in a file.

    Args:
        path: the file.
        package: the package it is in, "" for the root; relative imports start from it.
        modules: names of the package's modules; `from .losses import info_nce` is an arrow to `losses`, and
            `from .. import speedups` one to `speedups`.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if package else []
            start = ["vipolyqwen", *parts[: len(parts) - node.level + 1]] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [(f"{base}.{alias.name}", node.level > 0) for alias in node.names]
        else:
            continue
        for name, is_relative in names:
            top, _, inner = name.partition(".")
            if top == "vipolyqwen":
                found.append((inner if inner in modules else inner.rpartition(".")[0], is_relative, node.lineno))
    return found


def may_import(importer: str, imported: str) -> bool:
    """Whether the order of the rooms allows it."""
    room, other = room_of(importer), room_of(imported)
    allowed = MAY_IMPORT[room]
    return (room == other and room != "command") or other in allowed or imported in allowed


def package_arrows(root: Path) -> list[tuple[str, str, bool, int]]:
    """Returns importer, imported, whether relative, and line of every import between the package's modules."""
    files = package_files(root)
    arrows = []
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        arrows += [(module, *found) for found in imports_of(path, package, set(files))]
    return arrows


def faults(root: Path) -> list[str]:
    """Returns what the rules forbid in the package below `root`, one line an import."""
    found = []
    for importer, imported, is_relative, line in package_arrows(root):
        arrow = f"{importer}:{line} -> {imported or 'vipolyqwen'}"
        if room_of(imported) == "command":
            found.append(f"{arrow}: nothing imports a command")
        elif not may_import(importer, imported):
            found.append(f"{arrow}: {room_of(importer)} may import {MAY_IMPORT[room_of(importer)]}")
        if is_relative == (room_of(importer) == "command"):
            found.append(f"{arrow}: relative inside the package, absolute in commands")
    return found


def circle(root: Path) -> list[str]:
    """Returns modules that import one another in a circle, [] if none do."""
    graph: dict[str, set[str]] = {}
    for importer, imported, _, _ in package_arrows(root):
        if (importer, imported) == HASHED_TOGETHER:
            continue
        graph.setdefault(importer, set()).add(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package's sources in another folder, to be spoiled."""
    for path in package_files(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path


def test_imports_follow_the_order_of_the_rooms() -> None:
    assert faults(ROOT) == []
    assert len(package_arrows(ROOT)) > 100  # it does read them


def test_no_circle_of_modules() -> None:
    assert circle(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "match"),
    [
        ("data/sampler.py", "from ..training.losses import info_nce", "training.losses: data may import"),
        ("training/losses.py", "from ..evaluation.search import embed", "evaluation.search: training may import"),
        ("publishing/hub.py", "from ..training import trainer", "training.trainer: publishing may import"),
        ("modeling_vipolyqwen.py", "from .data.schema import Row", "data.schema: shipped may import"),
        ("evaluation/run.py", "def late():\n    from ..publish_vipolyqwen import main", "nothing imports a command"),
        ("publish_vipolyqwen.py", "import vipolyqwen.train_vipolyqwen", "nothing imports a command"),
        ("training/losses.py", "from vipolyqwen.data.schema import Row", "relative inside the package"),
        ("publish_vipolyqwen.py", "from .publishing.card import model_card", "absolute in commands"),
    ],
)
def test_a_forbidden_import_is_found(copied: Path, file: str, line: str, match: str) -> None:
    with (copied / file).open("a", encoding="utf-8") as lines:
        lines.write(f"\n{line}\n")
    found = faults(copied)
    assert len(found) == 1 and match in found[0] and found[0].startswith(file.removesuffix(".py").replace("/", "."))


def test_a_circle_is_found(copied: Path) -> None:
    (copied / "data/first.py").write_text("from .second import b\n", encoding="utf-8")
    (copied / "data/second.py").write_text("def late():\n    from . import first\n", encoding="utf-8")
    assert set(circle(copied)) == {"data.first", "data.second"}


def test_tests_and_benchmarks_name_the_package_and_import_no_test() -> None:
    modules = set(package_files(ROOT))
    for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("demo/assets/*.py")]:
        name = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            tops = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}:{node.lineno} is relative"
                tops = [node.module or ""]
            for top in tops:
                assert not top.startswith("test_"), f"{name}:{node.lineno} imports a test, {top}"
        for imported, _, line in imports_of(path, "", modules):
            assert imported in modules, f"{name}:{line} imports {imported!r}, which the package lacks"


def test_the_root_holds_shipped_files_commands_and_project_files() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    tracked = {path for path in listed.stdout.split("\0") if path and (ROOT / path).exists()}
    files = {path for path in tracked if "/" not in path}
    assert {path.split("/")[0] for path in tracked - files} <= FOLDERS
    for name in files:
        stem = name.removesuffix(".py")
        is_module = name.endswith(".py") and (SHIPPED.fullmatch(stem) or COMMANDS.fullmatch(stem))
        assert is_module or PROJECT_FILES.fullmatch(name), f"{name} is neither shipped nor a command nor the project's"


# Modules and functions of `os` that Windows (or macOS: sched_getaffinity) lacks, or that mean something else there.
UNIX = {"fcntl", "grp", "pwd", "pty", "resource", "termios"}
UNIX_FUNCTIONS = {"fork", "getloadavg", "getuid", "kill", "killpg", "pread", "pwrite", "register_at_fork", "setsid"}
UNIX_FUNCTIONS |= {"sched_getaffinity", "statvfs", "mkfifo", "fchmod"}


def uses_of_unix(path: Path) -> list[str]:
    """Lists what only Unix has in a file, outside functions and branches that ask for `sys.platform`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    asking = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.If | ast.IfExp)]
    asking = [node for node in asking if "sys.platform" in ast.unparse(node)]
    allowed = {id(child) for node in asking for child in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if id(node) in allowed:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in UNIX]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            found += [f"os.{node.attr}"] if node.attr in UNIX_FUNCTIONS else []
    return found


def test_nothing_needs_unix() -> None:
    used = {name: uses_of_unix(path) for name, path in package_files(ROOT).items()}
    assert {name: found for name, found in used.items() if found} == {}
