"""Runs every part of the system on a tiny corpus: base, training, repository, search, report (`make demo`).

    python demo_vipolyqwen.py [--output_dir outputs/demo] [--recipe recipes/demo.yaml] [--seed 0]

`train_vipolyqwen.py` trains the model, `publish_vipolyqwen.py` checks and writes the repository, and a further process
judges it: it loads the repository through `AutoModel` and `SentenceTransformer`, as a user would.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vipolyqwen import __version__

ROOT = Path(__file__).parent
# Warm-ups in place of pretrained backbones: InfoNCE alone, first on text, then on all tasks.
WARM_UP = ["--loss_table", "nce", "--learning_rate", "1e-3", "--warmup_steps", "30"]
WARM_UP += ["--eval_data", "null", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
WARM_UP += ["--save_strategy", "no"]
TEXT_ONLY = ["--max_steps", "320", "--per_device_train_batch_size", "192"]
TEXT_ONLY += ["--lr_scheduler_type", "constant_with_warmup"]
TEXT_WEIGHTS = {"text_pair": 3.0, "instr": 1.0}
ALL_TASKS = ["--max_steps", "620"]
BASE_SIZES = {"hidden_size": 128, "layers": 2, "vision_size": 128, "audio_size": 128, "vocab_size": 2048}
BASE_SIZES["convolutions"] = ((128, 64), (8, 5), (4, 2))  # 40 ms a frame: a third of the work on speech
BASE_SIZES["filter_bank"] = True


def main() -> None:
    """Runs the steps and prints the results and their place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"vipolyqwen {__version__}")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "demo.yaml")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of rows; the corpus stays the same")
    options = parser.parse_args()
    from vipolyqwen.demo.report import STAGES  # after the arguments: `--help` loads no library
    from vipolyqwen.demo.world import write_corpus

    started = time.perf_counter()
    folder = options.output_dir
    write_corpus(folder / "corpus")
    build_base(folder / "corpus", folder / "base", options.seed)
    train(options.recipe, folder, options.seed)
    publish(folder / STAGES[-1], folder / "model")
    judge(folder)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for group in ("directions", "tasks"):
        for name, values in metrics[group].items():
            chance = f"chance {values['chance']:.3f}, {values['candidates']} candidates"
            print(f"{name:15} recall@1 {values['recall@1']:.3f}  recall@10 {values['recall@10']:.3f}  ({chance})")
    print(f"{time.perf_counter() - started:.0f} s. The model: {folder / 'model'}. Open {folder / 'report.html'}.")


def build_base(corpus: Path, folder: Path, seed: int) -> None:
    """Writes an untrained tiny trimodal model whose tokenizer is trained on the corpus."""
    from transformers import set_seed

    from vipolyqwen.demo.tiny_base import build_tiny_base
    from vipolyqwen.publishing.repository import save_repository

    set_seed(seed)
    rows = [json.loads(line) for path in sorted(corpus.glob("train/*.jsonl")) for line in path.open(encoding="utf-8")]
    texts = (row[name] for row in rows for name in ("a", "b", "caption") if row.get(name))
    model, processor = build_tiny_base(texts, **BASE_SIZES)
    save_repository(model, processor, folder)


def train(recipe: Path, folder: Path, seed: int) -> None:
    """Runs the recipe, with its paths moved to `folder`, after two warm-ups on InfoNCE alone.

    The hardest-negative triplet of the mixed losses pulls a model that starts from random weights together before it
    can tell anything apart, and images and audio are learned several times faster once texts that say the same in
    three languages lie together. A pretrained backbone needs neither.
    """
    from vipolyqwen.demo.report import STAGES

    text = recipe.read_text(encoding="utf-8").replace("outputs/demo", folder.as_posix())
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, ROOT / "train_vipolyqwen.py", folder / "recipe.yaml"]
    # threads soon give way while they wait for others, or a second busy process would slow every step several times
    environment = {"GOMP_SPINCOUNT": "5000", **os.environ}
    text = [{"path": str(folder / f"corpus/train/{name}.jsonl"), "weight": w} for name, w in TEXT_WEIGHTS.items()]
    stages = [
        [*WARM_UP, *TEXT_ONLY, "--train_data", json.dumps(text), "--model", folder / "base"],
        [*WARM_UP, *ALL_TASKS, "--model", folder / "text"],
        [],
    ]
    for stage, name in zip(stages, STAGES, strict=True):
        output = ["--output_dir", folder / name, "--overwrite_output_dir"]  # an earlier demo
        subprocess.run([*command, *stage, *output, "--seed", str(seed)], check=True, env=environment)


def publish(run: Path, folder: Path) -> None:
    """Writes the trained model as a repository with card and fingerprint, without the training state."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo
    subprocess.run([sys.executable, ROOT / "publish_vipolyqwen.py", run, "--out", folder], check=True)


def judge(folder: Path) -> None:
    """Measures the repository in a fresh process in another folder, so that only the saved files count."""
    command = [sys.executable, "-m", "vipolyqwen.demo.report", folder.resolve()]
    with tempfile.TemporaryDirectory() as elsewhere:
        subprocess.run(command, check=True, cwd=elsewhere)


if __name__ == "__main__":
    main()
