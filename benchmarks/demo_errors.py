"""Which attribute of a scene does the demo's model get wrong? Errors of the six directions, counted and pictured.

    python benchmarks/demo_errors.py [FOLDER]

FOLDER is the demo's (outputs/demo). A scene is count × colour × thing × size × place, so a wrong first hit names its
cause: the attributes in which it differs from the query. Beside recall@1 by language stand the shares of the errors in
which each attribute differs, and how far they would be by chance: those of two different held-out scenes. Ten errors,
those with the largest lead of the wrong scene in each kind of query, are pictured with the query's nearest neighbours.
Writes results/studies/demo_errors.json, .md and docs/images/demo_errors.png.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from result_files import RESULTS, machine, versions
from sentence_transformers import SentenceTransformer

from vipolyqwen.data.sides import embed
from vipolyqwen.demo.images import FONT_FOLDER
from vipolyqwen.demo.report import scene_sides
from vipolyqwen.demo.scenes import ATTRIBUTES, Scene
from vipolyqwen.demo.world import read_rows

OUT = RESULTS / "studies" / "demo_errors"
PICTURE = Path(__file__).parents[1] / "docs/images/demo_errors.png"
PICTURED, NEIGHBOURS = 10, 3
CELL, TEXT_WIDTH, LINE = 112, 250, 22  # pixels


def main() -> None:
    """Embeds the held-out scenes, counts the errors, writes table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs/demo"))
    folder: Path = parser.parse_args().folder
    corpus = folder / "corpus"
    rows = read_rows(corpus / "trimodal.jsonl")
    embedder = SentenceTransformer(str(folder / "model"), trust_remote_code=True)
    vectors = {name: embed(embedder, sides) for name, sides in scene_sides(rows, corpus).items()}
    scenes = [Scene.from_code(row["scene"]) for row in rows]
    directions = {f"{a}->{b}": errors(vectors[a], vectors[b]) for a, b in permutations(vectors, 2)}
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "scenes": len(rows),
        "directions": {name: summary(found, scenes, rows) for name, found in directions.items()},
        "chance": differing([(a, b) for a, b in permutations(range(len(scenes)), 2)], scenes),
        "machine": machine(),
        "versions": versions(),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    OUT.with_suffix(".md").write_text(report(result), encoding="utf-8")
    picture(worst(directions), vectors, rows, corpus).save(PICTURE, optimize=True)
    print(report(result))


def errors(queries: torch.Tensor, candidates: torch.Tensor) -> list[tuple[int, int, float]]:
    """(query, first hit, lead of its cosine over the right one) of each query whose first hit is wrong."""
    cosines = queries @ candidates.T  # (scenes, scenes)
    hits = cosines.argmax(dim=1)
    leads = cosines.amax(dim=1) - cosines.diagonal()
    return [
        (row, hit, lead)
        for row, (hit, lead) in enumerate(zip(hits.tolist(), leads.tolist(), strict=True))
        if hit != row
    ]


def differing(pairs: Sequence[tuple[int, int]], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of the pairs of scenes that differ in each attribute, and in one attribute alone ("one")."""
    names = [*ATTRIBUTES]
    counts = dict.fromkeys([*names, "one"], 0)
    for a, b in pairs:
        found = [name for name in names if getattr(scenes[a], name) != getattr(scenes[b], name)]
        for name in found:
            counts[name] += 1
        counts["one"] += len(found) == 1
    return {name: count / max(1, len(pairs)) for name, count in counts.items()}


def summary(
    found: Sequence[tuple[int, int, float]], scenes: Sequence[Scene], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """recall@1, of each language too, and the causes of the errors."""
    wrong = {row for row, _, _ in found}
    by_language: dict[str, list[bool]] = {}
    for number, row in enumerate(rows):
        by_language.setdefault(row["language"], []).append(number not in wrong)
    return {
        "recall@1": 1 - len(wrong) / len(rows),
        "by_language": {name: sum(right) / len(right) for name, right in by_language.items()},
        "errors": len(found),
        "differs": differing([(row, hit) for row, hit, _ in found], scenes),
    }


def worst(directions: dict[str, list[tuple[int, int, float]]]) -> list[tuple[str, int]]:
    """Ten errors: those of the largest lead in each direction in turn, no query twice."""
    queues = {name: sorted(found, key=lambda error: -error[2]) for name, found in directions.items()}
    chosen: list[tuple[str, int]] = []
    while len(chosen) < PICTURED and any(queues.values()):
        for name, queue in queues.items():
            if queue and len(chosen) < PICTURED:
                row = queue.pop(0)[0]
                if row not in {known for _, known in chosen}:
                    chosen.append((name, row))
    return chosen


def picture(
    chosen: Sequence[tuple[str, int]],
    vectors: dict[str, torch.Tensor],
    rows: Sequence[dict[str, Any]],
    corpus: Path,
) -> Image.Image:
    """One line an error: the query, then its nearest neighbours with their cosines; the right one is green."""
    face = ImageFont.truetype(str(FONT_FOLDER / "NotoSans-Regular.ttf"), 14)
    chinese = ImageFont.truetype(str(FONT_FOLDER / "NotoSansCJKsc-Regular.otf"), 14)
    width = (NEIGHBOURS + 1) * (CELL + 8 + TEXT_WIDTH)
    sheet = Image.new("RGB", (width, len(chosen) * (CELL + 12)), "white")
    brush = ImageDraw.Draw(sheet)
    for line, (direction, query) in enumerate(chosen):
        asked, found = direction.split("->")
        cosines = vectors[found] @ vectors[asked][query]
        hits = cosines.topk(NEIGHBOURS)
        cells = [(asked, query, direction, "black")]
        for cosine, hit in zip(hits.values.tolist(), hits.indices.tolist(), strict=True):
            cells.append((found, hit, f"{cosine:.3f}", "green" if hit == query else "firebrick"))
        for column, (modality, row, title, colour) in enumerate(cells):
            left, top = column * (CELL + 8 + TEXT_WIDTH), line * (CELL + 12) + 6
            if modality == "image":
                sheet.paste(Image.open(corpus / rows[row]["image"]).convert("RGB"), (left, top))
            else:
                brush.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline="silver")
                brush.text((left + 10, top + CELL // 2 - 8), modality, fill="gray", font=face)
            brush.text((left + CELL + 6, top), title, fill=colour, font=face)
            font = chinese if rows[row]["language"] == "zh" else face
            for number, part in enumerate(wrapped(rows[row]["text"], font)):
                brush.text((left + CELL + 6, top + (number + 1) * LINE), part, fill=colour, font=font)
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Breaks a text into lines that fit beside an image."""
    words = text.split(" ") if " " in text else list(text)
    joint = " " if " " in text else ""
    lines = [""]
    for word in words:
        longer = f"{lines[-1]}{joint if lines[-1] else ''}{word}"
        if font.getlength(longer) <= TEXT_WIDTH - 12 or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def report(result: dict[str, Any]) -> str:
    """The tables of recall by language and of the causes of errors."""
    names = [*ATTRIBUTES, "one"]
    languages = [*next(iter(result["directions"].values()))["by_language"]]
    header = ["direction", "recall@1", *languages, "errors", *ATTRIBUTES, "one attribute alone"]
    lines = [
        "# Errors of the demo's model",
        "",
        f"First hits among {result['scenes']} held-out scenes; by language of text and speech; the share of",
        "the errors whose first hit differs from the query in each attribute, and of those that differ in one alone.",
        f"`{result['command']}`, {result['machine']}.",
        "",
        *(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header))),
    ]
    for direction, found in result["directions"].items():
        recalls = [found["recall@1"], *(found["by_language"][name] for name in languages)]
        cells = [*(f"{value:.3f}" for value in recalls), str(found["errors"])]
        shares = [f"{found['differs'][name]:.2f}" for name in names]
        lines.append(f"| {' | '.join([direction, *cells, *shares])} |")
    chance = [f"{result['chance'][name]:.2f}" for name in names]
    lines.append(f"| {' | '.join(['two scenes at random', *[''] * (len(languages) + 2), *chance])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
