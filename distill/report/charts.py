"""Charts as inline SVG that follows the page's light or dark theme.

Matplotlib draws them with placeholder colours, which become CSS variables, so one drawing suits both themes. Text stays
text and takes the page's font. No display, no global state: figures are made without pyplot.
"""

import dataclasses
import html
import io
import re
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Placeholders that matplotlib passes through unchanged, and the CSS variables they become.
_INK, _QUIET, _GRID = "#010101", "#020202", "#030303"
_VARIABLES = {_INK: "--ink", _QUIET: "--quiet", _GRID: "--grid"}
COLOURS = {"student": "#040404", "thinking": "#050505", "non_thinking": "#060606", "teacher": "#070707"}
_VARIABLES |= {placeholder: f"--{name.replace('_', '-')}" for name, placeholder in COLOURS.items()}
_OTHERS = list(COLOURS.values())

_MOST_POINTS = 600
_SMOOTH_FROM_POINTS = 60
_LOG_FROM_RATIO = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One line in pieces, a piece a stage: x in steps of the whole run, y with NaN where there is no value."""

    name: str
    pieces: Sequence[tuple[Sequence[float], Sequence[float]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """The part of the x axis that one stage takes up."""

    name: str
    begin: float
    end: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: a share in [0, 1] with its standard error, if known."""

    group: str
    colour: str
    share: float
    stderr: float | None


def colour_of(name: str, index: int) -> str:
    """The CSS variable of a series: by what its name says it is, else by its place."""
    return _VARIABLES[_placeholder(name, index)]


def line_chart(series: Sequence[Series], spans: Sequence[Span], *, label: str) -> str:
    """Lines over steps, the raw values faint below a moving mean where there are many; log scale for wide ranges."""
    figure, axes = _figure(4.4, 2.5)
    for index, line in enumerate(series):
        colour = _placeholder(line.name, index)
        # Piece by piece: the loss of another stage means something else, and a line between would invent values.
        for piece in line.pieces:
            x, y = _thinned(*(np.asarray(values, float) for values in piece))
            if len(x) < _SMOOTH_FROM_POINTS:
                axes.plot(x, y, color=colour, linewidth=1.6, marker="o" if len(x) < 15 else None, markersize=3)
            else:
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
                axes.plot(x, _moving_mean(y), color=colour, linewidth=1.6)
    _scale(axes, np.concatenate([np.asarray(y, float) for line in series for _, y in line.pieces]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    if spans:
        axes.set_xlim(0, spans[-1].end)
        _mark_stages(axes, spans)
    return _svg(figure, label)


def bar_chart(bars: Sequence[Bar], *, label: str) -> str:
    """Shares in percent, grouped, with the figure above each bar and standard errors as whiskers."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    figure, axes = _figure(9.6, 2.9)
    for position, group in enumerate(groups):
        members = [bar for bar in bars if bar.group == group]
        width = 0.3
        for index, bar in enumerate(members):
            x = position + (index - (len(members) - 1) / 2) * width
            height = 100 * bar.share
            axes.bar(x, height, width * 0.9, color=COLOURS[bar.colour], linewidth=0)
            whisker = 100 * (bar.stderr or 0)
            if whisker:
                axes.errorbar(x, height, whisker, color=_INK, elinewidth=0.9, capsize=2.5, capthick=0.9)
            axes.annotate(
                f"{height:.1f}",
                (x, height + whisker),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=10,
                color=_INK,
            )
    axes.set_xticks(range(len(groups)), groups, color=_INK, parse_math=False)
    axes.tick_params(axis="x", length=0, labelsize=10)
    axes.set_ylim(0, 112)
    axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    return _svg(figure, label)


def _figure(width_inches: float, height_inches: float):
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_QUIET, labelsize=9.5, length=0, pad=4)
    return figure, axes


def _scale(axes, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if len(values) == 0 or values.min() <= 0 or values.max() / values.min() <= _LOG_FROM_RATIO:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(y=0.08)
        return
    axes.set_yscale("log")
    decades = np.log10(values.max() / values.min())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())


def _mark_stages(axes, spans: Sequence[Span]) -> None:
    for index, span in enumerate(spans):
        if index:
            axes.axvline(span.begin, color=_QUIET, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.annotate(
            span.name,
            ((span.begin + span.end) / 2, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=9.5,
            color=_QUIET,
            parse_math=False,
        )


def _placeholder(name: str, index: int) -> str:
    for known, colour in COLOURS.items():
        if name == known or name.startswith(f"{known}_") or name.endswith(f"_{known}"):
            return COLOURS["non_thinking"] if name.endswith("non_thinking") else colour
    return _OTHERS[index % len(_OTHERS)]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stride = -(-len(x) // _MOST_POINTS)
    return x[::stride], y[::stride]


def _moving_mean(y: np.ndarray) -> np.ndarray:
    """Centred mean over a twentieth of the points, NaN left out."""
    half = max(1, len(y) // 40)
    finite = np.isfinite(y)
    total = np.concatenate([[0], np.cumsum(np.where(finite, y, 0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    counts = count[high] - count[low]
    return np.where(counts > 0, (total[high] - total[low]) / np.maximum(counts, 1), np.nan)


def _tick(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            divisor = 1e3 if unit == "k" else size
            return f"{value / divisor:g}{unit}"
    return f"{value:g}"


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    # A salt from the label keeps the ids of several charts in one page apart, and the file reproducible.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Cut what would reach beyond this drawing in a page: style rules, fixed sizes, ids that nothing refers to.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?!p[0-9a-f]{10}|m[0-9a-f]{10})[^"]*"', "", svg)
    svg = re.sub(r'^<svg [^>]*(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{html.escape(label)}">', svg)
    svg = svg.replace("xlink:href", "href")
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return svg
