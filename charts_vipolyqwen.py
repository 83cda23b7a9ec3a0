"""Lines as SVG, for pages that need nothing else."""

from html import escape

COLOURS = ("#1864ab", "#d9480f", "#2b8a3e", "#862e9c", "#e67700", "#0b7285", "#a61e4d", "#495057")
MARGIN = 34  # pixels left of and below the plot, for its numbers

Points = list[tuple[float, float]]


def line_chart(series: dict[str, Points], width: int = 480, height: int = 160) -> str:
    """Several lines over common axes that begin at zero (or below, where values do), with a legend under them."""
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
