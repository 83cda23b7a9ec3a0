"""Finds and reads media: files, also those spelled in another Unicode form on the disk than in the data, and URLs."""

import os
import unicodedata

from ..download_vipolyqwen import download, is_url
from ..media_vipolyqwen import LIMITS, open_file

FORMS = ("NFC", "NFD")  # macOS writes names in NFD; archives keep them so on other systems


def find_media(path: str) -> str:
    """Returns the path of an existing file, each part of it in NFC or NFD; `path` itself if there is none."""
    if path.isascii() or os.path.exists(path):
        return path
    found = os.sep if path.startswith(os.sep) else ""
    for part in filter(None, path.split(os.sep)):
        spellings = [part, *(unicodedata.normalize(form, part) for form in FORMS)]
        existing = [os.path.join(found, each) for each in spellings if os.path.exists(os.path.join(found, each))]
        if not existing:
            return path
        found = existing[0]
    return found


def below(root: str, path: str) -> str:
    """Returns a path that is relative to `root`; a URL unchanged."""
    return path if is_url(path) else os.path.join(root, path)


def read_media(path: str) -> bytes:
    """Returns the content of a file, or of a URL that the source allows.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no file or too large, or the URL is not of a public address or cannot be fetched in bounds.
    """
    if is_url(path):
        return download(path, True, LIMITS.download_bytes, LIMITS.download_seconds)
    with open_file(path) as file:
        return file.read()
