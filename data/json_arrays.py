"""Parses a JSON array entry by entry, so that a large file takes no more memory than its largest entry."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from .schema import RowError

SPACE = re.compile(r"[ \t\n\r]*")
PIECE = 2**20  # characters read at once
AHEAD = 2  # characters after an entry by which is known that it ends: a number may go on with `e+7`


def array_entries(text: TextIO, file: str, longest: int) -> Iterator[Any]:
    """Yields the entries of an array; `text` is read up to its opening bracket.

    Raises:
        RowError: the text is invalid JSON, or an entry has more than `longest` characters.
    """
    array = _Array(text, file, longest)
    following = array.next_character()
    while following != "]":
        yield array.entry()
        following = array.next_character()
        if following == "," and array.after(",") != "]":
            continue
        if following != "]":
            raise array.error("Expecting ',' delimiter" if following else "the array does not end")
    if array.after("]"):
        raise array.error("Extra data after the array")


class _Array:
    """Holds the part of a text that is parsed next.

    Args:
        text: the text.
        file: its name in errors.
        longest: characters of an entry at most.
    """

    def __init__(self, text: TextIO, file: str, longest: int) -> None:
        self.text = text
        self.file = file
        self.longest = longest
        self.entries = 0
        self._held, self._place = "", 0
        self._decode = json.JSONDecoder().raw_decode

    def next_character(self) -> str:
        """Returns the next character that is not a space, without passing it; empty at the end."""
        while True:
            self._place = SPACE.match(self._held, self._place).end()
            if self._place < len(self._held):
                return self._held[self._place]
            if not self._read():
                return ""

    def after(self, character: str) -> str:
        """Passes a character; returns the next one."""
        self._place += len(character)
        return self.next_character()

    def entry(self) -> Any:
        """Returns the entry that begins here."""
        self.entries += 1
        while True:
            try:
                entry, end = self._decode(self._held, self._place)
            except json.JSONDecodeError as error:  # it may go on in what was not read yet
                fault = error.msg
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from error
            else:
                if end + AHEAD < len(self._held) or not self._read():
                    self._place = end
                    return entry
                continue
            if len(self._held) - self._place > self.longest:
                raise self.error(f"{fault}, within {self.longest} characters, the limit of an entry")
            if not self._read():
                raise self.error(fault)

    def _read(self) -> bool:
        """Reads on, as much again as is held of the entry; returns whether there was more."""
        rest = self._held[self._place :]
        more = self.text.read(max(PIECE, len(rest)))
        if more:
            self._held, self._place = rest + more, 0
        return bool(more)

    def error(self, fault: str) -> RowError:
        """Returns the error of the entry that was read last."""
        return RowError(f"{self.file}, row {self.entries}: invalid JSON: {fault}. Repair it.", "invalid JSON")
