"""Writes the folder of a Space: the page of `app.py`, this package's code, and where the model is."""

import shutil
from pathlib import Path

import jinja2

from .. import __version__
from ..data.markdown import escaped
from .repository import PublishError, write_json

PACKAGE = Path(__file__).parents[1]
ROOMS = ("data", "evaluation", "serving", "demo")  # that app.py imports; demo without its assets
EXTRA = ("gradio>=6", "datasets>=5.2", "jinja2>=3.1", "pyyaml>=6")
SPACE_FILE = "space.json"


def write_space(folder: Path, name: str, tag: str | None = None, repository: Path | None = None) -> None:
    """Writes a folder that becomes a Space by uploading it as it is.

    Args:
        folder: a new folder.
        name: the published model, `ORG/NAME`, or the name of the folder that is copied.
        tag: the revision to load; `None`: the newest.
        repository: folder of a model that is copied into the Space; `None`: the Space loads it from the Hub.

    Raises:
        PublishError: the folder exists.
    """
    if folder.exists():
        raise PublishError(f"{folder} exists; remove it, or name another folder with --space.")
    code = folder / "vipolyqwen"
    for room in ("", *ROOMS):
        (code / room).mkdir(parents=True)
        for path in sorted((PACKAGE / room).iterdir()):
            if path.suffix in (".py", ".jinja") and path.name != "app.py":
                shutil.copy(path, code / room)
    shutil.copy(PACKAGE / "app.py", folder)
    shutil.copy(PACKAGE / "LICENSE", folder)
    floors = (PACKAGE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in floors if line and not line.startswith("#")]
    (folder / "requirements.txt").write_text("\n".join([*lines, *EXTRA]) + "\n", encoding="utf-8")
    title = name.split("/")[-1]
    if repository is not None:
        shutil.copytree(repository, folder / "model")
        write_json(folder / SPACE_FILE, {"folder": "model", "title": title})
    else:
        write_json(folder / SPACE_FILE, {"model": name, "revision": tag, "title": title})
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, finalize=escaped, keep_trailing_newline=True, trim_blocks=True)
    page = templates.get_template("space.md.jinja")
    text = page.render(title=title, repo_id=None if repository else name, version=__version__)
    (folder / "README.md").write_text(text, encoding="utf-8")
