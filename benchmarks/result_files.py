"""Result files of benchmarks: claims, limits, whether they hold, machine and versions."""

import json
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
LIBRARIES = ("torch", "transformers", "sentence-transformers", "accelerate", "peft", "deepspeed", "mteb")


def claim(value: float, bar: float, holds: bool) -> dict[str, Any]:
    """One measured number against its bar."""
    return {"value": value, "bar": bar, "holds": bool(holds)}


def write_result(name: str, claims: dict[str, dict[str, Any]], **figures: Any) -> None:
    """Writes and prints results/NAME.json: claims, other measurements, machine and versions.

    Args:
        name: of the file.
        claims: {id: result of `claim`}.
        figures: whatever the claims were computed from, and the settings.
    """
    result = {"claims": claims, **figures, "machine": machine(), "versions": versions()}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    print(text)


def write_table(page: str, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes a table into a page of docs/, between `<!-- NAME -->` and the next `<!-- end -->`.

    Args:
        page: file name.
        name: of the table.
        header: names of the columns.
        rows: cells.

    Raises:
        ValueError: the page has no such place.
    """
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    path = DOCS / page
    place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
    text, found = place.subn(lambda _: f"Measured on {machine()}.\n\n{table}\n", path.read_text(encoding="utf-8"))
    if found != 1:
        raise ValueError(f"{page} has {found} places `<!-- {name} -->`; give it one.")
    path.write_text(text, encoding="utf-8")


def machine() -> str:
    """What the numbers were measured on."""
    name = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    processor = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}, {processor}" if torch.cuda.is_available() else f"{processor}, CPU"


def versions() -> dict[str, str]:
    """Returns the versions of the installed libraries."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
