"""Fixtures of the tests of the shipped files."""

import json
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer

from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor


@pytest.fixture(scope="session")
def processor(tiny: tuple) -> ViPolyQwenProcessor:
    """The tiny model's processor; tests must not change it."""
    return tiny[1]


@pytest.fixture(scope="session")
def plain_ids(processor: ViPolyQwenProcessor) -> Callable:
    """Tokenises with a tokenizer without special tokens."""
    content = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    plain = Tokenizer.from_str(json.dumps({**content, "added_tokens": [], "post_processor": None}))
    return lambda text: plain.encode(text, add_special_tokens=False).ids
