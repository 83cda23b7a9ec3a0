"""Shows an inspection: a table in the terminal and a page that needs no other file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..images_vipolyqwen import load_image
from ..waveforms_vipolyqwen import load_audio
from .atomic import write_atomically
from .faults import Fault
from .inspection import Inspection, task_table
from .pair_units import PairRow
from .schema import Content
from .templates import audio_player, image_uri, templates_of

SIDE = 320  # pixels of a shown image
MOST_TEXT = 1200  # characters of a shown side
MOST_NEGATIVES = 3
COLUMNS = ("split", "task", "language", "rows", "length_a", "length_b", "tokens", "pixels", "seconds", "score")


def terminal_report(seen: Inspection, faults: Sequence[Fault]) -> str:
    """Returns the table of tasks and languages, and the faults with an example each, as text."""
    table = [list(COLUMNS)]
    table += [[_cell(row[name]) for name in COLUMNS] for row in task_table(seen)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines += [f"{path}: only the first {count:,} rows were read" for path, count in seen.limits.items()]
    lines.append("")
    for fault in faults:
        lines.append(f"{fault.count:>8,}  {fault.title}: {fault.remedy}")
        lines += [f"          {example}" for example in fault.examples[:1]]
    return "\n".join(lines if faults else [*lines, "No faults were found."])


def _cell(value: Any) -> str:
    if value is None or isinstance(value, dict):
        return spread(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def spread(figures: dict[str, float] | None) -> str:
    """Returns median, 95 % quantile and maximum in one cell."""
    if figures is None:
        return ""
    median, high, most = (_number(figures[name]) for name in ("median", "p95", "max"))
    return f"{median} ({high}, {most})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_page(seen: Inspection, faults: Sequence[Fault], name: str, path: Path) -> None:
    """Writes the page."""
    page = templates_of(Path(__file__).parent).get_template("inspection.html.jinja")
    text = page.render(
        name=name,
        rows=len(seen.rows),
        bad=len(seen.bad),
        files=len(seen.media),
        limits=seen.limits,
        faults=faults,
        table=task_table(seen),
        spread=spread,
        samples={key: [_shown_pair(pair) for pair in pairs] for key, pairs in sorted(seen.samples.items())},
    )
    write_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def _shown_pair(pair: PairRow) -> dict[str, Any]:
    row = pair.row
    return {
        "name": row.id,
        "a": _shown_content(row.side("a")),
        "b": _shown_content(row.side("b")),
        "score": row.score,
        "group": row.group,
        "negatives": [_shown_content(negative) for negative in row.negatives[:MOST_NEGATIVES]],
    }


def _shown_content(content: Content) -> Markup:
    """Returns a side as HTML; a file that cannot be read is shown as its error."""
    parts = []
    try:
        for number, source in enumerate(content.images, start=1):
            image = load_image(source if isinstance(source, bytes) else Path(source))
            parts.append(Markup('<img alt="image {}" src="{}">').format(number, image_uri(image, SIDE)))
        if content.audio is not None:
            samples, rate = load_audio(content.audio)
            parts.append(audio_player({"array": samples, "sampling_rate": rate}))
    except (ValueError, OSError) as error:
        parts.append(Markup("<b>{}</b>").format(str(error)))
    text = content.text if len(content.text) <= MOST_TEXT else content.text[:MOST_TEXT] + " …"
    return Markup("").join([*parts, Markup("<span>{}</span>").format(text)])
