"""Anything as an input: a unit vector or an error that names the input, in bounded time and memory.

`make test` runs a bounded part, the same each time; `make fuzz` runs `FUZZ_INPUTS` inputs and `FUZZ_FILES` damaged
files.
"""

import base64
import copy
import functools
import io
import os
import resource
import threading
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import random_audio, random_image, shake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vipolyqwen.images_vipolyqwen import load_image
from vipolyqwen.media_vipolyqwen import Limits
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.waveforms_vipolyqwen import load_audio

INPUTS = int(os.environ.get("FUZZ_INPUTS", "160"))
FILES = int(os.environ.get("FUZZ_FILES", "1200"))
THREAD_ENCODES = max(6, INPUTS // 100)  # of each of four threads
SECONDS = 5  # of one input on a processor; a busy machine takes longer by the clock
WAITED = 60  # s of one input by the clock
MEGABYTES = 1024  # that the process may grow over all inputs; the largest one is a few hundred kilobytes
MEGABYTES_OF_FILES = 256  # that it may grow over all damaged files
FILE_LIMITS = Limits(image_pixels=2**22, audio_samples=2**22)  # a header that states more costs nothing
ERRORS = (ValueError, OSError)
RNG = np.random.default_rng(0)


def bounded(share: float) -> Any:
    """Settings of a property: a share of the inputs, the same ones in `make test`."""
    return settings(
        max_examples=max(10, int(INPUTS * share)),
        deadline=None,  # it goes by the clock; see `timed`
        derandomize="FUZZ_INPUTS" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def timed(test: Callable) -> Callable:
    """Holds each input of a property to `SECONDS` and `WAITED`."""

    @functools.wraps(test)
    def run(*arguments: Any, **inputs: Any) -> None:
        used, started = time.process_time(), time.monotonic()
        test(*arguments, **inputs)
        assert time.process_time() - used < SECONDS and time.monotonic() - started < WAITED, inputs

    return run


def image_file(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    random_image(RNG).save(buffer, kind, **options)
    return buffer.getvalue()


def audio_file(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, random_audio(RNG, 0.2)["array"], 16_000, format=kind, **options)
    return buffer.getvalue()


def container_file(container: str, codec: str) -> bytes:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(random_audio(RNG, 0.3)["array"][None], "fltp", "mono")
        frame.sample_rate = 16_000
        resampler = av.AudioResampler(stream.format.name, "mono", 16_000, frame_size=stream.codec_context.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode())
    return buffer.getvalue()


def heic_file() -> bytes:
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(random_image(RNG)).save(buffer)
    return buffer.getvalue()


IMAGES = {kind: image_file(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "AVIF")}
AUDIO = {kind: audio_file(kind) for kind in ("WAV", "FLAC", "OGG", "MP3", "AIFF")}

# --- strategies --------------------------------------------------------------------------------------------------

characters = st.characters(exclude_categories=[]) | st.sampled_from("<|>/\\.\u0301\u0316\ud800\0ạềﬁ沙\U0001f600")
words = st.sampled_from(
    ["<|image_pad|>", "<ocr>", "<|im_end|>", "a/b.png", "logo.webp", "data:image/png;base64,", "x" * 3000]
)
texts = st.text(characters, max_size=40) | st.lists(words | st.text(characters, max_size=8), max_size=6).map("".join)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=40)
things = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.integers(), inner, max_size=3),
    max_leaves=6,
)
dtypes = st.sampled_from(
    ["uint8", "int8", "int16", "int32", "int64", "uint16", "float16", "float32", "float64", "bool", "c8"]
)


@st.composite
def arrays(draw: Any, dimensions: tuple[int, int] = (0, 4), most: int = 40) -> np.ndarray:
    """Arrays of any shape and dtype, some of them empty, some not finite."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 28, most]), min_size=dimensions[0], max_size=dimensions[1]))
    scale = draw(st.sampled_from([0, 0.5, 1, 200, 3e4, 1e30, float("nan"), float("inf")]))
    values = np.random.default_rng(draw(st.integers(0, 2**16))).uniform(-1, 1, shape) * scale
    with np.errstate(invalid="ignore", over="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return values.astype(draw(dtypes))


def as_base64(data: bytes) -> st.SearchStrategy:
    code = base64.b64encode(data).decode()
    return st.sampled_from([code, f"data:image/png;base64,{code}", f"data:,{code}", code[:-3]])


files = st.sampled_from(
    [*IMAGES.values(), *AUDIO.values(), b"", b"%!PS-Adobe-3.0 EPSF", b"#EXTM3U\nfile:///etc/passwd"]
)
pictures = st.builds(
    lambda mode, width, height: Image.new("RGB", (width, height), (9, 99, 199)).convert(mode),
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "YCbCr", "HSV"]),
    st.sampled_from([0, 1, 2, 30, 60, 401]),
    st.sampled_from([0, 1, 2, 30, 60]),
)
image_sources = (
    pictures
    | arrays()
    | files
    | files.flatmap(as_base64)
    | arrays().map(lambda array: torch.from_numpy(np.asarray(array)))
    | scalars
)
image_sources |= st.fixed_dictionaries({"bytes": files | st.none(), "path": texts | st.none()})
rates = st.sampled_from([16_000, 8_000, 44_100, 0, -1, 10**7, 2**31 - 1, 16_000.5, None, "16000", True])
samples = arrays((0, 2), 4000) | st.lists(st.integers(-(2**40), 2**40) | st.floats(), max_size=4)
audio_sources = files | samples | st.tuples(samples, rates) | scalars
audio_sources |= st.fixed_dictionaries({"array": samples, "sampling_rate": rates})
audio_sources |= st.fixed_dictionaries({"bytes": files | st.none(), "path": texts | st.none()})

parts = st.one_of(
    texts.map(lambda text: {"type": "text", "text": text}),
    image_sources.map(lambda source: {"type": "image", "image": source}),
    audio_sources.map(lambda source: {"type": "audio", "audio": source}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image", "audio", "video"]) | things}, optional={"text": things}
    ),
    things,
)
roles = st.sampled_from(["user", "system", "assistant", "query", "document"]) | things
messages = st.fixed_dictionaries({"role": roles, "content": texts | st.lists(parts, max_size=4) | things}) | things
good_parts = st.one_of(
    texts.map(lambda text: {"type": "text", "text": text}),
    st.sampled_from([{"type": "image", "image": data} for data in IMAGES.values()]),
)
clips = st.sampled_from([[], [], *([{"type": "audio", "audio": data}] for data in AUDIO.values())])
conversations = st.builds(
    lambda found, clip: [{"role": "user", "content": [*found, *clip]}], st.lists(good_parts, max_size=4), clips
)

# --- properties --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def memory() -> Any:
    """Holds the growth of the process over all properties to `MEGABYTES`."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"{grown:.0f} MB more"


@pytest.fixture(scope="module")
def encoder(tiny: tuple, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from sentence_transformers import SentenceTransformer

    folder = tmp_path_factory.mktemp("fuzz") / "tiny"
    save_repository(*tiny, folder)
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


def check_vectors(model: Any, batch: Any, count: int) -> None:
    with torch.no_grad():
        vectors = model(**batch).embeddings
    assert vectors.shape == (count, 1024)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(count), atol=1e-4, rtol=0)


def check_error(error: Exception) -> None:
    assert str(error).strip(), f"{type(error).__name__} says nothing"
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if "sentence_transformers" not in raised_in.parts:  # which repeats unknown keys of any length
        assert len(str(error)) < 2000, "the error repeats its input"


@bounded(0.3)
@given(
    text=st.none() | st.lists(texts | scalars, max_size=3),
    images=st.none() | image_sources | st.lists(image_sources | st.lists(image_sources, max_size=3), max_size=3),
    audio=st.none() | audio_sources | st.lists(audio_sources, max_size=3),
    task=st.sampled_from([None, None, "ocr", "auto", "query", "dance"]),
)
@timed
def test_a_call_gives_unit_vectors_or_an_error(tiny: tuple, text: Any, images: Any, audio: Any, task: Any) -> None:
    model, processor = tiny
    try:
        batch = processor(text=text, images=images, audio=audio, task=task, return_tensors="pt")
    except ERRORS as error:
        return check_error(error)
    rows = len(batch["has_audio"] if "has_audio" in batch else batch["input_ids"])
    check_vectors(model, batch, rows)


@bounded(0.3)
@given(conversation=st.lists(messages, max_size=3) | st.lists(st.lists(messages, max_size=2), max_size=3) | things)
@timed
def test_a_conversation_gives_unit_vectors_or_an_error(tiny: tuple, conversation: Any) -> None:
    model, processor = tiny
    try:
        batch = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
    except ERRORS as error:
        return check_error(error)
    check_vectors(model, batch, len(conversation) if isinstance(conversation[0], (list, tuple)) else 1)


@bounded(0.2)
@given(inputs=st.lists(conversations | texts, min_size=1, max_size=3), limit=st.sampled_from([8, 64, 512]))
@timed
def test_good_parts_give_unit_vectors_that_do_not_depend_on_their_batch(tiny: tuple, inputs: Any, limit: int) -> None:
    model, processor = tiny
    messages = [[{"role": "user", "content": item}] if isinstance(item, str) else item for item in inputs]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "plain_text": True, "max_length": limit}
    try:
        batch = processor.apply_chat_template(messages, **options)
    except ERRORS as error:
        return check_error(error)
    with torch.no_grad():
        together = model(**batch).embeddings
        for row, message in zip(together, messages, strict=True):
            alone = model(**processor.apply_chat_template([message], **options)).embeddings[0]
            torch.testing.assert_close(row, alone, atol=1e-5, rtol=0)


@bounded(0.1)
@given(text=texts)
@timed
def test_every_spelling_of_a_text_is_one_text_and_no_special_token(tiny: tuple, text: str) -> None:
    _, processor = tiny
    try:
        (ids,) = processor(text=[text])["input_ids"]
    except ERRORS as error:
        return check_error(error)
    (decomposed,) = processor(text=[unicodedata.normalize("NFD", text)])["input_ids"]
    assert decomposed == ids
    assert not set(ids[:-1]) & set(processor.tokenizer.all_special_ids)
    assert ids[-1] == processor.tokenizer.eos_token_id


@bounded(0.1)
@given(
    inputs=st.lists(
        texts
        | st.fixed_dictionaries({"text": texts}, optional={"image": image_sources})
        | st.fixed_dictionaries({"image": image_sources | st.lists(image_sources, max_size=2)})
        | conversations
        | st.lists(messages, min_size=1, max_size=2),
        min_size=1,
        max_size=3,
    )
)
@timed
def test_encode_gives_unit_vectors_or_an_error(encoder: Any, inputs: Any) -> None:
    try:
        vectors = encoder.encode(inputs)
    except ERRORS as error:
        return check_error(error)
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "_vipolyqwen" in frame.filename]
        if own:  # sentence-transformers raises other kinds before it asks the processor
            raise
        return None
    assert vectors.shape == (len(inputs), 1024)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-4)


# --- threads -----------------------------------------------------------------------------------------------------


def test_threads_beside_one_that_uses_the_tokenizer_get_the_same_vectors(encoder: Any) -> None:
    image, clip = random_image(RNG), random_audio(RNG, 0.2)
    inputs = ["Huế <ocr> <|image_pad|>", {"image": image, "text": "x<|im_start|>y"}, {"audio": clip}, "Hà Nội. " * 9]
    inputs += [{"image": [image, image]}, {"image": image, "text": "Đọc biển.", "audio": clip}]
    expected = [encoder.encode(item, prompt_name="ocr") for item in inputs]
    stop = threading.Event()
    different: list[int] = []

    def disturb() -> None:
        while not stop.is_set():
            encoder.tokenizer(["Huế <ocr>", "b"], padding="max_length", truncation=True, max_length=7)
            encoder.tokenizer("<|image_pad|>", split_special_tokens=True)

    def encode(start: int) -> None:
        for number in range(start, start + THREAD_ENCODES):
            place = number % len(inputs)
            found = encoder.encode(inputs[place], prompt_name="ocr")
            if np.abs(found - expected[place]).max() > 1e-6:
                different.append(place)

    other = threading.Thread(target=disturb)
    other.start()
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(encode, start) for start in range(4)]
    stop.set()
    other.join()
    assert [future.result() for future in futures] == [None] * 4
    assert different == []


# --- damaged files -----------------------------------------------------------------------------------------------


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Returns a file with bytes changed (headers more often than the rest), cut off, removed or inserted."""
    found = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        if not found:
            break
        place = int(rng.integers(0, min(len(found), 200) if rng.random() < 0.6 else len(found)))
        kind = rng.random()
        if kind < 0.7:
            found[place] = int(rng.choice([0, 1, 127, 128, 254, 255, int(rng.integers(0, 256))]))
        elif kind < 0.8:
            found[place : place + int(rng.integers(1, 9))] = b""
        elif kind < 0.9:
            found[place:place] = rng.bytes(int(rng.integers(1, 9)))
        elif len(found) > 20:
            del found[max(10, place) :]
    return bytes(found)


def originals() -> list[tuple[Any, bytes]]:
    containers = [("mp4", "aac"), ("adts", "aac"), ("matroska", "aac"), ("avi", "mp2")]
    heard = [*AUDIO.values(), *(container_file(*names) for names in containers)]
    return [(load_image, data) for data in [*IMAGES.values(), heic_file()]] + [(load_audio, data) for data in heard]


def test_a_damaged_file_is_read_or_refused() -> None:
    rng = np.random.default_rng(int(os.environ.get("FUZZ_SEED", "0")))
    found = originals()
    outcomes = {"read": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(FILES):
        load, data = found[number % len(found)]
        damaged = damage(data, rng)
        used, started = time.process_time(), time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(damaged, limits=FILE_LIMITS)
            outcomes["read"] += 1
        except ValueError as error:
            check_error(error)
            outcomes["refused"] += 1
        seconds, waited = time.process_time() - used, time.monotonic() - started
        assert seconds < SECONDS and waited < WAITED, damaged[:200]
    assert min(outcomes.values()) > FILES / 20  # the damage is neither none nor total
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES_OF_FILES, f"{grown:.0f} MB more"


@pytest.fixture(scope="module")
def tiny(tiny: tuple) -> tuple:
    """The tiny model with biases, as trained ones have them: without any, silence has the vector 0."""
    return shake(copy.deepcopy(tiny[0])).eval(), tiny[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that happens to name a file of the repository is no path here."""
    monkeypatch.chdir(tmp_path)
