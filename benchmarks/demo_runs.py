"""What benchmarks that train on the demo world have in common: bases, and held-out rows in three languages.

    python benchmarks/demo_runs.py [CORPUS]

writes what the studies (recipes/studies/) read beside the demo's corpus: CORPUS/parallel.jsonl, look_alikes.jsonl and
look_alikes_train.jsonl, with their images and audio.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from vipolyqwen.demo.phrasebook import QUESTIONS, READING
from vipolyqwen.demo.rows import BUILDERS, Built, Draft, Split, graded_pair
from vipolyqwen.demo.scenes import LANGUAGES, describe, generator, held_out_scenes, train_scenes, words
from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.demo.world import make_medium, read_rows, write_rows
from vipolyqwen.demo_vipolyqwen import BASE_SIZES
from vipolyqwen.publishing.repository import save_repository

NEUTRAL = {"vi": "Hãy xem hình.", "en": "Look at the image.", "zh": "请看图。"}
PARALLEL_SCENES, LOOK_ALIKE_SCENES = 80, 120


def main() -> None:
    """Writes the rows of the studies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, nargs="?", default=Path("outputs/demo/corpus"))
    corpus: Path = parser.parse_args().corpus
    held_out, train = Split("parallel", held_out_scenes(0)), Split("train", train_scenes(0))
    print(write_parallel(corpus, PARALLEL_SCENES))
    print(write_look_alikes(corpus, "look_alikes", held_out, PARALLEL_SCENES))
    print(write_look_alikes(corpus, "look_alikes_train", train, LOOK_ALIKE_SCENES))


def write_base(corpus: Path, seed: int, folder: Path) -> None:
    """Writes an untrained tiny base for the seed; its tokenizer knows the corpus."""
    rows = (row for path in sorted((corpus / "train").glob("*.jsonl")) for row in read_rows(path))
    texts = [row[side] for row in rows for side in ("a", "b") if row.get(side)]
    torch.manual_seed(seed)
    save_repository(*build_tiny_base(texts, **BASE_SIZES), folder)


def write_parallel(corpus: Path, scenes: int, seed: int = 0) -> Path:
    """Held-out rows of every task and of captions, for the same scenes in each of the three languages.

    Returns:
        The JSONL file; within a task and language every row tells of another scene.
    """
    split = Split("parallel", held_out_scenes(seed))
    if not 0 < scenes <= len(split.scenes):
        raise ValueError(f"{scenes} scenes; there are {len(split.scenes)} held-out ones. Ask for 1 or more of these.")
    chosen = generator(seed, "parallel").permutation(len(split.scenes))[:scenes]
    builders = BUILDERS | {"image_caption": caption, "graded": graded_pair}
    built: list[Built] = []
    for task, build in builders.items():
        for language in LANGUAGES:
            for number, scene in enumerate(chosen):
                name = f"parallel/{task}/{language}-{number:05d}"
                built.append(build(Draft(name, split.scenes[scene], language, split, generator(seed, name))))
    return write_built(corpus, "parallel", built, seed)


def write_look_alikes(corpus: Path, name: str, split: Split, scenes: int, seed: int = 0) -> Path:
    """Rows of `ocr` and `vqa_single` on the same signs and tickets, in each of the three languages.

    Each image has four rows: both tasks with a question of theirs (`asked`: "asked"), and both with one and the same
    question ("unasked"), which only the task's prefix tells apart. `rivals` is the same for the two rows of an image
    that differ in the task alone.

    Returns:
        The JSONL file.
    """
    chosen = generator(seed, name).permutation(len(split.scenes))[:scenes]
    built: list[Built] = []
    for language in LANGUAGES:
        for number, scene in enumerate(chosen):
            place = f"{name}/{language}-{number:05d}"
            built.extend(look_alikes(Draft(place, split.scenes[scene], language, split, generator(seed, place))))
    return write_built(corpus, name, built, seed)


def look_alikes(draft: Draft) -> list[Built]:
    """The four rows of an image."""
    style = draft.pick(("sign", "ticket"))
    media = (draft.medium(style),)
    wordings, answer, _ = QUESTIONS[draft.language][draft.pick(("count", "colour"))]
    written = describe(draft.scene, draft.language)
    told = answer.format_map(words(draft.scene, draft.language))
    reading, asking = draft.pick(READING[draft.language][style]), draft.pick(wordings)
    found = []
    for task, question, b in (("ocr", reading, written), ("vqa_single", asking, told)):
        for asked, a in (("asked", question), ("unasked", NEUTRAL[draft.language])):
            row = replace(draft, id=f"{draft.id}-{task}-{asked}").row(task, a, b, media=media)
            found.append((row | {"asked": asked, "rivals": f"{draft.id}-{asked}"}, media))
    return found


def write_built(corpus: Path, name: str, built: list[Built], seed: int) -> Path:
    """Writes rows to CORPUS/NAME.jsonl, and their images and audio."""
    for medium in {medium.path: medium for _, media in built for medium in media}.values():
        (corpus / medium.path).parent.mkdir(parents=True, exist_ok=True)
        make_medium(corpus, seed, medium)
    path = corpus / f"{name}.jsonl"
    write_rows(path, (row for row, _ in built))
    return path


def caption(draft: Draft) -> Built:
    """image_caption: a drawing; b is its description."""
    media = (draft.medium("drawing"),)
    template = int(draft.rng.integers(3))
    return draft.row("image_caption", "", describe(draft.scene, draft.language, template), media=media), media


if __name__ == "__main__":
    main()
