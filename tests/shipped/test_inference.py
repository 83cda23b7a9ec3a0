"""Everything that sentence-transformers offers at inference, and every form in which an input may come."""

import base64
import io
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from helpers import random_audio, random_image
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import quantize_embeddings
from transformers import AutoModel, AutoProcessor

from vipolyqwen.processing_vipolyqwen import TASK_PREFIXES, ViPolyQwenProcessor
from vipolyqwen.publishing.repository import save_repository


@pytest.fixture(scope="module")
def repository(tiny: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inference") / "tiny"
    save_repository(*tiny, folder)
    return folder


def load(folder: Path, **options: Any) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)


@pytest.fixture(scope="module")
def encoder(repository: Path) -> SentenceTransformer:
    """The repository as sentence-transformers loads it; tests must not change it."""
    return load(repository)


@pytest.fixture
def rows(rng: np.random.Generator) -> list[Any]:
    """Inputs of every kind, of different lengths."""
    image, audio = random_image(rng), random_audio(rng)
    return [
        "Huế",
        image,
        audio,
        {"image": image, "text": "Trên biển ghi gì? " * 4},
        "What colour are the big stars on the grass? " * 3,
        {"audio": random_audio(rng, 0.2), "text": "沙滩上有四个绿色的小方块。"},
        {"image": random_image(rng, 90, 40), "audio": audio},
    ]


def distance(found: Any, expected: Any) -> float:
    assert np.shape(found) == np.shape(expected)
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max())


# --- trust -------------------------------------------------------------------------------------------------------


def test_nothing_of_the_repository_s_code_runs_without_trust(repository: Path) -> None:
    for load_it in (SentenceTransformer, AutoModel.from_pretrained, AutoProcessor.from_pretrained):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load_it(str(repository), trust_remote_code=False)


# --- what encode offers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_every_input_gets_its_vector_in_its_place(batch_size: int, encoder: SentenceTransformer, rows: list) -> None:
    alone = np.stack([encoder.encode(row) for row in rows])
    assert alone.shape == (len(rows), 1024)
    assert distance(encoder.encode(rows, batch_size=batch_size), alone) <= 1e-5
    assert distance(encoder.encode(rows[::-1], batch_size=batch_size), alone[::-1]) <= 1e-5
    assert len(encoder.encode([])) == 0


def test_a_tuple_of_inputs_is_as_many_inputs(encoder: SentenceTransformer, rows: list) -> None:
    for given in (rows[0], rows[4]), (rows[1], rows[1]), (rows[0], rows[1]):
        assert encoder.encode(given).shape == encoder.encode(list(given)).shape == (2, 1024)


def test_queries_and_documents_are_embedded_alike_unless_a_task_is_named(
    encoder: SentenceTransformer, rows: list
) -> None:
    plain = encoder.encode(rows)
    assert distance(encoder.encode_query(rows), plain) == distance(encoder.encode_document(rows), plain) == 0
    for task, prefix in TASK_PREFIXES.items():
        steered = encoder.encode(rows, prompt_name=task)
        assert distance(encoder.encode_query(rows, prompt_name=task), steered) == 0
        assert distance(encoder.encode_document(rows, prompt=prefix), steered) == 0
        assert distance(steered, plain) > 1e-3
    with pytest.raises(ValueError, match="Prompt name 'nothing' not found"):
        encoder.encode(rows, prompt_name="nothing")


def test_vectors_can_be_cut_to_their_first_dimensions(
    repository: Path, encoder: SentenceTransformer, rows: list
) -> None:
    whole = encoder.encode(rows)
    assert distance(encoder.encode(rows, truncate_dim=64), whole[:, :64]) == 0
    short = load(repository, truncate_dim=64)
    assert short.get_embedding_dimension() == 64
    unit = short.encode(rows, normalize_embeddings=True)
    assert distance(unit, whole[:, :64] / np.linalg.norm(whole[:, :64], axis=1, keepdims=True)) <= 1e-6
    assert distance(short.similarity(unit, unit), encoder.similarity(whole[:, :64], whole[:, :64])) <= 1e-6


def test_similarity_is_the_cosine(encoder: SentenceTransformer, rows: list) -> None:
    vectors = encoder.encode(rows)
    assert distance(np.linalg.norm(vectors, axis=1), np.ones(len(rows))) <= 1e-6
    assert distance(encoder.similarity(vectors, vectors), vectors @ vectors.T) <= 1e-6
    others = vectors[::-1].copy()
    assert distance(encoder.similarity_pairwise(vectors, others), (vectors * others).sum(axis=1)) <= 1e-6


def test_vectors_can_be_quantised(encoder: SentenceTransformer, rows: list) -> None:
    vectors = encoder.encode(rows)
    bits = encoder.encode(rows, precision="ubinary")
    np.testing.assert_array_equal(np.unpackbits(bits.view(np.uint8), axis=1), vectors > 0)
    np.testing.assert_array_equal(quantize_embeddings(vectors, "ubinary"), bits)
    ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    eight = quantize_embeddings(vectors, "int8", ranges=ranges)
    assert (eight.dtype, eight.shape) == (np.int8, vectors.shape)
    back = (eight.astype(np.float32) + 128) / 255 * (ranges[1] - ranges[0]) + ranges[0]
    assert np.abs(back - vectors).max() <= ((ranges[1] - ranges[0]) / 255).max() * 1.01


def test_bfloat16_gives_float32_vectors_close_to_the_exact_ones(
    repository: Path, encoder: SentenceTransformer, rows: list
) -> None:
    vectors = load(repository, model_kwargs={"dtype": "bfloat16"}).encode(rows)
    assert vectors.dtype == np.float32
    assert (vectors * encoder.encode(rows)).sum(axis=1).min() > 0.98


def test_a_compiled_model_gives_the_same_vectors(repository: Path, encoder: SentenceTransformer, rows: list) -> None:
    compiled = load(repository)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled[0].model = torch.compile(compiled[0].model, backend=backend)
    assert distance(compiled.encode(rows[:2]), encoder.encode(rows[:2])) <= 1e-6
    assert graphs
    torch.compiler.reset()


@pytest.mark.slow
def test_several_processes_give_the_same_vectors(encoder: SentenceTransformer, repository: Path, rows: list) -> None:
    own = load(repository)
    pool = own.start_multi_process_pool(["cpu", "cpu"])
    try:
        vectors = own.encode(rows, pool=pool, chunk_size=2)
    finally:
        own.stop_multi_process_pool(pool)
    assert distance(vectors, encoder.encode(rows)) <= 1e-5


# --- forms of images and audio -----------------------------------------------------------------------------------


def file_bytes(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_an_image_may_come_in_any_form(encoder: SentenceTransformer, rng: np.random.Generator, tmp_path: Path) -> None:
    image = random_image(rng)
    data = file_bytes(image, "PNG")
    path, other = tmp_path / "ảnh của tôi.PNG", tmp_path / "other.tif"
    path.write_bytes(data)
    other.write_bytes(file_bytes(image, "TIFF"))
    array = np.asarray(image)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    bare = [str(path), array, torch.from_numpy(array.copy()), array.transpose(2, 0, 1), uri]
    expected = encoder.encode(image)
    for given in [*bare, *({"image": source} for source in [*bare, image, path, data, str(other), other])]:
        assert distance(encoder.encode([given])[0], expected) <= 1e-6
        assert distance(encoder.encode(["Huế", given])[1], expected) <= 1e-5


def test_an_input_may_have_a_list_of_images(
    tiny: tuple, encoder: SentenceTransformer, rng: np.random.Generator
) -> None:
    _, processor = tiny
    images = [random_image(rng), random_image(rng, 40, 90), random_image(rng)]
    batch = processor(text=["Huế"], images=[images], return_tensors="pt")
    with torch.no_grad():
        expected = tiny[0](**batch).embeddings[0]
    assert distance(encoder.encode({"image": images, "text": "Huế"}), expected) <= 1e-6
    mixed = encoder.encode([{"image": images, "text": "Huế"}, {"image": images[:1], "text": "Huế"}, "Huế"])
    assert distance(mixed[0], expected) <= 1e-5
    assert distance(mixed[2], encoder.encode("Huế")) <= 1e-5


def audio_forms(audio: dict[str, Any], folder: Path) -> list[Any]:
    path = folder / "tiếng nói.wav"
    soundfile.write(path, audio["array"], audio["sampling_rate"], subtype="FLOAT")
    return [str(path), audio, {"audio": audio}, {"audio": str(path)}, {"audio": path}, {"audio": path.read_bytes()}]


@pytest.mark.parametrize("rate", [16_000, 22_050])
def test_audio_may_come_in_any_form(
    rate: int, encoder: SentenceTransformer, rng: np.random.Generator, tmp_path: Path
) -> None:
    audio = random_audio(rng, 0.3, rate)
    expected = encoder.encode(audio)
    for given in audio_forms(audio, tmp_path):
        assert distance(encoder.encode([given])[0], expected) <= 1e-6
        assert distance(encoder.encode(["Huế", given])[1], expected) <= 1e-5


def test_audio_may_come_as_a_decoder(encoder: SentenceTransformer, rng: np.random.Generator, tmp_path: Path) -> None:
    decoders = pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, OSError, RuntimeError))
    audio = random_audio(rng, 0.3)
    path, *_ = audio_forms(audio, tmp_path)
    for given in (decoders.AudioDecoder(path), {"audio": decoders.AudioDecoder(path)}):
        assert distance(encoder.encode([given])[0], encoder.encode(audio)) <= 1e-5


# --- what stock code would misread -------------------------------------------------------------------------------


def test_a_path_that_would_be_embedded_as_letters_is_an_error(encoder: SentenceTransformer, tmp_path: Path) -> None:
    unknown = tmp_path / "an image.tif"
    unknown.write_bytes(b"")
    missing = ["photos/nothing.png", "a/nothing.WAV", "ảnh sản phẩm/áo thun.png", "C:\\ảnh\\1.heic", "x/scan.pdf"]
    for path in (*missing, str(unknown), "https://example.org/film.mp4"):
        with pytest.raises(ValueError, match=r"looks like the path of .*chat_template.*plain_text"):
            encoder.encode(["Huế", path])
        as_text = encoder.encode([path], processing_kwargs={"chat_template": {"plain_text": True}})
        assert as_text.shape == (1, 1024)
    for text in (
        "The file is nothing.png",
        "如何打开.webp",
        "setup.mp4",
        "nothing.png?",
        "see https://x.org",
        "a.b",
        ".png",
    ):
        assert encoder.encode(text).shape == (1024,)


def test_conversations_stand_beside_other_inputs(encoder: SentenceTransformer, rng: np.random.Generator) -> None:
    conversation = [
        {"role": "user", "content": "Huế"},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    inputs = ["Huế", conversation, {"image": random_image(rng)}]
    together = encoder.encode(inputs, prompt_name="ocr")
    alone = np.stack([encoder.encode([item], prompt_name="ocr")[0] for item in inputs])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("pair", [["a", "b"], ("a", "b"), [Image.new("RGB", (60, 48)), "a"]])
def test_a_pair_in_place_of_an_input_is_an_error(pair: Any, encoder: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="A pair was passed as one input"):
        encoder.encode([pair, pair, pair])


@pytest.mark.parametrize(
    "given",
    [
        None,
        5,
        {},
        b"bytes",
        {"video": np.zeros((2, 3, 8, 8))},
        {"texts": "a"},
        np.zeros(8000, dtype=np.float32),  # audio without its rate
        np.zeros((40, 60), dtype=np.uint8),  # stock code takes it for audio of 40 channels
        np.zeros((2, 40, 60, 3), dtype=np.uint8),
        "https://example.org/a.png",
        "https://example.org/a.wav",
    ],
)
def test_what_cannot_be_embedded_stops_the_batch(given: Any, encoder: SentenceTransformer) -> None:
    with pytest.raises(ValueError):  # stock messages among them
        encoder.encode(["Huế", given])


def test_audio_of_two_rates_in_one_batch_are_an_error(encoder: SentenceTransformer, rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="different sampling rates"):
        encoder.encode([random_audio(rng, 0.2, 16_000), random_audio(rng, 0.2, 22_050)])


# --- URLs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def website(tmp_path: Path) -> Iterator[str]:
    """An HTTP server on localhost that serves `tmp_path`."""
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_urls_are_fetched_if_that_is_allowed(
    repository: Path,
    encoder: SentenceTransformer,
    website: str,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    image, audio = random_image(rng), random_audio(rng)
    image.save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.wav", audio["array"], 16_000, subtype="FLOAT")
    urls = [f"{website}/a.png", f"{website}/a.wav"]
    for url in urls:
        with pytest.raises(ValueError, match="is a URL; download it"):
            encoder.encode(url)
    online = load(repository, processor_kwargs={"allow_urls": "private"})
    expected = encoder.encode([image, audio])
    assert distance(online.encode(urls), expected) <= 1e-5
    assert distance(online.encode([{"image": urls[0]}, {"audio": urls[1]}]), expected) <= 1e-5
    public = load(repository, processor_kwargs={"allow_urls": True})
    with pytest.raises(ValueError, match="127.0.0.1, not a public address"):
        public.encode(urls)
    with pytest.raises(ValueError, match=r"missing\.png' cannot be fetched: HTTP Error 404"):
        online.encode(f"{website}/missing.png")
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(ValueError, match=r"page\.png' cannot be read"):
        online.encode(f"{website}/page.png")


# --- adapters and training ---------------------------------------------------------------------------------------

COLOURS = {"đỏ": "red", "xanh": "blue", "vàng": "yellow", "tím": "purple"}


def train(encoder: SentenceTransformer, rows: dict[str, list], folder: Path, learning_rate: float) -> list[float]:
    """Trains for a few steps; returns the loss of each."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=learning_rate,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        prompts={"anchor": TASK_PREFIXES["instr"]},
    )
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        loss=MultipleNegativesRankingLoss(encoder),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_sentence_transformers_can_train_it_further(
    kind: str, repository: Path, rows: list, rng: np.random.Generator, tmp_path: Path
) -> None:
    encoder = load(repository)
    before = encoder.encode(rows)
    positives = list(COLOURS.values()) if kind == "text" else [random_image(rng) for _ in COLOURS]
    losses = train(encoder, {"anchor": list(COLOURS), "positive": positives}, tmp_path, 1e-3)
    assert losses[-1] < 0.5 * losses[0]
    after = encoder.encode(rows)
    assert distance(after, before) > 1e-3
    encoder.save_pretrained(str(tmp_path / "further"))
    assert distance(load(tmp_path / "further").encode(rows), after) <= 1e-6


def test_adapters_are_loaded_by_name_and_switched(repository: Path, rows: list, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    before = load(repository).encode(rows)
    vectors = {}
    for seed, name in enumerate(("colours", "other")):
        torch.manual_seed(seed)
        encoder = load(repository)
        encoder.add_adapter(peft.LoraConfig(target_modules=r".*(q_proj|v_proj)", r=4), adapter_name=name)
        losses = train(encoder, {"anchor": list(COLOURS), "positive": list(COLOURS.values())}, tmp_path, 1e-2)
        assert losses[-1] < losses[0]
        encoder.save_pretrained(str(tmp_path / name))
        vectors[name] = encoder.encode(rows)
    assert distance(vectors["colours"], before) > 1e-3

    assert distance(load(tmp_path / "colours").encode(rows), vectors["colours"]) <= 1e-6  # the adapter's own folder
    encoder = load(repository)
    for name in vectors:
        encoder.load_adapter(str(tmp_path / name), adapter_name=name)
    for name, expected in vectors.items():
        encoder.set_adapter(name)
        assert encoder.active_adapters() == [name]
        assert distance(encoder.encode(rows), expected) <= 1e-6
    encoder.disable_adapters()
    assert distance(encoder.encode(rows), before) <= 1e-6


def test_the_packages_processor_asks_for_no_trust(
    repository: Path, tiny: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or "n")
    tiny[1].save_pretrained(tmp_path / "alone")  # without a model's config.json
    for place in (repository, tmp_path / "alone"):
        processor = ViPolyQwenProcessor.from_pretrained(place)
        assert processor.task_prefixes == tiny[1].task_prefixes
    assert not asked
