"""Measures retrieval with shortened and coarser vectors: quality against bytes and search time.

    python evaluate_vipolyqwen.py MODEL --dims 1024,512,256 --precision float32,int8,binary [--pairs PAIRS]

Every search of the pairs is embedded once. Candidates are stored as `embed_vipolyqwen.py` stores them, queries stay
float32, as `serving/index.py` searches: bits find candidates by Hamming distance, which are then scored again.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers.utils import is_faiss_available

from ..data.precision import check_dimensions, check_precision, pack, shorten, unpack
from .metrics import query_ranks
from .search import read_pairs, searches
from .templates import ENVIRONMENT

FILE_NAME = "dimensions.json"  # publishing/card.py reads it in a checkpoint's folder
KEPT_BY_BITS = 100  # candidates that bits leave for the second score: ten times a page of ten results
TIMED_ROWS, TIMED_QUERIES, TOP = 20_000, 30, 10
Vectors = tuple[str, np.ndarray, np.ndarray, list[set[int]]]  # task, queries, candidates, relevant


def measure_dimensions(
    embedder: SentenceTransformer, path: Path, dimensions: Sequence[int], precisions: Sequence[str]
) -> dict[str, Any]:
    """Measures every combination.

    Args:
        embedder: any model of sentence-transformers that supports the modalities of the pairs.
        path: a file of pairs, or a recipe with `eval_data` and optionally `nce_min_score`.
        dimensions: numbers of components to keep.
        precisions: formats, see `data/precision.py`.

    Returns:
        Settings, and in `rows` for each combination: bytes of a vector, milliseconds of a search, recall@1 and MRR, as
        means over the tasks, and recall@1 of each task.

    Raises:
        ValueError: the model's vectors cannot be shortened or stored so.
    """
    width = embedder.get_embedding_dimension()
    for kept in dimensions:
        check_dimensions(kept, width)
        for precision in precisions:
            check_precision(precision, kept)
    pairs, min_score = read_pairs(path)
    embedded = [
        (search.task, _unit(search.embed_queries(embedder)), _unit(search.embed_candidates(embedder)), search.relevant)
        for search in searches(pairs, min_score)
    ]
    return {
        "pairs": str(path),
        "tasks": {task: {"queries": len(a), "candidates": len(b)} for task, a, b, _ in embedded},
        "rows": [measure(embedded, kept, precision) for kept in dimensions for precision in precisions],
        "timed_rows": TIMED_ROWS,
        "timed_with": f"faiss {version('faiss-cpu')}, one thread" if is_faiss_available() else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
    }


def _unit(vectors: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors.float(), dim=1).numpy()


def measure(embedded: list[Vectors], dimensions: int, precision: str) -> dict[str, Any]:
    """Returns the row of one combination; the time is `None` without FAISS."""
    recalls, reciprocal = {}, []
    for task, a, b, relevant in embedded:
        queries, stored = shorten(a, dimensions), pack(shorten(b, dimensions), precision)[0]
        similarity = partial(two_step_similarity, kept=KEPT_BY_BITS) if precision == "binary" else None
        candidates = torch.from_numpy(unpack(stored, precision))
        ranks = query_ranks(torch.from_numpy(queries), candidates, relevant, similarity)
        recalls[task] = (ranks <= 1).double().mean().item()
        reciprocal.append((1 / ranks).mean().item())
    vectors, scales = pack(shorten(embedded[0][2], dimensions), precision)
    return {
        "dimensions": dimensions,
        "precision": precision,
        "bytes": vectors[0].nbytes + (0 if scales is None else scales[0].nbytes),
        "milliseconds": search_time(shorten(embedded[0][1], dimensions), vectors, precision),
        "recall@1": statistics.mean(recalls.values()),
        "mrr": statistics.mean(reciprocal),
        "recall@1 by task": recalls,
    }


def two_step_similarity(queries: torch.Tensor, candidates: torch.Tensor, kept: int) -> torch.Tensor:
    """Returns (Q, C) similarities whose order is that of bits with rescoring.

    The `kept` candidates with the nearest bits are ordered by their cosine with the query in float32; all others come
    after them, ordered by their bits.

    Args:
        queries: (Q, D) float32, unit vectors.
        candidates: (C, D) float32, ± 1 / √D.
        kept: candidates that are scored again.
    """
    of_bits = torch.sign(queries) / queries.shape[1] ** 0.5 @ candidates.T
    nearest = of_bits.topk(min(kept, len(candidates)), dim=1).indices
    again = torch.zeros_like(of_bits, dtype=torch.bool).scatter_(1, nearest, True)
    return torch.where(again, queries @ candidates.T, of_bits - 3)  # cosines are at least -1


def search_time(queries: np.ndarray, stored: np.ndarray, precision: str) -> float | None:
    """Returns the median milliseconds that an exact search for ten of `TIMED_ROWS` vectors takes one core.

    Args:
        queries: (Q, D) float32.
        stored: (C, …) packed candidates, repeated up to that number.
        precision: their format.

    Returns:
        The time on one thread with FAISS; `None` without it.
    """
    if not is_faiss_available():
        return None
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        search = _timed_index(np.resize(stored, (TIMED_ROWS, stored.shape[1])), precision, queries.shape[1])
        seconds = []
        for query in np.resize(queries, (TIMED_QUERIES, queries.shape[1])):
            started = time.thread_time()
            search(query[None])
            seconds.append(time.thread_time() - started)
    finally:
        faiss.omp_set_num_threads(threads)
    return 1000 * statistics.median(seconds)


def _timed_index(stored: np.ndarray, precision: str, width: int) -> Callable[[np.ndarray], Any]:
    """Returns a function that searches vectors kept in memory in their format."""
    import faiss

    if precision == "binary":
        bits = faiss.IndexBinaryFlat(width)
        bits.add(stored)

        def search(query: np.ndarray) -> Any:
            _, found = bits.search(np.packbits(query > 0, axis=1), KEPT_BY_BITS)
            return np.sort(unpack(stored[found[0]], "binary") @ query[0])[-TOP:]

        return search
    formats = {"int8": faiss.ScalarQuantizer.QT_8bit_direct_signed, "float16": faiss.ScalarQuantizer.QT_fp16}
    if precision in formats:
        index = faiss.IndexScalarQuantizer(width, formats[precision], faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexFlatIP(width)
    index.add(stored.astype(np.float32))
    return lambda query: index.search(query, TOP)


def write_dimensions(result: dict[str, Any], folder: Path, model: str, command: str) -> str:
    """Writes dimensions.json and dimensions.md into a folder; returns the page.

    Args:
        result: of `measure_dimensions`.
        folder: created if missing.
        model: name of the model; the step of a run's folder is recorded, so that a card shows no older table.
        command: the command line.
    """
    state = Path(model) / "trainer_state.json"
    step = json.loads(state.read_text(encoding="utf-8"))["global_step"] if state.is_file() else None
    result = {"model": model, "step": step, "command": command, **result}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    page = ENVIRONMENT.get_template("dimensions.md.jinja").render(result | {"lines": table_lines(result)})
    (folder / "dimensions.md").write_text(page, encoding="utf-8")
    return page


def table_lines(result: dict[str, Any]) -> list[list[str]]:
    """Returns the cells of the table."""
    return [
        [
            str(row["dimensions"]),
            row["precision"],
            f"{row['bytes']:,}",
            "–" if row["milliseconds"] is None else f"{row['milliseconds']:.2f}",
            *(f"{value:.3f}" for value in (row["recall@1"], row["mrr"], *row["recall@1 by task"].values())),
        ]
        for row in result["rows"]
    ]
