"""Finds media files whose names are spelled in another Unicode form on the disk than in the data."""

import os
import unicodedata

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
