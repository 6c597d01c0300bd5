"""`import tessera` adds < 0.5 s to `import torch`.

python benchmarks/import_time.py
"""

from __future__ import annotations

import subprocess
import sys

from _timing import interleaved, machine, show


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    print(machine())
    variants = {
        "import torch": lambda: run("import torch"),
        "import torch, tessera": lambda: run("import torch, tessera"),
    }
    times = interleaved(variants, rounds=7)
    for name in variants:
        show(times, name, "import torch")
    added = sorted(
        b - a for a, b in zip(times["import torch"], times["import torch, tessera"], strict=True)
    )
    print(f"added, median: {added[len(added) // 2]:.3f} s (bar 0.5)")


if __name__ == "__main__":
    main()
