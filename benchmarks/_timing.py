"""Timing shared by the benchmarks: interleaved rounds, medians, and the machine in a line."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    load = os.getloadavg()[0]
    return (
        f"{cpu}, {os.cpu_count()} cores, load {load:.1f}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread"
    )


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 11,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds a call, by variant and round: each round runs every variant once, in turn.

    A machine's speed drifts; variants of one round met the same machine, so ratios are taken
    round by round.
    """
    for f in variants.values():
        f()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, f in variants.items():
            begun = clock()
            for _ in range(repeats):
                f()
            times[name].append((clock() - begun) / repeats)
    return times


def ratios(times: Mapping[str, list[float]], name: str, base: str) -> tuple[float, float, float]:
    """Lowest, median and highest of the rounds' ratios name / base."""
    r = [a / b for a, b in zip(times[name], times[base], strict=True)]
    return min(r), statistics.median(r), max(r)


def show(times: Mapping[str, list[float]], name: str, base: str, bar: str = "") -> None:
    low, mid, high = ratios(times, name, base)
    ms = 1e3 * statistics.median(times[name])
    print(f"  {name:<28} {ms:9.3f} ms   {mid:7.3f}x {base} ({low:.3f} .. {high:.3f})  {bar}")
