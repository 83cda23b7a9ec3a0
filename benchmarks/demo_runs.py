"""What benchmarks that train on the demo world have in common: bases, and held-out rows in three languages."""

from pathlib import Path

import torch

from vipolyqwen.demo.rows import BUILDERS, Built, Draft, Split, graded_pair
from vipolyqwen.demo.scenes import LANGUAGES, describe, generator, held_out_scenes
from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.demo.world import make_medium, read_rows, write_rows
from vipolyqwen.demo_vipolyqwen import BASE_SIZES
from vipolyqwen.publishing.repository import save_repository


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
    for medium in (medium for _, media in built for medium in media):
        (corpus / medium.path).parent.mkdir(parents=True, exist_ok=True)
        make_medium(corpus, seed, medium)
    path = corpus / "parallel.jsonl"
    write_rows(path, (row for row, _ in built))
    return path


def caption(draft: Draft) -> Built:
    """image_caption: a drawing; b is its description."""
    media = (draft.medium("drawing"),)
    template = int(draft.rng.integers(3))
    return draft.row("image_caption", "", describe(draft.scene, draft.language, template), media=media), media
