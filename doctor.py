"""Checks that a repository still gives the vectors that it was published with; if not, names the fault and its cause.

    python -m vipolyqwen.doctor REPO [--revision REVISION] [--device cpu] [--dtype DTYPE] [--attn_implementation NAME]

REPO is a folder or a repository on the Hub; its code runs, as with `trust_remote_code=True`. The exit code is 0 if
no check fails, else 1.
"""

import argparse
import gc
import sys
from importlib.metadata import PackageNotFoundError, version
from json import loads
from pathlib import Path
from typing import Any

import numpy as np
from packaging.specifiers import SpecifierSet
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor
from transformers.utils import cached_file

from vipolyqwen import __version__
from vipolyqwen.fingerprint_vipolyqwen import (
    TEXTS,
    Finding,
    Measured,
    compare,
    golden_image,
    read_fingerprint,
    tolerance,
    verdict,
)


def diagnose(
    repository: str | Path,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    attn_implementation: str | None = None,
) -> list[Finding]:
    """Loads a repository with transformers and sentence-transformers and compares it with its fingerprint.

    Args:
        repository: a folder or a repository on the Hub.
        revision: branch, tag or commit.
        device: device to run it on.
        dtype: load in this dtype; `None`: as published.
        attn_implementation: load with this attention; `None`: chosen by transformers.

    Returns:
        One finding a check.

    Raises:
        ValueError: the repository has no fingerprint.
        OSError: the repository does not exist.
    """
    published = read_fingerprint(repository, revision=revision)
    floors = check_floors(repository, revision)
    asked = {"dtype": dtype, "attn_implementation": attn_implementation}
    model_kwargs = {name: value for name, value in asked.items() if value is not None}
    try:
        model, report = AutoModel.from_pretrained(
            repository, revision=revision, trust_remote_code=True, output_loading_info=True, **model_kwargs
        )
        processor = AutoProcessor.from_pretrained(repository, revision=revision, trust_remote_code=True)
    except Exception as error:  # an error of any library is a finding
        return [floors, Finding("loading", "fail", f"raises {type(error).__name__}: {str(error)[:500]}")]
    findings = [floors, *compare(published, model.to(device), processor, report, dtype is not None)]
    dtypes = [] if dtype is None else [str(model.dtype).removeprefix("torch.")]
    del model
    gc.collect()  # memory may not hold two copies of a large model
    encoder_kwargs = {"revision": revision, "device": device, "model_kwargs": model_kwargs}
    return [
        *findings,
        check_sentence_transformers(repository, published, tolerance(published, dtypes), encoder_kwargs),
    ]


def check_floors(repository: str | Path, revision: str | None) -> Finding:
    """Checks the installed libraries against the requirements of the repository."""
    path = cached_file(repository, "config_sentence_transformers.json", revision=revision)
    faults, found = [], []
    for library, floor in loads(Path(path).read_text(encoding="utf-8"))["requirements"].items():
        try:
            installed = version(library)
        except PackageNotFoundError:
            faults.append(f"{library}{floor} is needed and not installed: pip install '{library}{floor}'")
            continue
        found.append(f"{library} {installed}")
        if not SpecifierSet(floor).contains(installed, prereleases=True):
            faults.append(f"{library} is {installed}, needed is {floor}: pip install '{library}{floor}'")
    return Finding("floors", "fail" if faults else "ok", "; ".join(faults or found))


def check_sentence_transformers(
    repository: str | Path, published: Measured, limit: float, encoder_kwargs: dict[str, Any]
) -> Finding:
    """Checks the vectors from sentence-transformers, which prepares inputs with different code."""
    check = "sentence-transformers"
    try:
        encoder = SentenceTransformer(str(repository), trust_remote_code=True, **encoder_kwargs)
        names = [*(f"text: {language}" for language in TEXTS), "image: drawing"]
        vectors = dict(zip(names, encoder.encode([*TEXTS.values(), golden_image()]), strict=True))
        for task in published.prefix_ids:
            vectors[f"prefix: {task}"] = encoder.encode(TEXTS["vi"], prompt_name=task)
    except Exception as error:  # as above
        return Finding(check, "fail", f"raises {type(error).__name__}: {str(error)[:500]}")
    exact = {name: vector.astype(np.float64) for name, vector in vectors.items()}
    cosines = {
        name: float(vector @ published.vectors[name] / np.linalg.norm(vector)) for name, vector in exact.items()
    }
    name = min(cosines, key=cosines.__getitem__)
    text = f"cosine {cosines[name]:.7f} with the published vector of {name!r}; the limit is 1 - {limit:g}"
    return Finding(check, "ok" if cosines[name] >= 1 - limit else "fail", text)


def main(arguments: list[str] | None = None) -> int:
    """Prints the findings; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vipolyqwen.doctor",
        description=__doc__.splitlines()[0],
        epilog="The code of the repository runs, as with `trust_remote_code=True`.",
    )
    parser.add_argument("--version", action="version", version=f"vipolyqwen {__version__}")
    parser.add_argument("repository", help="a folder, or a repository on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--device", default="cpu", help="device to run it on (default: cpu)")
    parser.add_argument("--dtype", help="load in this dtype (default: as published)")
    parser.add_argument("--attn_implementation", help="load with this attention (default: transformers' choice)")
    try:
        findings = diagnose(**vars(parser.parse_args(arguments)))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for finding in findings:
        print(f"{finding.level.upper():4}  {finding.check:21}  {finding.text}")
    fault = verdict(findings)
    print(fault or "Everything that matters is as published.")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
