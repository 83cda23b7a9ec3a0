"""Decodes images: a stated list of formats, transparency on white, within limits that hold before the decoding."""

import importlib
import importlib.util
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .media_vipolyqwen import LIMITS, MAX_ASPECT_RATIO, Limits, open_source, unreadable, unwrap

Image.init()
# Formats that are opened. Others stay closed: Pillow would run Ghostscript for EPS, whatever a file is called.
FORMATS = tuple(
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP") if name in Image.OPEN
)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
ORIENTATION = 0x0112  # EXIF tag, and how to turn an image of each of its values
TURNS = dict(
    enumerate(
        [
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ],
        start=2,
    )
)
STRIP = 2**20  # pixels that are laid on white at a time
MAX_SCANS = 100  # of a JPEG; each of them is a pass over all pixels, and an ordinary file has about 10
MAX_PASSES = 20  # over as many pixels as an image may have
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # the first after the data of a scan
SUBFILE_TYPE = 254  # TIFF tag; its lowest bit marks a smaller copy of another page


def is_pillow_heif_available() -> bool:
    """Returns whether HEIC files can be read."""
    return importlib.util.find_spec("pillow_heif") is not None


def load_image(source: Any, allow_urls: bool | str = False, rescale: bool = True, limits: Limits = LIMITS) -> Any:
    """Opens an image and checks its size and, for an array, the range of its pixels.

    Args:
        source: a path, an open file, the bytes of a file, base64, a data URL, `{"bytes", "path"}`, a PIL image, or an
            array or tensor of 0 … 255, (height, width), (height, width, channels) or (channels, height, width) with
            1 to 4 channels; a URL with `allow_urls`.
        allow_urls: fetch `http(s)://` sources; see `download`.
        rescale: whether the image processor divides by 255; if not, an array may be of 0 … 1.
        limits: bounds of file and pixels.

    Returns:
        An RGB PIL image, turned as its EXIF orientation says and laid on white where it is transparent, with pixels
        rounded to 8 bits; without `rescale` an array of floating-point numbers as (height, width, 3).

    Raises:
        ValueError: the image cannot be read, exceeds the limits or `MAX_ASPECT_RATIO`, has several pages or pixels
            outside the range, or is a URL without `allow_urls`.
    """
    try:
        source = unwrap(source)
        if isinstance(source, (np.ndarray, torch.Tensor)):
            return _from_array(_as_numpy(source), rescale, limits)
        if isinstance(source, Image.Image):
            return _finish(source, limits)
        with open_source(source, allow_urls, limits) as file:
            image = _open_image(file)
            _check_pages(image)
            if isinstance(image, Image.Image):
                _check_scans(image, file, limits)
                _scale_transparency(image)
            return _finish(image, limits)
    except Exception as error:  # noqa: BLE001  Pillow raises nearly every kind for damaged files
        raise unreadable("image", source, error) from error


def image_size(source: Any, limits: Limits = LIMITS) -> tuple[int, int]:
    """Returns width and height of an image file, read from its header.

    Raises:
        ValueError: it cannot be read, or exceeds the limits or `MAX_ASPECT_RATIO`.
    """
    try:
        with open_source(unwrap(source), False, limits) as file:
            image = _open_image(file)
            _check_size(*image.size, limits)
            return image.size
    except Exception as error:  # noqa: BLE001  as above
        raise unreadable("image", source, error) from error


def _open_image(file: BinaryIO) -> Any:
    """Reads the header of an image."""
    head = file.read(32)
    file.seek(0)
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS and b"avif" not in head:
        return _open_heif(file)
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is of none of the formats {', '.join(FORMATS)}; convert it to PNG") from error


def _open_heif(file: BinaryIO) -> Any:
    if not is_pillow_heif_available():
        raise ValueError("it is a HEIC file, which needs the pillow-heif package: pip install pillow-heif")
    return importlib.import_module("pillow_heif").open_heif(file, convert_hdr_to_8bit=True)


def _check_pages(image: Any) -> None:
    """Refuses a TIFF file of several pages, of which only the first would be seen."""
    if not isinstance(image, Image.Image) or image.format != "TIFF":
        return
    for page in range(1, image.n_frames):
        image.seek(page)
        if not image.tag_v2.get(SUBFILE_TYPE, 0) & 1:
            raise ValueError(
                f"it has {image.n_frames} pages; pass the pages that you want as images, such as "
                "{'image': [page.copy() for page in PIL.ImageSequence.Iterator(PIL.Image.open(path))]}"
            )
    image.seek(0)


def _check_scans(image: Image.Image, file: BinaryIO, limits: Limits) -> None:
    """Refuses a progressive JPEG with so many scans that its few bytes would take minutes."""
    if image.format != "JPEG" or not image.info.get("progressive"):
        return
    most = min(MAX_SCANS, MAX_PASSES * limits.image_pixels // max(1, image.width * image.height))
    place = file.tell()
    file.seek(0)
    scans = _count_scans(file.read(), most + 1)
    file.seek(place)
    if scans > most:
        raise ValueError(
            f"it is a JPEG of more than {most} scans, the limit at {image.width}×{image.height}; save it again"
        )


def _count_scans(data: bytes, most: int) -> int:
    """Returns the scans of a JPEG, `most` at most."""
    scans, place = 0, 2
    while scans < most and (marker := JPEG_MARKER.search(data, place)) is not None:
        if marker.group() == b"\xff\xd9":  # the end of the image
            break
        scans += marker.group() == b"\xff\xda"
        place = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2]))
    return scans


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.image_pixels:
        raise ValueError(
            f"{width}×{height} is more than {limits.image_pixels} pixels, the limit `image_pixels`; scale it down"
        )
    if min(width, height) == 0 or max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"it is {width}×{height}; an image needs pixels and an aspect ratio up to {MAX_ASPECT_RATIO}: crop it"
        )


def _finish(image: Any, limits: Limits) -> Image.Image:
    """Decodes an opened image as upright RGB on white."""
    _check_size(*image.size, limits)
    if not isinstance(image, Image.Image):
        return on_white(_eight_bits(image.to_pillow()))  # pillow-heif has turned it
    image.load()
    return on_white(_eight_bits(_upright(image)))


def _upright(image: Image.Image) -> Image.Image:
    """Turns a decoded image as its EXIF orientation says; damaged EXIF data says nothing."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # noqa: BLE001  Pillow raises several kinds; the pixels are sound
        return image
    if orientation not in TURNS:
        return image
    turned = image.transpose(TURNS[orientation])
    turned.info = {name: value for name, value in image.info.items() if name == "transparency"}  # else turned again
    return turned


def on_white(image: Image.Image) -> Image.Image:
    """Returns an image as RGB; what is transparent is laid on white, as paper and pages show it."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    result = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):  # in strips, since the steps take several copies
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        straight = strip.convert({"La": "LA", "RGBa": "RGBA"}.get(strip.mode, strip.mode)).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, straight).convert("RGB"), (0, top))
    return result


def _scale_transparency(image: Any) -> None:
    """Gives the transparent colour of an opened PNG of 2, 4 or 16 bits the range of the pixels that Pillow decodes."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None or not image.tile:
        return
    raw = image.tile[0].args
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = colour * (255 // (2 ** int(raw[-1]) - 1))
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales an image of 16-bit pixels to 8 bits, because conversion to RGB would clip all values above 255."""
    if image.mode[0] not in "IF":
        return image
    pixels = np.asarray(image)
    if image.mode.startswith("I;16"):
        shift = 0 if pixels.max(initial=0) < 256 else 8  # values of 8 bits in 16, which would all be black
        grey = Image.fromarray((pixels >> shift).astype(np.uint8))
        if "transparency" in image.info:
            grey.putalpha(Image.fromarray(np.where(pixels == image.info["transparency"], 0, 255).astype(np.uint8)))
        return grey
    _check_range(pixels.astype(np.float64), rescale=True)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


# --- arrays ------------------------------------------------------------------------------------------------------


def _as_numpy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    return array.detach().float().cpu().numpy() if _is_float_tensor(array) else np.asarray(array)


def _is_float_tensor(array: Any) -> bool:
    return isinstance(array, torch.Tensor) and array.is_floating_point()  # numpy has no bfloat16


def _from_array(pixels: np.ndarray, rescale: bool, limits: Limits) -> Any:
    """Returns an array as an RGB image, but floating-point numbers of 0 … 1 as (height, width, 3)."""
    if pixels.dtype.kind not in "buif":
        raise ValueError(f"its dtype is {pixels.dtype}; pass integers or floating-point numbers")
    pixels = _channels_last(pixels)
    _check_size(pixels.shape[1], pixels.shape[0], limits)
    _check_range(pixels, rescale)
    if pixels.dtype.kind in "ui":
        return on_white(Image.fromarray(pixels.astype(np.uint8)[..., 0] if pixels.shape[-1] == 1 else _bytes(pixels)))
    pixels = pixels.astype(np.float32)
    colour, alpha = pixels[..., : 1 if pixels.shape[-1] < 3 else 3], pixels[..., 3:] if pixels.shape[-1] > 3 else None
    alpha = pixels[..., 1:] if pixels.shape[-1] == 2 else alpha
    if alpha is not None:
        white = 255.0 if rescale else 1.0
        colour = colour * (alpha / white) + (white - alpha)
    if rescale:  # to 8 bits, as image processors that resize with Pillow need it
        return Image.fromarray(np.rint(np.broadcast_to(colour, (*colour.shape[:2], 3))).astype(np.uint8))
    return np.ascontiguousarray(np.broadcast_to(colour, (*colour.shape[:2], 3)))


def _bytes(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.astype(np.uint8))


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """Returns an array of pixels as (height, width, channels)."""
    if pixels.ndim == 2:
        return pixels[..., None]
    if pixels.ndim != 3:
        raise ValueError("pass (height, width), (height, width, channels) or (channels, height, width)")
    first, last = pixels.shape[0], pixels.shape[2]
    if first in CHANNELS and last in CHANNELS and min(pixels.shape) > 0:
        raise ValueError("its channels may be first or last; pass a PIL image")
    if last in CHANNELS or (last == 2 and first not in CHANNELS):
        return pixels
    if first in (*CHANNELS, 2):
        return np.moveaxis(pixels, 0, -1)
    raise ValueError("an image has 1 to 4 channels, first or last")


def _check_range(pixels: np.ndarray, rescale: bool) -> None:
    """Refuses pixels that the image processor would misread: non-finite, outside 0 … 255 or already rescaled."""
    if not np.isfinite(pixels).all():
        raise ValueError("it has NaN or infinite pixels; repair or drop it")
    low, high = float(pixels.min(initial=0)), float(pixels.max(initial=0))
    if (rescale or pixels.dtype.kind in "ui") and (low < 0 or high > 255):
        raise ValueError(
            f"its pixels are {low:g} … {high:g}; they must be 0 … 255: scale them, or undo a normalisation"
        )
    if rescale and 0 < high <= 1:
        raise ValueError(f"its pixels are {low:g} … {high:g} and would be divided by 255 again; multiply them by 255")


# --- room --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageScaler:
    """Prepares images with as many pixels as their inputs have room for.

    Attributes:
        processor: Qwen2-VL's image processor.
        options: keyword arguments of its call.
    """

    processor: Any
    options: Mapping[str, Any]

    @property
    def merge_size(self) -> int:
        """Returns the patches in a row that become one token."""
        return self.options.get("merge_size") or self.processor.merge_size

    @property
    def pixel_range(self) -> tuple[int, int]:
        """Returns `min_pixels` and `max_pixels`."""
        size = self.options.get("size") or self.processor.size
        low, high = self.options.get("min_pixels"), self.options.get("max_pixels")
        return low or size["shortest_edge"], high or size["longest_edge"]

    def count_tokens(self, sizes: Sequence[tuple[int, int]], bound: int) -> int:
        """Counts the tokens of images of these (height, width) with at most `bound` pixels each."""
        bounded = {**self.options, "min_pixels": min(self.pixel_range[0], bound), "max_pixels": bound}
        patches = [self.processor.get_number_of_image_patches(*size, bounded) for size in sizes]
        return sum(patches) // self.merge_size**2

    def bound(self, sizes: Sequence[tuple[int, int]], room: float) -> int | None:
        """Returns the largest bound of pixels with which the images of an input fit.

        Args:
            sizes: (height, width) of the images.
            room: tokens that they may take.

        Returns:
            `None` if they fit as they are, or are not resized; `min_pixels` if they fit at no size.
        """
        low, high = self.pixel_range
        resizes = self.options.get("do_resize", self.processor.do_resize)
        if not sizes or not resizes or room == math.inf or self.count_tokens(sizes, high) <= room:
            return None
        side = (self.options.get("patch_size") or self.processor.patch_size) * self.merge_size
        fits, exceeds = 0, (high - low) // side**2 + 1  # in tokens above `low`
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            if self.count_tokens(sizes, low + middle * side**2) <= room:
                fits = middle
            else:
                exceeds = middle
        return low + fits * side**2

    def prepare(self, images: Sequence[Any], bounds: Sequence[int | None]) -> dict[str, Any]:
        """Returns `pixel_values` and `image_grid_thw` of images, each with its bound of pixels."""
        outputs = []
        for bound, run in itertools.groupby(zip(images, bounds, strict=True), key=lambda pair: pair[1]):
            options = dict(self.options)
            if bound is not None:
                options = {name: options[name] for name in options if name not in ("min_pixels", "max_pixels")}
                options["size"] = {"shortest_edge": min(self.pixel_range[0], bound), "longest_edge": bound}
            outputs.append(self.processor([image for image, _ in run], **options))
        return _join(outputs)


def loaded_size(image: Any) -> tuple[int, int]:
    """Returns (height, width) of what `load_image` returns."""
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]


def _join(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins outputs of the image processor for some images each."""
    if len(outputs) == 1:
        return dict(outputs[0])
    joined = {}
    for name in outputs[0]:
        values = [output[name] for output in outputs]
        joined[name] = torch.cat(values) if isinstance(values[0], torch.Tensor) else np.concatenate(values)
    return joined


__all__ = ["FORMATS", "ImageScaler", "image_size", "load_image", "loaded_size", "on_white"]
