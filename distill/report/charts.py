"""The charts of a report: curves over steps, bars by model, results over compute, lengths of responses."""

import dataclasses
from collections.abc import Sequence

import markupsafe
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from distill.report.drawing import (
    COLOURS,
    GRID,
    INK,
    QUIET,
    VARIABLES,
    new_figure,
    placeholder,
    shortened,
    svg_of,
    tick,
)

_MOST_POINTS = 600
_SMOOTH_FROM_POINTS = 60
_LOG_FROM_RATIO = 30.0
_LONGEST_NAME = 22
_MOST_INNER_NAMES = 5
_BARS_INCHES, _BARS_REM = 9.6, 60.0
"""Width of a chart of bars as drawn, and of the page that it fills."""
_GROUP_INCHES, _CHARACTER_INCHES = 1.5, 0.098
_NAME_HEIGHT = 0.085
"""Of a name beside a chart of results, as a part of the axes' height: nearer ones are moved apart."""
_CHARACTER_WIDTH = 0.021
"""Of a name above a chart, as a part of the axes' width."""
_MOST_COLUMNS = 36


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reached:
    """What a model reached, and at which cost."""

    name: str
    flops: float
    """All that has led to it."""
    value: float
    error: float | None
    """Half the height of the whisker."""
    start: "Reached | None"
    """From where a line leads to it."""
    colour: str
    """Of COLOURS, or `quiet`."""
    dashed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """The outline of one histogram: shares of all responses by bins of equal width."""

    colour: str
    """Of COLOURS, or `quiet`."""
    bin_tokens: int
    counts: Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart with its words; `legend` pairs each line's name with its CSS colour variable."""

    title: str
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()
    svg: markupsafe.Markup


def colour_of(name: str, index: int) -> str:
    """The CSS variable of a series: by what its name says it is, else by its place."""
    return VARIABLES[placeholder(name, index)]


def line_chart(series: Sequence[Series], spans: Sequence[Span], *, label: str, unit: str = "") -> str:
    """Lines over steps, the raw values faint below a moving mean where there are many; log scale for wide ranges."""
    figure, axes = new_figure(4.4, 2.6, x_label="optimiser steps", y_label=unit)
    for index, line in enumerate(series):
        colour = placeholder(line.name, index)
        # Piece by piece: the loss of another stage means something else, and a line between would invent values.
        for piece in line.pieces:
            x, y = _thinned(*(np.asarray(values, float) for values in piece))
            if len(x) < _SMOOTH_FROM_POINTS:
                axes.plot(x, y, color=colour, linewidth=1.6, marker="o" if len(x) < 15 else None, markersize=3)
            else:
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
                axes.plot(x, _moving_mean(y), color=colour, linewidth=1.6)
    _scale(axes, np.concatenate([np.asarray(y, float) for line in series for _, y in line.pieces]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    if spans:
        axes.set_xlim(0, spans[-1].end)
        _mark_stages(axes, spans)
    return svg_of(figure, label)


def bar_chart(bars: Sequence[Bar], *, label: str) -> str:
    """Shares in percent, grouped, with the figure above each bar and standard errors as whiskers."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    inches = max(_BARS_INCHES, _GROUP_INCHES * len(groups))
    figure, axes = new_figure(inches, 2.9, y_label="pass@1, %")
    for position, group in enumerate(groups):
        members = [bar for bar in bars if bar.group == group]
        width = 0.3
        for index, bar in enumerate(members):
            x = position + (index - (len(members) - 1) / 2) * width
            height = 100 * bar.share
            axes.bar(x, height, width * 0.9, color=COLOURS[bar.colour], linewidth=0)
            whisker = 100 * (bar.stderr or 0)
            if whisker:
                axes.errorbar(x, height, whisker, color=INK, elinewidth=0.9, capsize=2.5, capthick=0.9)
            axes.annotate(
                f"{height:.1f}",
                (x, height + whisker),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=10,
                color=INK,
            )
    longest = int(0.92 * inches / len(groups) / _CHARACTER_INCHES)
    names = [shortened(group, longest) for group in groups]
    axes.set_xticks(range(len(groups)), names, color=INK, parse_math=False)
    axes.tick_params(axis="x", length=0, labelsize=10)
    axes.set_ylim(0, 112)
    axes.set_yticks([0, 25, 50, 75, 100])
    svg = svg_of(figure, label)
    if inches == _BARS_INCHES:
        return svg
    # Wider than the page: it scrolls there rather than shrink.
    return svg.replace("<svg ", f'<svg style="min-width: {_BARS_REM * inches / _BARS_INCHES:.0f}rem" ', 1)


def flops_chart(
    reached: Sequence[Reached], references: Sequence[Reached] = (), *, label: str, unit: str, highest: float | None
) -> str:
    """Results over the FLOPs that led to them, each joined to the one it started from, with its name beside it.

    `references` have a level and no cost: lines across. No axis goes below 0 or above `highest`.
    """
    figure, axes = new_figure(4.4, 3.0, x_label="all FLOPs, teacher included", y_label=unit)
    starts = {id(one.start) for one in reached}
    for one in reached:
        colour, style = _colour(one.colour), (0, (3, 2)) if one.dashed else "-"
        if one.start is not None:
            x, y = (one.start.flops, one.flops), (one.start.value, one.value)
            axes.plot(x, y, color=colour, linewidth=1.2 if one.dashed else 1.8, linestyle=style)
        axes.errorbar(
            one.flops, one.value, one.error, color=colour, marker="o", markersize=4.5, elinewidth=1, capsize=2.5
        )
    for one in references:
        axes.axhline(one.value, color=_colour(one.colour), linewidth=1.2, linestyle=(0, (1, 1.5)))
    everything = [*reached, *references]
    low = min(one.value - (one.error or 0) for one in everything)
    high = max(one.value + (one.error or 0) for one in everything)
    margin = 0.1 * (high - low) or 0.1 * high or 1.0
    axes.set_ylim(
        max(0, low - margin), high + margin if highest is None else min(highest + 0.3 * margin, high + margin)
    )
    farthest = max((one.flops for one in reached), default=0) or 1.0
    axes.set_xlim(-0.03 * farthest, 1.03 * farthest)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    _name_ends(axes, [one for one in everything if id(one) not in starts])
    bottom, top = axes.get_ylim()
    inner = [one for one in reached if id(one) in starts]
    # More would lie upon one another; the table has them all.
    for one in [one for one in inner if len(inner) <= _MOST_INNER_NAMES or not one.dashed][:_MOST_INNER_NAMES]:
        below = one.value - bottom > _NAME_HEIGHT * (top - bottom)
        offset = (4, -11 if below else 15)
        _name(axes, one, (one.flops, one.value), offset, "left" if one.flops < 0.8 * farthest else "right")
    return svg_of(figure, label)


def histogram(outlines: Sequence[Outline], *, label: str) -> str:
    """How many tokens responses have, as outlines over each other."""
    figure, axes = new_figure(4.4, 2.6, x_label="tokens of a response", y_label="% of responses")
    longest = max(len(outline.counts) * outline.bin_tokens for outline in outlines)
    for outline in outlines:
        merged = -(-longest // outline.bin_tokens // _MOST_COLUMNS)
        padded = np.zeros(-(-longest // (outline.bin_tokens * merged)) * merged)
        padded[: len(outline.counts)] = outline.counts
        heights = padded.reshape(-1, merged).sum(1) / max(1, sum(outline.counts)) * 100
        edges = np.arange(len(heights) + 1) * outline.bin_tokens * merged
        axes.stairs(heights, edges, color=_colour(outline.colour), linewidth=1.6)
        axes.stairs(heights, edges, color=_colour(outline.colour), alpha=0.12, fill=True)
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return svg_of(figure, label)


def _colour(name: str) -> str:
    return QUIET if name == "quiet" else COLOURS[name]


def _name_ends(axes: Axes, ends: Sequence[Reached]) -> None:
    """Names right of the axes, in the order of their values and apart, each tied to its point."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    placed: list[float] = []
    apart = min(_NAME_HEIGHT, 1 / max(1, len(ends)))
    ordered = sorted(ends, key=lambda one: one.value)
    for one in ordered:
        wanted = (one.value - low) / (high - low)
        placed.append(max(wanted, placed[-1] + apart) if placed else wanted)
    for above in range(len(placed) - 1, -1, -1):
        ceiling = 1.0 - apart * (len(placed) - 1 - above)
        placed[above] = min(placed[above], ceiling)
    for one, height in zip(ordered, placed, strict=True):
        at = low + height * (high - low)
        begin = one.flops if one.start is not None or one.flops else right
        axes.annotate(
            "",
            (begin, one.value),
            (1.03, height),
            xycoords="data",
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": _colour(one.colour), "linewidth": 0.6, "alpha": 0.6},
            annotation_clip=False,
        )
        _name(axes, one, (right + 0.03 * (right - axes.get_xlim()[0]), at), (3, -3), "left")


def _name(axes: Axes, one: Reached, at: tuple[float, float], offset: tuple[float, float], side: str) -> None:
    axes.annotate(
        shortened(one.name, _LONGEST_NAME),
        at,
        offset,
        textcoords="offset points",
        ha=side,
        fontsize=9.5,
        parse_math=False,
        annotation_clip=False,
        color=QUIET if one.dashed or one.colour == "quiet" else _colour(one.colour),
    )


def _scale(axes: Axes, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if len(values) == 0 or values.min() <= 0 or values.max() / values.min() <= _LOG_FROM_RATIO:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(y=0.08)
        return
    axes.set_yscale("log")
    decades = np.log10(values.max() / values.min())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())


def _mark_stages(axes: Axes, spans: Sequence[Span]) -> None:
    """Lines between stages, and their names above: in as many rows as it takes for none to run into another."""
    row_ends: list[float] = []
    for index, span in enumerate(spans):
        if index:
            axes.axvline(span.begin, color=QUIET, linewidth=0.8, linestyle=(0, (3, 3)))
        name = shortened(span.name, _LONGEST_NAME)
        middle, half = (span.begin + span.end) / 2, len(name) * _CHARACTER_WIDTH * spans[-1].end / 2
        row = next((row for row, end in enumerate(row_ends) if middle - half > end), len(row_ends))
        row_ends[row:] = [middle + half, *row_ends[row + 1 :]]
        axes.annotate(
            name,
            (middle, 1),
            (0, 3 + 12 * row),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=9.5,
            color=QUIET,
            parse_math=False,
        )


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
