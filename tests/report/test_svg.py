"""Axes and marks of charts."""

import xml.etree.ElementTree as ElementTree

import pytest

from rotq.report.svg import STYLE, Axis, Chart, spanning


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(0, 1, 0, 100), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Axis(0, 0.053, 0, 100), [0, 0.02, 0.04]),
        (Axis(-2, 3, 0, 100), [-2, -1, 0, 1, 2, 3]),
        (Axis(0.8, 12, 0, 100, log=True), [1, 2, 5, 10]),
        (Axis(0.002, 3, 0, 100, log=True), [0.01, 0.1, 1]),
    ],
)
def test_ticks_are_round_values_inside(axis: Axis, expected: list[float]) -> None:
    found = axis.ticks(6 if axis.low == -2 else 5)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("high", "step"), [(2, 1), (5, 1), (29, 5), (1023, 200)])
def test_what_is_counted_has_whole_ticks(high: int, step: int) -> None:
    found = Axis(0, high, 0, 100).ticks(8, whole=True)
    assert found == list(range(0, high + 1, step))


def test_places_are_between_the_ends() -> None:
    axis = Axis(0, 10, 100, 0)
    assert [axis.place(value) for value in (0, 5, 10, 11, -1)] == [100, 50, 0, 0, 100]
    log = Axis(1, 100, 0, 100, log=True)
    assert [log.place(value) for value in (1, 10, 100, 0)] == pytest.approx([0, 50, 100, 0])


def test_an_axis_holds_its_values_even_where_all_are_the_same() -> None:
    for values in ([3.0], [0.0, 0.0], [-1.0, 2.0], []):
        axis = spanning(values, 0, 10)
        assert all(axis.low <= value <= axis.high for value in values)
        assert axis.low < axis.high
    assert spanning([0.0, 1.0], 0, 1, log=True).low > 0


def test_a_file_of_its_own_is_xml_with_its_colours() -> None:
    chart = Chart(100, 'a "label" & <more>')
    chart.text(1, 2, "<script>")
    chart.bar(0, 0, 5, 5, 0, "a & b")
    chart.line([(0, 0), (1, 1)], 7, "line", dashed=True)
    chart.dot(1, 1, 2, "dot")
    root = ElementTree.fromstring(chart.svg(alone=True))
    assert root.attrib["aria-label"] == 'a "label" & <more>'
    assert [child.tag.rpartition("}")[2] for child in root] == [
        *("style", "text", "rect", "polyline", "circle")
    ]
    assert root[1].text == "<script>"
    assert "prefers-color-scheme:dark" in STYLE
    assert STYLE not in chart.svg()
