"""`Budget` and `Pace` by injected clocks: what is begun, what is not, and why."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tessera import graph as tg
from tessera.errors import InputError
from tessera.profiler import Budget, Meter, Pace


class Machine:
    """Wall clock and CPU clock that only the test moves, in integers of a millisecond."""

    def __init__(self, nowhere: Path) -> None:
        self.ms = self.cpu_ms = 0
        self.meter = Meter(
            watts_per_core=1000.0,  # a joule a CPU millisecond
            powercap=nowhere / "none",
            clock=lambda: self.ms / 1e3,
            cpu_clock=lambda: self.cpu_ms / 1e3,
        )

    def loop(self, budget: Budget, durations: Iterable[int]) -> int:
        """Units run in one loop, each as long as the next duration says."""
        left = iter(durations)
        units = 0
        for i in budget:
            assert i == units
            units += 1
            cost = next(left)
            self.ms += cost
            self.cpu_ms += cost
        return units


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_no_unit_is_begun_that_would_cross_the_cap(machine: Machine) -> None:
    budget = Budget(ms=10.5, meter=machine.meter)
    assert machine.loop(budget, [3] * 9) == 3
    assert budget.stopped_by == "ms"
    assert budget.spent.ms == pytest.approx(9.0)


def test_a_slower_unit_counts_at_once_also_in_the_next_loop(machine: Machine) -> None:
    budget = Budget(ms=10.5, meter=machine.meter)
    assert machine.loop(budget, [1, 5, 1, 9]) == 2  # 6 spent, 5 more would cross
    assert machine.loop(budget, [1] * 20) == 6


def test_a_slow_unit_is_forgotten_when_enough_fast_ones_followed(machine: Machine) -> None:
    budget = Budget(ms=10.5, meter=machine.meter)
    for _ in range(80):
        machine.loop(budget, [1] * 20)
    assert machine.loop(budget, [1, 8]) == 2
    assert machine.loop(budget, [1] * 20) == 3
    counts = [machine.loop(budget, [1] * 20) for _ in range(4)]
    assert counts[-1] == 10
    assert counts == sorted(counts)


def test_steps_and_joules_have_their_caps(machine: Machine) -> None:
    budget = Budget(ms=100, steps=4, meter=machine.meter)
    assert machine.loop(budget, [1] * 9) == 4
    assert budget.stopped_by == "steps"
    budget = Budget(joules=7.5, meter=machine.meter)
    assert machine.loop(budget, [2] * 9) == 3
    assert budget.stopped_by == "joules"
    assert budget.spent.joules == pytest.approx(6.0)
    assert budget.spent.joules_source == "estimate"


@pytest.mark.parametrize("cap", ["ms", "joules"])
def test_units_known_to_be_too_long_are_not_run_and_tried_again_ever_more_rarely(
    machine: Machine, cap: str
) -> None:
    caps = {cap: 5}
    budget = Budget(**caps, meter=machine.meter)
    ran = []
    for loop in range(400):
        if machine.loop(budget, [20]):
            ran.append(loop)
        else:
            assert budget.stopped_by == cap
            assert budget.spent.ms == 0.0
    assert ran == [0, 2, 7, 24, 89, 346]  # 1, 4, 16, 64 and 256 empty loops between


def test_a_slow_first_step_of_a_process_costs_one_empty_loop(machine: Machine) -> None:
    budget = Budget(ms=5.5, meter=machine.meter)
    assert machine.loop(budget, [50]) == 1
    assert machine.loop(budget, []) == 0
    assert machine.loop(budget, [1]) == 1  # still careful: 50 ms was just seen
    for _ in range(300):
        machine.loop(budget, [1] * 9)
    assert machine.loop(budget, [1] * 9) == 5


def test_one_interrupted_unit_does_not_stop_the_next_loop(machine: Machine) -> None:
    budget = Budget(ms=5, meter=machine.meter)
    for _ in range(5):
        machine.loop(budget, [1] * 9)
    assert machine.loop(budget, [40]) == 1
    assert machine.loop(budget, [1]) == 1


def test_an_exception_or_a_break_leaves_the_budget_usable(machine: Machine) -> None:
    budget = Budget(ms=10.5, meter=machine.meter)

    def failing() -> None:
        for i in budget:
            machine.ms += 2
            if i == 1:
                raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert budget.stopped_by is None
    assert budget.spent.ms == pytest.approx(4.0)
    for _ in budget:
        machine.ms += 3
        break
    assert budget.stopped_by is None
    assert budget.spent.ms == pytest.approx(3.0)
    assert machine.loop(budget, [2] * 9) == 5
    assert budget.stopped_by == "ms"


def test_a_new_budget_has_spent_nothing() -> None:
    budget = Budget(ms=1)
    assert (budget.spent.ms, budget.spent.joules, budget.stopped_by) == (0.0, 0.0, None)
    assert repr(Budget(ms=1, steps=2)) == "Budget(ms=1, steps=2)"


@pytest.mark.parametrize("cap", ["ms", "joules", "steps"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "5"])
def test_a_cap_is_positive_and_finite(cap: str, value: float) -> None:
    with pytest.raises(InputError, match=f"Budget needs {cap} > 0 and finite, got {value!r}"):
        Budget(**{cap: value})


def test_a_budget_has_a_cap_and_whole_steps() -> None:
    with pytest.raises(InputError, match=r"Budget needs a cap: Budget\(ms=5\)"):
        Budget()
    with pytest.raises(InputError, match=r"a whole number of steps, got 2\.5"):
        Budget(steps=2.5)


def test_pace_is_the_order_statistic_it_says() -> None:
    pace = Pace()
    assert (pace.high, pace.typical, len(pace)) == (None, None, 0)
    drawn = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    costs = drawn.tolist()
    for n, cost in enumerate(costs, 1):
        pace.add(cost)
        window = sorted(costs[max(0, n - 512) : n])
        recent = costs[max(0, n - 8) : n]
        assert len(pace) == len(window)
        assert pace.high == max(window[-1 - len(window) // 200], *recent, recent[0])
        assert pace.typical == sorted(recent)[(len(recent) - 1) // 2]


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_pace_refuses_what_is_no_cost(cost: float) -> None:
    pace = Pace()
    with pytest.raises(InputError, match="finite cost >= 0, got"):
        pace.add(cost)
    assert len(pace) == 0


def test_a_budget_caps_real_training_steps() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    optimizer = tg.SGD(net.parameters(), lr=0.1)

    @tg.training_step(optimizer=optimizer)
    def step(x: Tensor) -> Tensor:
        return net(x).square().mean()

    budget = Budget(ms=10_000, steps=3)
    losses = [step(torch.ones(2, 4)).item() for _ in budget]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert 0 < budget.spent.ms < 10_000
