"""Speed of `encode` against stock sentence-transformers and the bare backbone, with the same weights.

    python benchmarks/encode_speed.py [--models demo mid] [--dtypes float32 bfloat16] [--repeats 3] [--long]

Stock is sentence-transformers' Transformer on the language model alone, mean pooling and normalisation; bare is the
language model on one text after another, without padding. Texts are of random syllables, the numbers of words
log-normal, other ones in each round; a mixture of modalities is compared with this model in one pass of each batch
(`divide=False`). `--long` adds 4,096 texts, which take sentence-transformers' order by length best. The vectors of
both ways are compared. Writes benchmarks/results/encode_speed.json and the table of docs/performance.md.
"""

import argparse
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from result_files import claim, machine, write_result
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from timing import alternate, speedup
from transformers.utils import logging

from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.demo_vipolyqwen import BASE_SIZES
from vipolyqwen.publishing.repository import save_repository

MID_SIZES = {"hidden_size": 640, "layers": 12, "vision_size": 512, "audio_size": 512, "vocab_size": 2048}
MODELS = {"demo": (BASE_SIZES, 512), "mid": (MID_SIZES, 128)}  # sizes, texts of various lengths
BARS = {
    ("mixed_lengths", "stock", "float32"): 1.5,
    ("mixed_lengths", "stock", "bfloat16"): 1.3,
    ("mixed_lengths", "bare", "float32"): 0.9,
    ("modalities", "undivided", "float32"): 1.5,
    ("short", "stock", "float32"): 1.0,
    ("one_by_one", "stock", "float32"): 1.0,
    ("sorted", "stock", "float32"): 1.0,
    ("preprocess", "stock", "float32"): 0.83,  # at most 1.2 times as long
}
BATCH = 32
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
TABLE = re.compile(r"(?<=<!-- encode_speed -->\n).*?(?=<!-- end -->)", re.DOTALL)


def main() -> None:
    """Measures all models and dtypes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="also 4,096 texts")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            write_models(name, Path(folder) / name)
            for dtype in options.dtypes:
                rows += Contest(name, Path(folder) / name, dtype).run(options.repeats, options.long)
    claims = {
        "_".join([row["model"], row["dtype"], row["workload"], "over", row["over"]]): claim(
            row["median"], row["bar"], holds=row["median"] >= row["bar"]
        )
        for row in rows
        if row["bar"] is not None
    }
    write_result("encode_speed", claims, table=rows, repeats=options.repeats)
    PAGE.write_text(TABLE.sub(lambda _: table_of(rows), PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def write_models(name: str, folder: Path) -> None:
    """Writes the repository and the same language model as stock sentence-transformers loads it."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model, processor = build_tiny_base([words(rng, 12) for _ in range(2000)], **MODELS[name][0])
    processor.tokenizer.model_max_length = 2048
    model.vlm.language_model.save_pretrained(folder / "stock")
    processor.tokenizer.save_pretrained(folder / "stock")
    save_repository(model, processor, folder / "model")


def words(rng: np.random.Generator, count: int) -> str:
    """Returns a text of random syllables."""
    onsets, rimes = "b c d g h kh l m nh ph t tr v".split(), "a ăn ang êm i iên o ông ua ưng y".split()
    return " ".join(rng.choice(onsets) + rng.choice(rimes) for _ in range(count))


class Contest:
    """One model in one dtype and what it is compared with."""

    def __init__(self, name: str, folder: Path, dtype: str) -> None:
        self.name, self.dtype = name, dtype
        kwargs = {"dtype": getattr(torch, dtype)}
        self.ours = SentenceTransformer(str(folder / "model"), trust_remote_code=True, model_kwargs=kwargs)
        transformer = Transformer(str(folder / "stock"), model_kwargs=kwargs)
        width = transformer.get_embedding_dimension()
        self.stock = SentenceTransformer(modules=[transformer, Pooling(width, "mean"), Normalize()])

    def run(self, repeats: int, long: bool) -> list[dict[str, Any]]:
        """Returns a row of the table for each workload and each alternative."""
        rng = np.random.default_rng(1)
        rows = []
        for workload, rounds in self.workloads(rng, long, 1 + repeats):
            ways = self.ways(workload)
            seconds = alternate({name: in_turn(way, rounds) for name, way in ways.items()}, repeats)
            error = self.difference(rounds[0]) if workload in ("mixed_lengths", "modalities") else None
            for over in [name for name in seconds if name != "ours"]:
                ratio = speedup(seconds, "ours", over)
                bar = BARS.get((workload, over, self.dtype)) if self.name == "mid" or over == "stock" else None
                row = {"model": self.name, "dtype": self.dtype, "workload": workload, "over": over, "bar": bar}
                rows.append(row | ratio | ({} if error is None else error))
                print(rows[-1], flush=True)
        return rows

    def workloads(self, rng: np.random.Generator, long: bool, rounds: int) -> Iterator[tuple[str, list[list[Any]]]]:
        """Returns name -> inputs of each round; other ones each time, since new lengths may take longer."""

        def mixed(count: int) -> list[str]:
            return [words(rng, int(n)) for n in np.clip(np.exp(rng.normal(4.2, 1.0, count)), 8, 1024)]

        texts = [mixed(MODELS[self.name][1]) for _ in range(rounds)]
        yield "mixed_lengths", texts
        short = [[words(rng, int(n)) for n in rng.integers(3, 12, 256)] for _ in range(rounds)]
        yield "short", short
        yield "one_by_one", [inputs[:32] for inputs in short]
        yield "preprocess", [inputs[:1] * 300 for inputs in short]
        yield "modalities", [mixture(rng, inputs[:64]) for inputs in texts]
        if long and self.name == "demo":
            yield "sorted", [mixed(4096)] * rounds

    def ways(self, workload: str) -> dict[str, Callable[[list[Any]], Any]]:
        """Returns the alternatives of a workload, each a function of its inputs."""
        if workload == "modalities":
            return {"ours": lambda inputs: self.encode(self.ours, inputs), "undivided": self.undivided}
        one_by_one = {
            "preprocess": lambda model, inputs: [model.preprocess([text]) for text in inputs],
            "one_by_one": lambda model, inputs: [self.encode(model, text) for text in inputs],
        }
        run = one_by_one.get(workload, self.encode)
        ways = {name: partial(run, model) for name, model in (("ours", self.ours), ("stock", self.stock))}
        return ways | ({"bare": self.bare} if workload == "mixed_lengths" else {})

    def encode(self, model: SentenceTransformer, inputs: Any) -> torch.Tensor:
        """Encodes as a user does."""
        return model.encode(inputs, batch_size=BATCH, show_progress_bar=False, convert_to_tensor=True)

    def undivided(self, inputs: list[Any]) -> torch.Tensor:
        """Encodes with one pass a batch."""
        with one_pass(self.ours.transformers_model):
            return self.encode(self.ours, inputs)

    @torch.inference_mode()
    def bare(self, texts: list[str]) -> None:
        """Passes one text after another through the language model, without padding or mask."""
        backbone, tokenizer = self.stock[0].model, self.stock.tokenizer
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", truncation=True)["input_ids"].to(backbone.device)
            states = backbone(input_ids=ids, use_cache=False).last_hidden_state
            torch.nn.functional.normalize(states.float().mean(dim=1), dim=-1)

    def difference(self, inputs: list[Any]) -> dict[str, float]:
        """Compares the vectors with those of one pass a batch."""
        divided, joint = self.encode(self.ours, inputs).float(), self.undivided(inputs).float()
        cosines = torch.nn.functional.cosine_similarity(divided, joint)
        return {"largest_difference": float((divided - joint).abs().max()), "least_cosine": float(cosines.min())}


def in_turn(way: Callable[[list[Any]], Any], rounds: list[list[Any]]) -> Callable[[], Any]:
    """Returns a function that passes the inputs of the next round to `way` at each call."""
    following = iter(rounds)
    return lambda: way(next(following))


@contextmanager
def one_pass(model: torch.nn.Module) -> Iterator[None]:
    """Keeps `forward` from dividing batches inside the context."""
    forward = model.forward
    model.forward = lambda **inputs: forward(**inputs, divide=False)
    try:
        yield
    finally:
        model.forward = forward


def mixture(rng: np.random.Generator, texts: list[str]) -> list[Any]:
    """Returns texts, images and clips in random order."""
    images = [{"image": Image.fromarray(rng.integers(0, 256, (112, 112, 3), np.uint8))} for _ in range(16)]
    lengths = rng.integers(4_000, 64_000, 16)
    clips = [
        {"audio": {"array": rng.uniform(-0.5, 0.5, int(n)).astype(np.float32), "sampling_rate": 16_000}}
        for n in lengths
    ]
    items = [*texts, *images, *clips]
    return [items[index] for index in rng.permutation(len(items))]


def table_of(rows: list[dict[str, Any]]) -> str:
    """Returns the table of the page, above 1 where this package is faster."""
    lines = [f"Measured on {machine()}.", "", "| model | dtype | workload | against | times as fast | bar |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        bar = "" if row["bar"] is None else f"{row['bar']} {'✓' if row['median'] >= row['bar'] else '✗'}"
        ratio = f"{row['median']} ({row['lowest']}–{row['highest']})"
        cells = (row["model"], row["dtype"], row["workload"].replace("_", " "), row["over"], ratio, bar)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
