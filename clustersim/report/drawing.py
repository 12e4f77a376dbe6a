"""A drawing of boxes, lines and words, written as SVG by hand or as PNG by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from clustersim.errors import UsageError

_FONT = "Helvetica, Arial, sans-serif"
_MATPLOTLIB = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "cross": "x"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle from its upper left corner, in pixels; `text` stands in its middle."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    text: str = ""
    size: int = 12
    edge: str = "#4a5568"
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A straight line."""

    x1: float
    y1: float
    x2: float
    y2: float
    colour: str = "#4a5568"
    width: float = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """One line of text on its baseline; `turned`: read from below to above."""

    x: float
    y: float
    text: str
    size: int = 12
    anchor: Literal["start", "middle", "end"] = "start"
    colour: str = "#1a202c"
    bold: bool = False
    turned: bool = False


MarkKind = Literal["circle", "square", "triangle", "diamond", "cross"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point of a plot, `size` pixels wide around (x, y)."""

    x: float
    y: float
    kind: MarkKind
    colour: str
    size: float = 7.0
    opacity: float = 1.0
    hint: str = ""


Shape = Box | Line | Words | Mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Shapes on a white sheet, in the order in which they are painted."""

    width: float
    height: float
    title: str
    shapes: tuple[Shape, ...]

    def svg(self) -> str:
        """The drawing as an SVG document; every name in it is escaped."""
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" height="{self.height:g}" '
            f'viewBox="0 0 {self.width:g} {self.height:g}" font-family="{_FONT}" role="img">',
            f"<title>{escape(self.title)}</title>",
            f'<rect width="{self.width:g}" height="{self.height:g}" fill="#ffffff"/>',
            *(line for shape in self.shapes for line in _svg(shape)),
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def png(self) -> bytes:
        """The drawing as a PNG; UsageError where matplotlib is not installed."""
        try:
            import matplotlib
        except ImportError:
            raise UsageError("PNG needs matplotlib; pip install 'clustersim[plot]', or name a file .svg") from None
        matplotlib.use("Agg")
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        figure = Figure(figsize=(self.width / 100.0, self.height / 100.0), dpi=150)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_xlim(0, self.width)
        axes.set_ylim(self.height, 0)
        axes.axis("off")
        points = 72.0 / 100.0
        sides: dict[str, Literal["left", "center", "right"]] = {"start": "left", "middle": "center", "end": "right"}
        for order, shape in enumerate(self.shapes):
            match shape:
                case Box():
                    patch = Rectangle(
                        (shape.x, shape.y), shape.width, shape.height,
                        facecolor=shape.fill, edgecolor=shape.edge, linewidth=0.8, zorder=order,
                    )  # fmt: skip
                    axes.add_patch(patch)
                    axes.text(
                        shape.x + shape.width / 2.0, shape.y + shape.height / 2.0, _literal(shape.text),
                        size=shape.size * points, ha="center", va="center", zorder=order,
                    )  # fmt: skip
                case Line():
                    axes.plot(
                        (shape.x1, shape.x2), (shape.y1, shape.y2),
                        color=shape.colour, linewidth=shape.width * points, zorder=order,
                    )  # fmt: skip
                case Words():
                    axes.text(
                        shape.x, shape.y, _literal(shape.text), size=shape.size * points, ha=sides[shape.anchor],
                        va="baseline", color=shape.colour, weight="bold" if shape.bold else "normal", zorder=order,
                        rotation=90 if shape.turned else 0,
                    )  # fmt: skip
                case Mark():
                    axes.plot(
                        (shape.x,), (shape.y,), marker=_MATPLOTLIB[shape.kind], color=shape.colour, linestyle="",
                        markersize=shape.size * points, alpha=shape.opacity, zorder=order,
                    )  # fmt: skip
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        return stream.getvalue()


def _literal(text: str) -> str:
    """matplotlib reads what stands between dollar signs as mathematics."""
    return text.replace("$", r"\$")


def _svg(shape: Shape) -> Sequence[str]:
    match shape:
        case Box():
            hint = f"<title>{escape(shape.hint)}</title>" if shape.hint else ""
            box = (
                f'<rect x="{shape.x:g}" y="{shape.y:g}" width="{shape.width:g}" height="{shape.height:g}" rx="3" '
                f"fill={quoteattr(shape.fill)} stroke={quoteattr(shape.edge)}"
            )
            lines = [f"{box}>{hint}</rect>" if hint else f"{box}/>"]
            if shape.text:
                lines.append(
                    f'<text x="{shape.x + shape.width / 2:g}" y="{shape.y + shape.height / 2:g}" '
                    f'font-size="{shape.size}" text-anchor="middle" dominant-baseline="central">'
                    f"{escape(shape.text)}</text>"
                )
            return lines
        case Line():
            return [
                f'<line x1="{shape.x1:g}" y1="{shape.y1:g}" x2="{shape.x2:g}" y2="{shape.y2:g}" '
                f'stroke={quoteattr(shape.colour)} stroke-width="{shape.width:g}"/>'
            ]
        case Words():
            bold = ' font-weight="bold"' if shape.bold else ""
            turned = f' transform="rotate(-90 {shape.x:g} {shape.y:g})"' if shape.turned else ""
            return [
                f'<text x="{shape.x:g}" y="{shape.y:g}" font-size="{shape.size}" text-anchor="{shape.anchor}" '
                f"fill={quoteattr(shape.colour)}{bold}{turned}>{escape(shape.text)}</text>"
            ]
        case Mark():
            return [_mark(shape)]


def _mark(shape: Mark) -> str:
    half = shape.size / 2.0
    x, y = shape.x, shape.y
    opacity = f' opacity="{shape.opacity:g}"' if shape.opacity < 1.0 else ""
    hint = f"<title>{escape(shape.hint)}</title>" if shape.hint else ""
    if shape.kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{half:g}" fill={quoteattr(shape.colour)}{opacity}>{hint}</circle>'
    corners: dict[str, tuple[tuple[float, float], ...]] = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "triangle": ((0.0, -1.1), (1.1, 0.9), (-1.1, 0.9)),
        "diamond": ((0.0, -1.2), (1.2, 0.0), (0.0, 1.2), (-1.2, 0.0)),
    }
    if shape.kind == "cross":
        path = "".join(
            f"M{x - half:.1f} {y - sign * half:.1f}L{x + half:.1f} {y + sign * half:.1f}" for sign in (1.0, -1.0)
        )
        return f'<path d="{path}" stroke={quoteattr(shape.colour)} stroke-width="1.8"{opacity}>{hint}</path>'
    points = " ".join(f"{x + dx * half:.1f},{y + dy * half:.1f}" for dx, dy in corners[shape.kind])
    return f'<polygon points="{points}" fill={quoteattr(shape.colour)}{opacity}>{hint}</polygon>'


def check(path: Path) -> None:
    """UsageError where a drawing cannot be written to a file of this name."""
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"{path}: a picture is an .svg or a .png file; name one")


def write(drawing: Drawing, path: Path) -> None:
    """Write a drawing as SVG or PNG, by the suffix of `path`; whole or not at all."""
    from clustersim import files

    check(path)
    if path.suffix == ".svg":
        files.write_text(path, drawing.svg())
    else:
        files.write_bytes(path, drawing.png())
