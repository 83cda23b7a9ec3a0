"""An untrained small base for a recipe's data: random weights, a tokenizer trained on the recipe's texts.

    python benchmarks/tiny_base.py RECIPE OUTPUT [--hidden_size 128] [--layers 2] [--vocab_size 8000]

For comparisons on machines without the pretrained backbones. Point the recipe's `model` at OUTPUT.
"""

import argparse
from pathlib import Path

from transformers import set_seed

from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.data.sources import load_pairs
from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.training.arguments import read_recipe


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
    options = vars(parser.parse_args())
    recipe, output = read_recipe(options.pop("recipe")), options.pop("output")
    set_seed(options.pop("seed"))
    tasks = declare_tasks(recipe.get("tasks"))
    pairs = load_pairs(recipe["train_data"], tasks, min_audio_samples=1, check_media=False)
    model, processor = build_tiny_base((text for row in pairs.texts() for text in row), **options)
    save_repository(model, processor, output)
    print(f"{output}: {model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")


if __name__ == "__main__":
    main()
