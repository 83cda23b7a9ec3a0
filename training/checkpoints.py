"""Atomic checkpoints, also under a kill or a power cut, with a manifest that reveals damage.

A checkpoint is written to a temporary folder, flushed to disk and then renamed. The last file is a manifest with size
and SHA-256 of all others.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..data.atomic import UNFINISHED, flush_file, flush_folder

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
SUPERSEDED = "_superseded"  # in the output folder: checkpoints of a course that the run has left


class DamagedCheckpointError(ValueError):
    """A checkpoint differs from its manifest, or has none."""


def publish_checkpoint(written: Path, final: Path) -> None:
    """Adds the manifest to a checkpoint, flushes it to disk and renames it, atomically.

    Args:
        written: complete checkpoint, on the same file system as `final`.
        final: folder to move it to; an existing checkpoint is replaced.
    """
    files = sorted(path for path in written.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_flush_and_digest, files))
    entries = {
        path.relative_to(written).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    manifest = written / MANIFEST
    entries[MANIFEST] = _entry_of(entries)
    manifest.write_text(_as_text(entries), encoding="utf-8")
    _flush_and_digest(manifest)
    for folder in (written, *(path for path in written.rglob("*") if path.is_dir())):
        flush_folder(folder)
    delete_checkpoint(final)
    written.rename(final)
    flush_folder(final.parent)


def check_checkpoint(folder: Path) -> None:
    """Compares every file of a checkpoint with its manifest.

    Raises:
        DamagedCheckpointError: a file is missing or differs; lists such files.
        FileNotFoundError: the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"The checkpoint {folder} does not exist; name a folder `checkpoint-STEP` of a run.")
    faults = find_faults(folder)
    if faults:
        raise DamagedCheckpointError(
            f"The checkpoint {folder} is damaged: {'; '.join(faults)}. Resume from another one, or from the newest "
            "intact one with `--resume_from_checkpoint true`."
        )


def find_faults(folder: Path) -> list[str]:
    """Lists the faults of a checkpoint; empty if it is intact. Contents are read only if names and sizes are right."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        entries = json.loads(text)
    except FileNotFoundError:
        return [f"{MANIFEST} is missing, so writing it was interrupted"]
    except ValueError as error:
        return [f"{MANIFEST} is not valid JSON ({error})"]
    if not _is_intact(entries, text):
        return [f"the content of {MANIFEST} has changed"]
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


def _as_text(entries: dict[str, Any]) -> str:
    return json.dumps(entries, indent=2) + "\n"


def _entry_of(entries: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest's entry for itself: size and digest of the text of all other entries."""
    text = _as_text(entries).encode()
    return {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}


def _is_intact(entries: Any, text: str) -> bool:
    """Returns whether a manifest is as it was written, byte by byte; removes its entry for itself from `entries`."""
    if not isinstance(entries, dict) or _as_text(entries) != text:
        return False
    itself = entries.pop(MANIFEST, None)  # earlier versions wrote none
    if itself is not None and itself != _entry_of(entries):
        return False
    return all(isinstance(entry, dict) and entry.keys() == {"size", "sha256"} for entry in entries.values())


def newest_intact_checkpoint(output_dir: Path) -> Path | None:
    """Returns the newest intact checkpoint, or `None` if there are no checkpoints; warns of damaged ones.

    Raises:
        DamagedCheckpointError: all checkpoints are damaged.
    """
    checkpoints = list_checkpoints(output_dir)[::-1]
    for folder in checkpoints:
        faults = find_faults(folder)
        if not faults:
            return folder
        logger.warning(f"Skipping the damaged checkpoint {folder}: {'; '.join(faults)}.")
    if checkpoints:
        raise DamagedCheckpointError(
            f"All checkpoints in {output_dir} are damaged: {', '.join(path.name for path in checkpoints)}. Restore "
            "one, or start a new run in another folder or without `--resume_from_checkpoint`."
        )
    return None


def delete_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint, if it exists, atomically: it is renamed first."""
    if not folder.exists():
        return
    doomed = folder.parent / UNFINISHED / f"deleted-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    doomed.parent.mkdir(exist_ok=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def delete_old_checkpoints(output_dir: Path, limit: int | None, keep: set[Path], steps: Iterable[int] = ()) -> None:
    """Deletes the checkpoints of the lowest steps beyond a limit.

    Args:
        output_dir: folder of the run.
        limit: number of checkpoints to keep, besides those of `steps`; `None` or 0: all.
        keep: checkpoints to keep in any case; they count towards the limit.
        steps: of each, the first checkpoint written at or after it is kept and does not count.
    """
    if limit is None or limit <= 0:
        return
    by_step = {step_of(folder): folder for folder in list_checkpoints(output_dir)}
    strategic = {min((step for step in by_step if step >= wanted), default=-1) for wanted in steps}
    checkpoints = [folder for step, folder in by_step.items() if step not in strategic]
    surplus = len(checkpoints) - limit
    kept = {folder.resolve() for folder in keep}  # a folder has several spellings
    for folder in [folder for folder in checkpoints if folder.resolve() not in kept][: max(surplus, 0)]:
        delete_checkpoint(folder)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the folders `checkpoint-STEP` of a run by ascending step; the times of the files do not matter."""
    folders = output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    named = [folder for folder in folders if folder.name.rpartition("-")[2].isdecimal() and folder.is_dir()]
    return sorted((folder for folder in named if folder.name.count("-") == 1), key=step_of)


def set_aside_later(checkpoint: Path) -> list[Path]:
    """Moves the checkpoints after one into `_superseded`: a run that resumes there with other settings goes elsewhere.

    Returns:
        the new places.
    """
    later = [each for each in list_checkpoints(checkpoint.parent) if step_of(each) > step_of(checkpoint)]
    moved = []
    for folder in later:
        place = folder.parent / SUPERSEDED / folder.name
        while place.exists():
            place = place.with_name(f"{place.name}+")
        place.parent.mkdir(exist_ok=True)
        moved.append(folder.rename(place))
    return moved


def step_of(checkpoint: Path) -> int:
    """Returns the step in the name of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def delete_unfinished(output_dir: Path) -> None:
    """Deletes what a killed run was writing or deleting."""
    leftovers = output_dir / UNFINISHED
    if leftovers.exists():
        shutil.rmtree(leftovers)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_and_digest(path: Path) -> str:
    flush_file(path)
    return _digest(path)
