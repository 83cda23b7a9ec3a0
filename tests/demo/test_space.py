"""The page of app.py: items, uploads and refusals; clicks and uploads in a browser; a Space's folder."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers import TEXTS, random_audio, random_image, save_tiny_model

from vipolyqwen.fingerprint_vipolyqwen import write_fingerprint
from vipolyqwen.publishing.repository import PublishError
from vipolyqwen.publishing.space import write_space
from vipolyqwen.serving.loading import load_model

gradio = pytest.importorskip("gradio")

from vipolyqwen.demo.space import CSS, NO_PROMPT, Page, build_page, embed_items, read_files, read_rows  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, rows of all modalities, and files to upload, one of them broken."""
    folder = tmp_path_factory.mktemp("space")
    save_tiny_model(folder / "model")
    write_fingerprint(folder / "model")
    rng = np.random.default_rng(0)
    random_image(rng).save(folder / "a.png")
    soundfile.write(folder / "a.wav", random_audio(rng)["array"], 16_000)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "lines.txt").write_text("một\n\n<image> hai\n", encoding="utf-8")
    rows = [{"id": f"r{n}", "text": text, "image": "a.png", "audio": "a.wav"} for n, text in enumerate(TEXTS[:2])]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    model = load_model(str(folder / "model"))
    return Page(model, embed_items(model.encoder, read_rows(folder / "rows.jsonl", 2)), "Try it")


def test_each_part_of_a_row_is_an_item(page: Page) -> None:
    assert page.corpus.counts() == "2 images, 2 audio, 2 texts"
    assert page.corpus.vectors.shape == (6, 1024)
    assert sorted(set(page.corpus.names)) == ["r0", "r1"]


def test_a_query_finds_all_modalities_and_itself_first(page: Page, folder: Path) -> None:
    found, looked = page.search(TEXTS[1], None, None, NO_PROMPT, None)
    assert all(f"<h3>{name}</h3>" in found for name in ("Images", "Audio", "Texts"))
    assert '<span class="cosine">1.000</span> · #1' in found
    assert looked.count("<figure>") == 1
    found, looked = page.search("<b>câu</b> <image>", str(folder / "a.png"), str(folder / "a.wav"), "ocr", None)
    assert "Query: text + image + audio" in found and looked.count("<figure>") == 3
    assert "<b>" not in looked + found


def test_nothing_and_broken_files_are_answered(page: Page, folder: Path) -> None:
    assert "Type a text" in page.search("  ", None, None, NO_PROMPT, None)[0]
    assert "cannot be embedded" in page.search("", str(folder / "broken.png"), None, NO_PROMPT, None)[0]


def test_uploaded_files_become_the_corpus(page: Page, folder: Path) -> None:
    (folder / "page.pdf").write_bytes(b"%PDF")
    paths = [str(folder / name) for name in ("a.png", "a.wav", "lines.txt", "broken.png", "page.pdf")]
    corpus, report = page.upload(paths)
    assert corpus is not None and corpus.counts() == "1 images, 1 audio, 2 texts"
    assert corpus.names == ["a.png", "a.wav", "lines.txt:1", "lines.txt:3"]
    assert "broken.png" in report and ".pdf" in report and "Searching 1 images" in report
    assert "lines.txt:3" in page.search("<image> hai", None, None, NO_PROMPT, corpus)[0]
    for nothing in (None, [], [str(folder / "broken.png")]):
        assert page.upload(nothing)[0] is None
    assert page.reset()[0] is None


def test_uploads_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipolyqwen.demo.space.MAX_FILES", 1)
    monkeypatch.setattr("vipolyqwen.demo.space.MAX_LINES", 1)
    items, refused = read_files([str(folder / "lines.txt"), str(folder / "a.png")])
    assert [name for name, _ in items] == ["lines.txt:1"]
    assert "2 files" in refused[0] and "2 lines" in refused[1]


@pytest.fixture
def browser_page(page: Page) -> Iterator[tuple[Any, str]]:
    """A function that opens the page in headless Chromium at a size, and its address."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    blocks = build_page(page)
    _, url, _ = blocks.launch(css=CSS, prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            yield browser, url
            browser.close()
    finally:
        blocks.close()


@pytest.mark.slow
def test_clicks_and_uploads_in_a_browser(browser_page: tuple[Any, str], folder: Path) -> None:
    browser, url = browser_page
    opened = browser.new_page(viewport={"width": 390, "height": 844})  # a phone
    opened.set_default_timeout(60_000)
    opened.goto(url)
    opened.locator("#query_text textarea").fill(TEXTS[1])
    opened.locator("#search").click()
    opened.locator("#results .hit").first.wait_for()
    assert opened.locator("#results h3").all_inner_texts() == ["Images", "Audio", "Texts"]
    assert "1.000 · #1" in opened.locator("#results").inner_text()
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390  # nothing is wider than the phone
    opened.locator("#looked button").first.click()
    opened.locator("#pooling .tokens").wait_for()
    opened.locator("#own button").first.click()
    opened.locator("#files input[type=file]").set_input_files([str(folder / "a.png"), str(folder / "lines.txt")])
    opened.locator("#files").get_by_text("lines").first.wait_for()
    opened.locator("#use").click()
    opened.get_by_text("Searching 1 images, 0 audio, 2 texts of your files.").wait_for()
    opened.locator("#query_image input[type=file]").set_input_files(str(folder / "a.png"))
    opened.locator("#query_image img").first.wait_for()
    opened.locator("#query_text textarea").fill("")
    opened.locator("#search").click()
    opened.get_by_text("Query: image. Searched: 1 images").wait_for()
    assert "1.000 · #1" in opened.locator("#results").inner_text()
    opened.locator("#pooling .heat").wait_for()


def test_a_space_holds_the_app_and_all_that_it_imports(folder: Path, tmp_path: Path) -> None:
    space = tmp_path / "space"
    write_space(space, "you/viPolyQwen-mine", "v2")
    settings = json.loads((space / "space.json").read_text(encoding="utf-8"))
    assert settings == {"model": "you/viPolyQwen-mine", "revision": "v2", "title": "viPolyQwen-mine"}
    card = (space / "README.md").read_text(encoding="utf-8")
    assert "sdk: gradio" in card and 'models: ["you/viPolyQwen-mine"]' in card
    assert "gradio" in (space / "requirements.txt").read_text(encoding="utf-8")
    with pytest.raises(PublishError, match="space exists"):
        write_space(space, "you/viPolyQwen-mine")
    write_space(tmp_path / "other", "mine", repository=folder / "model")
    assert (tmp_path / "other/model/config.json").is_file()


@pytest.mark.slow
def test_the_app_of_a_space_runs_the_code_beside_it(tmp_path: Path) -> None:
    write_space(tmp_path / "space", "you/viPolyQwen-mine", "v2")
    program = (
        "import runpy, sys; sys.path.insert(0, '.'); app = runpy.run_path('app.py'); import vipolyqwen.demo.space as v"
    )
    program += "; o = app['read_options']([]); print(v.__file__, o.model, o.revision, o.trust_remote_code)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "space", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(tmp_path / "space/vipolyqwen/demo/space.py"),
        "you/viPolyQwen-mine",
        "v2",
        "True",
    ]
