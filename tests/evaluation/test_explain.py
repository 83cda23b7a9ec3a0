"""α put back on characters, patches and seconds; the page and what it refuses."""

import base64
import copy
import json
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import random_audio, random_image, save_tiny_model
from PIL import Image
from sentence_transformers import SentenceTransformer

from vipolyqwen.data.sides import Side
from vipolyqwen.data.templates import image_uri
from vipolyqwen.evaluate_vipolyqwen import main
from vipolyqwen.evaluation.explain import explain, read_input, worst
from vipolyqwen.evaluation.figures import heat_map, shaded_tokens, views
from vipolyqwen.evaluation.metrics import query_ranks
from vipolyqwen.evaluation.pooling_weights import PoolingWeights, TokenSpan, inspect_pooling
from vipolyqwen.evaluation.search import read_pairs, searches

SCRIPT = "<script>alert('ở')</script> & <image>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `model/`, a wide and a tall image, audio, and pairs.jsonl."""
    folder = tmp_path_factory.mktemp("explain")
    save_tiny_model(folder / "model", image_side=112)
    rng = np.random.default_rng(0)
    random_image(rng, 120, 60).save(folder / "wide.png")
    random_image(rng, 56, 112).save(folder / "tall.png")
    soundfile.write(folder / "speech.wav", random_audio(rng, 0.5)["array"], 16_000)
    rows = [{"task": "instr", "a": f"{SCRIPT} {i}", "b": f"answer {i} {SCRIPT}"} for i in range(6)]
    rows.append({"task": "ocr", "a": "Gì?", "b": "một", "images": ["wide.png"]})
    rows.append({"task": "audio", "a": "", "b": "hai", "audio": "speech.wav"})
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def embedder(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder / "model"), trust_remote_code=True)


def inside(embedder: SentenceTransformer, given: str) -> PoolingWeights:
    item = read_input(given)
    return inspect_pooling(embedder[0].auto_model, embedder[0].processor, item.side, item.task)


def total(pooled: PoolingWeights) -> float:
    return sum(span.weight for span in pooled.spans)


def test_text_is_shown_whole_and_its_weights_sum_to_one(embedder: SentenceTransformer) -> None:
    text = "Nguyễn Ưỡn ẫm 草地 🙂 \ufffd\n<ocr> end"
    pooled = inside(embedder, text)
    assert total(pooled) == pytest.approx(1, abs=1e-6)
    assert "".join(span.text for span in pooled.spans if span.kind == "text") == text
    # letters that the tiny tokenizer has no token for are several tokens, but one span
    assert pooled.positions > len(pooled.spans)
    assert [span.text for span in pooled.spans if span.kind == "special"] == ["<|im_end|>"]


def test_spans_hold_the_weights_that_the_model_returns(embedder: SentenceTransformer) -> None:
    batch = embedder[0].processor(text="Hai ngôi sao", return_tensors="pt")
    weights = embedder[0].auto_model(**batch, output_pooling_weights=True).pooling_weights[0].detach()
    pooled = inside(embedder, "Hai ngôi sao")
    assert pooled.spans[-1].weight == pytest.approx(weights[-1].item())
    assert pooled.spans[0].weight == pytest.approx(weights[0].item())
    assert pooled.positions == len(weights)


def test_a_task_is_a_special_token_at_the_front(embedder: SentenceTransformer) -> None:
    pooled = inside(embedder, '{"text": "Gì?", "task": "ocr"}')
    assert (pooled.spans[0].kind, pooled.spans[0].text) == ("special", "<ocr>")
    assert torch.equal(pooled.vector, torch.from_numpy(embedder.encode("Gì?", prompt_name="ocr")))


def test_an_image_has_the_grid_of_its_merged_patches(embedder: SentenceTransformer, folder: Path) -> None:
    pooled = inside(embedder, str(folder / "wide.png"))
    batch = embedder[0].processor(images=Image.open(folder / "wide.png"), return_tensors="pt")
    grid = batch["image_grid_thw"][0, 1:] // 2
    (weights,) = pooled.images
    assert weights.shape == tuple(grid.tolist())
    assert weights.shape[1] > weights.shape[0]
    assert [span.kind for span in pooled.spans] == ["special", "image", "special", "special"]
    assert pooled.spans[1].weight == pytest.approx(weights.sum())
    assert total(pooled) == pytest.approx(1, abs=1e-6)
    assert sum(pooled.shares().values()) == pytest.approx(1, abs=1e-6)


def test_two_images_in_one_input_keep_their_own_patches(embedder: SentenceTransformer, folder: Path) -> None:
    paths = [str(folder / "wide.png"), str(folder / "tall.png")]
    given = {"image": paths, "text": "Hình nào?"}
    pooled = inside(embedder, json.dumps(given))
    (wide, tall) = pooled.images
    assert wide.shape[1] > wide.shape[0]
    assert tall.shape[0] > tall.shape[1]
    assert total(pooled) == pytest.approx(1, abs=1e-6)
    assert list(pooled.shares()) == ["special tokens", "image 1", "image 2", "text"]
    batch = embedder[0].processor(text=["Hình nào?"], images=[paths], return_tensors="pt")
    weights = embedder[0].auto_model(**batch, output_pooling_weights=True).pooling_weights[0].detach()
    slots = batch["input_ids"][0] == embedder[0].processor.image_token_id
    assert np.allclose(np.concatenate([wide.ravel(), tall.ravel()]), weights[slots].numpy())


@pytest.mark.parametrize(
    "order", [("image", "text"), ("text", "image"), ("audio", "text"), ("text", "image", "audio")]
)
def test_what_is_explained_is_what_is_embedded(
    embedder: SentenceTransformer, folder: Path, order: tuple[str, ...]
) -> None:
    values = {"image": str(folder / "tall.png"), "text": "a <image> b", "audio": str(folder / "speech.wav")}
    given = {key: values[key] for key in order}
    pooled = inside(embedder, json.dumps(given))
    assert torch.allclose(pooled.vector, torch.from_numpy(embedder.encode(given)), atol=1e-6)


def test_audio_with_text_shows_both_routes(embedder: SentenceTransformer, folder: Path) -> None:
    given = json.dumps({"audio": str(folder / "speech.wav"), "text": "Ai nói?"})
    pooled = inside(embedder, given)
    assert total(pooled) == pytest.approx(1, abs=1e-6)
    assert pooled.audio.weights.sum() == pytest.approx(1, abs=1e-6)
    captions = [caption for caption, _ in views(pooled, read_input(given).side)]
    assert [caption.split(":")[0] for caption in captions] == ["Text route", "Audio route"]


def test_frames_lie_within_the_seconds_of_the_audio(embedder: SentenceTransformer, folder: Path) -> None:
    pooled = inside(embedder, str(folder / "speech.wav"))
    audio = pooled.audio
    assert pooled.spans == []
    assert len(audio.samples) == 8000
    assert 0 < audio.starts[0] < audio.seconds
    assert np.allclose(np.diff(audio.starts), audio.seconds)
    assert 0.5 - 2 * audio.seconds < audio.starts[-1] + audio.seconds < 0.5
    (_, figure) = views(pooled, Side(audio=str(folder / "speech.wav")))[0]
    assert figure.count("<rect") == len(audio.weights)
    assert ">0.5 s</text>" in figure


def test_frames_of_later_windows_lie_at_their_seconds(embedder: SentenceTransformer, folder: Path) -> None:
    processor = copy.copy(embedder[0].processor)
    processor.max_audio_seconds = 0.2
    audio = inspect_pooling(embedder[0].auto_model, processor, Side(audio=str(folder / "speech.wav"))).audio
    per_window = [((audio.starts >= begin) & (audio.starts < begin + 0.2)).sum() for begin in (0, 0.2, 0.4)]
    assert sum(per_window) == len(audio.weights) == len(audio.starts) and min(per_window) > 2
    assert audio.weights.sum() == pytest.approx(1, abs=1e-6)
    whole = inside(embedder, str(folder / "speech.wav")).audio
    np.testing.assert_allclose(audio.samples, whole.samples, atol=1e-5)
    first = audio.starts[0]
    np.testing.assert_allclose(audio.starts[np.cumsum([0, *per_window[:-1]])], [first, first + 0.2, first + 0.4])


def test_the_overlay_has_a_pixel_for_each_patch_and_is_strongest_where_the_weight_is() -> None:
    html = heat_map(Image.new("RGB", (40, 20)), np.array([[0.1, 0.4, 0.0], [0.2, 0.0, 0.1]], dtype=np.float32))
    encoded = re.search(r'class="overlay"[^>]*base64,([^"]+)', html)[1]
    overlay = np.asarray(Image.open(BytesIO(base64.b64decode(encoded))))
    assert overlay.shape == (2, 3, 4)
    assert overlay[..., 3].tolist() == [[51, 204, 0], [102, 0, 51]]  # 0.8 of 255 at the largest


def test_a_large_image_is_scaled_down() -> None:
    uri = image_uri(Image.new("RGB", (2000, 1000)), side=300)
    assert uri.startswith("data:image/jpeg")
    assert Image.open(BytesIO(base64.b64decode(uri.split(",")[1]))).size == (300, 150)


def test_the_strongest_token_is_the_most_visible_and_text_is_escaped() -> None:
    html = shaded_tokens([TokenSpan("text", "a", 0.25), TokenSpan("text", "<b>", 0.5), TokenSpan("image", "1", 0.25)])
    assert '--a:0.500" title="α = 0.2500">a</span>' in html
    assert '--a:1.000" title="α = 0.5000">&lt;b&gt;</span>' in html
    assert "image 1: 0.250" in html


def test_the_page_is_self_contained_and_escapes_what_users_wrote(embedder: SentenceTransformer, folder: Path) -> None:
    pairs = folder / "pairs.jsonl"
    inputs = [read_input(given) for given in (SCRIPT, str(folder / "wide.png"), str(folder / "speech.wav"))]
    page = explain(embedder, f"a{SCRIPT}", inputs, pairs, pairs)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|https?://""", page)
    assert page.count("<h2>Input") == 3
    assert page.count("<h3>Nearest neighbours") == 3
    for kind in ("text, of 14", "text + image, of 1", "audio, of 1"):
        assert page.count(f">{kind}</p>") == 3
    assert page.count("data:audio/flac") >= 4  # the input, and a neighbour of each
    assert "sums to 1" in page
    assert "prefers-color-scheme:dark" in page


def test_the_nearest_neighbour_of_a_corpus_text_is_itself(embedder: SentenceTransformer, folder: Path) -> None:
    page = explain(embedder, "m", [read_input("một")], folder / "pairs.jsonl", None)
    first = page.split('class="hit"')[1]
    assert "cosine 1.000" in first
    assert ">một</span>" in first


def test_failures_are_listed_worst_first(embedder: SentenceTransformer, folder: Path) -> None:
    pairs, min_score = read_pairs(folder / "pairs.jsonl")
    search = searches(pairs, min_score)[0]
    ranks = query_ranks(search.embed_queries(embedder), search.embed_candidates(embedder), search.relevant)
    table = worst(embedder, search)
    assert [row["rank"] for row in table["rows"]] == sorted((int(r) for r in ranks if r > 1), reverse=True)
    assert len(table["rows"]) > 1
    assert (table["queries"], table["candidates"], table["missed"]) == (6, 6, len(table["rows"]))
    for row in table["rows"]:
        number = re.search(r" (\d)</span>", row["query"])[1]
        assert f"answer {number}" in row["right"][1]
        assert row["found"][0][0] >= row["right"][0] - 1e-6
        assert all(f"answer {number}" not in html for _, html in row["found"])


def test_a_search_without_failures_says_so(embedder: SentenceTransformer, folder: Path) -> None:
    path = folder / "one.jsonl"
    path.write_text(json.dumps({"task": "instr", "a": "only", "b": "one"}))
    page = explain(embedder, "m", [], None, path)
    assert "0 of 1 queries do not rank their answer first" in page
    assert "<table" not in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a/missing.png", "'a/missing.png' looks like the path of an image"),
        ('{"image": "missing.png"}', "no file 'missing.png'"),
        ('{"audio": "missing.wav", "text": "a"}', "no file 'missing.wav'"),
        ("{'image': 'a.png'}", "begins like JSON but is invalid"),
        ('{"picture": "a.png"}', "has the keys picture"),
        ('{"task": "ocr"}', "has the keys task"),
        ('{"image": [1]}', "texts and paths are strings"),
        ('{"text": null}', "texts and paths are strings"),
        (__file__, "neither a text nor an image or audio file"),
        (" ", "neither a text nor an image or audio file"),
    ],
)
def test_an_unreadable_input_is_an_error(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_input(given)


def test_the_command_writes_the_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "new" / "page.html"
    main([str(folder / "model"), "--explain", "Xin chào", str(folder / "tall.png"), "--out", str(out)])
    assert out.read_text(encoding="utf-8").count("<h2>Input") == 2
    assert "page.html" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(folder / "model"), "--explain"])
    assert "at least one INPUT" in capsys.readouterr().err
