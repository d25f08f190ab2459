"""Draw small charts as inline SVG: lines over steps, values with intervals, and bars.

Colours are classes (`s0`, `s1`, …), so that the page's style sheet sets them for light and dark. ElementTree
escapes all texts.
"""

import dataclasses
import math
from collections.abc import Sequence
from xml.etree import ElementTree as ET

W, H = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MOST = 160  # points of a line, at most


@dataclasses.dataclass(frozen=True)
class Line:
    """points: (x, y); a value that is not finite is a gap. colour, dash: indices into the page's styles."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dash: int = 0


@dataclasses.dataclass(frozen=True)
class Dot:
    """A value with its interval, in a row of `intervals`."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 0


def lines(title: str, found: Sequence[Line], x_name: str = "step") -> str:
    """Draw lines over a common axis; "" if no point is finite.

    A line of more than `MOST` points is drawn as means of consecutive points, over a band from their minimum
    to their maximum.
    """
    drawn = [(line, _average_points(line.points)) for line in found]
    flat = [p for _, parts in drawn for part in parts for p in part]
    if not flat:
        return ""
    xs, lows, highs = [p[0] for p in flat], [p[2] for p in flat], [p[3] for p in flat]
    y_ticks, x_ticks = ticks(min(lows), max(highs)), ticks(min(xs), max(xs), 5, whole=True)
    sx = _scale(min(xs), max(xs), LEFT, W - RIGHT)
    sy = _scale(y_ticks[0], y_ticks[-1], H - BOTTOM, TOP)
    svg = _svg(W, H, f"{title} over {x_name}")
    for y in y_ticks:
        _rule(svg, LEFT, W - RIGHT, sy(y), "zero" if y == 0 else "rule")
        _text(svg, LEFT - 6, sy(y) + 3.5, number(y), "end")
    for x in x_ticks:
        _text(svg, sx(x), H - BOTTOM + 15, number(x), "middle")
    for line, parts in drawn:
        group = ET.SubElement(svg, "g", {"class": f"s{line.colour} d{line.dash}"})
        for part in parts:
            if any(p[2] < p[3] for p in part):
                edge = [(p[0], p[3]) for p in part] + [(p[0], p[2]) for p in reversed(part)]
                ET.SubElement(group, "path", {"class": "band", "d": _path(edge, sx, sy) + "Z"})
        for part in parts:
            ET.SubElement(group, "path", {"class": "line", "d": _path([p[:2] for p in part], sx, sy)})
        for x, y, _, _ in (p for part in parts for p in part):
            dot = ET.SubElement(group, "circle", {"cx": _n(sx(x)), "cy": _n(sy(y)), "r": "5", "class": "dot"})
            ET.SubElement(dot, "title").text = f"{line.name}: {number(y, 4)} at {x_name} {number(x, 8)}"
    return ET.tostring(svg, encoding="unicode")


def intervals(title: str, found: Sequence[Dot], *, marks: Sequence[float] = ()) -> str:
    """Draw values with their intervals, one per row; `marks` are vertical lines."""
    found = [d for d in found if math.isfinite(d.value)]
    if not found:
        return ""
    width, row, left = 720, 26, 250
    ends = [x for d in found for x in (d.value, d.low, d.high) if x is not None and math.isfinite(x)]
    x_ticks = ticks(min(*ends, 0.0), max(*ends, 0.0), 7)
    height = row * len(found) + 30
    sx = _scale(x_ticks[0], x_ticks[-1], left, width - 74)
    svg = _svg(width, height, title)
    for x in x_ticks:
        _rule(svg, 4, height - 22, sx(x), "zero" if x == 0 else "rule", across=False)
        _text(svg, sx(x), height - 6, number(x), "middle")
    for x in marks:
        _rule(svg, 4, height - 22, sx(x), "mark", across=False)
    for i, d in enumerate(found):
        y = 4 + row * (i + 0.5)
        _text(svg, left - 14, y + 4, d.label, "end", "label")
        group = ET.SubElement(svg, "g", {"class": f"s{d.colour}"})
        if d.low is not None and d.high is not None:
            _rule(group, sx(d.low), sx(d.high), y, "bar")
        ET.SubElement(group, "circle", {"cx": _n(sx(d.value)), "cy": _n(y), "r": "4.5", "class": "point"})
        _text(svg, width - 4, y + 4, f"{d.value:.2f}".replace("-", "−"), "end", "label")
    return ET.tostring(svg, encoding="unicode")


def bars(title: str, found: Sequence[tuple[str, float, str, int]]) -> str:
    """Draw bars from zero, one per row: (label, value, text, colour)."""
    top = max((v for _, v, _, _ in found), default=0.0)
    if top <= 0:
        return ""
    width, row, left = 720, 24, 150
    svg = _svg(width, row * len(found) + 6, title)
    for i, (label, value, says, colour) in enumerate(found):
        y = 3 + row * i
        _text(svg, left - 12, y + 15, label, "end", "label")
        length = max(value / top * (width - left - 110), 1.5)
        group = ET.SubElement(svg, "g", {"class": f"s{colour}"})
        ET.SubElement(group, "rect", {"x": str(left), "y": _n(y + 4), "width": _n(length), "height": "15",
                                      "rx": "2", "class": "fill"})
        _text(svg, left + length + 8, y + 15, says, "start", "label")
    return ET.tostring(svg, encoding="unicode")


def ticks(low: float, high: float, n: int = 4, whole: bool = False) -> list[float]:
    """Return about n round numbers that cover `low` to `high`; with `whole`, integers between them."""
    if not high > low:
        if whole:
            return [low]
        low, high = (low - abs(low) / 2, high + abs(low) / 2) if low else (0.0, 1.0)
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, round(step))
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(x: float, digits: int = 3) -> str:
    """Format a number with `digits` significant digits and a minus sign (U+2212)."""
    return f"{x:.{digits}g}".replace("e+0", "e").replace("e-0", "e-").replace("-", "−")


def _average_points(points) -> list[list[tuple[float, float, float, float]]]:
    """Average points to about MOST tuples (mean x, mean y, minimum, maximum), in parts without gaps."""
    size = max(1, math.ceil(len(points) / MOST))
    parts: list[list] = [[]]
    for i in range(0, len(points), size):
        some = [(float(x), float(y)) for x, y in points[i : i + size] if math.isfinite(y)]
        if not some:
            parts.append([])
            continue
        ys = [y for _, y in some]
        parts[-1].append((sum(x for x, _ in some) / len(some), sum(ys) / len(ys), min(ys), max(ys)))
    return [p for p in parts if p]


def _scale(low, high, a, b):
    span = (high - low) or 1.0
    return lambda x: a + (x - low) / span * (b - a)


def _n(x: float) -> str:
    return f"{x:.1f}"


def _path(points, sx, sy) -> str:
    if len(points) == 1:  # a line of length 0 shows its round ends, so a single point is visible
        points = [*points, points[0]]
    return "M" + "L".join(f"{_n(sx(x))} {_n(sy(y))}" for x, y in points)


def _svg(width, height, label: str):
    about = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label}
    return ET.Element("svg", about)


def _text(svg, x, y, text: str, anchor: str, kind: str = "tick") -> None:
    about = {"x": _n(x), "y": _n(y), "text-anchor": anchor, "class": kind}
    ET.SubElement(svg, "text", about).text = text


def _rule(svg, a, b, at, kind: str, across: bool = True) -> None:
    ends = (("x1", a), ("x2", b), ("y1", at), ("y2", at)) if across else (
        ("y1", a), ("y2", b), ("x1", at), ("x2", at))
    ET.SubElement(svg, "line", {**{k: _n(v) for k, v in ends}, "class": kind})
