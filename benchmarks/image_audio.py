"""Whether pairs of an image and audio, without text, help to find audio by image: against text as the only link.

    python benchmarks/image_audio.py [--steps 400] [--pair_steps 150] [--seeds 1] [--output_dir DIR]

Trains the demo's model for each seed on texts and then on all of the demo's pairs but those of `image_audio`, so that
text is the only link between images and audio. Trains that model further three times, for the same number of steps of
equal batches on InfoNCE: on pairs of `image_audio` alone ("direct"), on the former pairs ("hub") and on both ("all").
Measures recall@1 in the six directions between text, image and audio of held-out scenes, and writes
results/image_audio.json. Stages are kept in DIR, so that the same command resumes an interrupted study.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from demo_runs import write_base
from result_files import claim, write_result
from sentence_transformers import SentenceTransformer

from vipolyqwen.data.sides import embed
from vipolyqwen.demo.report import scene_sides
from vipolyqwen.demo.world import read_rows, write_corpus
from vipolyqwen.demo_vipolyqwen import TEXT_ONLY, TEXT_WEIGHTS, WARM_UP
from vipolyqwen.evaluation.metrics import six_directions

ROOT = Path(__file__).parent.parent
TASK = "image_audio"
DIRECT = ("image->audio", "audio->image")
ARMS: dict[str, Callable[[str], bool]] = {  # name -> whether the pairs of a task are trained on
    "direct": lambda task: task == TASK,
    "all": lambda task: True,
    "hub": lambda task: task != TASK,
}


def main() -> None:
    """Trains what is missing, measures, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=400, help="with text as the only link, after the warm-up on texts"
    )
    parser.add_argument("--pair_steps", type=int, default=150, help="of each choice of pairs after that")
    parser.add_argument("--text_steps", type=int, default=300, help="of the warm-up on texts")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/image_audio"))
    options = parser.parse_args()
    corpus: Path = options.output_dir / "corpus"
    if not (corpus / "trimodal.jsonl").is_file():
        write_corpus(corpus)
    recall = {arm: [] for arm in ARMS}
    seconds = {arm: [] for arm in ARMS}
    before = []
    for seed in range(options.seeds):
        folder = options.output_dir / f"seed{seed}-{options.text_steps}-{options.steps}-{options.pair_steps}"
        warm_up(corpus, folder, seed, options.text_steps)
        linked = recipe(corpus, folder, "linked", ARMS["hub"])
        train(linked, folder / "linked", seed, options.steps, ["--model", str(folder / "text")])
        before.append(measure(corpus, folder / "linked"))
        for arm in ARMS:
            seconds[arm].append(train_arm(corpus, folder, arm, seed, options.pair_steps))
            recall[arm].append(measure(corpus, folder / arm))
    means = {arm: [mean([run[name] for name in DIRECT]) for run in runs] for arm, runs in recall.items()}
    gains = [direct - hub for direct, hub in zip(means["direct"], means["hub"], strict=True)]
    write_result(
        TASK,
        {"gain in recall@1 of image->audio and audio->image, in the worst seed": claim(min(gains), 0, min(gains) > 0)},
        command=shlex.join(["python", *sys.argv]),
        steps={"text": options.text_steps, "linked by text": options.steps, "of each choice": options.pair_steps},
        scenes=len(read_rows(corpus / "trimodal.jsonl")),
        recall_at_1_before=before,
        recall_at_1=recall,
        training_seconds=seconds,
    )


def warm_up(corpus: Path, folder: Path, seed: int, steps: int) -> None:
    """Writes the base of a seed, and trains it on texts alone."""
    if not (folder / "base/model.safetensors").is_file():
        write_base(corpus, seed, folder / "base")
    texts = [{"path": str(corpus / f"train/{name}.jsonl"), "weight": weight} for name, weight in TEXT_WEIGHTS.items()]
    flags = [*TEXT_ONLY, "--train_data", json.dumps(texts), "--model", str(folder / "base")]
    train(recipe(corpus, folder, "text", ARMS["all"]), folder / "text", seed, steps, flags)


def train_arm(corpus: Path, folder: Path, arm: str, seed: int, steps: int) -> float:
    """Trains further on one choice of pairs; returns the seconds of training."""
    path = recipe(corpus, folder, arm, ARMS[arm])
    train(path, folder / arm, seed, steps, ["--model", str(folder / "linked")])
    log = json.loads((folder / arm / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return log[-1]["train_runtime"]


def recipe(corpus: Path, folder: Path, name: str, chosen: Callable[[str], bool]) -> Path:
    """Writes the demo's recipe for this corpus, with the training pairs of the chosen tasks."""
    text = (ROOT / "recipes/demo.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text.replace("outputs/demo/corpus", corpus.as_posix()))
    values["train_data"] = [source for source in values["train_data"] if chosen(Path(source["path"]).stem)]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / f"{name}.yaml"


def train(path: Path, output: Path, seed: int, steps: int, flags: list[str]) -> None:
    """Trains on InfoNCE alone as the demo's warm-ups do, unless that was done before."""
    if not (output / "model.safetensors").is_file():
        command = [sys.executable, ROOT / "train_vipolyqwen.py", path, *WARM_UP, *flags]
        command += ["--max_steps", str(steps), "--seed", str(seed), "--output_dir", output, "--overwrite_output_dir"]
        started = time.perf_counter()
        subprocess.run([*command, "--disable_tqdm", "true"], check=True)
        print(f"{output}: {time.perf_counter() - started:.0f} s", flush=True)


def measure(corpus: Path, model: Path) -> dict[str, Any]:
    """Returns recall@1 in each direction, without prompts."""
    embedder = SentenceTransformer(str(model), trust_remote_code=True, device="cpu")
    sides = scene_sides(read_rows(corpus / "trimodal.jsonl"), corpus)
    found = six_directions({name: embed(embedder, scenes) for name, scenes in sides.items()})
    return {name: values["recall@1"] for name, values in found.items()}


def mean(values: list[float]) -> float:
    """Returns the arithmetic mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
