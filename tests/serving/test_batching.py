import io
import threading
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TEXTS, random_image
from PIL import Image

from vipolyqwen.images_vipolyqwen import load_image
from vipolyqwen.serving import batching
from vipolyqwen.serving.batching import Batcher, Done, Job, decoded_bytes
from vipolyqwen.serving.embedding import embed
from vipolyqwen.serving.loading import LoadedModel, load_model
from vipolyqwen.serving.requests import RequestError


def png(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    random_image(rng).save(file, "PNG")
    return file.getvalue()


def wav(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setparams((1, 2, 16_000, 0, "NONE", ""))
        opened.writeframes(rng.integers(-9000, 9000, 8000, dtype=np.int16).tobytes())
    return file.getvalue()


def parts(**content: Any) -> list[dict[str, Any]]:
    return [{"type": kind, kind: value} for kind, value in content.items()]


def message(item: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": item}]


@pytest.fixture(scope="module")
def batcher(model: LoadedModel) -> Batcher:
    return Batcher(model, max_tokens=64)


def test_vectors_of_mixed_requests_are_those_of_encode(
    batcher: Batcher, model: LoadedModel, rng: np.random.Generator
) -> None:
    image, audio = png(rng), wav(rng)
    jobs = [
        Job([parts(text=text) for text in TEXTS]),
        Job([parts(image=image), parts(audio=audio), parts(image=image, text=TEXTS[0])], dimensions=64),
        Job([parts(text=TEXTS[1]), parts(image=image, text=TEXTS[2], audio=audio)], prompt_name="ocr"),
    ]
    for job, done in zip(jobs, batcher.run(jobs), strict=True):
        assert isinstance(done, Done)
        expected = model.encoder.encode(
            [message(item) for item in job.inputs],
            prompt_name=job.prompt_name,
            truncate_dim=job.dimensions,
            normalize_embeddings=True,
        )
        assert np.abs(done.vectors - expected).max() <= 1e-6
        assert done.tokens > 0


def test_bad_requests_cost_no_other_request(batcher: Batcher, model: LoadedModel, rng: np.random.Generator) -> None:
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    length = model.encoder.processor.tokenizer.model_max_length
    bad = {
        "input[1]": Job([parts(text="good"), parts(image=b"no image")]),
        "prompt_name": Job([parts(text="a")], prompt_name="nothing"),
        "dimensions": Job([parts(text="a")], dimensions=2000),
        "50000000": Job([parts(image=bomb.getvalue())]),
        str(length): Job([parts(text="biển " * length)]),
        "truncated": Job([parts(audio=wav(rng)[:100])]),
        "EPS": Job([parts(image=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")]),
        "surrogate": Job([parts(text="\ud800")]),
    }
    good = Job([parts(text=TEXTS[0])])
    first, *found, last = batcher.run([good, *bad.values(), good])
    for result in (first, last):
        assert isinstance(result, Done)
        assert np.abs(result.vectors[0] - model.encoder.encode(TEXTS[0])).max() <= 1e-6
    words = {"EPS": "cannot be read"}
    for word, error in zip(bad, found, strict=True):
        assert isinstance(error, RequestError) and error.status == 400, (word, error)
        assert words.get(word, word) in f"{error.message} {error.param}", (word, error.message)


def test_a_batch_that_fails_is_an_error_of_its_requests_only(
    batcher: Batcher, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.encoder.forward

    def fail_if_long(features: dict, **kwargs: Any) -> dict:
        if features["input_ids"].shape[1] > 20:
            raise RuntimeError("out of memory")
        return forward(features, **kwargs)

    monkeypatch.setattr(model.encoder, "forward", fail_if_long)
    failed, done = batcher.run([Job([parts(text=TEXTS[0] * 3)]), Job([parts(text="a")])])
    assert isinstance(failed, RequestError) and failed.status == 500 and isinstance(done, Done)


def test_batches_hold_inputs_of_one_prompt_within_the_tokens(batcher: Batcher) -> None:
    jobs = [Job([parts(text="a" * 30)] * 5 + [parts(text="b" * 90)] * 2), Job([parts(text="a")], prompt_name="ocr")]
    errors: dict[int, RequestError] = {}
    items = [item for number, job in enumerate(jobs) for item in batcher._load(number, job, errors)]
    batches = batcher._batches(items)
    assert [[item.cost for item in batch] for batch in batches] == [[32, 32], [12] * 5, [2]]


def test_threads_get_their_own_vectors(batcher: Batcher, model: LoadedModel) -> None:
    expected = model.encoder.encode(TEXTS)
    worst: list[float] = []

    def ask(number: int) -> None:
        for _ in range(5):
            (done,) = batcher.run([Job([parts(text=TEXTS[number])])])
            worst.append(float(np.abs(done.vectors[0] - expected[number]).max()))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 20 and max(worst) <= 1e-6


def test_no_more_is_decoded_than_the_processor_takes(
    model: LoadedModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = model.encoder.processor
    monkeypatch.setattr(processor, "limits", {"image_pixels": 100})
    monkeypatch.setattr(processor, "max_audio_seconds", 0.1)
    monkeypatch.setattr(processor, "max_audio_windows", 2)
    strict = Batcher(model)
    jobs = [Job([parts(audio=wav(rng))]), Job([parts(image=png(rng))]), Job([parts(text="a")])]
    long, large, fine = strict.run(jobs)
    assert isinstance(long, RequestError) and long.status == 400 and "max_audio_seconds" in str(long)
    assert isinstance(large, RequestError) and large.status == 400 and "image_pixels" in str(large)
    assert isinstance(fine, Done)


def test_inputs_for_a_tower_that_is_not_loaded_are_refused_before_they_are_decoded(
    repository: Path, model: LoadedModel, rng: np.random.Generator
) -> None:
    some = Batcher(load_model(str(repository), device="cpu", towers=["text", "image"]))
    jobs = [Job([parts(audio=b"no audio")]), Job([parts(text="a", audio=wav(rng))]), Job([parts(image=png(rng))])]
    *refused, fine = some.run(jobs)
    for error in refused:
        assert isinstance(error, RequestError) and (error.status, error.param) == (400, "input[0]")
        assert "audio" in error.message and "text, image only" in error.message
    assert isinstance(fine, Done)
    expected = model.encoder.encode([message(jobs[2].inputs[0])])
    assert np.abs(fine.vectors - expected).max() <= 1e-6


def test_media_that_would_fill_the_memory_are_refused_before_they_are_decoded(
    model: LoadedModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = io.BytesIO()
    Image.new("1", (2000, 1000)).save(large, "PNG")  # 6 MB in RGB
    strict = Batcher(model, max_decoded=13_000_000)
    decoded: list[int] = []
    monkeypatch.setattr(
        batching, "load_image", lambda *given, **named: (decoded.append(1), load_image(*given, **named))[1]
    )
    refused = Job([[{"type": "image", "image": large.getvalue()}] * 2, parts(image=large.getvalue())])
    (error,) = strict.run([refused])
    assert isinstance(error, RequestError) and error.status == 400 and not decoded
    assert "18000000" in error.message and "13000000" in error.message
    assert strict._groups([6, 6, 0, 13_000_000, 14_000_000, 1]) == [[0, 1, 2], [3], [4], [5]]
    long = Job([parts(audio=wav(rng))] * 2)
    small = Job([parts(image=large.getvalue())])
    results = strict.run([small, refused, Job([parts(text="a")]), long, small])
    assert [isinstance(result, Done) for result in results] == [True, False, True, True, True]
    assert decoded_bytes("audio", wav(rng), strict._limits) == 4 * 8000


def test_a_vector_without_direction_is_an_error_of_its_input(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, values = model.encoder.forward, {"is 0": 0.0, "NaN": float("nan"), "infinite": float("inf")}

    def spoil(features: dict, **kwargs: Any) -> dict:
        output = forward(features, **kwargs)
        output["sentence_embedding"][0] = values[word]
        return output

    monkeypatch.setattr(model.encoder, "forward", spoil)
    for word in values:
        spoiled, good = Batcher(model).run([Job([parts(text="a long text")]), Job([parts(text="a")])])
        assert isinstance(spoiled, RequestError) and spoiled.status == 400 and word in spoiled.message
        assert isinstance(good, Done)
        found = embed(model.encoder, ["a long text", "a"], on_error="none")
        assert list(found.ok) == [False, True] and word in str(found.reasons[0]) and np.isnan(found.vectors[0]).all()
        with pytest.raises(ValueError, match="Input 0 of 2"):
            embed(model.encoder, ["a long text", "a"])
