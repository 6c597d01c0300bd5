import itertools

import pytest

from tessera.report.chart import Line, line_chart, spread, ticks
from tessera.report.curves import mean_lines, task_lines
from tessera.report.heatmap import DARK, LIGHT, heat_map
from tessera.report.result import Point, parse
from tessera.report.svg import contrast, ramp, readable_on


@pytest.mark.parametrize("scale", [LIGHT, DARK])
def test_numbers_are_readable_on_every_cell_and_lightness_is_monotone(scale):
    fills = [ramp(scale, i / 200) for i in range(201)]
    assert min(contrast(fill, readable_on(fill)) for fill in fills) >= 4.5
    from_white = [contrast(fill, "#ffffff") for fill in fills]
    assert from_white == sorted(from_white, reverse=scale is DARK)


@pytest.mark.parametrize(("page", "at"), [("#ffffff", "light"), ("#121518", "dark")])
def test_lines_stand_out_from_the_page(learned, page, at):
    curve = [Point(i, i, (0.5,) * 20) for i in range(1, 21)]
    results = parse([learned(recipe=str(i)) for i in range(7)])
    for line in task_lines(curve, sequential=True) + mean_lines(results):
        assert contrast(getattr(line, at), page) >= 3


def test_ramp_ends_at_its_ends():
    assert (ramp(LIGHT, 0.0), ramp(LIGHT, 1.0)) == (LIGHT[0], LIGHT[-1])


@pytest.mark.parametrize(
    ("largest", "wanted"),
    [(1, [0, 1]), (4, [0, 1, 2, 3, 4]), (10, [0, 2, 4, 6, 8, 10]), (12_500, [0, 5000, 10_000])],
)
def test_ticks_are_round(largest, wanted):
    assert ticks(largest, at_most=6) == wanted


@pytest.mark.parametrize(
    "wanted",
    [
        [50.0] * 11,
        [0.0, 1.0, 2.0, 99.0, 100.0],
        [10.0, 90.0],
        [100.0, 95.0, 12.0, 11.0, 95.0, 40.0],
    ],
)
def test_spread_keeps_the_gap_the_range_and_the_order(wanted):
    placed = spread(wanted, gap=10.0, low=0.0, high=100.0)
    ordered = sorted(placed)
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert ordered[0] >= 0
    assert ordered[-1] <= 100
    pairs = sorted(zip(wanted, placed, strict=True))
    assert [place for _, place in pairs] == ordered


def test_spread_leaves_what_does_not_touch():
    assert spread([70.0, 10.0, 40.0], gap=10.0, low=0.0, high=100.0) == [70.0, 10.0, 40.0]


def test_line_chart_puts_points_where_they_belong():
    line = Line(name="er", points=((0, 0.0), (10, 1.0)), light="#000", dark="#fff", kind="bold")
    chart = line_chart([line], [], width=780, summary="x")
    # Left edge on the base line, right edge 300 px higher: 780 - (12 + 10 + 2 letters * 7.4).
    assert '<polyline points="34.0,336.0 743.2,36.0"' in chart


@pytest.mark.parametrize("num_tasks", [1, 20, 40])
def test_heat_map_of_any_size_has_its_cells(num_tasks):
    rows = [[0.5] * num_tasks] * (num_tasks + 1)
    drawing = heat_map(rows, label="er")
    assert drawing.count("<rect") == num_tasks * (num_tasks + 1)
    assert drawing.count('class="ink cell"') == num_tasks * (num_tasks + 1) // 2
    assert (">50.0</text>" if num_tasks <= 10 else ">50</text>") in drawing
