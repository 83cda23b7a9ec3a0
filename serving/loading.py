"""Loads a published model and makes sure that it gives the vectors that it was published with."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers.utils import cached_file

from ..fingerprint_vipolyqwen import FILE_NAME, Finding, compare_vectors, read_fingerprint, tolerance, verdict

NOT_THE_MODEL = ("versions", "attention")  # of the fingerprint: what may differ where the vectors are the same


@dataclass(frozen=True)
class LoadedModel:
    """A model and the mark of what it was published as.

    Attributes:
        encoder: the model.
        name: its folder's name or Hub id.
        fingerprint: 16 hexadecimal digits that other weights, tokenizers, settings or prefixes change.
        source: folder or Hub id that it was loaded from.
        revision: branch, tag or commit on the Hub.
    """

    encoder: SentenceTransformer
    name: str
    fingerprint: str
    source: str
    revision: str | None = None

    @property
    def dtype(self) -> str:
        """Returns the dtype of the weights, such as "float32"."""
        return str(self.encoder.transformers_model.dtype).removeprefix("torch.")

    def check(self) -> list[Finding]:
        """Embeds the golden inputs and compares them with the published vectors."""
        published = read_fingerprint(self.source, revision=self.revision)
        model, processor = self.encoder.transformers_model, self.encoder.processor
        return compare_vectors(published, model, processor, tolerance(published, [self.dtype]))


def load_model(
    source: str,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    towers: Sequence[str] | None = None,
    **processor_kwargs: Any,
) -> LoadedModel:
    """Loads a repository and checks its vectors.

    Args:
        source: folder or Hub id.
        device: such as "cuda"; `None`: the library's choice.
        dtype: of the weights; `None`: as published.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether code from the Hub may run; code in a folder always may.
        towers: which of text, image and audio to load; `None`: all. Vectors of the others are not checked.
        **processor_kwargs: settings of the processor, such as `allow_urls`.

    Raises:
        ValueError: the repository has no fingerprint, or gives other vectors.
        OSError: the repository does not exist.
    """
    folder = Path(source)
    fingerprint = fingerprint_of(source, revision)
    encoder = SentenceTransformer(
        source,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code or folder.is_dir(),
        model_kwargs={name: value for name, value in {"dtype": dtype, "towers": towers}.items() if value},
        processor_kwargs=processor_kwargs or None,
    )
    name = folder.resolve().name if folder.is_dir() else source
    loaded = LoadedModel(encoder.eval(), name, fingerprint, source, revision)
    if fault := verdict(loaded.check()):
        raise ValueError(
            f"{source!r} gives other vectors than it was published with. {fault} "
            "`python -m vipolyqwen.doctor` says more."
        )
    return loaded


def fingerprint_of(source: str, revision: str | None = None) -> str:
    """Returns the mark of a repository: a hash of its `fingerprint.json` but for the versions of libraries.

    Raises:
        ValueError: the repository has no such file.
    """
    read_fingerprint(source, revision=revision)
    path = cached_file(source, FILE_NAME, revision=revision)
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    kept = {name: value for name, value in content.items() if name not in NOT_THE_MODEL}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()
