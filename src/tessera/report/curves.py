"""What the two charts draw: lines and task spans read off the results' curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tessera.report.chart import Line, Span
from tessera.report.result import Point, Result
from tessera.report.svg import percent, ramp

__all__ = ["mean_lines", "seen_mean", "task_lines", "task_spans"]

# Tasks have an order, so their colours do: dark to bright, told apart by lightness as well as hue.
_TASKS_LIGHT = ("#2b2a8c", "#7b2a9e", "#b93a82", "#d4573f", "#b3780b")
_TASKS_DARK = ("#8f86ff", "#c478e6", "#f07fa8", "#f7a072", "#f2dc6b")
# Results have none: Okabe and Ito's palette, the first for the main result.
_RESULTS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#f0803c"),
    ("#008a67", "#22b991"),
    ("#b3548a", "#dd92bb"),
    ("#8a6d00", "#e8c547"),
    ("#555555", "#b5b5b5"),
)
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "12 4")
_TEXT = ("#16191d", "#f1f3f5")


def task_lines(curve: Sequence[Point], *, sequential: bool) -> list[Line]:
    """One line per task from the moment its learning starts, under the bold mean of those seen.

    Args:
        curve: Evaluations by step. None values are passed over.
        sequential: False for joint training, which learns every task from the start.

    Returns:
        Lines for `chart.line_chart`; empty when the curve is.

    Example:
        >>> curve = [Point(10, 1, (0.8, 0.0)), Point(20, 2, (0.6, 0.9))]
        >>> for line in task_lines(curve, sequential=True):
        ...     print(line.name, line.points)
        task 1 ((10, 0.8), (20, 0.6))
        task 2 ((10, 0.0), (20, 0.9))
        mean ((10, 0.8), (20, 0.75))
    """
    lines = []
    num_tasks = len(curve[0].accuracy) if curve else 0
    for task in range(1, num_tasks + 1):
        points = _of_task(curve, task, sequential=sequential)
        if points:
            at = (task - 1) / max(1, num_tasks - 1)
            lines.append(
                Line(
                    name=f"task {task}",
                    points=points,
                    light=ramp(_TASKS_LIGHT, at),
                    dark=ramp(_TASKS_DARK, at),
                    kind="thin",
                    tooltip=f"task {task}: {percent(points[-1][1])} % at the end",
                )
            )
    mean = _of_mean(curve, sequential=sequential)
    # With one task the mean is that task's line.
    if mean and num_tasks > 1:
        tooltip = f"mean over the tasks seen so far: {percent(mean[-1][1])} % at the end"
        lines.append(
            Line(
                name="mean",
                points=mean,
                light=_TEXT[0],
                dark=_TEXT[1],
                kind="bold",
                tooltip=tooltip,
            )
        )
    return lines


def mean_lines(results: Sequence[Result]) -> list[Line]:
    """The mean over the tasks seen so far, one line per result, the first one bold and on top.

    A result without a curve, but with an average accuracy, becomes a level across the chart: the
    joint baseline is a mark to reach, not a course.

    Args:
        results: The main result first.

    Returns:
        Lines for `chart.line_chart`; empty when no result has a curve.

    Example:
        >>> mean_lines([])
        []
    """
    longest = max((p.step for result in results for p in result.curve), default=0)
    lines = []
    for index, result in enumerate(results):
        points = _of_mean(result.curve, sequential=result.sequential)
        kind = "thin" if index else "bold"
        if not points and result.average_accuracy is not None:
            final = result.average_accuracy
            points, kind = ((0.0, final), (float(longest), final)), "level"
        if points:
            light, dark = _RESULTS[index % len(_RESULTS)]
            lines.append(
                Line(
                    name=result.label,
                    points=points,
                    light=light,
                    dark=dark,
                    kind=kind,
                    dashes=_DASHES[index % len(_DASHES)],
                    tooltip=f"{result.label}: {percent(points[-1][1])} % at the end",
                )
            )
    if all(line.kind == "level" for line in lines):
        return []
    return lines[::-1]


def task_spans(curve: Sequence[Point]) -> list[Span]:
    """The steps each task was learned in; a task ends with the last evaluation during it.

    Args:
        curve: Evaluations by step.

    Returns:
        One span per task that has points, in order.

    Example:
        >>> task_spans([Point(10, 1, (0.8, 0.0)), Point(20, 2, (0.6, 0.9))])
        [Span(name='task 1', start=0, end=10), Span(name='task 2', start=10, end=20)]
    """
    ends: dict[int, int] = {}
    for point in curve:
        if point.task >= 1:
            ends[point.task] = point.step
    starts = [0, *ends.values()]
    return [
        Span(f"task {task}", start, end)
        for (task, end), start in zip(ends.items(), starts, strict=False)
    ]


def seen_mean(point: Point, *, sequential: bool) -> float | None:
    """The mean accuracy over the tasks seen at this point; None when none was measured.

    Args:
        point: One evaluation.
        sequential: False for joint training, which sees all tasks from the start.

    Returns:
        In [0, 1], or None.

    Example:
        >>> seen_mean(Point(10, 2, (0.5, 1.0, 0.0)), sequential=True)
        0.75
    """
    seen = point.accuracy[: point.task] if sequential else point.accuracy
    values = [value for value in seen if value is not None]
    return math.fsum(values) / len(values) if values else None


def _of_task(
    curve: Sequence[Point], task: int, *, sequential: bool
) -> tuple[tuple[float, float], ...]:
    measured = [p for p in curve if p.accuracy[task - 1] is not None]
    if sequential:
        first = next((i for i, p in enumerate(measured) if p.task >= task), None)
        if first is None:
            return ()
        # One point earlier, if there is one: the rise starts where the task before ended.
        measured = measured[max(0, first - 1) :]
    return tuple((p.step, value) for p in measured if (value := p.accuracy[task - 1]) is not None)


def _of_mean(curve: Sequence[Point], *, sequential: bool) -> tuple[tuple[float, float], ...]:
    means = [(p.step, seen_mean(p, sequential=sequential)) for p in curve]
    return tuple((step, value) for step, value in means if value is not None)
