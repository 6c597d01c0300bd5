"""`measure`: time by an injected clock, joules by a fake folder of counters, by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tessera.errors import InputError
from tessera.profiler import Measurement, Meter, measure


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def zone(root: Path, folder: str, name: str, energy_uj: int, most_uj: int = 1000) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{most_uj}\n")
    return path / "energy_uj"


def test_the_estimate_is_cpu_seconds_times_watts(tmp_path: Path) -> None:
    clock, cpu = Clock(), Clock()
    meter = Meter(watts_per_core=8.0, powercap=tmp_path, clock=clock, cpu_clock=cpu)
    with measure(meter=meter) as m:
        clock.now += 0.25
        cpu.now += 0.5  # two threads
    assert (m.ms, m.joules, m.joules_source) == (250.0, 4.0, "estimate")


def test_nothing_is_known_before_the_block_ends_and_all_after_an_exception(tmp_path: Path) -> None:
    clock = Clock()
    kept = []

    def failing() -> None:
        with measure(meter=Meter(powercap=tmp_path, clock=clock)) as m:
            kept.append(m)
            assert math.isnan(m.ms)
            assert math.isnan(m.joules)
            clock.now += 1.0
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert kept[0].ms == 1000.0


def test_rapl_sums_packages_and_memory_once_and_follows_a_wrap_around(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 990)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)  # part of the package
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 10)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 100)
    zone(tmp_path, "intel-rapl:2", "psys", 7)  # holds the packages
    with measure(meter=Meter(powercap=tmp_path)) as m:
        first.write_text("30\n")  # 990 -> 1000 = 0 -> 30
        second.write_text("150\n")
        memory.write_text("11\n")
        (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("900\n")
        (tmp_path / "intel-rapl:2" / "energy_uj").write_text("900\n")
    assert m.joules_source == "rapl"
    assert m.joules == pytest.approx((40 + 50 + 1) * 1e-6, rel=1e-12)


def test_counters_that_cannot_be_read_are_the_next_rungs_business(tmp_path: Path) -> None:
    cpu = Clock()
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = Meter(watts_per_core=2.0, powercap=tmp_path, cpu_clock=cpu)
    with measure(meter=meter) as m:
        counter.unlink()  # gone in the middle
        cpu.now += 1.0
    assert (m.joules, m.joules_source) == (2.0, "estimate")
    with measure(meter=meter) as m:
        pass
    assert m.joules_source == "estimate"
    counter.write_text("not a number")
    with measure(meter=Meter(powercap=tmp_path)) as m:
        pass
    assert m.joules_source == "estimate"


def fake_gpu(monkeypatch: pytest.MonkeyPatch, energies_mj: list[int]) -> list[str]:
    """CUDA and pynvml as far as the meter looks at them; the calls they got."""
    calls: list[str] = []

    def energy(device: str) -> int:
        calls.append(device)
        return energies_mj.pop(0)

    nvml = SimpleNamespace(
        nvmlInit=lambda: calls.append("init"),
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc")
    )
    return calls


def test_nvml_comes_first_once_cuda_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    calls = fake_gpu(monkeypatch, [1000, 3500])
    with measure(meter=Meter(powercap=tmp_path)) as m:
        pass
    assert (m.joules, m.joules_source) == (2.5, "nvml")
    assert calls == ["synchronize", "init", "GPU-abc", "synchronize", "GPU-abc"]


def test_without_cuda_in_use_a_gpu_is_not_even_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_gpu(monkeypatch, [])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with measure(meter=Meter(powercap=tmp_path)) as m:
        pass
    assert m.joules_source == "estimate"
    assert not calls


def test_a_driver_that_refuses_leaves_rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    fake_gpu(monkeypatch, [])  # the read raises
    with measure(meter=Meter(powercap=tmp_path)) as m:
        pass
    assert m.joules_source == "rapl"
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    with measure(meter=Meter(powercap=tmp_path)) as m:
        pass
    assert m.joules_source == "rapl"


@pytest.mark.parametrize("watts", [0.0, -1.0, float("nan"), float("inf")])
def test_watts_must_make_sense(watts: float) -> None:
    with pytest.raises(InputError, match="watts_per_core > 0 and finite, got"):
        Meter(watts_per_core=watts)


def test_a_measurement_prints_its_source() -> None:
    m = Measurement(ms=2.0, joules=0.5, joules_source="rapl")
    assert repr(m) == "Measurement(2 ms, 0.5 J (rapl))"
