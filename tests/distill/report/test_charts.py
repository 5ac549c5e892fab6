import itertools
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
        ("anything", 7, "--thinking"),
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


def texts(svg):
    return [element.text for element in xml.etree.ElementTree.fromstring(svg).iter() if element.text]


def reached(name, flops, value, start=None, **fields):
    return charts.Reached(name=name, flops=flops, value=value, error=None, start=start, colour="thinking", **fields)


def test_results_over_compute_are_joined_to_what_they_started_from_and_named():
    first = reached("student before", 0, 10.0)
    middle = reached("off_policy", 4e12, 50.0, first)
    ends = [
        reached(name, 9e12, 60.0, middle, dashed=dashed) for name, dashed in (("on_policy", False), ("aside", True))
    ]
    teacher = charts.Reached(name="teacher", flops=0, value=97.0, error=None, start=None, colour="teacher")
    svg = charts.flops_chart([first, middle, *ends], [teacher], label="x", unit="pass@1, %", highest=100.0)
    said = texts(svg)
    assert {"student before", "off_policy", "on_policy", "aside", "teacher", "pass@1, %", "4T", "100"} <= set(said)
    # Two results at the same place have names at different heights.
    heights = [re.findall(rf'y="([0-9.]+)"[^>]*>{name}<', svg) for name in ("on_policy", "aside")]
    assert heights[0] != heights[1]


def test_many_long_names_stay_different_and_do_not_crowd_the_chart():
    first = reached("student before", 0, 10.0)
    inner = [reached(f"a_stage_with_a_long_name_{n}", 1e12, 50.0, first, dashed=True) for n in range(8)]
    ends = [reached(f"the_stage_that_follows_stage_{n}", 2e12, 60.0, one, dashed=True) for n, one in enumerate(inner)]
    said = texts(charts.flops_chart([first, *inner, *ends], label="x", unit="%", highest=100.0))
    assert len({text for text in said if text.startswith("the_stage")}) == 8
    assert not [text for text in said if text.startswith("a_stage")]
    wide = charts.bar_chart(
        [charts.Bar(group=one.name, colour="thinking", share=0.5, stderr=None) for one in inner], label="x"
    )
    assert len({text for text in texts(wide) if text.startswith("a_sta")}) == 8
    assert 'style="min-width: ' in wide.partition(">")[0]


def test_names_of_short_stages_take_rows_of_their_own():
    def rows(ends):
        spans = [
            charts.Span(name=f"stage_{n}", begin=b, end=e) for n, (b, e) in enumerate(itertools.pairwise([0, *ends]))
        ]
        svg = charts.line_chart([line("loss", [0.1] * 10)], spans, label="x")
        return len(set(re.findall(r'y="([0-9.]+)"[^>]*>stage_', svg)))

    assert rows([100, 200, 300]) == 1
    assert rows([100, 103, 106]) == 2


def test_a_histogram_is_of_shares_and_coarser_where_there_are_many_bins():
    svg = charts.histogram(
        [charts.Outline(colour="student", bin_tokens=256, counts=[0] * 99 + [3, 1])], label="lengths"
    )
    assert {"tokens of a response", "% of responses"} <= set(texts(svg))
    assert max(float(text) for text in texts(svg) if text.replace(".", "").isdigit()) < 26_000
