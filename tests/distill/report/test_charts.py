import math
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from distill.report import charts

SPANS = [charts.Span(name="off_policy", begin=0, end=100), charts.Span(name="on_policy", begin=100, end=200)]


def line(name, y, begin=0):
    return charts.Series(name=name, pieces=[(list(range(begin + 1, begin + len(y) + 1)), y)])


def test_every_colour_follows_the_theme_and_the_drawing_is_well_formed():
    svg = charts.line_chart([line("thinking", [0.1] * 70), line("other", [0.2] * 3)], SPANS, label='KL "<a>" & b')
    xml.etree.ElementTree.fromstring(svg)
    # What is left of '#' refers to an element of the drawing.
    assert re.search(r"(?<!href=\")(?<!url\()#\w+|rgb\(", svg) is None
    assert {"var(--thinking)", "var(--quiet)", "var(--grid)"} <= set(re.findall(r"var\(--[a-z-]+\)", svg))
    assert "<style" not in svg
    assert " width=" not in svg.partition(">")[0]


@pytest.mark.parametrize(
    ("name", "index", "variable"),
    [
        ("thinking", 3, "--thinking"),
        ("non_thinking", 0, "--non-thinking"),
        ("kl_non_thinking", 0, "--non-thinking"),
        ("teacher_tail_mass", 0, "--teacher"),
        ("loss", 0, "--student"),
        ("anything", 5, "--thinking"),
    ],
)
def test_colours_follow_the_meaning_of_the_name(name, index, variable):
    assert charts.colour_of(name, index) == variable


def test_scale_is_logarithmic_for_wide_positive_ranges_only():
    def labels(y):
        return re.findall(r">([-0-9.e]+[a-zA-Z]?)</text>", charts.line_chart([line("loss", y)], SPANS, label="x"))

    assert {"0.01", "1"} <= set(labels([0.01, 0.1, 1.0]))
    assert "0" in labels([0.0, 0.1, 1.0])
    assert "-1" in labels([-1.0, 0.01, 1.0])


def test_moving_mean_leaves_gaps_out_and_keeps_a_constant():
    y = np.array([2.0, math.nan, 2.0, 2.0, math.nan, math.nan, math.nan])
    np.testing.assert_array_equal(charts._moving_mean(y), [2, 2, 2, 2, 2, math.nan, math.nan])


def test_bars_show_their_figures_and_whiskers():
    # The dollar and the brace would be an error in matplotlib's mathematics.
    bars = [
        charts.Bar(group="off_policy", colour="thinking", share=0.491, stderr=0.031),
        charts.Bar(group="off_policy", colour="non_thinking", share=0.22, stderr=None),
        charts.Bar(group="teacher $x_{", colour="thinking", share=1.0, stderr=0.0),
    ]
    svg = charts.bar_chart(bars, label="pass@1")
    texts = [element.text for element in xml.etree.ElementTree.fromstring(svg).iter() if element.text]
    assert {"49.1", "22.0", "100.0", "off_policy", "teacher $x_{"} <= set(texts)


def test_no_values_at_all_still_draw_axes():
    svg = charts.line_chart([line("loss", [math.nan])], [], label="loss")
    xml.etree.ElementTree.fromstring(svg)
