"""Checks that a repository still gives the vectors that it was published with; if not, names the fault and its cause.

    python -m vipolyqwen.doctor REPO [--revision REVISION] [--device cpu] [--dtype DTYPE] [--attn_implementation NAME]

    python -m vipolyqwen.doctor REPO --against http://HOST:PORT/v1 [--dtype DTYPE]
    python -m vipolyqwen.doctor REPO --quantization int8
    python -m vipolyqwen.doctor REPO --towers text [image] [audio] [--dtype DTYPE]

REPO is a folder or a repository on the Hub; its code runs, as with `trust_remote_code=True`, and cannot import this
package, as on a machine where it is not installed. With --against, a server's vectors are compared with the published
ones; --dtype says in which one it runs. With --quantization, weights are rounded by torchao while they are loaded, and
the vectors that they give are compared with the published ones; so are, with --towers, those of a model of which some
towers alone are loaded. The exit code is 0 if no check fails, else 1.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from json import loads
from pathlib import Path
from typing import Any

import soundfile
from packaging.specifiers import SpecifierSet
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor
from transformers.utils import cached_file, is_torchao_available

from vipolyqwen import __version__
from vipolyqwen.configuration_vipolyqwen import TOWERS
from vipolyqwen.fingerprint_vipolyqwen import (
    TOLERANCES,
    Finding,
    Measured,
    compare,
    compare_files,
    compare_loading,
    compare_vector,
    compare_vectors,
    golden_inputs,
    load_fingerprint,
    read_fingerprint,
    tolerance,
    vector_finding,
    verdict,
)
from vipolyqwen.serving.parity import compare_server

PACKAGE = "vipolyqwen"
# Limits of 1 - cosine with rounded weights: twice that of bfloat16.
QUANTIZED = {"int8": 1e-2}
SETTINGS = ("attn_implementation", "fingerprint", "checkpoint")  # options of the check without a server and the like


def diagnose(
    repository: str | Path,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    attn_implementation: str | None = None,
    fingerprint: Path | None = None,
    checkpoint: Path | None = None,
) -> list[Finding]:
    """Loads a repository in both ways that its users do and compares it with its fingerprint.

    Args:
        repository: a folder or a repository on the Hub.
        revision: branch, tag or commit.
        device: where to run it.
        dtype: load in this dtype; `None`: as published.
        attn_implementation: load with this attention; `None`: chosen by transformers.
        fingerprint: compare with this file; `None`: with the repository's `fingerprint.json`.
        checkpoint: the folder that the repository was published from; its code must give the same vectors.

    Returns:
        One finding a check.

    Raises:
        ValueError: the repository has no fingerprint.
        OSError: the repository does not exist.
    """
    published = load_fingerprint(fingerprint) if fingerprint else read_fingerprint(repository, revision=revision)
    asked = {"dtype": dtype, "attn_implementation": attn_implementation}
    model_kwargs = {name: value for name, value in asked.items() if value is not None}
    findings = [check_floors(repository, revision)]
    with package_hidden():
        try:
            model, processor, report = load(repository, revision, model_kwargs)
        except Exception as error:  # an error of any library is a finding
            return [*findings, Finding("loading", "fail", raised(error))]
        findings += compare(published, model.to(device), processor, report, dtype is not None)
        limit = tolerance(published, [] if dtype is None else [str(model.dtype).removeprefix("torch.")])
        del model
        gc.collect()  # memory may not hold two copies of a large model
        encoder_kwargs = {"revision": revision, "device": device, "model_kwargs": model_kwargs}
        findings.append(check_sentence_transformers(repository, published, processor, limit, encoder_kwargs))
        if checkpoint is not None:
            findings.append(check_checkpoint(checkpoint, published, limit))
    return [*findings, *compare_files(published, repository, revision=revision)]


@contextmanager
def package_hidden() -> Iterator[None]:
    """Makes every import of this package fail, as it does where the package is not installed."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == PACKAGE}
    sys.modules[PACKAGE] = None  # type: ignore[assignment]  # the import system's mark of a module that must not load
    try:
        yield
    finally:
        del sys.modules[PACKAGE]
        sys.modules.update(hidden)


def load(repository: str | Path, revision: str | None, model_kwargs: dict[str, Any]) -> tuple[Any, Any, dict]:
    """Loads model, processor and loading info through the Auto classes."""
    model, report = AutoModel.from_pretrained(
        repository, revision=revision, trust_remote_code=True, output_loading_info=True, **model_kwargs
    )
    return model, AutoProcessor.from_pretrained(repository, revision=revision, trust_remote_code=True), report


def raised(error: Exception) -> str:
    """Names an error of a library as a finding does."""
    return f"raises {type(error).__name__}: {str(error)[:500]}"


def check_floors(repository: str | Path, revision: str | None) -> Finding:
    """Whether the installed libraries are as new as the repository says it needs."""
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
    repository: str | Path, published: Measured, processor: Any, limit: float, encoder_kwargs: dict[str, Any]
) -> Finding:
    """Checks the vectors from sentence-transformers, which prepares inputs with different code."""
    check = "sentence-transformers"
    has_audio = any(name.startswith("audio: ") for name in published.vectors)
    inputs = golden_inputs(processor, has_audio)
    try:
        encoder = SentenceTransformer(str(repository), trust_remote_code=True, **encoder_kwargs)
        with tempfile.TemporaryDirectory() as folder:
            rows = {name: as_row(arguments, Path(folder)) for name, arguments in inputs.items()}
            worst = min(
                compare_vector(name, encoder.encode(row, prompt_name=inputs[name].get("task")), published)
                for name, row in rows.items()
                if name in published.vectors
            )
    except Exception as error:  # as above
        return Finding(check, "fail", raised(error))
    return vector_finding(check, worst, limit)


def as_row(arguments: dict[str, Any], folder: Path) -> str | dict[str, Any]:
    """Returns one input as sentence-transformers takes it, a text or a dict of parts, with its media as files.

    Args:
        arguments: the processor's arguments for the input.
        folder: where the files are written, without loss.
    """
    parts: dict[str, Any] = {}  # image, text, audio: code of earlier versions takes parts in the order of the keys
    if "images" in arguments:
        parts["image"] = str(folder / "image.png")
        arguments["images"][0][0].save(parts["image"])
    if "text" in arguments:
        parts["text"] = arguments["text"][0]
    if "audio" in arguments:
        clip = arguments["audio"][0]
        parts["audio"] = str(folder / "audio.wav")
        soundfile.write(parts["audio"], clip["array"], clip["sampling_rate"], subtype="FLOAT")
    return parts["text"] if list(parts) == ["text"] else parts


def check_checkpoint(checkpoint: Path, published: Measured, limit: float) -> Finding:
    """Checks that a checkpoint gives the published vectors with the code in its folder."""
    try:
        model, processor, report = load(checkpoint, None, {})
    except Exception as error:  # as above
        return Finding("checkpoint", "fail", raised(error))
    findings = [compare_loading(report), *compare_vectors(published, model, processor, limit)]
    faults = [f"{finding.check}: {finding.text}" for finding in findings if finding.level == "fail"]
    text = "; ".join(faults) or "gives the published vectors with its code"
    return Finding("checkpoint", "fail" if faults else "ok", text)


def diagnose_server(
    url: str, repository: str | Path, revision: str | None = None, dtype: str | None = None
) -> list[Finding]:
    """Compares a server's vectors with the fingerprint of a repository.

    Args:
        url: base of its API, such as `http://127.0.0.1:8000/v1`.
        repository: a folder or a repository on the Hub.
        revision: branch, tag or commit.
        dtype: dtype of the server's weights; `None`: as published.

    Raises:
        ValueError: the repository has no fingerprint, or the dtype has no tolerance.
        OSError: the repository does not exist, or the server does not answer.
    """
    published = read_fingerprint(repository, revision=revision)
    if dtype is not None and dtype not in TOLERANCES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(TOLERANCES)}.")
    processor = AutoProcessor.from_pretrained(repository, revision=revision, trust_remote_code=True)
    return compare_server(url, published, processor, tolerance(published, [dtype] if dtype else []))


def diagnose_quantized(
    repository: str | Path, quantization: str, revision: str | None = None, device: str = "cpu"
) -> list[Finding]:
    """Compares the vectors of quantised weights with the fingerprint of a repository, a finding a kind of input.

    Args:
        repository: a folder or a repository on the Hub.
        quantization: one of `QUANTIZED`.
        revision: branch, tag or commit.
        device: where to run it.

    Raises:
        ValueError: the repository has no fingerprint.
        OSError: the repository does not exist.
        ModuleNotFoundError: torchao is not installed.
    """
    published = read_fingerprint(repository, revision=revision)
    config = quantization_config(quantization)
    with package_hidden():
        model, processor, report = load(repository, revision, {"quantization_config": config})
    note = Finding("quantization", "note", f"{quantization} by torchao {version('torchao')}")
    loaded = compare_loading(report)
    return [note, loaded, *compare_vectors(published, model.to(device), processor, QUANTIZED[quantization])]


def diagnose_towers(
    repository: str | Path,
    towers: list[str],
    revision: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> list[Finding]:
    """Compares the vectors of a model of which some towers are loaded with the fingerprint of its repository.

    Args:
        repository: a folder or a repository on the Hub.
        towers: those to load, `text` among them.
        revision: branch, tag or commit.
        device: where to run it.
        dtype: load in this dtype; `None`: as published.

    Returns:
        A note about the towers, and one finding a kind of input that they can embed.

    Raises:
        ValueError: the repository has no fingerprint, `towers` lacks `text`, or the code is older than `towers`.
        OSError: the repository does not exist.
    """
    published = read_fingerprint(repository, revision=revision)
    model_kwargs = {"towers": towers, **({} if dtype is None else {"dtype": dtype})}
    with package_hidden():
        try:
            model, processor, report = load(repository, revision, model_kwargs)
        except TypeError as error:
            raise ValueError(f"{repository} was published with code that always loads all towers: {error}") from error
        limit = tolerance(published, [] if dtype is None else [str(model.dtype).removeprefix("torch.")])
        absent = [tower for tower in TOWERS if tower not in towers]
        left_out = f"; inputs with {' or '.join(absent)} are not measured" if absent else ""
        note = Finding("towers", "note", f"{' and '.join(towers)}{left_out}")
        return [note, compare_loading(report), *compare_vectors(published, model.to(device), processor, limit)]


def quantization_config(name: str) -> Any:
    """Returns the stock `quantization_config` of weights alone; projections, which are small, stay as they are."""
    if not is_torchao_available():
        raise ModuleNotFoundError("--quantization needs torchao, which is not installed: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
    from transformers import TorchAoConfig

    kinds = {"int8": Int8WeightOnlyConfig}
    return TorchAoConfig(kinds[name](), modules_to_not_convert=["projection", "audio_projection"])


def refuse_combinations(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with an error if options were given together of which one would be ignored."""
    given = [name for name in ("against", "quantization", "towers") if getattr(options, name) is not None]
    ignored = {"against": SETTINGS, "quantization": ("dtype", *SETTINGS), "towers": SETTINGS}
    both = [*given, *(name for name in ignored[given[0]] if getattr(options, name) is not None)] if given else []
    if len(both) > 1:
        parser.error(f"--{both[0]} does not go with --{' and --'.join(both[1:])}; ask for one at a time.")


def run_checks(options: argparse.Namespace) -> list[Finding]:
    """Returns the findings of the check that the command line asks for."""
    repository, revision, device = options.repository, options.revision, options.device
    if options.quantization is not None:
        return diagnose_quantized(repository, options.quantization, revision, device)
    if options.towers is not None:
        return diagnose_towers(repository, options.towers, revision, device, options.dtype)
    if options.against is not None:
        return diagnose_server(options.against, repository, revision, options.dtype)
    attention, given = options.attn_implementation, (options.fingerprint, options.checkpoint)
    return diagnose(repository, revision, device, options.dtype, attention, *given)


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
    parser.add_argument("--device", default="cpu", help="where to run it (default: cpu)")
    parser.add_argument("--dtype", help="load in this dtype (default: as published)")
    parser.add_argument("--attn_implementation", help="load with this attention (default: transformers' choice)")
    parser.add_argument("--fingerprint", type=Path, help="compare with this file (default: the repository's)")
    parser.add_argument(
        "--checkpoint", type=Path, help="also compare this folder, which the repository was published from"
    )
    parser.add_argument("--against", metavar="URL", help="compare a server's vectors instead: http://HOST:PORT/v1")
    parser.add_argument(
        "--quantization", choices=QUANTIZED, help="compare the vectors of weights that torchao rounds so"
    )
    parser.add_argument(
        "--towers", nargs="+", choices=TOWERS, help="compare the vectors of a model that has these towers alone"
    )
    options = parser.parse_args(arguments)
    refuse_combinations(parser, options)
    try:
        findings = run_checks(options)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    for finding in findings:
        print(f"{finding.level.upper():4}  {finding.check:21}  {finding.text}")
    fault = verdict(findings)
    print(fault or "Everything that matters is as published.")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
