"""Published files open nothing, the package runs nothing it reads, and pages escape what rows and recipes name."""

import ast
import importlib
import importlib.util
import json
import multiprocessing
import re
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import yaml

from vipolyqwen.data.markdown import escape_markdown
from vipolyqwen.evaluation.templates import ENVIRONMENT
from vipolyqwen.publishing.card import model_card
from vipolyqwen.publishing.checks import PUBLISHED

ROOT = Path(__file__).parents[2]
CODE = sorted(name for name in PUBLISHED if name.endswith(".py"))
PACKAGE = [path for path in ROOT.glob("**/*.py") if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks")]
PACKAGE = [path for path in PACKAGE if not path.relative_to(ROOT).parts[0].startswith((".", "build", "outputs"))]
# Distributions of requirements.txt by the name of their import where it differs.
IMPORT_NAMES = {"pillow": "PIL"}
BROUGHT = {"tokenizers", "yaml", "accelerate"}  # by transformers; the last only where it is installed
WATCHED = ("open", "socket.", "subprocess.", "os.system", "os.exec", "os.remove", "os.rename", "os.mkdir", "urllib.")
PICKLES = ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
HOSTILE = "a|b\n## Free\r\n---\n<script>alert(1)</script> [win](javascript:x) {{ 7 * 7 }} \x1b[31m\u202egpj.exe"


# --- published files


def required() -> set[str]:
    """Names that requirements.txt lets a shipped file import."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {re.split(r"[<>=,]", line)[0].strip() for line in lines if line and not line.startswith("#")}
    return {IMPORT_NAMES.get(name, name) for name in names}


def imported(node: ast.AST) -> list[str]:
    """Roots of the absolute imports that run as soon as the module is imported."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [alias.name.split(".")[0] for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and not child.level:
            found.append((child.module or "").split(".")[0])
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not is_guarded(child):
            found += imported(child)
    return found


def is_guarded(node: ast.AST) -> bool:
    """Whether a branch runs only where an optional library is installed."""
    return (
        isinstance(node, ast.If) and re.search(r"is_\w+_available\(|TYPE_CHECKING", ast.unparse(node.test)) is not None
    )


@pytest.mark.parametrize("name", CODE)
def test_a_published_file_imports_what_is_required_and_nothing_else(name: str) -> None:
    roots = set(imported(ast.parse((ROOT / name).read_text(encoding="utf-8"))))
    assert roots <= {*sys.stdlib_module_names, *required(), *BROUGHT}


def report_events(channel: Connection) -> None:
    """Imports all published files anew, and sends what the interpreter's audit saw them open or run."""
    events: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        if event.startswith(WATCHED):
            events.append(f"{event} {arguments[0]}" if arguments else event)

    spec = importlib.util.spec_from_loader("published", loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(ROOT)]
    sys.modules["published"] = package
    sys.dont_write_bytecode = True
    sys.addaudithook(watch)
    for name in CODE:
        importlib.import_module(f"published.{name.removesuffix('.py')}")
    events.append("open probe")
    channel.send(events)


def test_importing_the_published_files_opens_nothing() -> None:
    """Besides code: each file itself, and the libraries it imports."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=report_events, args=(sender,)
    )  # hooks cannot be removed
    process.start()
    assert receiver.poll(60)
    events = receiver.recv()
    process.join()
    assert events.pop() == "open probe"
    assert {f"open {ROOT / name}" for name in CODE} <= {event.replace("vipolyqwen/../", "") for event in events}
    code = re.compile(r"open (.*\.(py|pyc|so|pth)|.*__pycache__.*|/proc/.*|.*/(METADATA|RECORD|entry_points\.txt))$")
    assert [event for event in events if not code.match(event)] == []


# --- code that would run what it reads


def is_safe_loader(node: ast.ClassDef) -> bool:
    """Whether a class reads YAML as `yaml.safe_load` does."""
    return [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]


def dangers(tree: ast.AST) -> list[str]:
    """Calls that run, or may run, code in what they read."""
    found = []
    safe = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and is_safe_loader(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", "") or "", *(alias.name for alias in node.names)]
            found += [
                name for name in names if name in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
            ]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        bare = name in ("eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "jinja2.Template")
        bare |= name == "yaml.load" and given.get("Loader") not in safe
        unsafe = name.endswith("torch.load") and given.get("weights_only") != "True"
        unsafe |= "allow_pickle" in given or given.get("shell", "False") != "False"
        unsafe |= name == "jinja2.Environment" and not given.keys() & {"autoescape", "finalize"}
        found += [f"{name}({given})"] if bare or unsafe else []
    return found


def test_no_file_of_the_package_runs_what_it_reads() -> None:
    assert len(PACKAGE) > 80
    found = {str(path.relative_to(ROOT)): dangers(ast.parse(path.read_text(encoding="utf-8"))) for path in PACKAGE}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "jinja2.Environment()",
        "jinja2.Template(text)",
    ],
)
def test_a_dangerous_call_is_found(line: str) -> None:
    assert len(dangers(ast.parse(line))) == 1


# --- pages


def test_a_hostile_name_stays_in_its_line_cell_and_tag() -> None:
    shown = escape_markdown(HOSTILE)
    assert not re.search(r"[\x00-\x1f\u202a-\u202e]", shown)
    assert "<" not in shown and "](" not in shown and not re.search(r"(?<!\\)\|", shown)
    assert escape_markdown("Tiếng Việt: 中文, a_b* `c`") == "Tiếng Việt: 中文, a_b* `c`"


def hostile_run(folder: Path) -> Path:
    """A checkpoint whose record names hostile things."""
    source = {"name": HOSTILE, "on_hub": False, "rows": 1, "weight": 1.0, "tasks": {HOSTILE: 1}, "sides": {HOSTILE: 1}}
    settings = {"tasks": {HOSTILE: {"prefix": HOSTILE}}, HOSTILE: HOSTILE}
    record = {"base_models": [HOSTILE], "continued_from": HOSTILE, "settings": settings, "hardware": HOSTILE}
    record |= {"train_data": [source], "eval_data": [source], "versions": {HOSTILE: HOSTILE}}
    values = {"recall@1": 0.5, "candidates": 7, "chance": 0.1}
    entry = {"step": 1, **{f"eval_{HOSTILE}_{name}".replace("\n", " "): value for name, value in values.items()}}
    (folder / "training.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1, "epoch": 1.0, "log_history": [entry]}))
    return folder


def test_the_card_of_a_hostile_run_has_its_own_front_matter_headings_and_tables(tiny: tuple, tmp_path: Path) -> None:
    card = model_card("org/name", *tiny, hostile_run(tmp_path))
    plain = model_card("org/name", *tiny, tmp_path / "none")
    front, text = re.match(r"---\n(.*?)\n---\n(.*)", str(card), re.DOTALL).groups()
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert yaml.safe_load(front).keys() - {"base_model", "model-index"} <= yaml.safe_load(
        plain.data.to_yaml()
    ).keys() | {"metrics"}

    def headings(page: str) -> list[str]:
        return [line for line in page.splitlines() if line.startswith("#")]

    assert headings(text) == headings(plain.text)
    assert "<script" not in text and "](javascript" not in text and "49" not in re.findall(r"\{\{.*?\}\}|49 ", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line: len(re.findall(r"(?<!\\)\|", line)) - 1 for line in rows if "script" in line}
    assert len(widths) >= 4 and set(widths.values()) <= {2, 5, 7}


def test_the_scorecard_of_a_hostile_task_has_its_own_rows() -> None:
    table = ENVIRONMENT.from_string(
        '{% from "tables.md.jinja" import table %}{{ table(["task", "x"], lines) | safe }}'
    )
    page = table.render(lines=[[HOSTILE, "1"], ["plain", "2"]])
    lines = [line for line in page.splitlines() if line]
    assert lines[:2] == ["| task | x |", "| --- | --- |"] and lines[3] == "| plain | 2 |" and len(lines) == 4
    assert "<script" not in lines[2] and len(re.findall(r"(?<!\\)\|", lines[2])) == 3
