"""A trained model to a repository that others load: weights, code, processor, sentence-transformers files, card.

    python publish_vipolyqwen.py CHECKPOINT (--repo_id ORG/NAME | --out DIR)

CHECKPOINT is a folder that training wrote, or a PEFT adapter's. Nothing of it is copied: the model is loaded and saved
again, so that optimizer states and the like stay behind. What is not whole or does not load is refused.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from vipolyqwen.fingerprint_vipolyqwen import write_fingerprint
from vipolyqwen.publishing.card import TRAINING_FILE, model_card, read_training
from vipolyqwen.publishing.hub import PublishError, upload
from vipolyqwen.publishing.repository import PUBLISHED, check_files, load_adapter, load_whole, refuse_checkpoint
from vipolyqwen.publishing.verify import embed, samples

ROOT = Path(__file__).parent

# The lowest versions that were tried; sentence-transformers checks them before it loads anything.
REQUIREMENTS = {"sentence-transformers": ">=6.0.1", "transformers": ">=5.17"}
READER_PACKAGES = ("torch", "transformers", "sentence-transformers", "soundfile", "scipy", "pillow", "numpy")

MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]
MAX_SHARD_SIZE = "5GB"


def main(argv: list[str] | None = None) -> None:
    """Builds, checks and publishes a repository, or says why not."""
    options = read_options(argv)
    try:
        publish(options)
    except PublishError as error:
        sys.exit(f"Not published: {error}")


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a trained model or of a PEFT adapter")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--repo_id", help="ORG/NAME on the Hub (HF_ENDPOINT, HF_TOKEN)")
    where.add_argument("--out", type=Path, help="a new folder")
    parser.add_argument("--tag", help="name of the published revision; default: the next of v1, v2, …")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--max_shard_size", default=MAX_SHARD_SIZE, help="largest file of weights")
    parser.add_argument(
        "--adapter", metavar="BASE", help="publish a PEFT adapter as it is, for BASE on the Hub; default: merge it"
    )
    return parser.parse_args(argv)


def publish(options: argparse.Namespace) -> None:
    """Builds in a folder of its own; only what passed all checks reaches its place."""
    out = options.out
    if out is not None and out.exists():
        raise PublishError(f"{out} exists; remove it, or name another folder.")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vipolyqwen_", dir=out and out.parent) as scratch:
        folder = Path(scratch) / "repository"
        name = options.repo_id or out.name
        model, processor = build_repository(
            options.checkpoint, folder, name, options.tag, options.adapter, options.max_shard_size
        )
        check_files(folder)
        check_that_it_loads(folder, options.checkpoint, model, processor)
        if out is not None:
            folder.rename(out)
            print(f"The repository: {out}")
        else:
            done = upload(folder, options.repo_id, PUBLISHED, options.tag, options.private)
            print(f"{done.repo_id}, revision {done.tag} (commit {done.commit})")


def build_repository(
    checkpoint: Path,
    folder: Path,
    name: str,
    tag: str | None = None,
    adapter_base: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Writes everything that is published of `checkpoint` to the new folder `folder`; returns what that is.

    Args:
        checkpoint: what training wrote, or an adapter.
        folder: where to.
        name: what the card calls it: `ORG/NAME`, or a folder's name.
        tag: the revision that the card's examples pin.
        adapter_base: the Hub repository whose adapter it is to remain; `None`: weights are whole, adapters merged.
        max_shard_size: largest file of weights.

    Raises:
        PublishError: the checkpoint is not whole.
    """
    refuse_checkpoint(checkpoint)
    is_adapter = (checkpoint / "adapter_config.json").is_file()
    if adapter_base is not None and not is_adapter:
        raise PublishError(f"{checkpoint} has no adapter_config.json, so it is no adapter; drop --adapter.")
    model, processor = load_adapter(checkpoint) if is_adapter else load_whole(checkpoint)
    folder.mkdir(parents=True)
    if adapter_base is None:
        save_repository(model, processor, folder, max_shard_size=max_shard_size)
    else:
        save_adapter(checkpoint, adapter_base, folder)
        save_reading_files(processor, folder, has_audio=model.config.audio_config is not None)
    floors = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    packages = [line for line in floors if line.split(">=")[0] in READER_PACKAGES]
    packages += ["peft"] if adapter_base is not None else []
    (folder / "requirements.txt").write_text("\n".join(packages) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    training = read_training(checkpoint)
    if training:
        _write_json(folder / TRAINING_FILE, training)
    card = model_card(name, model, processor, checkpoint, adapter_base, tag)
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    if adapter_base is None:  # an adapter is checked with its base, which has a fingerprint of its own
        write_fingerprint(folder)
    return model, processor


def save_repository(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: str | PathLike,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Writes a whole repository: `AutoModel`, `AutoProcessor` and `SentenceTransformer` load the folder as it is.

    Args:
        model: the model; its code is copied along.
        processor: its processor, whose task prefixes become the prompts.
        folder: where to; created if it is not there.
        state_dict: weights to write in place of the model's own, as a sharded trainer gathers them.
        max_shard_size: largest file of weights.
    """
    model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
    save_reading_files(processor, Path(folder), has_audio=model.config.audio_config is not None)


def save_reading_files(processor: ProcessorMixin, folder: Path, has_audio: bool) -> None:
    """Writes what turns inputs into tensors: the processor and sentence-transformers' files."""
    processor.save_pretrained(folder)
    for name, content in sentence_transformers_files(processor, has_audio).items():
        _write_json(folder / name, content)


def save_adapter(checkpoint: Path, base: str, folder: Path) -> None:
    """Writes an adapter for the repository `base`; the base is looked up by that name."""
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("modules_to_save"):
        raise PublishError(
            f"The adapter replaces whole modules (modules_to_save: {', '.join(config['modules_to_save'])}), which "
            "transformers 5.17 leaves random, without an error, when it loads an adapter. Publish it merged: drop "
            "--adapter."
        )
    # `auto_mapping` names this package, which readers do not have
    config |= {"base_model_name_or_path": base, "auto_mapping": None, "task_type": "FEATURE_EXTRACTION"}
    _write_json(folder / "adapter_config.json", config)
    shutil.copy(checkpoint / "adapter_model.safetensors", folder)


def sentence_transformers_files(processor: ProcessorMixin, has_audio: bool) -> dict[str, Any]:
    """File name -> content of what makes the stock modules of sentence-transformers load and feed the model."""
    modalities = ["text", "image", *(["audio"] if has_audio else []), "message"]
    route = {"method": "forward", "method_output_name": "embeddings"}
    return {
        "modules.json": MODULES,
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {name: dict(route) for name in modalities}
            | {"message": {**route, "format": "structured"}},
            "module_output_name": "sentence_embedding",
            "unpad_inputs": False,
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "requirements": REQUIREMENTS,
            "prompts": dict(processor.task_prefixes),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }


def check_that_it_loads(folder: Path, checkpoint: Path, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Loads and uses the folder in another process that knows nothing of this package, next to the checkpoint.

    Raises:
        PublishError: it does not load, or its vectors are not those of `model`, or those of a whole checkpoint with
            the code that lies in it.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        expected = Path(elsewhere) / "expected.npy"
        has_audio = model.config.audio_config is not None
        np.save(expected, embed(model, processor, samples(processor, has_audio)))
        command = [sys.executable, "-P", ROOT / "publishing" / "verify.py", folder, expected]
        command += [checkpoint] if (checkpoint / "config.json").is_file() else []  # not an adapter
        environment = {**os.environ, "HF_MODULES_CACHE": elsewhere}  # no code of another repository of this name
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise PublishError(f"a fresh process cannot use what would be published:\n{done.stderr[-4000:]}")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
