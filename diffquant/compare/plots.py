"""Plots as inline SVG: text of the page's own font, colours by CSS class, no script.

All take data in its own units and return one `<svg>`; WIDTH x HEIGHT are user units, the page decides
how wide that is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from math import ceil, floor, isfinite, log10

WIDTH, HEIGHT = 440, 256
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 26, 34
LINE = 12  # height of a label
RADIUS, GAP = 5, 9  # of a dot, and from its middle to its label
BAR = 0.72  # of the room one bar has
LETTER = 6.0  # mean width of a letter of a label
DECADES = 7  # at most, on a logarithmic axis
FEW = 300.0  # highest over lowest, up to which 2 and 5 are marked between the powers of ten

#: left, top, right, bottom
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve; `kind` is its CSS class, points are (x, y)."""

    name: str
    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar with an optional tick at `mark`; `kind` is its CSS class."""

    title: str
    kind: str
    value: float
    mark: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One labelled point."""

    name: str
    kind: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Axis:
    """From a value to a place; both ends of the range are on the axis."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, here = self.low, self.high, value
        if self.logarithmic:
            low, high, here = log10(low), log10(high), log10(max(value, self.low))
        return self.start + (here - low) / ((high - low) or 1.0) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return _even(self.low, self.high)
        decades = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low <= FEW else (1,)
        found = [step * 10.0**decade for decade in decades for step in steps]
        return [each for each in found if self.low <= each * 1.0001 and each <= self.high * 1.0001]


def lines(curves: Sequence[Line], *, x: str, y: str, logarithmic: bool = True) -> str:
    """Curves over a linear x and a mostly logarithmic y; values that are not positive are left out."""
    known = [point for curve in curves for point in curve.points if _shows(point[1])]
    if not known:
        return _nothing("no error at all: every value is zero")
    across = Axis(min(p[0] for p in known), max(p[0] for p in known), LEFT, WIDTH - RIGHT)
    up = (_decades if logarithmic else _from_round_to_round)([p[1] for p in known])
    body = [*_grid(across, up, x, y, _whole), *(_curve(curve, across, up) for curve in curves)]
    return _svg(body, f"{y} over {x}")


def bars(items: Sequence[Bar], *, x: str, y: str) -> str:
    """One bar per item, side by side, from zero."""
    shown = [item for item in items if isfinite(item.value)]
    top = max([0.0, *(item.value for item in shown), *(item.mark or 0.0 for item in shown)])
    if not top:
        return _nothing("no error at all: every value is zero")
    across = Axis(0, len(items), LEFT, WIDTH - RIGHT)
    up = Axis(0.0, top * 1.05, HEIGHT - BOTTOM, TOP)
    body = [*_grid(across, up, x, y, _whole), *_bars(items, across, up)]
    return _svg(body, f"{y} over {x}")


def dots(items: Sequence[Dot], *, x: str, y: str, wall: tuple[str, float]) -> str:
    """Labelled points over a linear x from zero and a logarithmic y; `wall` is a marked x."""
    known = [item for item in items if _shows(item.y)]
    if not known:
        return _nothing("no error at all: every value is zero")
    across = Axis(0.0, max(wall[1], *(item.x for item in known)) * 1.04, LEFT, WIDTH - RIGHT)
    up = _decades([item.y for item in known])
    body = [*_grid(across, up, x, y, _short), _wall(wall, across), *_labelled(known, across, up)]
    return _svg(body, f"{y} over {x}")


# ------------------------------------------------------------------------------------------- pieces


def _svg(body: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        + "".join(body)
        + "</svg>"
    )


def _nothing(text: str) -> str:
    return _svg(
        [f'<text class="none" x="{WIDTH / 2}" y="{HEIGHT / 2}">{escape(text)}</text>'], text
    )


def _grid(across: Axis, up: Axis, x: str, y: str, told: Callable[[float], str]) -> Iterator[str]:
    for tick in up.ticks():
        at = up.at(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="tick end" x="{LEFT - 7}" y="{at + 3.5:.1f}">{_short(tick)}</text>'
    for tick in across.ticks():
        at = across.at(tick)
        yield f'<text class="tick mid" x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}">{told(tick)}</text>'
    yield f'<text class="axis end" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">{escape(x)}</text>'
    yield f'<text class="axis" x="0" y="10">{escape(y)}</text>'


def _curve(curve: Line, across: Axis, up: Axis) -> str:
    places = [(across.at(a), up.at(b)) for a, b in curve.points if _shows(b)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    points = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>' for a, b in places)
    name = escape(curve.name)
    return f'<g class="curve {curve.kind}"><title>{name}</title><polyline points="{path}"/>{points}</g>'


def _bars(items: Sequence[Bar], across: Axis, up: Axis) -> Iterator[str]:
    width = max((across.at(1) - across.at(0)) * BAR, 0.6)
    floor_y = up.at(0.0)
    for index, item in enumerate(items):
        if not isfinite(item.value):
            continue
        left, top = across.at(index + 0.5) - width / 2, up.at(item.value)
        drawn = (
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{max(floor_y - top, 0.8):.1f}" rx="{min(width / 3, 1.5):.1f}"/>'
        )
        if item.mark is not None and isfinite(item.mark):
            at = up.at(item.mark)
            drawn += f'<line class="mark" x1="{left - 1:.1f}" x2="{left + width + 1:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<g class="bar {item.kind}"><title>{escape(item.title)}</title>{drawn}</g>'


def _wall(wall: tuple[str, float], across: Axis) -> str:
    at = across.at(wall[1])
    # Beside the line, on the side where there is room: above it stands what the axis measures.
    anchor, beside = ("", at + GAP) if at < WIDTH / 2 else (" end", at - GAP)
    return (
        f'<line class="wall" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="label{anchor}" x="{beside:.1f}" y="{TOP + LINE / 2:.1f}">'
        f"{escape(wall[0])}</text>"
    )


def _labelled(items: Sequence[Dot], across: Axis, up: Axis) -> Iterator[str]:
    """Dots, each with its name beside it where there is room; all tell it when pointed at."""
    places = [(across.at(item.x), up.at(item.y)) for item in items]
    taken = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in places]
    for item, (x, y) in zip(items, places, strict=True):
        name = escape(item.name)
        yield (
            f'<g class="dot {item.kind}"><title>{name}</title>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"/>{_label(item.name, x, y, taken)}</g>'
        )


def _label(name: str, x: float, y: float, taken: list[Box]) -> str:
    """The name in the first free place around the dot, which is taken from then on; or nothing."""
    width = LETTER * len(name)
    for side, rise in product((1, -1), (0.0, -0.8, 0.8, -1.6, 1.6)):
        left, middle = (x + GAP if side > 0 else x - GAP - width), y + rise * LINE
        box = (left, middle - LINE / 2, left + width, middle + LINE / 2)
        inside = LEFT < left and left + width < WIDTH and TOP < box[1] and box[3] < HEIGHT - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            anchor, at = ("", left) if side > 0 else (" end", left + width)
            return (
                f'<text class="label{anchor}" x="{at:.1f}" y="{middle + 3.5:.1f}">'
                f"{escape(name)}</text>"
            )
    return ""


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# -------------------------------------------------------------------------------------------- scales


def _shows(value: float) -> bool:
    return isfinite(value) and value > 0


def _decades(values: Sequence[float]) -> Axis:
    """A logarithmic axis upwards, a little wider than the values."""
    high = max(values) * 1.3
    low = max(min(values) / 1.3, high / 10**DECADES)
    return Axis(low, high, HEIGHT - BOTTOM, TOP, logarithmic=True)


def _from_round_to_round(values: Sequence[float]) -> Axis:
    """A linear axis upwards, a little wider than the values."""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 1.0
    return Axis(low - room, high + room, HEIGHT - BOTTOM, TOP)


def _even(low: float, high: float) -> list[float]:
    """About five round numbers in the range."""
    rough = (high - low) / 5 or 1.0
    unit = 10.0 ** floor(log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    return [step * i for i in range(ceil(low / step), floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def _whole(value: float) -> str:
    return str(int(value)) if value == int(value) else ""
