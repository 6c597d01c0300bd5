"""What `tessera learn --json` writes, checked and made into values the page can trust."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tessera.errors import InputError

__all__ = ["REQUIRED", "Point", "Result", "Row", "parse"]

REQUIRED = (
    "recipe",
    "scenario",
    "stream",
    "seed",
    "num_tasks",
    "accuracy_matrix",
    "average_accuracy",
    "backward_transfer",
    "forward_transfer",
    "forgetting",
    "seconds",
    "weights_sha256",
    "settings",
    "curve",
)

Row = tuple[float | None, ...]


class Point(NamedTuple):
    """One evaluation during training: accuracy on every task, in [0, 1], None if not measured."""

    step: int
    task: int
    accuracy: Row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """One run.

    Attributes:
        label: What the page calls it: the recipe, with the seed where two share a recipe.
        rows: T + 1 rows of T accuracies in [0, 1]; row 0 is the untrained model.
        average_accuracy: ACC in [0, 1]. As for all four figures, None is "undefined".
        backward_transfer: BWT in [-1, 1].
        forward_transfer: FWT in [-1, 1].
        forgetting: In [-1, 1]; positive is worse.
        seconds: Wall-clock time of the run.
        curve: Evaluations during training, by step.
    """

    label: str
    recipe: str
    scenario: str
    stream: str
    seed: int
    num_tasks: int
    rows: tuple[Row, ...]
    average_accuracy: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting: float | None
    seconds: float | None
    weights_sha256: str
    settings: Mapping[str, Any]
    curve: tuple[Point, ...]

    @property
    def sequential(self) -> bool:
        """Whether the tasks were learned one by one; the joint baseline has no rows between."""
        return self.num_tasks == 1 or any(
            value is not None for row in self.rows[1:-1] for value in row
        )


def parse(results: Sequence[Mapping[str, Any]]) -> list[Result]:
    """The results as checked values; the first is the main one.

    Args:
        results: Mappings as `tessera learn --json` writes them. A NaN counts as None.

    Returns:
        One `Result` each, in order, with distinct labels where the seeds differ.

    Raises:
        InputError: No result; a key is missing; a shape or a range is wrong; or the results are
            not about the same stream, scenario and number of tasks, so they cannot be compared.

    Example:
        >>> parse([{"recipe": "er"}])
        Traceback (most recent call last):
        tessera.errors.InputError: report.write needs the key 'scenario' in results[0] ('er'),
        which has only: recipe; pass the mapping that `tessera learn --json` writes
    """
    if isinstance(results, Mapping) or not results:
        raise InputError(
            "report.write needs a list with at least one result, the main one first; got "
            f"{'a single mapping' if results else 'none'}: call report.write([result], folder)"
        )
    for index, result in enumerate(results):
        _require_keys(result, index)
    seeds = Counter(str(result["recipe"]) for result in results)
    parsed = [
        _parse_one(result, f"results[{index}]", shared=seeds[str(result["recipe"])] > 1)
        for index, result in enumerate(results)
    ]
    for index, baseline in enumerate(parsed):
        for key in ("stream", "scenario", "num_tasks"):
            main, other = getattr(parsed[0], key), getattr(baseline, key)
            if main != other:
                raise InputError(
                    f"report.write compares results on one stream, but results[0] has "
                    f"{key}={main!r} and results[{index}] has {key}={other!r}: "
                    "write one report each"
                )
    return parsed


def _require_keys(result: object, index: int) -> None:
    if not isinstance(result, Mapping):
        raise InputError(
            f"report.write needs results[{index}] to be a mapping, got {type(result).__name__}; "
            "pass what `tessera learn --json` writes, parsed by json.load"
        )
    for key in REQUIRED:
        if key not in result:
            raise InputError(
                f"report.write needs the key {key!r} in results[{index}] "
                f"({result.get('recipe', 'no recipe')!r}), which has only: "
                f"{', '.join(map(str, result))}; pass the mapping that `tessera learn --json` "
                "writes"
            )


def _parse_one(result: Mapping[str, Any], where: str, *, shared: bool) -> Result:
    num_tasks = _whole(result["num_tasks"], f"{where}['num_tasks']", at_least=1)
    seed = _whole(result["seed"], f"{where}['seed']")
    settings = result["settings"]
    if not isinstance(settings, Mapping):
        raise InputError(
            f"{where}['settings'] must map names to values, got {type(settings).__name__}"
        )
    recipe = str(result["recipe"])
    return Result(
        label=f"{recipe} (seed {seed})" if shared else recipe,
        recipe=recipe,
        scenario=str(result["scenario"]),
        stream=str(result["stream"]),
        seed=seed,
        num_tasks=num_tasks,
        rows=_matrix(result["accuracy_matrix"], f"{where}['accuracy_matrix']", num_tasks),
        average_accuracy=_figure(result["average_accuracy"], f"{where}['average_accuracy']", 0, 1),
        backward_transfer=_figure(
            result["backward_transfer"], f"{where}['backward_transfer']", -1, 1
        ),
        forward_transfer=_figure(result["forward_transfer"], f"{where}['forward_transfer']", -1, 1),
        forgetting=_figure(result["forgetting"], f"{where}['forgetting']", -1, 1),
        seconds=_figure(result["seconds"], f"{where}['seconds']", 0, math.inf),
        weights_sha256=str(result["weights_sha256"] or ""),
        settings=settings,
        curve=_curve(result["curve"], f"{where}['curve']", num_tasks),
    )


def _matrix(rows: object, where: str, num_tasks: int) -> tuple[Row, ...]:
    if not isinstance(rows, Sequence) or len(rows) != num_tasks + 1:
        got = f"{len(rows)} rows" if isinstance(rows, Sequence) else type(rows).__name__
        raise InputError(
            f"{where} needs {num_tasks + 1} rows for {num_tasks} tasks (row 0 is the untrained "
            f"model), got {got}"
        )
    return tuple(_row(row, f"{where}[{i}]", num_tasks) for i, row in enumerate(rows))


def _curve(curve: object, where: str, num_tasks: int) -> tuple[Point, ...]:
    if not isinstance(curve, Sequence):
        raise InputError(
            f"{where} must be a list of points, got {type(curve).__name__}; [] is none"
        )
    points = []
    for i, point in enumerate(curve):
        here = f"{where}[{i}]"
        if not isinstance(point, Mapping) or not {"step", "task", "accuracy"} <= point.keys():
            raise InputError(f"{here} needs the keys step, task and accuracy, got {point!r:.80}")
        points.append(
            Point(
                step=_whole(point["step"], f"{here}['step']"),
                task=_whole(point["task"], f"{here}['task']", at_most=num_tasks),
                accuracy=_row(point["accuracy"], f"{here}['accuracy']", num_tasks),
            )
        )
    return tuple(sorted(points, key=lambda point: point.step))


def _row(row: object, where: str, num_tasks: int) -> Row:
    if not isinstance(row, Sequence) or len(row) != num_tasks:
        got = f"{len(row)}" if isinstance(row, Sequence) else type(row).__name__
        raise InputError(f"{where} needs one accuracy per task, {num_tasks}, got {got}")
    return tuple(_figure(value, f"{where}[{j}]", 0, 1) for j, value in enumerate(row))


def _figure(value: object, where: str, low: float, high: float) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, int | float) or not low <= value <= high or math.isinf(value):
        raise InputError(
            f"{where} must be None or a finite number in [{low}, {high}], got {value!r:.80}"
        )
    return float(value)


def _whole(value: object, where: str, *, at_least: int = 0, at_most: int | None = None) -> int:
    if not isinstance(value, int) or value < at_least or (at_most is not None and value > at_most):
        above = "" if at_most is None else f" and <= {at_most}"
        raise InputError(f"{where} must be a whole number >= {at_least}{above}, got {value!r:.80}")
    return value
