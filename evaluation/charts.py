"""Draws line and interval charts as self-contained SVG."""

from html import escape
from math import isfinite

COLOURS = ("#1864ab", "#d9480f", "#2b8a3e", "#862e9c", "#e67700", "#0b7285", "#a61e4d", "#495057")
MARGIN = 34  # pixels left of and below the plot, for its numbers

Points = list[tuple[float, float]]


def line_chart(series: dict[str, Points], width: int = 480, height: int = 160) -> str:
    """Draws several lines over common axes that include zero, with a legend below.

    Args:
        series: name -> (x, y) points.
        width: of the plot in pixels.
        height: of the plot in pixels.
    """
    points = [point for line in series.values() for point in line]
    last = max(x for x, _ in points) or 1
    low, high = min(0.0, *(y for _, y in points)), max(0.0, *(y for _, y in points))
    span = high - low or 1

    def place(line: Points) -> str:
        return " ".join(f"{MARGIN + width * x / last:.1f},{height * (high - y) / span + 8:.1f}" for x, y in line)

    lines, legend = [], []
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        lines.append(f'<polyline points="{place(line)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        legend.append(f'<span style="color:{colour}">■</span> {escape(name)} {line[-1][1]:.3g}')
    labels = (
        f'<text x="0" y="14">{high:.3g}</text><text x="0" y="{height + 8}">{low:.3g}</text>'
        f'<text x="{MARGIN}" y="{height + 24}">0</text>'
        f'<text x="{MARGIN + width}" y="{height + 24}" text-anchor="end">step {last:.0f}</text>'
    )
    frame = f'<rect x="{MARGIN}" y="8" width="{width}" height="{height}" fill="none" stroke="#ddd"/>'
    drawing = "".join((frame, *lines, labels))
    return (
        f'<svg width="{width + MARGIN + 4}" height="{height + 28}" font-size="11">{drawing}</svg>'
        f'<div style="max-width:{width + MARGIN}px;font-size:12px">{" &nbsp; ".join(legend)}</div>'
    )


def interval_chart(rows: dict[str, tuple[float, float, float]], title: str, width: int = 420) -> str:
    """Draws a dot and an interval per row over an axis that includes zero, as a standalone SVG file.

    Args:
        rows: name -> (value, lower end, upper end); without finite ends only the dot is drawn.
        title: label of the axis.
        width: of the axis in pixels.
    """
    left, line = 150, 24  # pixels for the names, and for each row
    ends = [end for row in rows.values() for end in row if isfinite(end)] + [0.0]
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low or 1.0)
    scale = width / (high - low + 2 * margin)

    def place(value: float) -> float:
        return left + (value - low + margin) * scale

    height = line * len(rows) + 50
    parts = [f'<line x1="{place(0):.1f}" y1="24" x2="{place(0):.1f}" y2="{height - 24}" stroke="#999"/>']
    for number, (name, (value, lower, upper)) in enumerate(rows.items()):
        y, colour = 24 + line * (number + 0.5), COLOURS[0]
        parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{escape(name)}</text>')
        if isfinite(lower) and isfinite(upper):
            ends_at = f'x1="{place(lower):.1f}" y1="{y:.0f}" x2="{place(upper):.1f}" y2="{y:.0f}"'
            parts.append(f'<line {ends_at} stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{place(value):.1f}" cy="{y:.0f}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + width + 8}" y="{y + 4:.0f}">{value:+.3f}</text>')
    for value in [0.0] + [end for end in (low, high) if abs(place(end) - place(0)) > 40]:  # labels must not overlap
        parts.append(f'<text x="{place(value):.1f}" y="{height - 8}" text-anchor="middle">{value:+.2f}</text>')
    parts.append(f'<text x="{left}" y="14">{escape(title)}</text>')
    total = left + width + 60
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" font-size="12" '
        f'font-family="sans-serif"><rect width="{total}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
