"""Draws scenes as images: things on a ground, or words on a sign or a ticket."""

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scenes import Scene, spoken_phrases

SIDE = 112  # pixels; 8 x 8 patches of 14
LINE = 94  # pixels that a line of a sign may be wide
SCALE = 3  # images are painted this much larger, then reduced: smooth edges
FONT_FOLDER = Path(__file__).parent / "assets" / "fonts"
LATIN_FONTS = ("NotoSans-Regular.ttf", "NotoSerif-Bold.ttf", "NotoSans-Bold.ttf", "DejaVuSansCondensed-Bold.ttf")
FONTS = {"vi": LATIN_FONTS, "en": LATIN_FONTS, "zh": ("NotoSansCJKsc-Regular.otf", "NotoSerifCJKsc-Bold.otf")}

Colour = tuple[int, int, int]
COLOURS: dict[str, Colour] = {
    "red": (216, 30, 36),
    "yellow": (250, 214, 20),
    "blue": (30, 70, 215),
    "purple": (160, 65, 195),
    "white": (248, 248, 248),
    "black": (28, 28, 30),
}
GROUNDS: dict[str, Colour] = {
    "grass": (96, 170, 70),
    "sea": (40, 150, 160),
    "sky": (160, 210, 242),
    "sand": (214, 184, 134),
}
SIZES = {"big": 48.0, "small": 27.0}  # pixels across
PAPERS: tuple[tuple[Colour, Colour], ...] = (  # (paper, ink) of signs and tickets
    ((250, 248, 240), (20, 20, 30)),
    ((255, 236, 150), (50, 30, 10)),
    ((24, 92, 60), (250, 250, 245)),
    ((30, 60, 140), (255, 250, 230)),
    ((225, 240, 250), (120, 20, 30)),
    ((160, 30, 40), (255, 248, 235)),
)
BEHIND: Colour = (115, 112, 108)  # what signs and tickets lie on

Points = np.ndarray  # (n, 2) float, x to the right and y down, in units of the thing's size, centre at 0


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws the scene as 112 x 112 RGB; place, turn, tint and grain vary with `rng`."""
    image = Image.new("RGB", (SIDE * SCALE,) * 2, _tinted(GROUNDS[scene.place], rng))
    brush = ImageDraw.Draw(image)
    _TEXTURES[scene.place](brush, rng)
    colour = _tinted(COLOURS[scene.colour], rng)
    for x, y, size in _spots(scene, rng):
        turn = math.radians(rng.uniform(-12, 12))
        mirror = rng.choice((-1, 1))
        _THINGS[scene.thing](_Pen(brush, colour, x, y, size, turn, mirror))
    return _grained(image, rng)


def write_sign(scene: Scene, language: str, style: str, rng: np.random.Generator) -> Image.Image:
    """Writes the scene's caption on a sign or a ticket, 112 x 112 RGB, a phrase a line.

    Args:
        scene: Whose caption to write.
        language: `vi`, `en` or `zh`.
        style: `sign` or `ticket`.
        rng: Chooses the font, the colours and small shifts.
    """
    paper, ink = PAPERS[rng.integers(len(PAPERS))] if style == "sign" else PAPERS[rng.choice((0, 1, 4))]
    font = FONTS[language][rng.integers(len(FONTS[language]))]
    image = Image.new("RGB", (SIDE * SCALE,) * 2, BEHIND)
    brush = ImageDraw.Draw(image)
    paper, ink = _tinted(paper, rng), _tinted(ink, rng)
    (_draw_board if style == "sign" else _draw_ticket)(brush, paper, ink)
    lines = sign_lines(scene, language)
    slot = 102 * SCALE / len(lines)
    shift = rng.uniform(-2, 2) * SCALE
    for number, line in enumerate(lines):
        face = _fitting(font, line, LINE * SCALE, slot * (0.98 if language == "zh" else 1.06))
        middle = (5 * SCALE + slot * (number + 0.5)) + rng.uniform(-0.7, 0.7) * SCALE
        centre = SIDE * SCALE / 2 + shift * (1 - face.getlength(line) / (LINE * SCALE)) + rng.uniform(-1, 1) * SCALE
        brush.text((centre, middle), line, ink, face, anchor="mm")
    return _grained(image, rng)


def sign_lines(scene: Scene, language: str) -> list[str]:
    """Returns the caption as lines of a sign: five phrases, but Chinese size and noun share a line."""
    phrases = spoken_phrases(scene, language)
    return phrases if language != "zh" else [*phrases[:3], "".join(phrases[3:])]


# Grounds


def _blades(brush: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Grass: short upright strokes, darker and lighter."""
    for x, y, lean, tone in rng.uniform(0, 1, (70, 4)):
        foot, height = (x * SIDE * SCALE, y * SIDE * SCALE), 7 * SCALE
        tip = (foot[0] + (lean - 0.5) * height, foot[1] - height)
        brush.line((foot, tip), (70, 140, 50) if tone < 0.6 else (130, 195, 95), SCALE + 1)


def _waves(brush: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Sea: rows of wavy lines."""
    phase = rng.uniform(0, 2 * math.pi)
    for row in range(6, SIDE, 14):
        xs = np.arange(0, SIDE * SCALE + 1, 4 * SCALE)
        ys = row * SCALE + 2.5 * SCALE * np.sin(xs / (4.5 * SCALE) + phase + row)
        brush.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), (120, 200, 205), SCALE + 2)


def _clouds(brush: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Sky: a few soft clouds."""
    for _ in range(3):
        x, y = rng.uniform(5, SIDE - 5, 2) * SCALE
        for dx, dy, r in ((-9, 2, 6), (0, -1, 8), (9, 2, 6)):
            box = [x + (dx - r) * SCALE, y + (dy - r * 0.7) * SCALE, x + (dx + r) * SCALE, y + (dy + r * 0.7) * SCALE]
            brush.ellipse(box, (214, 235, 248))


def _grains(brush: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Sand: dark and light specks."""
    for x, y, tone in rng.uniform(0, 1, (130, 3)):
        cx, cy, r = x * SIDE * SCALE, y * SIDE * SCALE, 0.8 * SCALE
        brush.ellipse((cx - r, cy - r, cx + r, cy + r), (176, 142, 92) if tone < 0.6 else (240, 220, 180))


_TEXTURES: dict[str, Callable[[ImageDraw.ImageDraw, np.random.Generator], None]] = {
    "grass": _blades,
    "sea": _waves,
    "sky": _clouds,
    "sand": _grains,
}


# Things


class _Pen:
    """Draws a thing's parts, given in its own units, at its place, size and turn."""

    def __init__(
        self, brush: ImageDraw.ImageDraw, colour: Colour, x: float, y: float, size: float, turn: float, mirror: int
    ) -> None:
        self.brush, self.colour = brush, colour
        self.centre, self.size = np.array((x, y)) * SCALE, size * SCALE
        self.frame = np.array(((math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))))
        self.mirror = np.array((mirror, 1))
        dark = sum(colour) < 150
        self.edge = _mixed(colour, (255, 255, 255), 0.35) if dark else _mixed(colour, (0, 0, 0), 0.45)

    def place(self, points: Points) -> list[tuple[float, float]]:
        """Points in the thing's units -> canvas pixels."""
        placed = self.centre + (np.asarray(points) * self.mirror @ self.frame) * self.size
        return [(x, y) for x, y in placed.tolist()]

    def shape(self, points: Points, fill: Colour | None = None) -> None:
        """A filled outline in the thing's colour, or another."""
        corners = self.place(points)
        self.brush.polygon(corners, fill or self.colour)
        joint = "curve" if len(corners) < 12 else None  # round corners cost time; curves do not show them
        self.brush.line([*corners, corners[0]], self.edge, max(3, round(self.size * 0.04)), joint)

    def line(self, points: Points, fill: Colour | None = None, width: float = 0.05) -> None:
        """A stroke, in the edge's colour unless told."""
        self.brush.line(self.place(points), fill or self.edge, max(3, round(self.size * width)))


def _round(radius: float, x: float = 0, y: float = 0, half: bool = False) -> Points:
    """Points of a circle, or of its upper half from left to right."""
    angle = np.linspace(math.pi, 2 * math.pi, 18) if half else np.linspace(0, 2 * math.pi, 36, endpoint=False)
    return np.stack((x + radius * np.cos(angle), y + radius * np.sin(angle)), axis=1)


def _star(pen: _Pen) -> None:
    angle = np.arange(10) * math.pi / 5 - math.pi / 2
    reach = np.where(np.arange(10) % 2 == 0, 0.54, 0.22)
    pen.shape(np.stack((reach * np.cos(angle), reach * np.sin(angle)), axis=1))


def _fish(pen: _Pen) -> None:
    pen.shape(np.array(((0.18, 0), (0.54, -0.26), (0.54, 0.26))))
    pen.shape(_round(1) * (0.4, 0.27) - (0.14, 0))
    pen.line(_round(0.03, -0.34, -0.06), width=0.06)


def _boat(pen: _Pen) -> None:
    pen.line(np.array(((0, 0.2), (0, -0.5))), width=0.07)
    pen.shape(np.array(((0.04, -0.5), (0.42, 0.08), (0.04, 0.08))))
    pen.shape(np.array(((-0.05, -0.36), (-0.34, 0.08), (-0.05, 0.08))))
    pen.shape(np.array(((-0.54, 0.16), (0.54, 0.16), (0.36, 0.46), (-0.36, 0.46))))


def _ball(pen: _Pen) -> None:
    pen.shape(_round(0.47))
    pen.line(np.array(((-0.47, 0), (0, 0.1), (0.47, 0))))
    pen.line(np.array(((0, -0.47), (0.1, 0), (0, 0.47))))


def _flower(pen: _Pen) -> None:
    for angle in np.arange(6) * math.pi / 3:
        pen.shape(_round(0.18, 0.33 * math.cos(angle), 0.33 * math.sin(angle)))
    middle = _mixed(pen.colour, (255, 255, 255), 0.75) if sum(pen.colour) < 400 else (150, 85, 30)
    pen.shape(_round(0.17), middle)


def _umbrella(pen: _Pen) -> None:
    hook = _round(0.09, 0.09, 0.42)[:19]
    pen.line(np.concatenate((np.array(((0, -0.5), (0, 0.42))), hook[::-1])), width=0.07)
    dome = _round(0.52, half=True)
    scallops = [_round(0.52 / 3, 0.52 * c / 3, half=True)[::-1] * (1, 0.5) for c in (2, 0, -2)]
    pen.shape(np.concatenate((dome, *scallops)) + (0, 0.06))


_THINGS: dict[str, Callable[[_Pen], None]] = {
    "star": _star,
    "fish": _fish,
    "boat": _boat,
    "ball": _ball,
    "flower": _flower,
    "umbrella": _umbrella,
}


def _spots(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(x, y, size) in pixels of each thing: near the middle of one quarter."""
    quarter = SIDE / 2
    spots = []
    for corner in rng.permutation(4)[: scene.count]:
        size = SIZES[scene.size] * rng.uniform(0.93, 1.05)
        x, y = quarter * (np.array((corner % 2, corner // 2)) + 0.5) + rng.uniform(-4, 4, 2)
        spots.append((x, y, size))
    return spots


# Signs


def _draw_board(brush: ImageDraw.ImageDraw, paper: Colour, ink: Colour) -> None:
    """A board with a frame."""
    edge = SIDE * SCALE - 1
    brush.rounded_rectangle((SCALE, SCALE, edge - SCALE, edge - SCALE), 9 * SCALE, paper)
    inner = (2.5 * SCALE, 2.5 * SCALE, edge - 2.5 * SCALE, edge - 2.5 * SCALE)
    brush.rounded_rectangle(inner, 8 * SCALE, None, _mixed(ink, paper, 0.3), SCALE)


def _draw_ticket(brush: ImageDraw.ImageDraw, paper: Colour, ink: Colour) -> None:
    """A slip of paper with bitten sides."""
    edge = SIDE * SCALE - 1
    brush.rectangle((3 * SCALE, 0, edge - 3 * SCALE, edge), paper)
    for y in range(0, edge, 14 * SCALE):
        for x in (3 * SCALE, edge - 3 * SCALE):
            brush.ellipse((x - 3 * SCALE, y + 4 * SCALE, x + 3 * SCALE, y + 10 * SCALE), BEHIND)
    for y in (2 * SCALE, edge - 2 * SCALE):
        for x in range(8 * SCALE, edge - 8 * SCALE, 5 * SCALE):
            brush.line((x, y, x + 3 * SCALE, y), _mixed(ink, paper, 0.5), 2)


@lru_cache(maxsize=512)
def _face(font: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT_FOLDER / font, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def _fitting(font: str, line: str, width: float, height: float) -> ImageFont.FreeTypeFont:
    """The font at the largest size at which the line fits the width and its ink the height."""
    trial = _face(font, 100)
    left, top, right, bottom = trial.getbbox(line)
    ink_height = max(bottom - top, 62)  # short words without tall letters would grow out of proportion
    return _face(font, int(min(100 * width / (right - left), 80 * height / ink_height, 0.95 * height)))


# Light


def _tinted(colour: Colour, rng: np.random.Generator) -> Colour:
    """The colour, a little lighter or darker and a little off."""
    shade = np.array(colour) * rng.uniform(0.93, 1.03) + rng.uniform(-6, 6, 3)
    red, green, blue = np.clip(shade, 0, 255).astype(int).tolist()
    return red, green, blue


def _mixed(one: Colour, other: Colour, share: float) -> Colour:
    """`share` of the other colour in the one."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _grained(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The painted canvas at its final size, with slight uneven light (coarse, so that files stay small)."""
    small = np.asarray(image.reduce(SCALE), dtype=np.float32)
    patches = Image.fromarray(rng.normal(0, 3.5, (8, 8)).astype(np.float32))
    lit = small + np.asarray(patches.resize((SIDE, SIDE), Image.Resampling.BILINEAR))[..., None]
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))
