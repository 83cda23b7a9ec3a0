"""Searches embedded rows with a text, an image, audio or a mix of them.

    python -m vipolyqwen.serving.search MODEL DIR "bốn bông hoa đỏ" [--top 5]
    python -m vipolyqwen.serving.search MODEL DIR --image photo.jpg [--audio question.wav]

DIR is what embed_vipolyqwen.py wrote, with an index from `python -m vipolyqwen.serving.index DIR`. MODEL must be the
one that embedded DIR. Prints cosine and id of the nearest rows.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from ..data.command_line import run_command
from .embedding import PLAIN_TEXT, embed
from .index import VectorIndex, read_index
from .loading import LoadedModel, load_model


def search(
    model: LoadedModel, index: VectorIndex, queries: list[Any], k: int = 10, prompt_name: str | None = None
) -> tuple[np.ndarray, list[list[str]]]:
    """Embeds queries and finds the nearest rows.

    Args:
        model: the model that embedded the rows.
        index: the rows.
        queries: inputs as `encode` takes them; a string is a text.
        k: rows for each query.
        prompt_name: prompt of the queries, such as a task's name.

    Returns:
        Cosines, (queries, k) float32 in descending order, and the ids.

    Raises:
        ValueError: a query cannot be embedded.
    """
    found = embed(
        model.encoder,
        queries,
        prompt_name=prompt_name,
        dimensions=index.settings["dimensions"],
        processing_kwargs=PLAIN_TEXT,
    )
    return index.search(found.vectors, k)


def read_query(text: str | None, image: Path | None, audio: Path | None) -> list[dict[str, Any]]:
    """Returns a conversation of one message with what is given of text, image and audio.

    Raises:
        ValueError: nothing is given.
        OSError: a file cannot be read.
    """
    content: list[dict[str, Any]] = []
    if image is not None:
        content.append({"type": "image", "image": image.read_bytes()})
    if text is not None:
        content.append({"type": "text", "text": text})
    if audio is not None:
        content.append({"type": "audio", "audio": audio.read_bytes()})
    if not content:
        raise ValueError("The query is empty; give a text, --image FILE or --audio FILE.")
    return [{"role": "user", "content": content}]


def main(argv: list[str] | None = None) -> int:
    """Prints the nearest rows; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vipolyqwen.serving.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("folder", type=Path, help="folder that embed_vipolyqwen.py wrote")
    parser.add_argument("text", nargs="?", help="text of the query")
    parser.add_argument("--image", type=Path, help="image file of the query")
    parser.add_argument("--audio", type=Path, help="audio file of the query")
    parser.add_argument("--top", type=int, default=10, help="rows to print; default: 10")
    parser.add_argument("--prompt_name", help="prompt of the query; default: the general embedding")
    parser.add_argument("--device", help="such as cuda or cpu")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run a model's code from the Hub")
    options = parser.parse_args(argv)
    query = read_query(options.text, options.image, options.audio)
    model = load_model(
        options.model, options.device, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    index = read_index(options.folder, model.fingerprint)
    scores, ids = search(model, index, [query], options.top, options.prompt_name)
    for score, row_id in zip(scores[0], ids[0], strict=False):
        print(f"{score:.4f}  {row_id}")
    return 0


if __name__ == "__main__":
    run_command(main)
