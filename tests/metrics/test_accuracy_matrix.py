"""The figures of continual learning on matrices small enough to check by head."""

import math

import pytest

from tessera.errors import MetricError
from tessera.metrics import AccuracyMatrix

# Row 0 is the untrained model; then after each of three tasks.
HAND = [
    [0.10, 0.20, 0.30],
    [0.90, 0.25, 0.40],
    [0.70, 0.80, 0.35],
    [0.60, 0.85, 0.75],
]


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert AccuracyMatrix.from_rows(HAND).average_accuracy() == pytest.approx(2.20 / 3, abs=1e-15)


def test_backward_transfer_compares_the_end_with_the_diagonal():
    want = ((0.60 - 0.90) + (0.85 - 0.80)) / 2
    assert AccuracyMatrix.from_rows(HAND).backward_transfer() == pytest.approx(want, abs=1e-15)


def test_forward_transfer_compares_the_row_before_with_the_untrained_model():
    want = ((0.25 - 0.20) + (0.35 - 0.30)) / 2
    got = AccuracyMatrix.from_rows(HAND).forward_transfer()
    assert got == pytest.approx(want, abs=1e-15)
    without_baseline = (0.25 + 0.35) / 2  # another library's figure of that name
    assert abs(got - without_baseline) > 0.2


def test_forward_transfer_follows_the_baseline():
    rows = [[0.0, 0.0, 0.0], *HAND[1:]]
    assert AccuracyMatrix.from_rows(rows).forward_transfer() == pytest.approx(0.30, abs=1e-15)


def test_forgetting_is_the_best_earlier_minus_the_last():
    want = ((0.90 - 0.60) + (0.80 - 0.85)) / 2
    assert AccuracyMatrix.from_rows(HAND).forgetting() == pytest.approx(want, abs=1e-15)


def test_forgetting_sees_a_peak_in_the_middle():
    """0.6 -> 0.9 -> 0.5 is 0.4; first minus last would say 0.1."""
    rows = [[0.0] * 3, [0.6, 0.5, 0.5], [0.9, 0.5, 0.5], [0.5, 0.5, 0.5]]
    matrix = AccuracyMatrix.from_rows(rows)
    assert matrix.forgetting() == pytest.approx((0.4 + 0.0) / 2, abs=1e-15)
    assert matrix.backward_transfer() == pytest.approx((-0.1 + 0.0) / 2, abs=1e-15)
    two = AccuracyMatrix.from_rows([[0.0] * 2, [0.9, 0.1], [0.5, 0.5]])
    assert two.forgetting() == pytest.approx(0.4, abs=1e-15)


def test_the_last_row_and_the_untrained_row_are_not_the_best_earlier():
    """Forgetting may be negative: the end is better than ever before."""
    rows = [[1.0, 1.0], [0.5, 0.1], [0.7, 0.9]]
    assert AccuracyMatrix.from_rows(rows).forgetting() == pytest.approx(-0.2, abs=1e-15)


def test_accuracy_on_a_task_before_it_was_learned_may_count_but_need_not_exist():
    rows = [[0.0] * 3, [0.5, 0.9, math.nan], [0.5, 0.4, math.nan], [0.5, 0.4, 0.5]]
    assert AccuracyMatrix.from_rows(rows).forgetting() == pytest.approx(0.25, abs=1e-15)
    rows[1][1] = math.nan
    assert AccuracyMatrix.from_rows(rows).forgetting() == pytest.approx(0.0, abs=1e-15)


def test_a_single_task_transfers_and_forgets_nothing():
    matrix = AccuracyMatrix.from_rows([[0.1], [0.8]])
    assert matrix.average_accuracy() == 0.8
    assert matrix.backward_transfer() == matrix.forward_transfer() == matrix.forgetting() == 0.0


def test_a_figure_asked_for_too_early_names_what_is_missing():
    def without(after, task):
        rows = [list(r) for r in HAND]
        rows[after][task - 1] = math.nan
        return AccuracyMatrix.from_rows(rows)

    needs = {
        "average_accuracy": [(3, 1), (3, 2), (3, 3)],
        "backward_transfer": [(3, 1), (3, 2), (1, 1), (2, 2)],
        "forward_transfer": [(1, 2), (2, 3), (0, 2), (0, 3)],
        "forgetting": [(3, 1), (3, 2), (1, 1), (2, 1), (2, 2)],
    }
    for figure, cells in needs.items():
        for after in range(4):
            for task in range(1, 4):
                matrix = without(after, task)
                if (after, task) in cells:
                    message = rf"on task {task} after task {after}, .* record\(after={after}, task"
                    with pytest.raises(MetricError, match=message):
                        getattr(matrix, figure)()
                else:
                    assert math.isfinite(getattr(matrix, figure)())


def test_record_and_rows_and_from_rows_are_one_thing():
    matrix = AccuracyMatrix(3)
    assert all(math.isnan(a) for row in matrix.rows for a in row)
    for after, row in enumerate(HAND):
        for task, accuracy in enumerate(row, start=1):
            matrix.record(after, task, accuracy)
    assert matrix.rows == HAND
    assert AccuracyMatrix.from_rows(matrix.rows).rows == HAND
    matrix.rows[0][0] = 9.0
    assert matrix.rows == HAND
    matrix.record(3, 1, 0)
    assert matrix.rows[3][0] == 0.0


def test_the_rows_given_are_left_alone():
    rows = [list(r) for r in HAND]
    AccuracyMatrix.from_rows(rows).forgetting()
    assert rows == HAND


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan, math.inf, 93.5])
def test_an_accuracy_lies_between_0_and_1(bad):
    with pytest.raises(MetricError, match=r"an accuracy lies in \[0, 1\], got"):
        AccuracyMatrix(1).record(1, 1, bad)


@pytest.mark.parametrize(("after", "task"), [(-1, 1), (3, 1), (1, 0), (1, 3)])
def test_a_cell_outside_the_matrix_is_refused(after, task):
    with pytest.raises(MetricError, match=rf"record\(after={after}, task={task}\) is outside"):
        AccuracyMatrix(2).record(after, task, 0.5)


def test_bad_sizes_are_refused():
    for bad in (0, -1):
        with pytest.raises(MetricError, match="needs num_tasks >= 1"):
            AccuracyMatrix(bad)
    for rows in ([], [[]]):
        with pytest.raises(MetricError, match="needs num_tasks >= 1"):
            AccuracyMatrix.from_rows(rows)
    with pytest.raises(MetricError, match="row 1 has 1 accuracies, a matrix of 3 rows needs 2"):
        AccuracyMatrix.from_rows([[0.1, 0.1], [0.2], [0.3, 0.3]])
