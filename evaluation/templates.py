"""The page templates of this folder (`*.jinja`)."""

from pathlib import Path

from ..data.templates import templates_of

ENVIRONMENT = templates_of(Path(__file__).parent)
