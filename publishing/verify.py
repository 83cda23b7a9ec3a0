"""Loads a repository as its readers do, without this package, and embeds something: what publishing insists on.

    python -P verify_vipolyqwen.py REPOSITORY EXPECTED.npy [CHECKPOINT]

SentenceTransformer and AutoModel must give the unit vectors of the model in the publishing process, which are in
EXPECTED.npy, and so must CHECKPOINT with its own code.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

TOLERANCE = {torch.float32: 1e-5}  # merging an adapter, or a batch of another shape, rounds differently
LOW_PRECISION_TOLERANCE = 2e-2


def main() -> None:
    """Checks; exits with what is wrong."""
    sys.modules["vipolyqwen"] = None  # an import of the package must fail here as it would where it is not installed
    from sentence_transformers import SentenceTransformer  # not needed, and slow to import, where `embed` is imported

    repository, expected, *checkpoint = sys.argv[1:]
    encoder = SentenceTransformer(repository, trust_remote_code=True, device="cpu")
    model, processor = load(repository, repository)
    inputs = samples(processor, with_audio=model.config.audio_config is not None)
    vectors = {"the model that was to be published": np.load(expected)}
    vectors["SentenceTransformer"] = np.stack([encoder.encode(row) for row in inputs.values()])
    vectors["AutoModel"] = embed(model, processor, inputs)
    if checkpoint:
        has_processor = (Path(checkpoint[0]) / "processor_config.json").is_file()
        own = load(checkpoint[0], checkpoint[0] if has_processor else repository)
        vectors["the checkpoint with its own code"] = embed(*own, inputs)
    problems = wrong_vectors(vectors, list(inputs), TOLERANCE.get(model.dtype, LOW_PRECISION_TOLERANCE))
    if problems:
        sys.exit("\n".join(problems))


def load(model_path: str, processor_path: str) -> tuple[Any, Any]:
    """Model and processor through the Auto classes; exits if a tensor was not found or not used."""
    model, report = AutoModel.from_pretrained(model_path, trust_remote_code=True, output_loading_info=True)
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[name]:
            sys.exit(f"{model_path} loads with {name}: {', '.join(sorted(map(str, report[name])))}")
    return model.eval(), AutoProcessor.from_pretrained(processor_path, trust_remote_code=True)


def samples(processor: Any, with_audio: bool) -> dict[str, Any]:
    """One input of each kind."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    inputs = {
        "Vietnamese": "Trên biển ghi gì?",
        "English": "Three large blue balls.",
        "Chinese": "沙滩上有四个球。",
        "image": {"image": image},
        "image and text": {"image": image, "text": "Biển báo ở đâu?"},
    }
    if with_audio:
        rate = processor.feature_extractor.sampling_rate
        sound = {"array": rng.uniform(-0.5, 0.5, rate // 2).astype(np.float32), "sampling_rate": rate}
        inputs |= {"sound": {"audio": sound}, "everything": {"image": image, "text": "hello", "audio": sound}}
    return inputs


@torch.no_grad()
def embed(model: Any, processor: Any, inputs: dict[str, Any]) -> np.ndarray:
    """(inputs, projection_dim) float32, each input in a batch of its own."""
    vectors = []
    for row in inputs.values():
        row = {"text": row} if isinstance(row, str) else row
        images = [[row["image"]]] if "image" in row else None
        sounds = [row["audio"]] if "audio" in row else None
        batch = processor(text=[row.get("text", "")], images=images, audio=sounds, return_tensors="pt")
        vectors.append(model(**batch).embeddings[0].float().numpy())
    return np.stack(vectors)


def wrong_vectors(vectors: dict[str, np.ndarray], names: list[str], tolerance: float) -> list[str]:
    """What is wrong with which input's vector, each way against the first one."""
    (reference, expected), *others = vectors.items()
    problems = []
    for name, vector in zip(names, expected, strict=True):
        if not np.isfinite(vector).all() or abs(np.linalg.norm(vector) - 1) > tolerance:
            problems.append(f"{name}: the norm of the vector is {np.linalg.norm(vector)}; it must be 1.")
    for way, found in others:
        distances = np.abs(found - expected).max(axis=1)
        problems += [
            f"{name}: {way} and {reference} differ by {distance:.2g}; the limit is {tolerance}."
            for name, distance in zip(names, distances, strict=True)
            if not distance <= tolerance
        ]
    return problems


if __name__ == "__main__":
    main()
