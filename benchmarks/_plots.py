"""Two small plots as PNG: bars in groups, and lines. Drawn with Pillow, which is there anyway."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, ROW, LEFT, RIGHT, TOP = 900, 17, 190, 60, 56
INK, PALE, MARK = (40, 40, 46), (214, 216, 222), (196, 48, 43)
COLOURS = ((70, 120, 190), (120, 164, 214), (172, 202, 232))


@dataclass(frozen=True, slots=True)
class Group:
    """Bars under one name, and a mark on each where there is one."""

    name: str
    values: tuple[float, ...]
    marks: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A curve of (x, y), with a name."""

    name: str
    points: tuple[tuple[float, float], ...]


def bars(path: Path, title: str, labels: Sequence[str], groups: Sequence[Group]) -> None:
    """Horizontal bars; the colour says which of `labels` one is."""
    height = TOP + sum(ROW * len(group.values) + 12 for group in groups) + 16
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    largest = max(max(*group.values, *(group.marks or (0.0,))) for group in groups)
    scale = (WIDTH - LEFT - RIGHT) / largest
    _head(draw, title, labels)
    one = LEFT + scale
    draw.line((one, TOP - 4, one, height - 12), fill=PALE, width=2)
    y = TOP
    for group in groups:
        draw.text((LEFT - 10, y + ROW), group.name, INK, _font(14), anchor="rm")
        for index, value in enumerate(group.values):
            end = LEFT + value * scale
            draw.rectangle((LEFT, y, end, y + ROW - 4), fill=COLOURS[index % len(COLOURS)])
            mark = LEFT + group.marks[index] * scale if group.marks else 0.0
            if mark:
                draw.line((mark, y - 2, mark, y + ROW - 2), fill=MARK, width=3)
            beside = mark if end - 4 < mark < end + 36 else end
            draw.text((beside + 6, y + ROW // 2 - 2), f"{value:.2f}", INK, _font(12), anchor="lm")
            y += ROW
        y += 12
    image.save(path, optimize=True)


def lines(path: Path, title: str, axes: tuple[str, str], curves: Sequence[Line]) -> None:
    """Curves from the origin on linear axes; `axes` are the names of x and y."""
    height, bottom = 420, 370
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    _head(draw, title, [curve.name for curve in curves])
    right, top = (max(point[axis] for curve in curves for point in curve.points) for axis in (0, 1))
    wide, high = (WIDTH - 70 - RIGHT) / right, (bottom - TOP - 10) / top
    for part in range(5):
        x, y = right * part / 4, top * part / 4
        draw.line((70, bottom - y * high, WIDTH - RIGHT, bottom - y * high), fill=PALE)
        draw.text((62, bottom - y * high), f"{y:.2f}", INK, _font(12), anchor="rm")
        draw.text((70 + x * wide, bottom + 12), f"{x:.0f}", INK, _font(12), anchor="mm")
    draw.text((WIDTH - RIGHT, bottom + 32), axes[0], INK, _font(13), anchor="rm")
    draw.text((70, TOP - 8), axes[1], INK, _font(13), anchor="lm")
    for index, curve in enumerate(curves):
        places = [(70 + x * wide, bottom - y * high) for x, y in curve.points]
        draw.line(places, fill=COLOURS[index % len(COLOURS)], width=3)
        for x, y in places:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=COLOURS[index % len(COLOURS)])
    image.save(path, optimize=True)


def _head(draw: ImageDraw.ImageDraw, title: str, labels: Sequence[str]) -> None:
    draw.text((16, 14), title, INK, _font(16), anchor="lm")
    x = WIDTH - RIGHT - sum(int(draw.textlength(label, _font(13))) + 36 for label in labels)
    for index, label in enumerate(labels):
        draw.rectangle((x, 9, x + 12, 21), fill=COLOURS[index % len(COLOURS)])
        draw.text((x + 18, 15), label, INK, _font(13), anchor="lm")
        x += int(draw.textlength(label, _font(13))) + 36


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
