"""Plots as inline SVG: lines, bands and axes in the colours of the page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 38


@dataclass
class Plot:
    """A plot of values in [0, 1] over x in [low, high]; parts are drawn in the order in which they are added.

    title: for readers who do not see it. xlabel, ylabel: of the axes. ticks: of x.
    """

    title: str
    xlabel: str
    ylabel: str
    low: float
    high: float
    ticks: Sequence[float] = ()
    width: int = 360
    height: int = 230
    _parts: list[str] = field(default_factory=list)

    def _x(self, x: float) -> float:
        share = (x - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return LEFT + share * (self.width - LEFT - RIGHT)

    def _y(self, y: float) -> float:
        return TOP + (1 - y) * (self.height - TOP - BOTTOM)

    def band(self, start: float, end: float) -> None:
        """Shade a stretch of x."""
        x, width = self._x(start), max(2.0, self._x(end) - self._x(start))
        height = self.height - TOP - BOTTOM
        self._parts.append(f'<rect class="band" x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{height}"/>')

    def line(self, x: Sequence[float], y: Sequence[float], kind: str, *, dots: bool = False) -> None:
        """Draw a line through the points whose y is defined. kind: its class, "a", "b", "c" or "faint"."""
        points = [(self._x(u), self._y(v)) for u, v in zip(x, y, strict=True) if v == v]
        path = " ".join(f"{u:.1f},{v:.1f}" for u, v in points)
        self._parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        if dots:
            self._parts += [f'<circle class="dot {kind}" cx="{u:.1f}" cy="{v:.1f}" r="3"/>' for u, v in points]

    def dots(self, x: Sequence[float], y: Sequence[float], kind: str) -> None:
        """Draw points. kind: as of `line`."""
        self._parts += [
            f'<circle class="dot {kind}" cx="{self._x(u):.1f}" cy="{self._y(v):.1f}" r="4"/>'
            for u, v in zip(x, y, strict=True)
        ]

    def svg(self) -> str:
        """Return the plot."""
        right, bottom = self.width - RIGHT, self.height - BOTTOM
        grid = []
        for y in (0.0, 0.25, 0.5, 0.75, 1.0):
            at = self._y(y)
            grid.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
            grid.append(f'<text class="tick end" x="{LEFT - 6}" y="{at + 4:.1f}">{y:g}</text>')
        for x in self.ticks or (self.low, (self.low + self.high) / 2, self.high):
            grid.append(f'<text class="tick mid" x="{self._x(x):.1f}" y="{bottom + 15}">{x:.4g}</text>')
        middle, turn = f"{TOP + (bottom - TOP) / 2:.0f}", "rotate(-90 12 {0})"
        labels = (
            f'<text class="axis mid" x="{(LEFT + right) / 2:.0f}" y="{self.height - 6}">{escape(self.xlabel)}</text>'
            f'<text class="axis mid" transform="{turn.format(middle)}" x="12" y="{middle}">{escape(self.ylabel)}</text>'
        )
        return (
            f'<svg role="img" aria-label="{escape(self.title)}" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}">{"".join(grid)}{"".join(self._parts)}{labels}</svg>'
        )
