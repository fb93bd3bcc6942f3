"""Bytes against error as a PNG, for a README or a model card: points, their names, one line.

Lengths are in units of the finished picture's half pixels: WIDTH x HEIGHT units, twice as many
pixels. Everything is drawn larger and made smaller once, so that edges are smooth.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from diffquant.compare.plots import Axis

WIDTH, HEIGHT = 880, 500
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 76, 46
#: Pixels per unit while drawing, and in the finished picture.
DRAWN, SHOWN = 4, 2
COLOURS = 128  # of the finished picture: as many as smooth edges need
TITLE, TEXT = 17, 12.5
DOT, RING = 4.5, 9.0
GAP = 6.0  # between a point and its name

PAPER, INK, SOFT, GRID = "#ffffff", "#1d1c1a", "#6b6862", "#e5e2dc"
#: As in the report, in the order kinds first appear.
HUES = ("#2563c9", "#d97706", "#0d9488", "#a23bb5", "#c0362c", "#65801d")

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One result; `name` stands beside it where there is room, `is_marked` gives it a ring."""

    x: float
    y: float
    kind: str
    name: str = ""
    is_marked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What a picture shows.

    points   those that are not finite are left out; later ones lie above
    is_line  the points are joined from left to right
    limit    a height with its name: a dashed line
    """

    title: str
    x: str
    y: str
    points: tuple[Point, ...]
    is_line: bool = False
    is_logarithmic: bool = False
    limit: tuple[str, float] | None = None


def picture(chart: Chart) -> Image.Image:
    """The chart, SHOWN times WIDTH x HEIGHT pixels."""
    known = [point for point in chart.points if isfinite(point.x) and isfinite(point.y)]
    across, up = _axes(chart, known)
    sheet = _Sheet()
    hues = _hues(known)
    _frame(sheet, chart, across, up)
    _legend(sheet, hues)
    places = [(across.at(point.x), up.at(point.y)) for point in known]
    if chart.is_line:
        sheet.line(sorted(places), GRID, 2.0)
    for point, place in zip(known, places, strict=True):
        if point.is_marked:
            sheet.ring(place)
        sheet.dot(place, hues[point.kind])
    _names(sheet, known, places)
    return sheet.finished()


def _axes(chart: Chart, points: Sequence[Point]) -> tuple[Axis, Axis]:
    wide = [point.x for point in points]
    high = [point.y for point in points] + ([chart.limit[1]] if chart.limit else [])
    room = 0.04 * (max(wide) - min(wide)) or 1.0
    across = Axis(min(wide) - room, max(wide) + room, LEFT, WIDTH - RIGHT)
    if chart.is_logarithmic:
        low, top = min(each for each in high if each > 0) / 1.3, max(high) * 1.3
    else:
        low, top = 0.0, max(high) * 1.08
    up = Axis(low, top, HEIGHT - BOTTOM, TOP, logarithmic=chart.is_logarithmic)
    return across, up


def _hues(points: Sequence[Point]) -> dict[str, str]:
    kinds = dict.fromkeys(point.kind for point in points)
    return {kind: HUES[index % len(HUES)] for index, kind in enumerate(kinds)}


# ------------------------------------------------------------------------------------------ drawing


class _Sheet:
    """A drawing in units; it remembers where something lies that a name should not cover."""

    def __init__(self) -> None:
        size = (WIDTH * DRAWN, HEIGHT * DRAWN)
        self._image = Image.new("RGB", size, PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self.taken: list[Box] = []

    def line(self, places: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(x * DRAWN, y * DRAWN) for x, y in places]
        self._draw.line(scaled, fill=colour, width=round(width * DRAWN), joint="curve")

    def dashes(self, y: float, colour: str) -> None:
        for start in range(LEFT, WIDTH - RIGHT, 10):
            self.line([(start, y), (min(start + 5, WIDTH - RIGHT), y)], colour, 1.2)

    def dot(self, place: tuple[float, float], colour: str) -> None:
        self._draw.ellipse(_scaled(_around(place, DOT + 1.2)), fill=PAPER)
        self._draw.ellipse(_scaled(_around(place, DOT)), fill=colour)
        self.taken.append(_around(place, DOT))

    def ring(self, place: tuple[float, float]) -> None:
        box = _scaled(_around(place, RING))
        self._draw.ellipse(box, outline=INK, width=round(1.6 * DRAWN))
        self.taken.append(_around(place, RING))

    def text(
        self,
        place: tuple[float, float],
        words: str,
        *,
        anchor: str = "ls",
        size: float = TEXT,
        colour: str = SOFT,
    ) -> None:
        x, y = place
        at = (x * DRAWN, y * DRAWN)
        self._draw.text(at, words, font=_font(size), fill=colour, anchor=anchor)

    def finished(self) -> Image.Image:
        """Smaller, and in few colours: half the bytes for the same picture."""
        size = (WIDTH * SHOWN, HEIGHT * SHOWN)
        small = self._image.resize(size, Image.Resampling.LANCZOS)
        return small.quantize(COLOURS, dither=Image.Dither.NONE)


def _frame(sheet: _Sheet, chart: Chart, across: Axis, up: Axis) -> None:
    sheet.text((LEFT - 44, 30), chart.title, size=TITLE, colour=INK)
    for tick in up.ticks():
        y = up.at(tick)
        sheet.line([(LEFT, y), (WIDTH - RIGHT, y)], GRID, 1.0)
        sheet.text((LEFT - 8, y), f"{tick:.3g}", anchor="rm")
    for tick in across.ticks():
        sheet.text((across.at(tick), HEIGHT - BOTTOM + 16), f"{tick:.3g}", anchor="mm")
    sheet.text((WIDTH - RIGHT, HEIGHT - 12), chart.x, anchor="rs")
    sheet.text((LEFT - 44, TOP - 14), chart.y)
    if chart.limit is not None:
        name, value = chart.limit
        sheet.dashes(up.at(value), SOFT)
        sheet.taken.append((LEFT, up.at(value) - 1, WIDTH - RIGHT, up.at(value) + 1))
        sheet.text((WIDTH - RIGHT, up.at(value) - 5), name, anchor="rs")


def _legend(sheet: _Sheet, hues: Mapping[str, str]) -> None:
    """Kinds from the right to the left, above the plot; one alone needs no telling."""
    if len(hues) == 1:
        return
    right = float(WIDTH - RIGHT)
    for kind, colour in reversed(list(hues.items())):
        sheet.text((right, TOP - 14), kind, anchor="rs")
        right -= _length(kind) + 11
        sheet.dot((right + 3, TOP - 18), colour)
        right -= 16


def _names(sheet: _Sheet, points: Sequence[Point], places: Sequence[tuple[float, float]]) -> None:
    """The name of each point on the first side where it covers nothing; none where it always would.
    Marked points choose first."""
    named = [each for each in zip(points, places, strict=True) if each[0].name]
    for point, place in sorted(named, key=lambda each: not each[0].is_marked):
        far = (RING if point.is_marked else DOT) + GAP
        free = (each for each in _sides(point.name, place, far) if _is_free(each[0], sheet.taken))
        found = next(free, None)
        if found is not None:
            box, at, anchor = found
            sheet.text(at, point.name, anchor=anchor, colour=INK)
            sheet.taken.append(box)


def _sides(
    name: str, place: tuple[float, float], far: float
) -> Iterator[tuple[Box, tuple[float, float], str]]:
    """Where a name may stand: its box, the point of its anchor, the anchor."""
    (x, y), long, tall = place, _length(name), TEXT
    for at, anchor, left, top in (
        ((x + far, y), "lm", x + far, y - tall / 2),
        ((x - far, y), "rm", x - far - long, y - tall / 2),
        ((x, y - far), "ms", x - long / 2, y - far - tall),
        ((x, y + far + tall), "ms", x - long / 2, y + far),
        ((x + far, y - far), "ls", x + far, y - far - tall),
        ((x + far, y + far + tall), "ls", x + far, y + far),
        ((x - far, y - far), "rs", x - far - long, y - far - tall),
        ((x - far, y + far + tall), "rs", x - far - long, y + far),
    ):
        yield (left, top, left + long, top + tall), at, anchor


def _is_free(box: Box, taken: Sequence[Box]) -> bool:
    left, top, right, bottom = box
    inside = left >= LEFT and right <= WIDTH and top >= TOP - 8 and bottom <= HEIGHT - BOTTOM
    return inside and not any(
        left < other[2] and other[0] < right and top < other[3] and other[1] < bottom
        for other in taken
    )


def _around(place: tuple[float, float], radius: float) -> Box:
    x, y = place
    return (x - radius, y - radius, x + radius, y + radius)


def _scaled(box: Box) -> Box:
    left, top, right, bottom = box
    return (left * DRAWN, top * DRAWN, right * DRAWN, bottom * DRAWN)


def _length(words: str) -> float:
    return float(_font(TEXT).getlength(words)) / DRAWN


@cache
def _font(size: float) -> Any:
    """Pillow's own, so that a chart looks the same everywhere."""
    return ImageFont.load_default(round(size * DRAWN))
