"""Says scenes: recorded phrases of one voice, joined with varying gaps, speed, loudness and noise."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

from .scenes import Scene, spoken_phrases

RATE = 16_000
GAP_SECONDS = (0.03, 0.15)
SPEEDS = (19, 20, 21)  # twentieths: 0.95 to 1.05 times the recorded speed
CLIP_FOLDER = Path(__file__).parent / "assets"


@lru_cache
def clips() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Reads the recordings by language, voice and phrase: (samples,) float32 in [-1, 1], 16 kHz mono."""
    clip, rate = soundfile.read(CLIP_FOLDER / "clips.ogg", dtype="float32")
    if rate != RATE:
        raise ValueError(f"clips.ogg has {rate} samples a second, not {RATE}; make it again with make_assets.py")
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for language, voice, phrase, start, end in json.loads((CLIP_FOLDER / "clips.json").read_text("utf-8")):
        found.setdefault(language, {}).setdefault(voice, {})[phrase] = clip[start:end]
    return found


def say_scene(scene: Scene, language: str, rng: np.random.Generator) -> np.ndarray:
    """Says the scene's caption with one voice: (samples,) float32 in [-1, 1], 16 kHz mono, about two seconds."""
    voices = clips()[language]
    voice = voices[list(voices)[rng.integers(len(voices))]]
    parts = [_silence(rng)]
    for phrase in spoken_phrases(scene, language):
        parts += [voice[phrase] * rng.uniform(0.85, 1.1), _silence(rng)]
    said = _faster(np.concatenate(parts), SPEEDS[rng.integers(len(SPEEDS))])
    loud = rng.uniform(0.25, 0.9) * said / np.abs(said).max()
    noisy = loud + 10 ** rng.uniform(-4, -2.7) * rng.standard_normal(len(loud), dtype=np.float32)
    return np.clip(noisy, -1, 1).astype(np.float32)


def _faster(clip: np.ndarray, twentieths: int) -> np.ndarray:
    """Plays the clip at so many twentieths of its speed (pitch moves too), resampled by its spectrum."""
    padded = np.pad(clip, (0, -len(clip) % (twentieths * 16)))  # a length whose Fourier transforms are fast
    length = len(padded) * 20 // twentieths
    return np.fft.irfft(np.fft.rfft(padded), length) * (length / len(padded))


def _silence(rng: np.random.Generator) -> np.ndarray:
    return np.zeros(round(rng.uniform(*GAP_SECONDS) * RATE), dtype=np.float32)
