"""Opens WebDataset archives: .tar files whose members `KEY.jpg`, `KEY.txt`, `KEY.json`, … are the columns of a row."""

import glob
import json
import tarfile
from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa

from .files import cache_folder, content_digest

FIRST = 100  # samples by which the columns and their types are known
TEXTS = ("txt", "text", "transcript")  # what `datasets` decodes as text


def open_archive(file: str) -> datasets.Dataset:
    """Opens an archive as a table, converted once: images and audio as bytes, texts, JSON objects, and `__key__`.

    Raises:
        ValueError: the file is not an archive, or its samples cannot be read.
    """
    try:
        features = _features(file)
        return datasets.load_dataset(
            "webdataset",
            data_files=glob.escape(file),
            split="train",
            features=features,
            cache_dir=str(cache_folder() / content_digest(file)),
        )
    except (tarfile.TarError, EOFError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{file}: not readable as a WebDataset archive: {cause}. Write the file again.") from error


def _features(file: str) -> datasets.Features:
    """Returns the types of the columns of the first samples; media stay bytes, which needs no decoder."""
    samples = list(islice(_samples(file), FIRST))
    if not samples:
        raise ValueError(f"{file} has no samples; a sample is files that share a name, such as 0.jpg and 0.txt.")
    inferred = pa.Table.from_pylist([{**dict.fromkeys(_columns(samples)), **sample} for sample in samples]).schema
    return datasets.Features.from_arrow_schema(inferred)


def _columns(samples: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for sample in samples for name in sample))


def _samples(file: str) -> Iterator[dict[str, Any]]:
    sample: dict[str, Any] = {}
    with tarfile.open(file) as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            stem, _, column = name.partition(".")
            if not member.isfile() or not stem or not column:
                continue
            key = f"{folder}/{stem}" if folder else stem
            if sample and sample["__key__"] != key:
                yield sample
                sample = {}
            if column in sample:
                raise ValueError(f"{file}: the member {member.name!r} occurs twice; rename or drop one.")
            content = archive.extractfile(member).read()
            try:
                sample |= {column: _decoded(column, content), "__key__": key, "__url__": file}
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}: the member {member.name!r} cannot be read: {error}. Repair it.") from error
    if sample:
        yield sample


def _decoded(column: str, content: bytes) -> Any:
    ending = column.rpartition(".")[2].lower()
    if ending == "json":
        return json.loads(content)
    if ending in TEXTS:
        return content.decode()
    return int(content) if ending in ("cls", "cls2", "index", "inx", "id") else content
