"""Loads page templates (`*.jinja`), and shows media on a page that needs no other file."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import soundfile
from markupsafe import Markup
from PIL import Image

from .markdown import escaped

MAX_IMAGE_SIDE = 448  # pixels; larger images are scaled down and stored as JPEG


def templates_of(folder: Path) -> jinja2.Environment:
    """Returns the templates of a folder, which escape values for HTML or Markdown by the name of the template."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        finalize=escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def data_uri(content: bytes, media_type: str) -> str:
    """Returns the content of a file as a `data:` URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image_uri(image: Image.Image, side: int = MAX_IMAGE_SIDE) -> str:
    """Returns an image as a PNG `data:` URI; one larger than `side` pixels is scaled down and stored as JPEG."""
    buffer = BytesIO()
    if max(image.size) <= side:
        image.save(buffer, "PNG")
        return data_uri(buffer.getvalue(), "image/png")
    small = image.convert("RGB")
    small.thumbnail((side, side))
    small.save(buffer, "JPEG", quality=85)
    return data_uri(buffer.getvalue(), "image/jpeg")


def audio_player(audio: dict[str, Any]) -> Markup:
    """Returns an HTML player of `{"array", "sampling_rate"}`."""
    buffer = BytesIO()
    soundfile.write(buffer, audio["array"], audio["sampling_rate"], format="FLAC", subtype="PCM_16")
    return Markup('<audio controls src="{}"></audio>').format(data_uri(buffer.getvalue(), "audio/flac"))
