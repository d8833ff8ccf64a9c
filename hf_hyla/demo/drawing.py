"""The pictures of the demo, as SVG and HTML: plain functions of numbers, without any library."""

import math
from collections.abc import Sequence
from html import escape


# How features are drawn: the first is the shape, and so on. Further features are only written as digits.
FEATURES = ("shape", "size", "colour", "number")
SHAPES = ("circle", "triangle", "square", "diamond", "star", "plus", "ring", "bow tie")
COLOURS = ("red", "orange", "gold", "green", "teal", "blue", "purple", "pink")
_FILLS = ("#d7263d", "#f2842f", "#dcb000", "#2e9e4f", "#12a5a5", "#2f6fde", "#8142b8", "#ea6fb1")
NUM_DRAWN = len(SHAPES)
# The columns and rows of a 3 × 3 grid in which the items of a panel lie, by the number of items.
_PLACES = ("e", "ai", "aei", "acgi", "acegi", "acdfgi", "acdefgi", "abcdfghi")
_PANEL = 100
_GAP = 8
LINES = (("#2f6fde", "9 5"), ("#d7263d", "2 4"), ("#2e9e4f", "12 4 2 4"), ("#8142b8", "4 2"))


def feature_names(num_features: int) -> list[str]:
    return [FEATURES[i] if i < len(FEATURES) else f"feature {i + 1}" for i in range(num_features)]


def described(panel: Sequence[int]) -> str:
    """A panel in words, for screen readers."""
    digits = " ".join(map(str, panel))
    if max(panel) >= NUM_DRAWN:
        return digits
    shape, size, colour, number = _drawn(panel)
    plural = SHAPES[shape] + ("es" if SHAPES[shape].endswith("s") else "s") if number else SHAPES[shape]
    return f"{number + 1} {COLOURS[colour]} {plural} of size {size + 1}, digits {digits}"


def panel(values: Sequence[int] | None, digits: bool = False, mark: str = "") -> str:
    """
    One panel, 100 × 100: as many items as its number says, of its shape, size and colour.

    Args:
        values: the features, from 0 on; `None` draws a question mark. Values that cannot be drawn are written.
        digits: whether to write the values below the items.
        mark: `"right"`, `"possible"` or `"wrong"`: a frame, and a sign on the corner, which it overlaps by 5.
    """
    frame, dash, sign = {
        "right": ("#1a7f37", "", "✓"),
        "possible": ("#9a6700", "6 4", "≈"),
        "wrong": ("#cf222e", "2 3", "✗"),
    }.get(mark, ("#8c95a3", "", ""))
    width = 4 if mark else 1.5
    parts = [
        f'<rect x="2" y="2" width="96" height="96" rx="9" fill="#fff" stroke="{frame}" stroke-width="{width}" '
        f'stroke-dasharray="{dash}"/>'
    ]
    if values is None:
        parts.append('<text x="50" y="66" font-size="46" text-anchor="middle" fill="#8c95a3">?</text>')
    elif max(values) >= NUM_DRAWN:
        parts.append(_text(50, 57, " ".join(map(str, values)), 20))
    else:
        digits = digits or len(values) > len(FEATURES)
        scale = 0.84 if digits else 1
        parts.append(f'<g transform="translate({50 * (1 - scale):.1f} 0) scale({scale})">{_items(values)}</g>')
        if digits:
            parts.append(_text(50, 93, " ".join(map(str, values)), 15))
    if sign:
        parts.append(f'<circle cx="93" cy="7" r="12" fill="{frame}"/>{_text(93, 13, sign, 17, "#fff")}')
    return "".join(parts)


def board(panels: Sequence[Sequence[int] | None], digits: bool = False, selected: int | None = None) -> str:
    """
    The 3 × 3 board as one SVG image. Its first eight panels can be reached by keyboard and carry `data-panel`.

    Args:
        panels: nine, row by row; the last is `None` where it is asked for.
        selected: the panel that has a frame around it.
    """
    step = _PANEL + _GAP
    parts = []
    for number, values in enumerate(panels):
        name = f"row {number // 3 + 1}, column {number % 3 + 1}: "
        label = name + (described(values) if values is not None else "to be answered")
        reached = f' role="button" tabindex="0" data-panel="{number}"' if number < 8 else ' role="img"'
        chosen = (
            '<rect x="-2" y="-2" width="104" height="104" rx="12" fill="none" stroke="#4f46e5" stroke-width="3.5"/>'
            if number == selected
            else ""
        )
        parts.append(
            f'<g transform="translate({number % 3 * step + 4} {number // 3 * step + 4})"{reached} '
            f'aria-label="{escape(label)}">{panel(values, digits)}{chosen}</g>'
        )
    return svg(3 * step, 3 * step, "".join(parts), "The puzzle: three rows of three panels", "hyla-board")


def bars(probabilities: Sequence[float], answer: int, right: int | None) -> str:
    """The probability of each digit as bars; the model's answer is dark, and the right digit has a frame and a dot."""
    width, height, step = 15, 38, 17
    parts = []
    for value, probability in enumerate(probabilities):
        tall = max(probability * height, 0.8)
        fill = "#4f46e5" if value == answer else "#b9bff0"
        x = value * step + 2
        parts.append(
            f'<g><title>{value}: {probability:.1%}</title><rect x="{x}" y="{6 + height - tall:.1f}" width="{width - 2}" '
            f'height="{tall:.1f}" fill="{fill}"/>{_text(x + 6.5, 57, str(value), 11, "currentColor")}</g>'
        )
        if value == right:
            parts.append(
                f'<rect x="{x - 1.5}" y="4.5" width="{width + 1}" height="{height + 3}" fill="none" stroke="#1a7f37" '
                f'stroke-width="1.5" rx="2"/><circle cx="{x + 6.5}" cy="62" r="2.2" fill="#1a7f37"/>'
            )
    most = f"{answer} with {probabilities[answer]:.0%}"
    return svg(len(probabilities) * step + 4, 66, "".join(parts), f"probability of each digit, most {most}")


def heat_map(codes: Sequence[Sequence[Sequence[float]]], scales: Sequence[float], label: str) -> str:
    """
    Codes as coloured cells: a block for each key, rows are layers, columns heads. Blue is below 0, orange above.

    Args:
        codes: (layers, keys, heads).
        scales: (layers,), the size of a score that has the full colour.
    """
    cell, tall, gap = 6, 10, 5
    parts, x = [], 0
    for key in range(len(codes[0])):
        for layer, (of_layer, scale) in enumerate(zip(codes, scales, strict=True)):
            for head, score in enumerate(of_layer[key]):
                parts.append(
                    f'<rect x="{x + head * cell}" y="{layer * tall}" width="{cell - 0.6:.1f}" height="{tall - 1}" '
                    f'fill="{shade(score / scale if scale else 0.0)}"><title>layer {layer + 1}, head {head + 1}: {score:.2f}</title></rect>'
                )
        x += len(codes[0][key]) * cell + gap
    return svg(x - gap, len(codes) * tall, "".join(parts), label, "hyla-heat")


def shade(score: float) -> str:
    """The colour of a score from -1 to 1: blue, near white, orange."""
    if not math.isfinite(score):
        return "#888888"
    strength = min(abs(score), 1.0) ** 0.7
    end = (217, 95, 2) if score > 0 else (33, 102, 172)
    return "#" + "".join(f"{round(244 + (channel - 244) * strength):02x}" for channel in end)


def curve(x: Sequence[float], truth: Sequence[float], answers: dict[str, Sequence[float]], name: str) -> str:
    """
    The answers of models against the truth, as lines over one variable. Each line has its own dash pattern and a name.

    Args:
        x, truth: (points,), in [0, 1].
        answers: (points,), the answers of each model, by its name. They are drawn up to a tenth outside of [0, 1].
        name: the name of the variable.
    """
    width, height, left, top = 480, 280, 40, 12

    def path(values: Sequence[float]) -> str:
        points = zip(x, values, strict=True)
        return " ".join(
            f"{left + a * width:.1f},{top + (1.1 - min(max(b, -0.1), 1.1)) / 1.2 * height:.1f}" for a, b in points
        )

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        across, down = left + tick * width, top + (1.1 - tick) / 1.2 * height
        parts += [
            f'<path d="M{left} {down:.1f}h{width}M{across:.1f} {top}v{height}" stroke="currentColor" stroke-opacity=".15"/>',
            _text(left - 6, down + 4, f"{tick:g}", 12, "currentColor", "end"),
            _text(across, top + height + 16, f"{tick:g}", 12, "currentColor"),
        ]
    parts.append(_text(left + width / 2, top + height + 34, name, 14, "currentColor"))
    parts.append(f'<polyline points="{path(truth)}" fill="none" stroke="#8c95a3" stroke-width="5"/>')
    legend = [("true value", "#8c95a3", "", 5.0)]
    for (model, values), (colour, dash) in zip(answers.items(), LINES * len(answers), strict=False):
        parts.append(
            f'<polyline points="{path(values)}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"/>'
        )
        legend.append((model, colour, dash, 2.5))
    for number, (words, colour, dash, stroke) in enumerate(legend):
        y = top + height + 56 + 20 * (number // 2)
        start = left + number % 2 * width / 2
        parts.append(
            f'<path d="M{start} {y - 4}h34" stroke="{colour}" stroke-width="{stroke}" stroke-dasharray="{dash}"/>'
            + _text(start + 42, y, words, 13, "currentColor", "start")
        )
    bottom = top + height + 64 + 20 * ((len(legend) - 1) // 2)
    return svg(left + width + 16, bottom, "".join(parts), f"Answers and true value over {name}", "hyla-curve")


def svg(width: float, height: float, inside: str, label: str, name: str = "") -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="{"group" if "tabindex" in inside else "img"}" aria-label="{escape(label)}" class="{name}" overflow="visible" '
        f'font-family="system-ui, sans-serif">{inside}</svg>'
    )


def _drawn(values: Sequence[int]) -> tuple[int, int, int, int]:
    """Shape, size, colour and number. Features that a panel lacks have fixed values: size 5, colour 5 and one item."""
    shape, size, colour, number = (*values, *(0, 5, 5, 0)[len(values) :])[:4]
    return shape, size, colour, number


def _items(values: Sequence[int]) -> str:
    shape, size, colour, number = _drawn(values)
    radius = 5 + size * 1.35
    path = f'<path d="{_outline(shape, radius)}" fill="{_FILLS[colour]}" fill-rule="evenodd"/>'
    places = [("abcdefghi".index(place) % 3, "abcdefghi".index(place) // 3) for place in _PLACES[number]]
    return "".join(
        f'<g transform="translate({20 + 30 * column} {20 + 30 * row})">{path}</g>' for column, row in places
    )


def _outline(shape: int, r: float) -> str:
    """The path of a shape around the origin, of about the area of a circle of radius r."""

    def circle(radius: float) -> str:
        return f"M{-radius:.2f} 0a{radius:.2f} {radius:.2f} 0 1 0 {2 * radius:.2f} 0a{radius:.2f} {radius:.2f} 0 1 0 {-2 * radius:.2f} 0z"

    def around(radii: Sequence[float], turn: float = -90) -> str:
        angles = [math.radians(turn + 360 * i / len(radii)) for i in range(len(radii))]
        points = [f"{a * math.cos(t):.2f} {a * math.sin(t):.2f}" for a, t in zip(radii, angles, strict=True)]
        return f"M{'L'.join(points)}z"

    third = r / 3
    return {
        "circle": circle(r * 0.95),
        "triangle": around([r * 1.15] * 3),
        "square": around([r * 1.2] * 4, -45),
        "diamond": f"M0 {-r * 1.25:.2f}L{r * 0.8:.2f} 0L0 {r * 1.25:.2f}L{-r * 0.8:.2f} 0z",
        "star": around([r * 1.2, r * 0.5] * 5),
        "plus": f"M{-third:.2f} {-r:.2f}h{2 * third:.2f}v{r - third:.2f}h{r - third:.2f}v{2 * third:.2f}h{third - r:.2f}v{r - third:.2f}"
        f"h{-2 * third:.2f}v{third - r:.2f}h{third - r:.2f}v{-2 * third:.2f}h{r - third:.2f}z",
        "ring": circle(r) + circle(r * 0.55),
        "bow tie": f"M{-r * 0.95:.2f} {-r * 0.8:.2f}L{r * 0.95:.2f} {r * 0.8:.2f}v{-r * 1.6:.2f}L{-r * 0.95:.2f} {r * 0.8:.2f}z",
    }[SHAPES[shape]]


def _text(x: float, y: float, words: str, size: float, fill: str = "#1f2937", anchor: str = "middle") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'
    )
