"""Draws images, audio and pooling weights as self-contained HTML.

In every figure colour strength is proportional to α, relative to the largest α of that figure.
"""

import numpy as np
from markupsafe import Markup
from PIL import Image

from ..data.sides import Side
from ..data.templates import audio_player, image_uri
from ..images_vipolyqwen import load_image
from .pooling_weights import FrameWeights, PoolingWeights, TokenSpan
from .templates import ENVIRONMENT

HEAT = (232, 89, 12)
STRONGEST = 0.8  # opacity over the strongest patch, so that the image stays visible below

STYLE = Markup(ENVIRONMENT.get_template("figures.css.jinja").render())


def show(side: Side, width: int = 120) -> Markup:
    """Renders one side of a pair: its images, audio and text."""
    parts = [
        Markup('<img width="{}" alt="image {}" src="{}"> ').format(width, number, image_uri(load_image(image)))
        for number, image in enumerate(side.images, start=1)
    ]
    if side.audio is not None:
        parts.append(audio_player(side.read_audio()))
    if side.text.strip():
        parts.append(Markup('<span class="said">{}</span>').format(side.text.strip()))
    return Markup('<div class="side">{}</div>').format(Markup("").join(parts))


def shaded_tokens(spans: list[TokenSpan]) -> Markup:
    """Renders the text route from first to last position; an image is a slot with the sum of its patches."""
    largest = max((span.weight for span in spans if span.kind != "image"), default=0.0) or 1.0
    shown = []
    for span in spans:
        if span.kind == "image":
            slot = Markup('<span class="slot" style="--a:0">image {}: {:.3f}</span>')
            shown.append(slot.format(span.text, span.weight))
            continue
        name = Markup(' class="special"') if span.kind == "special" else ""
        text = span.text.replace("\n", "↵\n")
        element = Markup('<span{} style="--a:{:.3f}" title="α = {:.4f}">{}</span>')
        shown.append(element.format(name, span.weight / largest, span.weight, text))
    return Markup('<div class="tokens">{}</div>').format(Markup("").join(shown))


def heat_map(image: Image.Image, weights: np.ndarray, width: int = 300) -> Markup:
    """Renders the image, and a grey copy under an overlay with one pixel per merged patch.

    Args:
        image: of any size.
        weights: (rows, columns) float32, α of the merged patches.
        width: of each copy, in pixels.
    """
    overlay = np.zeros((*weights.shape, 4), dtype=np.uint8)
    overlay[..., :3] = HEAT
    overlay[..., 3] = np.round(255 * STRONGEST * weights / (weights.max() or 1))
    template = (
        '<div class="heat"><img width="{w}" alt="as given" src="{u}"><div><img width="{w}" alt="in grey" src="{u}">'
        '<img class="overlay" alt="α of {r} × {c} patches" src="{v}"></div></div>'
    )
    rows, columns = weights.shape
    uris = {"u": image_uri(image), "v": image_uri(Image.fromarray(overlay), side=max(rows, columns))}
    return Markup(template).format(w=width, r=rows, c=columns, **uris)


def shaded_waveform(audio: FrameWeights, width: int = 720, height: int = 90) -> Markup:
    """Renders the waveform over seconds; the background of each frame is as strong as its α."""
    seconds = len(audio.samples) / audio.rate
    largest = audio.weights.max() or 1.0
    frames = "".join(
        f'<rect class="frame" x="{width * start / seconds:.2f}" width="{width * audio.seconds / seconds:.2f}" '
        f'height="{height}" fill-opacity="{STRONGEST * weight / largest:.3f}"><title>{start:.2f} s: α = {weight:.4f}'
        "</title></rect>"
        for start, weight in zip(audio.starts, audio.weights, strict=True)
    )
    peaks = [np.abs(part).max() for part in np.array_split(audio.samples, min(width, len(audio.samples)))]
    scale = height / 2 / (max(peaks) or 1)
    step = width / len(peaks)
    bars = "".join(
        f"M{step * i:.1f} {height / 2 - p * scale:.1f}V{height / 2 + p * scale:.1f}" for i, p in enumerate(peaks)
    )
    unit = next(unit for unit in (0.1, 0.25, 0.5, 1, 2, 5, 10) if seconds / unit <= 12 or unit == 10)
    ticks = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{height}" y2="{height + 4}"/>'
        f'<text x="{x:.1f}" y="{height + 16}"{_anchor(x, width)}>{tick:g} s</text>'
        for tick in np.round(np.arange(0, seconds + 1e-9, unit), 6)
        for x in [width * tick / seconds]
    )
    view = f'viewBox="0 0 {width} {height + 20}" width="{width}"'
    drawing = f'<svg class="wave" {view}>{frames}<path d="{bars}" fill="none"/>{ticks}</svg>'
    return Markup(drawing)  # numbers only


def _anchor(x: float, width: int) -> str:
    if x < width * 0.02:
        return ""
    return ' text-anchor="end"' if x > width * 0.98 else ' text-anchor="middle"'


def views(pooled: PoolingWeights, side: Side) -> list[tuple[str, Markup]]:
    """Returns every figure of one input with its caption: tokens, each image, the waveform.

    Args:
        pooled: of `inspect_pooling`.
        side: the input that was inspected.
    """
    found = []
    if pooled.spans:
        total = sum(span.weight for span in pooled.spans)
        caption = f"Text route: {pooled.positions} positions, Σα = {total:.3f}; uniform weights would be "
        found.append((caption + f"{1 / pooled.positions:.4f} each", shaded_tokens(pooled.spans)))
    for number, (weights, image) in enumerate(zip(pooled.images, side.images, strict=True), start=1):
        row, column = np.unravel_index(weights.argmax(), weights.shape)
        caption = (
            f"Image {number}: {weights.shape[0]} × {weights.shape[1]} patches, Σα = {weights.sum():.3f}, the largest "
            f"{weights.max():.4f} in row {row + 1}, column {column + 1}"
        )
        found.append((caption, heat_map(load_image(image), weights)))
    if pooled.audio is not None:
        weights, strongest = pooled.audio.weights, pooled.audio.weights.argmax()
        caption = (
            f"Audio route: {len(weights)} frames of {1000 * pooled.audio.seconds:.0f} ms, Σα = {weights.sum():.3f}"
            f", the largest {weights[strongest]:.4f} at {pooled.audio.starts[strongest]:.2f} s"
        )
        found.append((caption, shaded_waveform(pooled.audio)))
    return found
