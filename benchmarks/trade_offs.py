"""One vector a page against many: index size, search time and quality on this package's task of document pages.

    pip install -e '.[search]'
    python benchmarks/trade_offs.py [MODEL] [--pairs PAIRS] [--copies 40]

Pages are the images of the pairs of task `ocr`, queries the texts on them, as in recipes/suites/demo.yaml. One vector:
the embedding, searched by FAISS's exact flat index. Many vectors: the projection of every image patch, and of every
token of the query, compared by MaxSim (late interaction, as in ColPali): each token's best patch, summed over tokens.
`--copies` repeats the pages to time a longer index; quality is measured without copies. Writes
results/trade_offs.json and trade_offs.md.
"""

import argparse
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result_files import RESULTS, claim, write_result
from scipy.stats import binom
from torch import Tensor
from torch.nn import functional

from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.evaluation.chance import search_chance
from vipolyqwen.evaluation.custom_tasks import CustomRetrieval, custom_tasks
from vipolyqwen.evaluation.metrics import best_ranks
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor

BATCH = 16
CUTOFFS = (1, 5)
Embedded = tuple[Tensor, list[Tensor]]  # (rows, D) vectors, and of each row (positions, D) unit vectors


def main() -> None:
    """Embeds, searches, times, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="outputs/demo/model", help="viPolyQwen repository")
    parser.add_argument("--pairs", type=Path, default=Path("outputs/demo/corpus/eval.jsonl"))
    parser.add_argument("--copies", type=int, default=40, help="copies of the pages in the timed indexes")
    options = parser.parse_args()
    torch.set_num_threads(1)  # both searches on one thread
    model = ViPolyQwenModel.from_pretrained(options.model).eval()
    processor = ViPolyQwenProcessor.from_pretrained(options.model, config=model.config)
    figures = measure(model, processor, page_task(options.pairs), options.copies)
    one, many = figures["one_vector"], figures["many_vectors"]
    claims = {
        f"many vectors / one vector, {name}": claim(many[name] / one[name], 1.0, many[name] > one[name])
        for name in ("index_bytes_per_page", "cpu_ms_per_query")
    }
    command = shlex.join(["python", *sys.argv])
    write_result("trade_offs", claims, command=command, **figures)
    (RESULTS / "trade_offs.md").write_text(page(command, figures), encoding="utf-8")


def page_task(pairs: Path) -> CustomRetrieval:
    """The task of document pages: a text finds the image that shows it."""
    entry = {"task": "pages", "name": "Signs", "path": str(pairs), "only": ["ocr"], "query": "b"}
    return custom_tasks(entry, declare_tasks(None))[0]


def measure(
    model: ViPolyQwenModel, processor: ViPolyQwenProcessor, task: CustomRetrieval, copies: int
) -> dict[str, Any]:
    """Quality, index size and search time of both kinds of index, with the chance levels.

    Args:
        model: in evaluation mode.
        processor: its processor.
        task: of document pages.
        copies: of the pages, in the timed indexes.
    """
    queries = embed(model, processor, [[{"type": "text", "text": text}] for text in task.split["queries"]["text"]])
    images = ([{"type": "image", "image": image}] for image in task.split["corpus"]["image"])
    pages = embed(model, processor, images, patches_only=True)
    relevant = torch.zeros(len(queries[0]), len(pages[0]), dtype=torch.bool)
    relevant[tuple(torch.tensor(task.relevant).T)] = True
    gains = [[1.0] * int(count) for count in relevant.sum(dim=1)]
    chance = {f"acc@{k}": search_chance(f"hit_rate_at_{k}", gains, len(pages[0])) for k in CUTOFFS}
    chance["mean_rank"] = search_chance("mean_rank", gains, len(pages[0]))
    chance["acc@1_limit"] = binom.ppf(0.975, len(gains), chance["acc@1"]) / len(gains)
    flat = flat_index(pages[0], copies)
    patches = stack_patches(pages[1]).repeat(copies, 1, 1)
    tokens = [len(of_query) for of_query in queries[1]]
    one = quality(queries[0] @ pages[0].T, relevant)
    one |= costs(pages[0], lambda row: flat.search(queries[0][row : row + 1].numpy(), CUTOFFS[-1]), len(tokens))
    many = quality(torch.stack([max_sim(query, stack_patches(pages[1])) for query in queries[1]]), relevant)
    many |= costs(pages[1], lambda row: max_sim(queries[1][row], patches).topk(CUTOFFS[-1]), len(tokens))
    return {
        "candidates": len(pages[0]),
        "queries": len(tokens),
        "chance": chance,
        "dimension": pages[0].shape[1],
        "patches_per_page": statistics.mean(map(len, pages[1])),
        "tokens_per_query": statistics.mean(tokens),
        "timed_pages": copies * len(pages[0]),
        "one_vector": one,
        "many_vectors": many,
    }


@torch.inference_mode()
def embed(
    model: ViPolyQwenModel,
    processor: ViPolyQwenProcessor,
    inputs: Iterable[list[dict[str, Any]]],
    patches_only: bool = False,
) -> Embedded:
    """The vector of each input, and the unit vector of each of its positions, or of its image patches alone.

    The vector of a position is its projection, as if the pooling had chosen it alone.
    """
    inputs, vectors, positions = list(inputs), [], []
    for start in range(0, len(inputs), BATCH):
        messages = [[{"role": "user", "content": content}] for content in inputs[start : start + BATCH]]
        batch = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", plain_text=True
        )
        output = model(**batch, output_hidden_states=True)
        vectors.append(output.embeddings)
        projected = functional.normalize(model.projection(output.hidden_states[-1]).float(), dim=-1)
        kept = batch["input_ids"] == processor.image_token_id if patches_only else batch["attention_mask"].bool()
        positions += [rows[mask] for rows, mask in zip(projected, kept, strict=True)]
    return torch.cat(vectors), positions


def max_sim(query: Tensor, pages: Tensor) -> Tensor:
    """(pages,) late-interaction scores of (tokens, D) and (pages, patches, D) unit vectors."""
    return torch.einsum("td,npd->tnp", query, pages).amax(dim=2).sum(dim=0)


def stack_patches(pages: list[Tensor]) -> Tensor:
    """(pages, patches, D); a page with fewer patches than the longest repeats its first, which changes no maximum."""
    longest = max(map(len, pages))
    return torch.stack([torch.cat([page, page[:1].expand(longest - len(page), -1)]) for page in pages])


def flat_index(vectors: Tensor, copies: int) -> Any:
    """FAISS's exact index of (pages, D) vectors, each `copies` times."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The flat index needs FAISS; install it with: pip install -e '.[search]'") from error
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.tile(vectors.numpy(), (copies, 1)))
    return index


def quality(similarities: Tensor, relevant: Tensor) -> dict[str, float]:
    """Acc@1, Acc@5 and mean rank of (queries, pages) similarities; ties count against them."""
    ranks = best_ranks(similarities, relevant).double()
    found = {f"acc@{k}": (ranks <= k).double().mean().item() for k in CUTOFFS}
    return found | {"mean_rank": ranks.mean().item()}


def costs(pages: Tensor | list[Tensor], search: Callable[[int], Any], queries: int) -> dict[str, float]:
    """Bytes of float32 a page, and the median milliseconds of CPU time of one query.

    Args:
        pages: their vectors.
        search: finds the best pages of the query of a number.
        queries: how many to time.
    """
    milliseconds = []
    for row in range(queries):
        start = time.process_time()  # of the CPU: other processes do not count
        search(row)
        milliseconds.append(1000 * (time.process_time() - start))
    size = sum(page.numel() for page in pages) * 4 / len(pages)
    return {"index_bytes_per_page": size, "cpu_ms_per_query": statistics.median(milliseconds)}


def page(command: str, figures: dict[str, Any]) -> str:
    """Formats the figures as Markdown."""
    one, many, chance = (figures[name] for name in ("one_vector", "many_vectors", "chance"))
    lines = ["| | Acc@1 | Acc@5 | mean rank | bytes a page | CPU ms a query |", "|---|---|---|---|---|---|"]
    for name, row in (("one vector", one), ("many vectors", many), ("chance", chance)):
        scores = f"{row['acc@1']:.3f} | {row['acc@5']:.3f} | {row['mean_rank']:.1f}"
        costs = f"{row['index_bytes_per_page']:,.0f} | {row['cpu_ms_per_query']:.2f}" if row is not chance else "– | –"
        lines.append(f"| {name} | {scores} | {costs} |")
    at_chance = [
        name for name, row in (("one vector", one), ("many vectors", many)) if row["acc@1"] <= chance["acc@1_limit"]
    ]
    verdict = (
        f"A random order exceeds an Acc@1 of {chance['acc@1_limit']:.4f} in at most one run of forty. Not above that, "
        f"so at the level of chance: {' and '.join(at_chance) or 'neither'}."
    )
    setting = (
        f"`{command}`: {figures['queries']} queries, {figures['candidates']} candidates, "
        f"{figures['patches_per_page']:.0f} patches a page, {figures['tokens_per_query']:.1f} tokens a query, vectors "
        f"of {figures['dimension']} float32. Times: CPU time of one query on one thread, over "
        f"{figures['timed_pages']:,} pages."
    )
    parts = ["# One vector against many", *(textwrap.fill(text, 119) for text in (setting, verdict))]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


if __name__ == "__main__":
    main()
