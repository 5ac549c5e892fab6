"""How every chart is drawn: inline SVG that follows the page's light or dark theme.

Matplotlib draws with placeholder colours, which become CSS variables, so one drawing suits both themes. Text stays
text and takes the page's font. No display, no global state: figures are made without pyplot.
"""

import html
import io
import re

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Placeholders that matplotlib passes through unchanged, and the CSS variables they become.
INK, QUIET, GRID = "#010101", "#020202", "#030303"
COLOURS = {
    "student": "#040404",
    "thinking": "#050505",
    "non_thinking": "#060606",
    "teacher": "#070707",
    "fifth": "#080808",
    "sixth": "#090909",
}
"""By the name of what is drawn, else in this order."""
VARIABLES = {INK: "--ink", QUIET: "--quiet", GRID: "--grid"} | {
    placeholder: f"--{name.replace('_', '-')}" for name, placeholder in COLOURS.items()
}

_LABEL_SIZE = 9.5


def new_figure(
    width_inches: float, height_inches: float, *, x_label: str = "", y_label: str = ""
) -> tuple[Figure, Axes]:
    """A figure with one set of axes, in the style of the page."""
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, labelsize=_LABEL_SIZE, length=0, pad=4)
    axes.set_xlabel(x_label, color=QUIET, fontsize=_LABEL_SIZE)
    axes.set_ylabel(y_label, color=QUIET, fontsize=_LABEL_SIZE)
    return figure, axes


def placeholder(name: str, index: int) -> str:
    """The colour of a series: by what its name says it is, else by its place."""
    for known, colour in COLOURS.items():
        if name == known or name.startswith(f"{known}_") or name.endswith(f"_{known}"):
            return COLOURS["non_thinking"] if name.endswith("non_thinking") else colour
    return list(COLOURS.values())[index % len(COLOURS)]


def tick(value: float) -> str:
    """A number on an axis: `0.05`, `1500`, `20k`, `3M`, `1.5T`, `2E`."""
    for size, unit in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e4, "k"),
    ):
        if abs(value) >= size:
            divisor = 1e3 if unit == "k" else size
            return f"{value / divisor:g}{unit}"
    return f"{value:g}"


def shortened(name: str, most: int) -> str:
    """The name, or its beginning and its end around an ellipsis, so that numbered ones stay different."""
    return name if len(name) <= most else f"{name[: most - most // 2 - 1]}…{name[-(most // 2) :]}"


def svg_of(figure: Figure, label: str) -> str:
    """The drawing as an element of a page; `label` is what it shows, for those who do not see it."""
    buffer = io.StringIO()
    # A salt from the label keeps the ids of several charts in one page apart, and the file reproducible. `savefig`
    # would draw everything twice, once to arrange it.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Cut what would reach beyond this drawing in a page: style rules, fixed sizes, ids that nothing refers to.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?!p[0-9a-f]{10}|m[0-9a-f]{10})[^"]*"', "", svg)
    svg = re.sub(r'^<svg [^>]*(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{html.escape(label)}">', svg)
    svg = svg.replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
