"""Values on Markdown pages: whatever a name holds, it starts no line, cell, tag or link."""

import re
from typing import Any

import jinja2
from jinja2.nodes import EvalContext
from markupsafe import Markup

# Line ends, other control characters, and marks that reverse the direction of what follows them.
BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
ESCAPES = str.maketrans({"<": "&lt;", "|": "\\|"})


def escape_markdown(value: Any) -> str:
    """Returns a value as text within one line and one cell of a table."""
    return BREAKS.sub(" ", str(value)).translate(ESCAPES).replace("](", "]\\(")


def code_span(value: Any) -> Markup:
    """Returns a value as code within one line and one cell of a table; `<` needs no escape in code."""
    return Markup("`" + BREAKS.sub(" ", str(value)).replace("`", "'").replace("|", "\\|") + "`")


@jinja2.pass_eval_context
def escaped(context: EvalContext, value: Any) -> Any:
    """Escapes what a Markdown template shows (jinja2's `finalize`), unless the template marks it `safe`.

    HTML templates have autoescape, which escapes in its way.
    """
    if context.autoescape or isinstance(value, Markup | jinja2.Undefined):
        return value
    return escape_markdown(value)
