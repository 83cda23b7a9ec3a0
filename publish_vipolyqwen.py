"""Publishes a trained model as a repository: weights, code, processor, sentence-transformers files, card.

    python publish_vipolyqwen.py CHECKPOINT (--repo_id ORG/NAME | --out DIR) [--space DIR]

CHECKPOINT is the output folder of a run, or of a PEFT adapter. The model is loaded and saved again, so that optimizer
states and the like stay behind. A checkpoint that is incomplete or that a fresh process cannot use is refused.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vipolyqwen import __version__
from vipolyqwen.data.command_line import run_command

if TYPE_CHECKING:
    from vipolyqwen.fingerprint_vipolyqwen import Measured

ROOT = Path(__file__).parent
READER_PACKAGES = ("torch", "transformers", "sentence-transformers", "soundfile", "scipy", "pillow", "numpy")


def main(argv: list[str] | None = None) -> None:
    """Builds, checks and publishes a repository; exits with the reason if a check refuses it."""
    options = read_options(argv)
    from vipolyqwen.publishing.repository import PublishError  # after the arguments: `--help` loads no library

    try:
        publish(options)
    except PublishError as error:
        sys.exit(f"Not published: {error}")


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"vipolyqwen {__version__}")
    parser.add_argument("checkpoint", type=Path, help="folder of a trained model, or of a PEFT adapter")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--repo_id", help="ORG/NAME on the Hub (HF_ENDPOINT, HF_TOKEN)")
    where.add_argument("--out", type=Path, help="a new folder")
    parser.add_argument("--tag", help="name of the published revision; default: the next of v1, v2, …")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file of weights; default: 5GB")
    parser.add_argument(
        "--adapter", metavar="BASE", help="publish a PEFT adapter as it is, for BASE on the Hub; default: merge it"
    )
    parser.add_argument(
        "--space", type=Path, metavar="DIR", help="also write the folder of a Space with a page to try it"
    )
    return parser.parse_args(argv)


def publish(options: argparse.Namespace) -> None:
    """Builds in a temporary folder, which is moved or uploaded only after all checks have passed."""
    from vipolyqwen.publishing.checks import PUBLISHED, check_files, check_that_it_loads
    from vipolyqwen.publishing.hub import upload
    from vipolyqwen.publishing.repository import PublishError
    from vipolyqwen.publishing.space import write_space

    out = options.out
    for folder in (out, options.space):
        if folder is not None and folder.exists():
            raise PublishError(f"{folder} exists; remove it, or name another folder.")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vipolyqwen_", dir=out and out.parent) as scratch:
        folder = Path(scratch) / "repository"
        name = options.repo_id or out.name
        expected = build_repository(
            options.checkpoint, folder, name, options.tag, options.adapter, options.max_shard_size
        )
        check_files(folder)
        check_that_it_loads(folder, options.checkpoint, expected)
        if out is not None:
            folder.rename(out)
            print(f"The repository: {out}")
            if options.space is not None:
                write_space(options.space, out.name, repository=out)
        else:
            done = upload(folder, options.repo_id, PUBLISHED, options.tag, options.private)
            print(f"{done.repo_id}, revision {done.tag} (commit {done.commit})")
            if options.space is not None:
                write_space(options.space, done.repo_id, done.tag)
    if options.space is not None:
        print(f"The Space: {options.space}; upload it with `hf upload ORG/NAME {options.space} --repo-type space`")


def build_repository(
    checkpoint: Path,
    folder: Path,
    name: str,
    tag: str | None = None,
    adapter_base: str | None = None,
    max_shard_size: str = "5GB",
) -> "Measured":
    """Writes everything that is published of `checkpoint` to the new folder `folder`; returns its fingerprint.

    Args:
        checkpoint: the output folder of a run, or an adapter.
        folder: where to.
        name: the title of the card: `ORG/NAME`, or a folder's name.
        tag: the revision that the card's examples pin.
        adapter_base: the Hub repository whose adapter is published unmerged; `None`: all weights, adapters merged.
        max_shard_size: largest file of weights.

    Raises:
        PublishError: the checkpoint is incomplete.
    """
    from vipolyqwen.fingerprint_vipolyqwen import FILE_NAME, fingerprint, hash_files, save_fingerprint
    from vipolyqwen.publishing import repository
    from vipolyqwen.publishing.card import model_card, read_training
    from vipolyqwen.publishing.checks import refuse_checkpoint

    refuse_checkpoint(checkpoint)
    is_adapter = (checkpoint / repository.ADAPTER_CONFIG).is_file()
    if adapter_base is not None and not is_adapter:
        raise repository.PublishError(
            f"{checkpoint} has no adapter_config.json, so it is not an adapter; drop --adapter."
        )
    model, processor = repository.load_adapter(checkpoint) if is_adapter else repository.load_repository(checkpoint)
    folder.mkdir(parents=True)
    if adapter_base is None:
        repository.save_repository(model, processor, folder, max_shard_size=max_shard_size)
    else:
        has_audio = model.config.audio_config is not None
        repository.copy_adapter(checkpoint, adapter_base, processor, folder, has_audio)
    floors = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    packages = [line for line in floors if line.split(">=")[0] in READER_PACKAGES]
    packages += ["peft"] if adapter_base is not None else []
    (folder / "requirements.txt").write_text("\n".join(packages) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    training = read_training(checkpoint)
    if training:
        repository.write_json(folder / repository.TRAINING_FILE, training)
    card = model_card(name, model, processor, checkpoint, adapter_base, tag)
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    measured = fingerprint(model, processor)
    measured.files = hash_files(folder)
    if adapter_base is None:
        save_fingerprint(measured, folder / FILE_NAME)
    else:
        measured.marks = {}  # of merged tensors, while readers load an adapter beside its base
    return measured


if __name__ == "__main__":
    run_command(main)
