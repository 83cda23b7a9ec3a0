"""The page of `app.py`: a query of text, image and audio, the nearest of a corpus, and where the pooling looked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio  # pyright: ignore[reportMissingImports]
import torch
from markupsafe import Markup
from sentence_transformers import SentenceTransformer

from ..data.corpus import CorpusRow, read_corpus
from ..data.templates import templates_of
from ..evaluation.explain import AUDIO_ENDINGS, IMAGE_ENDINGS, literal_side
from ..evaluation.figures import STYLE, show, views
from ..evaluation.pooling_weights import inspect_pooling
from ..evaluation.search import Side, embed
from ..serving.loading import LoadedModel

TEXT_ENDINGS = (".txt",)
KINDS = {"image": "Images", "audio": "Audio", "text": "Texts"}
SHOWN = 4  # results of each kind
BATCH = 32
MAX_FILES, MAX_LINES, MAX_CHARACTERS = 200, 1000, 4000
EXAMPLES = "bốn bông hoa đỏ lớn trên trời · three small blue balls on the sand · 沙滩上有三个蓝色的小球"
NO_PROMPT = "none: the general embedding"
SHOW_RESULTS = "() => document.querySelector('#results').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
TEMPLATES = templates_of(Path(__file__).parent)
CSS = str(STYLE) + TEMPLATES.get_template("space.css.jinja").render()


@dataclass
class SearchedCorpus:
    """Items that a query searches.

    Attributes:
        sides: the items, each of one modality.
        names: their ids or file names.
        vectors: (N, D) float32 unit vectors.
        refused: what could not be embedded, and why.
    """

    sides: list[Side] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    vectors: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    refused: list[str] = field(default_factory=list)

    def counts(self) -> str:
        """Says how many items of each kind there are."""
        kinds = [side.kind for side in self.sides]
        return ", ".join(f"{kinds.count(kind)} {name.lower()}" for kind, name in KINDS.items()) if kinds else "nothing"

    def nearest(self, vector: torch.Tensor) -> dict[str, list[tuple[int, float, str, Markup]]]:
        """Returns heading -> overall rank, cosine, name and rendered item of the nearest items of each kind."""
        found: dict[str, list[tuple[int, float, str, Markup]]] = {}
        if not self.sides:
            return found
        cosines = self.vectors @ vector
        for rank, place in enumerate(cosines.argsort(descending=True, stable=True).tolist(), start=1):
            of_kind = found.setdefault(KINDS[self.sides[place].kind], [])
            if len(of_kind) < SHOWN:
                of_kind.append((rank, cosines[place].item(), self.names[place], show(self.sides[place], width=150)))
        return {name: found[name] for name in KINDS.values() if name in found}


def embed_items(encoder: SentenceTransformer, items: Sequence[tuple[str, Side]]) -> SearchedCorpus:
    """Embeds named items of one modality each; one that cannot be read is refused and costs no other one."""
    corpus, vectors = SearchedCorpus(), []
    ordered = sorted(items, key=lambda item: list(KINDS).index(item[1].kind))  # a batch pads least within a kind
    for start in range(0, len(ordered), BATCH):
        group = ordered[start : start + BATCH]
        try:
            vectors.append(embed(encoder, [side for _, side in group]))
        except (ValueError, OSError) as error:
            if len(group) == 1:
                corpus.refused.append(f"{group[0][0]}: {error}")
                continue
            parts = [embed_items(encoder, [item]) for item in group]
            corpus.refused += [reason for part in parts for reason in part.refused]
            group = [item for item, part in zip(group, parts, strict=True) if part.sides]
            vectors += [part.vectors for part in parts if part.sides]
        corpus.names += [name for name, _ in group]
        corpus.sides += [side for _, side in group]
    corpus.vectors = torch.cat(vectors) if vectors else corpus.vectors
    return corpus


def read_rows(path: Path, limit: int) -> list[tuple[str, Side]]:
    """Reads the first rows of a file as `embed_vipolyqwen.py` does; each text, image and recording is an item."""
    _, units = read_corpus({"path": str(path)})
    items: list[tuple[str, Side]] = []
    rows = (row for unit in units() for row in unit.read())
    for row, _ in zip((row for row in rows if isinstance(row, CorpusRow)), range(limit), strict=False):
        parts = [literal_side(row.text)] if row.text.strip() else []
        parts += [Side(images=(image,)) for image in row.images]
        parts += [Side(audio=row.audio)] if row.audio is not None else []
        items += [(row.id, part) for part in parts]
    return items


def read_files(paths: Sequence[str]) -> tuple[list[tuple[str, Side]], list[str]]:
    """Reads uploaded files: images, audio, and texts, one a line; returns the items and what was refused."""
    items: list[tuple[str, Side]] = []
    refused = [f"{len(paths)} files were given; the first {MAX_FILES} are used."] if len(paths) > MAX_FILES else []
    for path in map(Path, paths[:MAX_FILES]):
        ending = path.suffix.lower()
        if ending in IMAGE_ENDINGS:
            items.append((path.name, Side(images=(str(path),))))
        elif ending in AUDIO_ENDINGS:
            items.append((path.name, Side(audio=str(path))))
        elif ending in TEXT_ENDINGS:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
            kept = [(n, line) for n, line in enumerate(lines, start=1) if line]
            if len(kept) > MAX_LINES:
                refused.append(f"{path.name}: it has {len(kept)} lines; the first {MAX_LINES} are used.")
            items += [(f"{path.name}:{n}", literal_side(line[:MAX_CHARACTERS])) for n, line in kept[:MAX_LINES]]
        else:
            known = ", ".join((*IMAGE_ENDINGS, *AUDIO_ENDINGS, *TEXT_ENDINGS))
            refused.append(f"{path.name}: files that end in {ending or 'nothing'} are not read; use {known}.")
    return items, refused


@dataclass
class Page:
    """What the page does.

    Attributes:
        model: the model.
        corpus: what is searched until files are uploaded.
        title: of the page.
    """

    model: LoadedModel
    corpus: SearchedCorpus
    title: str = "viPolyQwen"

    def search(
        self, text: str, image: str | None, audio: str | None, prompt: str, uploaded: SearchedCorpus | None
    ) -> tuple[str, str]:
        """Returns the results and the pooling weights as HTML."""
        side = literal_side(text.strip()[:MAX_CHARACTERS], () if image is None else (image,), audio)
        if not side.modalities:
            return _message("Type a text, or drop an image or a recording."), ""
        encoder = self.model.encoder
        try:
            pooled = inspect_pooling(
                encoder.transformers_model, encoder.processor, side, None if prompt == NO_PROMPT else prompt
            )
            figures = views(pooled, side)
        except (ValueError, OSError) as error:
            return _message(f"This cannot be embedded: {error}"), ""
        corpus = self.corpus if uploaded is None else uploaded
        template = TEMPLATES.get_template("space_results.html.jinja")
        found = template.render(kinds=corpus.nearest(pooled.vector), kind=side.kind, counts=corpus.counts())
        looked = TEMPLATES.get_template("space_pooling.html.jinja").render(figures=figures, shares=pooled.shares())
        return found, looked

    def upload(self, paths: list[str] | None) -> tuple[SearchedCorpus | None, str]:
        """Embeds uploaded files; returns the corpus and a report."""
        items, refused = read_files(paths or [])
        corpus = embed_items(self.model.encoder, items)
        lines = [f"Searching {corpus.counts()} of your files.", *refused, *corpus.refused]
        if not corpus.sides:
            lines[0] = "None of your files can be searched, so the given corpus stays."
        return corpus if corpus.sides else None, _message("\n".join(lines))

    def reset(self) -> tuple[None, str]:
        """Returns to the given corpus."""
        return None, _message(f"Searching the given corpus: {self.corpus.counts()}.")


def _message(text: str) -> str:
    return str(Markup('<p class="message">{}</p>').format(text))


def build_page(page: Page) -> gradio.Blocks:
    """Returns the page; `launch(css=CSS, …)` serves it."""
    prompts = [NO_PROMPT, *page.model.encoder.processor.task_prefixes]
    intro = TEMPLATES.get_template("space_intro.md.jinja").render(page=page, counts=page.corpus.counts())
    with gradio.Blocks(title=page.title, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gradio.Markdown(intro)
        uploaded = gradio.State(None)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                text = gradio.Textbox(
                    label="Text: Tiếng Việt, English, 中文",
                    placeholder=EXAMPLES,
                    lines=2,
                    max_length=MAX_CHARACTERS,
                    elem_id="query_text",
                )
                image = gradio.Image(
                    label="Image", type="filepath", format="png", sources=["upload"], height=180, elem_id="query_image"
                )
                audio = gradio.Audio(
                    label="Audio", type="filepath", sources=["upload", "microphone"], elem_id="query_audio"
                )
                prompt = gradio.Dropdown(prompts, value=NO_PROMPT, label="Prompt", elem_id="prompt")
                go = gradio.Button("Search", variant="primary", elem_id="search")
            with gradio.Column(scale=3, min_width=300):
                results = gradio.HTML(_message("Results appear here."), elem_id="results")
        with gradio.Accordion("Where the pooling looked", open=False, elem_id="looked"):
            pooling = gradio.HTML(_message("Search first."), elem_id="pooling")
        with gradio.Accordion("Search your own files", open=False, elem_id="own"):
            files = gradio.File(label="Images, audio, .txt", file_count="multiple", type="filepath", elem_id="files")
            with gradio.Row():
                use = gradio.Button("Search these files", elem_id="use")
                back = gradio.Button("Search the given corpus again", elem_id="back")
            status = gradio.HTML(elem_id="status")
        _connect(page, (text, image, audio, prompt, uploaded), (results, pooling), (go, files, use, back, status))
    return blocks


def _connect(page: Page, asked: tuple[Any, ...], shown: tuple[Any, ...], controls: tuple[Any, ...]) -> None:
    """Lets the controls call the page, one event at a time: there is one model."""
    text, uploaded = asked[0], asked[-1]
    go, files, use, back, status = controls
    one = {"concurrency_id": "model", "concurrency_limit": 1}
    searched = gradio.on([go.click, text.submit], page.search, list(asked), list(shown), api_name="search", **one)
    searched.then(None, js=SHOW_RESULTS)
    use.click(page.upload, [files], [uploaded, status], api_name=False, **one)
    back.click(page.reset, [], [uploaded, status], api_name=False)
