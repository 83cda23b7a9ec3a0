"""Does the vector of a 12-minute conversation hold what was said after nine minutes?

    python benchmarks/long_conversations.py outputs/demo/model [--recordings 32] [--turn 20]

Two voices of the demo say sentences in turn for 12 minutes. For each two recordings, a sentence that each says in the
minute after 9:00 is compared with both: right if the sentences fit their recordings better than each other's, by the
sum of cosines. (The sum cancels what a sentence or a recording has in common with all others.) Chance is 0.5. Writes
benchmarks/results/long_conversations.json.
"""

import argparse
import math

import numpy as np
from result_files import claim, write_result
from sentence_transformers import SentenceTransformer

from vipolyqwen.demo.scenes import Scene, all_scenes, describe, spoken_phrases
from vipolyqwen.demo.speech import RATE, clips

SECONDS, ASKED = 720, range(540, 600)  # length of a recording; when the sentences that are searched begin
LANGUAGE = "vi"
PAUSE = 0.08  # s between phrases


def main() -> None:
    """Embeds the recordings and the sentences, and counts the pairs that are right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the trained demo model")
    parser.add_argument("--recordings", type=int, default=32)
    parser.add_argument("--turn", type=int, default=20, help="seconds from one sentence to the next")
    options = parser.parse_args()
    encoder = SentenceTransformer(options.model, trust_remote_code=True)
    rng = np.random.default_rng(1)
    heard, asked = [], []
    for _ in range(options.recordings):
        scenes = [all_scenes()[place] for place in rng.permutation(len(all_scenes()))[: SECONDS // options.turn]]
        clip = {"array": conversation(scenes, options.turn, rng), "sampling_rate": RATE}
        heard.append(encoder.encode({"audio": clip}))
        asked += [describe(scenes[start // options.turn], LANGUAGE) for start in ASKED[:: options.turn]]
    vectors = np.asarray(encoder.encode(asked)).reshape(options.recordings, -1, heard[0].size)
    report(np.einsum("iqd,jd->qij", vectors, np.stack(heard)), options.turn)


def conversation(scenes: list[Scene], turn: int, rng: np.random.Generator) -> np.ndarray:
    """Says a scene every `turn` seconds, by two voices in turn: (samples,) float32 in [-1, 1], with faint noise."""
    voices = list(clips()[LANGUAGE].values())
    said = 1e-3 * rng.standard_normal(SECONDS * RATE, dtype=np.float32)
    pause = np.zeros(round(PAUSE * RATE), np.float32)
    for number, scene in enumerate(scenes):
        voice = voices[number % len(voices)]
        sentence = np.concatenate([part for text in spoken_phrases(scene, LANGUAGE) for part in (voice[text], pause)])
        start = number * turn * RATE
        said[start : start + len(sentence)] += sentence[: len(said) - start]
    return np.clip(said, -1, 1)


def report(cosines: np.ndarray, turn: int) -> None:
    """Writes the result file.

    Args:
        cosines: (sentences of a recording, recordings, recordings), a sentence's recording in the second place.
        turn: seconds from one sentence to the next.
    """
    asked, count, _ = cosines.shape
    fit = np.diagonal(cosines, axis1=1, axis2=2)  # (sentences, recordings), with the recording that says it
    gain = fit[:, :, None] + fit[:, None] - cosines - cosines.transpose(0, 2, 1)
    right = float((gain[:, *np.triu_indices(count, 1)] > 0).mean())
    error = 0.5 / math.sqrt(asked * count)  # of independent sentences; the pairs share them
    claims = {"share_of_right_pairs": claim(round(right, 3), 0.5, holds=right - 2 * error > 0.5)}
    rank = float((cosines > fit[:, :, None]).sum() / (asked * count * (count - 1)))
    figures = {"standard_error_at_chance": round(error, 3), "mean_rank_of_the_recording": round(rank, 3)}
    sizes = {"recordings": count, "sentences_of_each": SECONDS // turn, "asked_of_each": asked, "seconds": SECONDS}
    write_result("long_conversations", claims, **figures, **sizes)


if __name__ == "__main__":
    main()
