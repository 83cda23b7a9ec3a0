"""Writes the corpus of the demo world, in which all six tasks make sense.

    python -m vipolyqwen.demo.world OUTPUT_FOLDER [--seed 0]

The folder gets train/TASK.jsonl (image_caption: drawings with a description; image_audio: drawings with a recording of
the same scene, without text), eval.jsonl (the six tasks, scenes that no training row knows), trimodal.jsonl (those
scenes as text, drawing and speech) and media/. `scenes` defines the scenes, `phrasebook` the questions about them,
`rows` the rows of each task, `images` the drawings and signs, `speech` the recordings.
"""

import argparse
import io
import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
from tqdm import tqdm

from .images import draw_scene, write_sign
from .rows import BUILDERS, Built, Draft, Medium, Row, Split, graded_pair, image_audio, near_misses
from .scenes import (
    LANGUAGE_CYCLE,
    VOCABULARY,
    Scene,
    describe,
    generator,
    held_out_scenes,
    train_scenes,
)
from .speech import RATE, say_scene

__all__ = ["VOCABULARY", "Scene", "describe", "held_out_scenes", "train_scenes", "write_corpus"]

WORKERS = 2
GRADED_TRAIN_SHARE = 0.25  # of text_pair rows
GRADED_EVAL_ROWS = 160


def write_corpus(folder: Path, seed: int = 0, variations: int = 5) -> None:
    """Writes the corpus; the same arguments always give the same files.

    Args:
        folder: Where to; created if it does not exist.
        seed: Chooses the held-out scenes and everything random.
        variations: Training rows for each scene and task.
    """
    train, held_out = Split("train", train_scenes(seed)), Split("eval", held_out_scenes(seed))
    built = {f"train/{task}": training_rows(task, train, seed, variations) for task in BUILDERS}
    built["train/image_caption"] = [caption_row(row, train, seed) for row, _ in built["train/vqa_single"]]
    built["train/image_audio"] = image_audio_rows(built["train/vqa_single"], built["train/audio"])
    built["eval"] = evaluation_rows(held_out, seed)
    built["trimodal"] = [trimodal_row(draft) for draft in _drafts(held_out, "trimodal", seed)]
    media = [medium for pairs in built.values() for _, files in pairs for medium in files]
    for parent in {(folder / medium.path).parent for medium in media}:
        parent.mkdir(parents=True, exist_ok=True)
    # "spawn": a caller may hold torch's threads, and a forked copy of those can hang
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        made = pool.map(partial(make_medium, folder, seed), media, chunksize=64)
        list(tqdm(made, total=len(media), desc="demo world", unit=" files", mininterval=0.5))
    (folder / "train").mkdir(exist_ok=True)
    for name, pairs in built.items():
        write_rows(folder / f"{name}.jsonl", (row for row, _ in pairs))


def training_rows(task: str, split: Split, seed: int, variations: int) -> list[Built]:
    """Returns `variations` rows of a task for each scene, with media; text_pair gives a share to graded pairs."""
    rows = []
    for draft in _drafts(split, task, seed, variations):
        graded = task == "text_pair" and draft.rng.random() < GRADED_TRAIN_SHARE
        row, media = (graded_pair if graded else BUILDERS[task])(draft)
        if task in ("ocr", "audio"):
            row["negatives"] = near_misses(draft)
        rows.append((row, media))
    return rows


def evaluation_rows(split: Split, seed: int) -> list[Built]:
    """Returns one row of each task for each scene, so that no two answers agree, then graded pairs; with media."""
    rows = [build(draft) for task, build in BUILDERS.items() for draft in _drafts(split, task, seed)]
    return rows + [graded_pair(draft) for draft in _drafts(split, "graded", seed)[:GRADED_EVAL_ROWS]]


def _drafts(split: Split, task: str, seed: int, variations: int = 1) -> list[Draft]:
    """Returns `variations` drafts of each scene, each time in another order, with fixed shares of the languages."""
    drafts = []
    for round_number in range(variations):
        order = generator(seed, f"{split.name}/{task}/{round_number}").permutation(len(split.scenes))
        for scene_number in order:
            number = len(drafts)
            name = f"{split.name}/{task}/{number:05d}"
            language = LANGUAGE_CYCLE[number % len(LANGUAGE_CYCLE)]
            drafts.append(Draft(name, split.scenes[scene_number], language, split, generator(seed, name)))
    return drafts


def trimodal_row(draft: Draft) -> Built:
    """Builds one scene as text, drawing and speech, all in the draft's language."""
    drawing, speech = draft.medium("drawing"), draft.medium("speech")
    row: Row = {
        "id": draft.id,
        "language": draft.language,
        "scene": draft.scene.code,
        "text": describe(draft.scene, draft.language, int(draft.rng.integers(3))),
        "image": drawing.path,
        "audio": speech.path,
    }
    return row, (drawing, speech)


def caption_row(row: Row, split: Split, seed: int) -> Built:
    """The drawing of a vqa_single row with a description in place of the question: a task that the recipe declares."""
    name = f"{row['id']}/caption"
    draft = Draft(name, Scene.from_code(row["scene"]), row["language"], split, generator(seed, name))
    template = int(draft.rng.integers(3))
    kept = {name: row[name] for name in ("id", "language", "scene")}
    described = {"caption": describe(draft.scene, draft.language, template), "negatives": near_misses(draft, template)}
    return {**kept, "image": row["images"][0], **described}, ()


def image_audio_rows(shown: list[Built], said: list[Built]) -> list[Built]:
    """Pairs each drawing with a recording of its scene, each of either once; they need no further files."""
    recordings: dict[str, list[Row]] = {}
    for row, _ in said:
        recordings.setdefault(row["scene"], []).append(row)
    return [(image_audio(row, recordings[row["scene"]].pop()), ()) for row, _ in shown]


def make_medium(folder: Path, seed: int, medium: Medium) -> None:
    """Draws, writes or says one file; its path alone seeds it."""
    rng = generator(seed, medium.path)
    encoded = io.BytesIO()  # one write a file: the encoders' many small ones double the time
    if medium.kind == "speech":
        clip = say_scene(medium.scene, medium.language, rng)
        soundfile.write(encoded, clip, RATE, format="FLAC", subtype="PCM_16")
    elif medium.kind == "drawing":
        draw_scene(medium.scene, rng).save(encoded, "PNG", compress_level=3)
    else:
        write_sign(medium.scene, medium.language, medium.kind, rng).save(encoded, "PNG", compress_level=3)
    (folder / medium.path).write_bytes(encoded.getvalue())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows as a JSONL file."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the demo corpus.")
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--seed", type=int, default=0, help="chooses the held-out scenes and everything random")
    parser.add_argument("--variations", type=int, default=3, help="training rows for each scene and task")
    arguments = parser.parse_args()
    write_corpus(arguments.folder, arguments.seed, arguments.variations)


if __name__ == "__main__":
    main()
