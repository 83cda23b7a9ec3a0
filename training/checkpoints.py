"""Checkpoints that are there whole or not at all, also after a kill or a power cut, and that show damage.

A checkpoint is written in a folder of its own, flushed to the disk and then renamed. The last file written is a
manifest of all others; what differs from it is damaged.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
# In the output folder: checkpoints that are being written, or deleted. The stock upload leaves out what begins with _.
UNFINISHED = "_unfinished"


class DamagedCheckpointError(ValueError):
    """A checkpoint is not as it was written."""


def publish_checkpoint(written: Path, final: Path) -> None:
    """Gives a checkpoint that was written whole its place and name; a kill at any moment leaves it there or not.

    Args:
        written: a folder on the same disk.
        final: where to; a checkpoint that is there already is replaced.
    """
    files = sorted(path for path in written.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_flush_and_digest, files))
    entries = {
        path.relative_to(written).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    manifest = written / MANIFEST
    manifest.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    _flush_and_digest(manifest)
    for folder in (written, *(path for path in written.rglob("*") if path.is_dir())):
        _flush_folder(folder)
    delete_checkpoint(final)
    written.rename(final)
    _flush_folder(final.parent)


def check_checkpoint(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        DamagedCheckpointError: something is missing or different; says what, and what to do.
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {folder}; name a folder `checkpoint-STEP` of a run.")
    faults = find_faults(folder)
    if faults:
        raise DamagedCheckpointError(
            f"The checkpoint {folder} is damaged: {'; '.join(faults)}. Resume from another one, or from the newest "
            "that is whole with `--resume_from_checkpoint true`."
        )


def find_faults(folder: Path) -> list[str]:
    """What is wrong with a checkpoint; empty if it is whole. Files are read only if all are there in full."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"{MANIFEST} is missing, so it was not written to its end"]
    except ValueError as error:
        return [f"{MANIFEST} is no JSON ({error})"]
    faults = []
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            faults.append(f"{name} has {path.stat().st_size:,} bytes of {entry['size']:,}")
    if faults:
        return faults
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, [folder / name for name in entries])
        return [
            f"the content of {name} has changed"
            for (name, entry), digest in zip(entries.items(), digests, strict=True)
            if digest != entry["sha256"]
        ]


def newest_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named in a warning. `None` if there is none at all.

    Raises:
        DamagedCheckpointError: there are some, and all are damaged.
    """
    checkpoints = [Path(path) for path in reversed(sort_checkpoints(str(output_dir)))]
    for folder in checkpoints:
        faults = find_faults(folder)
        if not faults:
            return folder
        logger.warning(f"The checkpoint {folder} is damaged and left out: {'; '.join(faults)}.")
    if checkpoints:
        raise DamagedCheckpointError(
            f"All checkpoints in {output_dir} are damaged: {', '.join(path.name for path in checkpoints)}. Restore "
            "one, or start anew in another folder or without `--resume_from_checkpoint`."
        )
    return None


def delete_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint, if it is there, so that a kill leaves no part of it under its name."""
    if not folder.exists():
        return
    doomed = folder.parent / UNFINISHED / f"deleted-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    doomed.parent.mkdir(exist_ok=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def delete_old_checkpoints(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Deletes the oldest checkpoints until `limit` are left, none of `keep` among them."""
    if limit is None or limit <= 0:
        return
    checkpoints = [Path(path) for path in sort_checkpoints(str(output_dir), use_mtime=True)]
    surplus = len(checkpoints) - limit
    for folder in [folder for folder in checkpoints if folder not in keep][: max(surplus, 0)]:
        delete_checkpoint(folder)


def delete_unfinished(output_dir: Path) -> None:
    """Deletes what a killed run has left."""
    leftovers = output_dir / UNFINISHED
    if leftovers.exists():
        shutil.rmtree(leftovers)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_and_digest(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
