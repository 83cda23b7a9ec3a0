"""Fingerprint of a published repository: records its vectors, weights and settings, and names later differences.

A newer library rarely fails; it changes vectors silently: it initialises a renamed layer at random, resizes images
with other code, casts weights. `write_fingerprint` writes to `fingerprint.json` the vectors of golden inputs (computed
by formulas, so the same anywhere), a mark of every tensor, and the settings that they depend on. `compare` measures
again and lists the differences: `python -m vipolyqwen.doctor REPO` prints them, `from_pretrained(…, verify=True)`
raises an error.
"""

import hashlib
import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.utils import cached_file

from .processing_vipolyqwen import ViPolyQwenProcessor

FILE_NAME = "fingerprint.json"
HASHED_ENDINGS = (".py", ".json", ".jinja")
UNHASHED = {FILE_NAME, "training.json", "model.safetensors.index.json"}  # no vector depends on them
# Read by transformers if they lie beside the others, and then they change tokens, tensors or weights.
READ_IF_PRESENT = (
    "adapter_config.json added_tokens.json chat_template.json preprocessor_config.json special_tokens_map.json"
).split()
CLASSES = ("image_processor", "feature_extractor")  # settings that name a class; equal vectors make others harmless
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pillow")
TEXTS = {
    "vi": "Ba quả bóng đỏ lớn trên bãi cỏ, biển ghi: Cà phê sữa đá 25.000đ.",
    "en": "Three large red balls on the grass; the sign says: iced milk coffee, 25,000 dong.",
    "zh": "草地上有三个红色的大球，牌子上写着：冰奶咖啡，两万五千盾。",  # noqa: RUF001
}
SPECIAL_TOKENS = "<ocr> <|image_pad|> <|im_end|>"  # characters that must not become tokens
# Settings of the image processor and of the feature extractor on which tensors depend.
IMAGE_SETTINGS = (
    "do_convert_rgb do_normalize do_rescale do_resize image_mean image_std merge_size patch_size resample "
    "rescale_factor size temporal_patch_size"
).split()
AUDIO_SETTINGS = "do_normalize feature_size padding_side padding_value return_attention_mask sampling_rate".split()

# 1 - cosine that rounding alone may cause. Two vectors at distance d have 1 - cosine = d² / 2.
# float32: the model guarantees 1e-5 for each of 1024 components over batches and attention implementations, hence
# d = 3.2e-4 and 5e-8; 1e-6 leaves a factor of 4 in d to deeper models and other machines.
# bfloat16 keeps 8 bits, float16 11 (half a unit: 2^-9, 2^-12). Each of a backbone's 2 x 28 residual additions rounds
# by that much, in random directions: d = 2^-9 · √56 = 0.015 and 1e-4 if all else is exact. Matrix products and norms
# add several times that, hence d = 0.1 and 5e-3; float16: d = 0.0125 and 8e-5.
TOLERANCES = {"float64": 1e-6, "float32": 1e-6, "float16": 8e-5, "bfloat16": 5e-3}

# Limit of the change of a tensor's marks, relative to its norm. They are sums in float64; 1e-6 lets a table that is
# computed on loading (rotary frequencies) differ in the last bit of float32, 6e-8.
SAME = 1e-6
# A cast to bfloat16 rounds each value by at most 2^-9 of itself, and a mark by about that part of the norm; 2^-7
# leaves a factor of 4. The projections of two random tensors differ by about their norm; both differ by less than
# 2^-7 in one case of 25,000.
ROUNDED = 2.0**-7
UNIT = 1e-5  # limit of |norm - 1| of a vector: the model normalises in float32 in every dtype
MARK_PERIOD = 4093  # a prime, so that no row length of a matrix lines up with it


@dataclass
class Finding:
    """Result of one check.

    Attributes:
        check: name of the check, such as `weights` or, for vectors, `image`.
        level: `ok`, `note` (a difference that is harmless by itself) or `fail`.
        text: the finding and its remedy.
    """

    check: str
    level: str
    text: str


@dataclass
class Measured:
    """Content of `fingerprint.json`; published files have these keys, so they must not be renamed."""

    versions: dict[str, str]  # library -> version
    dtype: list[str]  # dtypes of the parameters, sorted
    attention: dict[str, str]  # tower -> implementation
    settings: dict[str, Any]  # of the processor
    prefix_ids: dict[str, int]  # task -> id of its prefix token
    token_ids: dict[str, list[int]]  # golden text -> its ids
    marks: dict[str, list[float]]  # tensor -> norm and two projections
    vectors: dict[str, list[float]]  # golden input, `kind: name` -> its unit vector
    files: dict[str, str] = field(default_factory=dict)  # code, tokenizer and settings -> hash of its content


def golden_image() -> Image.Image:
    """Draws an RGB image of 96 × 64 pixels with edges, gradients and a disc, in integers: the same anywhere."""
    y, x = np.mgrid[:64, :96]
    red, green, blue = 255 * x // 95, 255 * y // 63, 128 + 0 * x
    disc = (x - 60) ** 2 + (y - 30) ** 2 < 20**2
    stripes = (x // 8 + y // 8) % 2 == 0
    pixels = np.stack([np.where(disc, 230, red), np.where(disc, 20, green), np.where(stripes, blue, 40)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def golden_audio(sampling_rate: int) -> dict[str, Any]:
    """Synthesises 1 s that rises from 200 to 2000 Hz over a hum of 110 Hz, at the encoder's `sampling_rate` in Hz."""
    t = np.arange(sampling_rate) / sampling_rate
    samples = 0.5 * np.sin(2 * np.pi * (200 * t + 900 * t**2)) + 0.1 * np.sin(2 * np.pi * 110 * t)
    return {"array": samples.astype(np.float32), "sampling_rate": sampling_rate}


def golden_inputs(processor: Any, has_audio: bool) -> dict[str, dict[str, Any]]:
    """Returns the golden inputs: name, which begins with the kind of input -> arguments of the processor."""
    image, audio = [[golden_image()]], [golden_audio(processor.feature_extractor.sampling_rate)]
    inputs: dict[str, dict[str, Any]] = {f"text: {language}": {"text": [text]} for language, text in TEXTS.items()}
    inputs["text: special tokens"] = {"text": [SPECIAL_TOKENS]}
    inputs["image: drawing"] = {"images": image}
    inputs["mix: image + text"] = {"text": [TEXTS["vi"]], "images": image}
    if has_audio:
        inputs["audio: tones"] = {"audio": audio}
        inputs["mix: text + audio"] = {"text": [TEXTS["en"]], "audio": audio}
        inputs["mix: image + text + audio"] = {"text": [TEXTS["zh"]], "images": image, "audio": audio}
    for task in processor.task_prefixes:
        inputs[f"prefix: {task}"] = {"text": [TEXTS["vi"]], "task": task}
    if has_audio and _fuses_prefix(processor) and "audio" in processor.task_prefixes:
        inputs["audio: tones with prefix"] = {"audio": audio, "task": "audio"}
    return inputs


@torch.no_grad()
def embed(model: Any, processor: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """Embeds one golden input as (projection_dim,) float32, on the CPU."""
    batch = processor(**arguments, return_tensors="pt").to(model.device)
    return model(**batch).embeddings[0].cpu()


def mark(tensor: torch.Tensor) -> list[float]:
    """Returns the norm and two projections of a tensor, in float64; they tell replaced and rounded values apart."""
    flat = tensor.detach().flatten().cpu()
    rest = flat[len(flat) // MARK_PERIOD * MARK_PERIOD :]
    sums = flat[: len(flat) - len(rest)].view(-1, MARK_PERIOD).sum(dim=0, dtype=torch.float64)
    sums[: len(rest)] += rest
    angles = torch.arange(MARK_PERIOD, dtype=torch.float64)
    norm = torch.linalg.vector_norm(flat, dtype=torch.float64)
    return [float(norm), float(sums @ angles.cos()), float(sums @ angles.sin())]


def hash_files(folder: str | PathLike) -> dict[str, str]:
    """Returns name -> hash of the content of a repository's code, tokenizer and settings."""
    paths = [path for path in sorted(Path(folder).iterdir()) if path.suffix in HASHED_ENDINGS]
    return {path.name: _hash_file(path) for path in paths if path.name not in UNHASHED}


def _hash_file(path: Path) -> str:
    """Hashes text without its line endings, JSON without its layout and the library's version in it."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape").replace("\r\n", "\n")
    if path.suffix == ".json":
        try:
            text = json.dumps(json.loads(text, object_hook=_without_version), sort_keys=True)
        except json.JSONDecodeError:
            text = f"not JSON: {text}"
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _without_version(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != "transformers_version"}


def compare_files(published: Measured, repository: str | PathLike, **hub_kwargs: Any) -> list[Finding]:
    """Compares the files of a repository with the published ones; fingerprints of earlier versions have none.

    Returns:
        One finding, or none without hashes.
    """
    if not published.files:
        return []
    changed, missing = [], []
    added = [
        name
        for name in READ_IF_PRESENT
        if name not in published.files and _find(repository, name, hub_kwargs) is not None
    ]
    for name, digest in published.files.items():
        path = _find(repository, name, hub_kwargs)
        if path is None:
            missing.append(name)
        elif _hash_file(Path(path)) != digest:
            changed.append(name)
    faults = [(changed, "differ from the published files"), (missing, "are missing"), (added, "were added")]
    text = "; ".join(f"{_listed(names)} {fault}" for names, fault in faults if names)
    if text:
        return [Finding("files", "fail", f"{text}: restore the files, or publish again if it is meant")]
    return [
        Finding("files", "ok", f"all {len(published.files)} files of code, tokenizer and settings are as published")
    ]


def _find(repository: str | PathLike, name: str, hub_kwargs: dict[str, Any]) -> str | None:
    return cached_file(repository, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)


def _fuses_prefix(processor: Any) -> bool:
    """Returns whether a prefix steers audio alone; repositories published before the setting exist without it."""
    return getattr(processor, "audio_prefix", "none") == "fuse"


def _loads_a_part(config: Any) -> bool:
    """Returns whether the model has some of its towers only; code published before the setting exists without it."""
    return getattr(config, "towers", None) is not None


def processor_settings(processor: Any) -> dict[str, Any]:
    """Returns the processor's settings on which tensors depend, in the form that JSON restores."""
    image, audio = processor.image_processor.to_dict(), processor.feature_extractor.to_dict()
    settings = {
        "image_processor": type(processor.image_processor).__name__,
        "feature_extractor": type(processor.feature_extractor).__name__,
        "tokenizer.model_max_length": processor.tokenizer.model_max_length,
        "min_audio_samples": processor.min_audio_samples,
        "max_audio_seconds": processor.max_audio_seconds,
        **({"audio_prefix": "fuse"} if _fuses_prefix(processor) else {}),
        **{f"image_processor.{name}": image.get(name) for name in IMAGE_SETTINGS},
        **{f"feature_extractor.{name}": audio.get(name) for name in AUDIO_SETTINGS},
    }
    return json.loads(json.dumps(settings))


def measure(model: Any, processor: Any) -> Measured:
    """Measures a loaded model and its processor; the vectors stay empty."""
    config, tokenizer = model.config, processor.tokenizer
    towers = {"text": config.text_config, "vision": config.vision_config}
    towers |= {"audio": config.audio_config} if config.audio_config is not None else {}
    texts = processor(text=list(TEXTS.values()), padding=False)["input_ids"]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Measured(
        versions={"python": platform.python_version(), **{library: version(library) for library in LIBRARIES}},
        dtype=sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}),
        attention={tower: part._attn_implementation for tower, part in towers.items()},
        settings=processor_settings(processor),
        prefix_ids={task: tokenizer.convert_tokens_to_ids(text) for task, text in processor.task_prefixes.items()},
        token_ids=dict(zip(TEXTS, [list(map(int, ids)) for ids in texts], strict=True)),
        marks={name: mark(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()},
        vectors={},
    )


def fingerprint(model: Any, processor: Any) -> Measured:
    """Measures a loaded model and its processor, with the vectors of the golden inputs."""
    measured = measure(model, processor)
    for name, arguments in golden_inputs(processor, model.config.audio_config is not None).items():
        measured.vectors[name] = [round(value, 8) for value in embed(model, processor, arguments).tolist()]
    return measured


def save_fingerprint(measured: Measured, path: str | PathLike) -> None:
    """Writes a fingerprint as JSON, one attribute a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in vars(measured).items()]
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def write_fingerprint(folder: str | PathLike) -> None:
    """Loads the repository at `folder` as its users do and writes `fingerprint.json` to it.

    Raises:
        ValueError: tensors are missing, left over or of another shape.
    """
    model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    faults = compare_loading(report)
    if faults.level == "fail":
        raise ValueError(f"{folder} cannot be fingerprinted, because its weights are incomplete: {faults.text}.")
    measured = fingerprint(model, processor)
    measured.files = hash_files(folder)
    save_fingerprint(measured, Path(folder) / FILE_NAME)


def compare(
    published: Measured, model: Any, processor: Any, report: dict[str, Any], dtype_was_asked_for: bool = False
) -> list[Finding]:
    """Measures a loaded model again and compares it with its fingerprint.

    Args:
        published: content of `fingerprint.json`.
        model: the model, as `from_pretrained` returned it.
        processor: its processor.
        report: its loading info, from `from_pretrained(…, output_loading_info=True)`.
        dtype_was_asked_for: the caller chose the dtype, so a dtype other than the published one is a note.

    Returns:
        One finding a check: keys, dtype, weights, settings, then each kind of vector.
    """
    now = measure(model, processor)
    tensors = [
        _compare_dtype(published, now, dtype_was_asked_for),
        _compare_marks(published, now, dtype_was_asked_for, model),
    ]
    before, after = ({n: v for n, v in each.settings.items() if n not in CLASSES} for each in (published, now))
    classes = [{name: each.settings.get(name) for name in CLASSES} for each in (published, now)]
    return [
        compare_loading(report),
        *(tensors if published.marks else []),  # an adapter has none: readers load it beside its base, not merged
        _compare_values("processor", before, after),
        _compare_values("classes", *classes, "note"),
        _compare_values("prefixes", published.prefix_ids, now.prefix_ids),
        _compare_values("tokenizer", published.token_ids, now.token_ids),
        _compare_values("attention", published.attention, now.attention, "note"),
        _compare_values("versions", published.versions, now.versions, "note"),
        *compare_vectors(published, model, processor, tolerance(published, now.dtype if dtype_was_asked_for else [])),
    ]


def tolerance(published: Measured, asked_for: list[str]) -> float:
    """Returns the limit of 1 - cosine for the coarsest of the published dtypes and those asked for."""
    return max(TOLERANCES[dtype] for dtype in (*published.dtype, *asked_for))


def compare_loading(report: dict[str, Any]) -> Finding:
    """Checks by the loading info that the tensors of the files and those of the model are the same."""
    faults = {
        "missing_keys": "not in the files, so initialised at random",
        "mismatched_keys": "of another shape in the files, so initialised at random",
        "unexpected_keys": "in the files, but not in the model",
    }
    found = [f"{_listed(report[name])} {meaning}" for name, meaning in faults.items() if report[name]]
    if found:
        cause = "the files are incomplete, or this version of the libraries renames tensors"
        return Finding("keys", "fail", f"{'; '.join(found)}: {cause}")
    return Finding("keys", "ok", "every tensor of the model is in the files, and no other")


def _compare_dtype(published: Measured, now: Measured, was_asked_for: bool) -> Finding:
    if published.dtype == now.dtype:
        return Finding("dtype", "ok", " and ".join(now.dtype))
    text = f"published in {' and '.join(published.dtype)}, loaded in {' and '.join(now.dtype)}"
    if was_asked_for:
        return Finding("dtype", "note", f"{text}, as asked for")
    return Finding(
        "dtype", "fail", f"{text}: the weights were cast; load with dtype={published.dtype[0]!r} if the files are not"
    )


def _compare_marks(published: Measured, now: Measured, rounding_was_asked_for: bool, model: Any) -> Finding:
    rounded, replaced = [], []
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in published.marks.keys() & now.marks.keys():
        before, after = np.array(published.marks[name]), np.array(now.marks[name])
        change = float(np.abs(after - before).max() / max(before[0], 1e-30))
        if not change <= SAME:  # NaN is a change
            was_cast = change <= ROUNDED and (rounding_was_asked_for or _has_few_digits(tensors[name].detach()))
            (rounded if was_cast else replaced).append(name)
    changes = [
        f"{_listed(names)} {change}"
        for names, change in (
            (
                replaced,
                "hold other values than when published: initialised at random, trained on, or another checkpoint's",
            ),
            (rounded, "hold rounded values: they were cast to a dtype with fewer digits at some point"),
            (now.marks.keys() - published.marks.keys(), "are new since publication"),
            (published.marks.keys() - now.marks.keys(), "no longer exist"),
        )
        if names
    ]
    harmless = not replaced and published.marks.keys() == now.marks.keys() and rounding_was_asked_for
    if not changes:
        return Finding("weights", "ok", f"all {len(now.marks)} tensors hold the published values")
    return Finding("weights", "note" if harmless else "fail", "; ".join(changes))


def _has_few_digits(tensor: torch.Tensor) -> bool:
    """Returns whether a dtype of 16 bits holds all values of a tensor, which a cast leaves and training does not."""
    return any(torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)) for dtype in (torch.bfloat16, torch.float16))


def _compare_values(check: str, before: dict[str, Any], after: dict[str, Any], level: str = "fail") -> Finding:
    changes = [
        f"{name} was {_short(before.get(name))}, is {_short(after.get(name))}"
        for name in [*before, *(after.keys() - before.keys())]
        if before.get(name) != after.get(name)
    ]
    return Finding(check, level if changes else "ok", "; ".join(changes) or "as when published")


def compare_vectors(published: Measured, model: Any, processor: Any, limit: float) -> list[Finding]:
    """Compares the vectors of the golden inputs: one finding a kind of input, about its worst vector."""
    worst: dict[str, tuple[float, str]] = {}
    has_audio = any(name.startswith("audio: ") for name in published.vectors)
    for name, arguments in golden_inputs(processor, has_audio).items():
        if name not in published.vectors:  # a task added since; `prefixes` names it
            continue
        needed = [tower for argument, tower in (("images", "image"), ("audio", "audio")) if argument in arguments]
        if _loads_a_part(model.config) and not all(map(model.config.loads, needed)):
            continue
        try:
            found = compare_vector(name, embed(model, processor, arguments).numpy(), published)
        except Exception as error:  # an error of any library is a finding
            found = -1.0, f"{name} raises {type(error).__name__}: {str(error)[:200]}"
        kind = name.split(": ")[0]
        worst[kind] = min(worst.get(kind, found), found)
    return [vector_finding(kind, found, limit) for kind, found in worst.items()]


def compare_vector(name: str, found: np.ndarray, published: Measured) -> tuple[float, str]:
    """Returns the cosine of the vector of a golden input with the published one, and a sentence about it.

    Args:
        name: of the golden input.
        found: (projection_dim,) float; a vector whose norm is not 1 counts as cosine -1.
        published: the fingerprint.
    """
    vector = found.astype(np.float64)
    norm = float(np.linalg.norm(vector))
    if not abs(norm - 1) <= UNIT:  # NaN fails too
        return -1.0, f"the vector of {name!r} has norm {norm:.7g}, which must be 1 ± {UNIT:g}"
    cosine = float(vector @ published.vectors[name]) / norm
    return -1.0 if np.isnan(cosine) else cosine, f"cosine {cosine:.7f} with the published vector of {name!r}"


def vector_finding(check: str, worst: tuple[float, str], limit: float) -> Finding:
    """Judges the worst vector of a check, as `compare_vector` describes it, by the limit of 1 - cosine."""
    cosine, text = worst
    return Finding(check, "ok" if cosine >= 1 - limit else "fail", f"{text}; the limit is 1 - {limit:g}")


KINDS = ("text", "image", "audio", "mix", "prefix", "sentence-transformers")  # findings about vectors


def verdict(findings: list[Finding]) -> str:
    """Names the broken kinds of vectors and the likely cause in one line; empty if no check failed."""
    failed = [finding for finding in findings if finding.level == "fail"]
    if not failed:
        return ""
    broken = [finding.check for finding in failed if finding.check in KINDS]
    measured = any(finding.check in KINDS for finding in findings)
    effect = "Its vectors are still the published ones." if measured else "It could not be measured."
    if broken:
        effect = f"Broken: {', '.join(broken)}."
    causes = [finding for finding in failed if finding.check not in KINDS]
    causes = causes or [finding for finding in findings if finding.level == "note"]
    text = " ".join(f"[{finding.check}] {finding.text}." for finding in causes)
    unknown = "weights, settings and versions are as published, so the hardware or code that was edited by hand."
    return f"{effect} Likely cause: {text or unknown}"


def read_fingerprint(repository: str | PathLike, **hub_kwargs: Any) -> Measured:
    """Reads the `fingerprint.json` of a folder or a repository on the Hub.

    Raises:
        ValueError: the repository has no such file.
        OSError: the repository does not exist or cannot be reached.
    """
    try:
        path = cached_file(repository, FILE_NAME, **hub_kwargs)
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError) or not (
            Path(repository).is_dir() or isinstance(error.__cause__, EntryNotFoundError)
        ):
            raise OSError(f"{str(repository)!r} cannot be reached, or does not exist: {error}") from error
        raise ValueError(
            f"{str(repository)!r} has no {FILE_NAME} to compare with. Write it from a model known to be good, with "
            "`vipolyqwen.fingerprint_vipolyqwen.write_fingerprint(FOLDER)`."
        ) from error
    return load_fingerprint(path)


def load_fingerprint(path: str | PathLike) -> Measured:
    """Reads a fingerprint that `save_fingerprint` wrote."""
    return Measured(**json.loads(Path(path).read_text(encoding="utf-8")))


def verify(
    model: Any, report: dict[str, Any], repository: str | PathLike, dtype_was_asked_for: bool, **hub_kwargs: Any
) -> None:
    """Compares a model just loaded from `repository` with the fingerprint in it.

    Args:
        model: the model, as `from_pretrained` returned it.
        report: its loading info.
        repository: the folder or repository on the Hub that it was loaded from.
        dtype_was_asked_for: as in `compare`.
        **hub_kwargs: `revision`, `token`, … for the files of the repository.

    Raises:
        ValueError: the model differs from the published one.
    """
    processor = ViPolyQwenProcessor.from_pretrained(repository, trust_remote_code=True, **hub_kwargs)
    published = read_fingerprint(repository, **hub_kwargs)
    findings = compare(published, model, processor, report, dtype_was_asked_for)
    findings += compare_files(published, repository, **hub_kwargs)
    fault = verdict(findings)
    if fault:
        raise ValueError(f"{str(repository)!r} differs from the published model. {fault}")


def _listed(names: Any) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


__all__ = [
    "FILE_NAME",
    "Finding",
    "Measured",
    "compare",
    "compare_files",
    "hash_files",
    "compare_vectors",
    "golden_inputs",
    "read_fingerprint",
    "tolerance",
    "verdict",
    "verify",
    "write_fingerprint",
    "golden_image",
    "golden_audio",
    "mark",
    "TEXTS",
]
