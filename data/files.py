"""Finds the files of a source, and the digests of their content."""

import glob
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow as pa
import xxhash

from .atomic import write_atomically
from .source_config import SourceConfig

TEXTS = (".jsonl", ".json", ".csv", ".tsv")
FORMATS = (*TEXTS, ".parquet", ".arrow", ".tar")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # of text files, by the names that Arrow gives them
# Beside the data of a clone or of a model, and not data.
DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"}
SPLIT_WORDS = {"train": {"train"}, "validation": {"validation", "valid", "val", "dev"}, "test": {"test", "eval"}}
PIECE = 2**24  # bytes hashed at once
SURROGATE = re.compile("[\ud800-\udfff]")  # how Python writes bytes that are not UTF-8
SETTLED = 2.0  # seconds; a file that was written less than that ago may be written again within one tick of its clock


def suffix_of(file: str) -> str:
    """Returns the ending of a file's name in lower case, of a compressed text file that of the text."""
    endings = [ending.lower() for ending in Path(file).suffixes[-2:]]
    if len(endings) == 2 and endings[0] in TEXTS and endings[1] in COMPRESSIONS:
        return endings[0]
    return Path(file).suffix.lower()


def open_binary(file: str) -> BinaryIO:
    """Opens a file to read its bytes, of a compressed text file those of the text."""
    compression = COMPRESSIONS.get(Path(file).suffix.lower())
    return open(file, "rb") if compression is None else io.BufferedReader(pa.input_stream(file, compression))


def cache_folder() -> Path:
    """Returns the folder of converted files: one inside the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "vipolyqwen"


def content_digest(file: str) -> str:
    """Returns a digest of the content of a file.

    A file is read again only if its size, its times or its place on the disk differ from those at the last time. The
    time of change (ctime) is among them: unlike that of modification (mtime), no program can set it back.
    """
    path, state = os.path.abspath(file), os.stat(file)
    seen = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    note = cache_folder() / "digests" / hashlib.blake2b(path.encode(), digest_size=16).hexdigest()
    try:
        noted = json.loads(note.read_text())
        if noted["state"] == seen:
            return noted["digest"]
    except (OSError, ValueError, KeyError):
        pass  # no note yet, or one that was damaged: the content is read
    digest = xxhash.xxh3_128()
    with open(file, "rb") as content:
        while piece := content.read(PIECE):
            digest.update(piece)
    if time.time() - state.st_ctime > SETTLED:
        text = json.dumps({"state": seen, "digest": digest.hexdigest()})
        write_atomically(note, lambda unfinished: unfinished.write_text(text), writer=f"{os.getpid()}-")
    return digest.hexdigest()


def find_files(source: SourceConfig) -> list[str]:
    """Returns the local files of a source, or a folder written by `save_to_disk`; empty for a Hub dataset."""
    path = os.path.expanduser(source.path)
    is_folder = os.path.isdir(path)
    if is_folder and source.name is not None and not is_saved(path):
        path = _named_folder(path, source)
    if is_saved(path):
        return [path]
    files = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
    if is_folder:
        files = _of_split(_files_inside(path), path, source)
    elif files and source.split != "train":
        raise ValueError(f"{source.path}: `split: {source.split}` is for folders and Hub datasets; name its files.")
    if files:
        _refuse_hub_keys(source, is_folder)
    if not files and (is_folder or glob.has_magic(path) or os.path.isabs(path) or suffix_of(path) in FORMATS):
        raise FileNotFoundError(
            f"{source.path}: no such file or folder with {', '.join(FORMATS)} files; correct the path."
        )
    _refuse_names(files)
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(f"{file} is not a regular file; name files, or a folder of them.")
        if suffix_of(file) not in FORMATS:
            raise ValueError(
                f"{file}: the format is unknown; known: {', '.join(FORMATS)}, and text files that end with "
                f"{', '.join(COMPRESSIONS)} too. Convert it, such as a spreadsheet to .csv."
            )
    return files


def _refuse_names(files: Sequence[str]) -> None:
    """Raises ValueError for a name that is not UTF-8, and for a text file that is there compressed as well."""
    found = set(files)
    for file in files:
        if SURROGATE.search(file):
            raise ValueError(f"{file!r}: the name is not UTF-8; rename the file or its folder.")
        plain, ending = os.path.splitext(file)
        if ending.lower() in COMPRESSIONS and plain in found:
            raise ValueError(f"{plain} and {file} would give the same rows twice; name one of them, or move it.")


def _refuse_hub_keys(source: SourceConfig, is_folder: bool) -> None:
    for name in ("revision",) if is_folder else ("name", "revision"):
        if getattr(source, name) is not None:
            raise ValueError(f"{source.path}: `{name}: {getattr(source, name)}` is for Hub datasets; drop it.")


def is_saved(folder: str) -> bool:
    """Returns whether `save_to_disk` wrote a folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def _named_folder(path: str, source: SourceConfig) -> str:
    """Returns the folder of a configuration inside a clone of a Hub dataset: `NAME` or `data/NAME`."""
    for folder in (os.path.join(path, str(source.name)), os.path.join(path, "data", str(source.name))):
        if os.path.isdir(folder):
            return folder
    raise ValueError(
        f"{source.path}: `name: {source.name}` is neither a folder in it nor in its data/; correct or drop it."
    )


def _files_inside(folder: str) -> list[str]:
    """Returns the files of a folder; if it has none, those below it, as a clone of a Hub dataset has them."""
    for pattern in ("*", "**/*"):  # a leading `*` leaves out .git and other hidden folders
        found = glob.glob(os.path.join(glob.escape(folder), pattern), recursive=True)
        data = [file for file in found if suffix_of(file) in FORMATS and os.path.isfile(file)]
        data = [file for file in data if os.path.basename(file) not in DESCRIPTIONS]
        if data:
            return sorted(data)
    return []


def _of_split(files: list[str], folder: str, source: SourceConfig) -> list[str]:
    """Returns the files of a folder that belong to the split; all, if no name of a file or folder contains a split."""
    words = {file: set(re.split(r"[\W_]", os.path.relpath(file, folder).lower())) for file in files}
    if source.split == "train" and not any(words[file] & set().union(*SPLIT_WORDS.values()) for file in files):
        return files
    chosen = [file for file in files if words[file] & SPLIT_WORDS.get(source.split, {source.split})]
    if files and not chosen:
        names = [os.path.relpath(file, folder) for file in files]
        raise ValueError(
            f"{source.path}: no file name contains the split {source.split!r}; found {names}. Correct `split`."
        )
    return chosen
