"""Pictures, sounds and pooling weights as HTML that needs nothing else: for pages of one file.

In every figure a position is the stronger coloured the larger its α, against the largest one there.
"""

import base64
from io import BytesIO
from typing import Any

import numpy as np
import soundfile
from markupsafe import Markup
from PIL import Image

from ..media_vipolyqwen import load_image
from .pooling_weights import Attention, Piece, Sound
from .search import Side

HEAT = (232, 89, 12)
STRONGEST = 0.8  # opacity over the strongest patch: what is under it stays visible
PICTURE_SIDE = 448  # pixels; larger pictures are scaled down, and as JPEG

STYLE = Markup("""
:root{color-scheme:light dark;--ground:#fff;--ink:#222;--soft:#666;--line:#d5d5d5;--heat:232 89 12;--most:.75;
--good:#2b8a3e;--wave:#343a40}
@media (prefers-color-scheme:dark){:root{--ground:#15171a;--ink:#e8e8e8;--soft:#a5a8ad;--line:#43474d;
--heat:255 122 46;--most:.6;--good:#51cf66;--wave:#ced4da}}
body{background:var(--ground);color:var(--ink)}
.tokens{white-space:pre-wrap;line-height:2;overflow-wrap:anywhere}
.tokens span{background:rgb(var(--heat)/calc(var(--a)*var(--most)));padding:.15em 0;border-radius:2px}
.tokens .special,.tokens .slot{border:1px dashed var(--soft);padding:.05em .3em;margin:0 .15em;
font-size:.82em;white-space:nowrap}
.tokens .slot{border-style:solid}
.heat{display:flex;gap:.6em;flex-wrap:wrap;align-items:flex-start}
.heat div{position:relative;line-height:0}.heat div img:first-child{filter:grayscale(1)}
.heat .veil{position:absolute;inset:0;width:100%;height:100%;image-rendering:pixelated}
.wave{max-width:100%;height:auto;display:block}.wave .frame{fill:rgb(var(--heat))}
.wave path{stroke:var(--wave)}.wave text{fill:var(--soft);font-size:11px}.wave line{stroke:var(--soft)}
.side audio{height:32px;width:220px;max-width:100%;display:block;margin:.2em 0}
.side img{max-width:100%;height:auto;border-radius:3px;margin:.1em .2em .1em 0}
.side .said{display:block;white-space:pre-wrap;overflow-wrap:anywhere}
""")


def data_uri(content: bytes, media_type: str) -> str:
    """The content of a file as an address."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def picture_uri(image: Image.Image, side: int = PICTURE_SIDE) -> str:
    """An image as PNG; one that is larger than `side` pixels scaled down to that, as JPEG."""
    buffer = BytesIO()
    if max(image.size) <= side:
        image.save(buffer, "PNG")
        return data_uri(buffer.getvalue(), "image/png")
    small = image.convert("RGB")
    small.thumbnail((side, side))
    small.save(buffer, "JPEG", quality=85)
    return data_uri(buffer.getvalue(), "image/jpeg")


def player(sound: dict[str, Any]) -> Markup:
    """A sound that can be played."""
    buffer = BytesIO()
    soundfile.write(buffer, sound["array"], sound["sampling_rate"], format="FLAC", subtype="PCM_16")
    return Markup('<audio controls src="{}"></audio>').format(data_uri(buffer.getvalue(), "audio/flac"))


def show(side: Side, width: int = 120) -> Markup:
    """One side of a pair: its pictures, its sound, its text."""
    parts = [
        Markup('<img width="{}" alt="picture {}" src="{}"> ').format(width, number, picture_uri(load_image(image)))
        for number, image in enumerate(side.images, start=1)
    ]
    if side.audio is not None:
        parts.append(player(side.sound()))
    if side.text.strip():
        parts.append(Markup('<span class="said">{}</span>').format(side.text.strip()))
    return Markup('<div class="side">{}</div>').format(Markup("").join(parts))


def shaded_tokens(pieces: list[Piece]) -> Markup:
    """The text route from first to last position; an image is a slot with the sum of its patches."""
    largest = max((piece.weight for piece in pieces if piece.kind != "image"), default=0.0) or 1.0
    shown = []
    for piece in pieces:
        if piece.kind == "image":
            slot = Markup('<span class="slot" style="--a:0">image {}: {:.3f}</span>')
            shown.append(slot.format(piece.text, piece.weight))
            continue
        name = Markup(' class="special"') if piece.kind == "special" else ""
        text = piece.text.replace("\n", "↵\n")
        span = Markup('<span{} style="--a:{:.3f}" title="α = {:.4f}">{}</span>')
        shown.append(span.format(name, piece.weight / largest, piece.weight, text))
    return Markup('<div class="tokens">{}</div>').format(Markup("").join(shown))


def heat_map(image: Image.Image, weights: np.ndarray, width: int = 300) -> Markup:
    """The image, and in grey under a veil with one pixel for each merged patch: (rows, columns) `weights`."""
    veil = np.zeros((*weights.shape, 4), dtype=np.uint8)
    veil[..., :3] = HEAT
    veil[..., 3] = np.round(255 * STRONGEST * weights / (weights.max() or 1))
    template = (
        '<div class="heat"><img width="{w}" alt="as given" src="{u}"><div><img width="{w}" alt="in grey" src="{u}">'
        '<img class="veil" alt="α of {r} × {c} patches" src="{v}"></div></div>'
    )
    rows, columns = weights.shape
    uris = {"u": picture_uri(image), "v": picture_uri(Image.fromarray(veil), side=max(rows, columns))}
    return Markup(template).format(w=width, r=rows, c=columns, **uris)


def shaded_waveform(sound: Sound, width: int = 720, height: int = 90) -> Markup:
    """The waveform over its seconds, on a ground as strong as the α of each frame."""
    seconds = len(sound.samples) / sound.rate
    largest = sound.weights.max() or 1.0
    frames = "".join(
        f'<rect class="frame" x="{width * start / seconds:.2f}" width="{width * sound.seconds / seconds:.2f}" '
        f'height="{height}" fill-opacity="{STRONGEST * weight / largest:.3f}"><title>{start:.2f} s: α = {weight:.4f}'
        "</title></rect>"
        for start, weight in zip(sound.starts, sound.weights, strict=True)
    )
    peaks = [np.abs(part).max() for part in np.array_split(sound.samples, min(width, len(sound.samples)))]
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


def views(attention: Attention, side: Side) -> list[tuple[str, Markup]]:
    """Every figure of one input with its caption: tokens, each image, the waveform.

    Args:
        attention: of `look_inside`.
        side: the input.
    """
    found = []
    if attention.pieces:
        total = sum(piece.weight for piece in attention.pieces)
        caption = f"Text route: {attention.positions} positions, Σα = {total:.3f}; even weights would be "
        found.append((caption + f"{1 / attention.positions:.4f} each", shaded_tokens(attention.pieces)))
    for number, (weights, image) in enumerate(zip(attention.images, side.images, strict=True), start=1):
        row, column = np.unravel_index(weights.argmax(), weights.shape)
        caption = (
            f"Image {number}: {weights.shape[0]} × {weights.shape[1]} patches, Σα = {weights.sum():.3f}, the largest "
            f"{weights.max():.4f} in row {row + 1}, column {column + 1}"
        )
        found.append((caption, heat_map(load_image(image), weights)))
    if attention.sound is not None:
        weights, strongest = attention.sound.weights, attention.sound.weights.argmax()
        caption = (
            f"Audio route: {len(weights)} frames of {1000 * attention.sound.seconds:.0f} ms, Σα = {weights.sum():.3f}"
            f", the largest {weights[strongest]:.4f} at {attention.sound.starts[strongest]:.2f} s"
        )
        found.append((caption, shaded_waveform(attention.sound)))
    return found
