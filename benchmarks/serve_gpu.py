"""The engine on an accelerator: a tenant for each row, beside the model alone.

    python benchmarks/serve_gpu.py [device]

A transformer of `torch.nn` with random weights (12 layers of width 768, 128 tokens), 64 requests in
flight of a row each, every one of another tenant with a LoRA r = 8 of its own, against the same
batches of the bare model on the same device, their answers fetched as the engine's are. Each answer
is compared with the model under that delta alone. Then a delta is attached for the first time, from
the processor's memory. Target: at least 0.9x the throughput of the base.
Needs nothing but torch, NumPy and safetensors; without a device it takes cuda, if there is one.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _timing import interleaved, machine, ratios
from tessera import arch, peft, random
from tessera.serve.engine import Engine

TENANTS, BATCHES, TOKENS, WORDS = 64, 4, 128, 30_000
LAYERS, WIDTH, HEADS = 12, 768, 12


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Encoder(nn.Module):
    """[rows, tokens] -> [rows, width]: the mean over the tokens."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean(1)


def fitted(model: nn.Module, seeds: range) -> dict[str, arch.Delta]:
    """LoRA over query and value, as files would bring them: on the processor."""
    found = {}
    for seed in seeds:
        delta = peft.lora(model, 8, 16, sites=["*.query", "*.value"], seed=seed)
        draw = random.generator(seed, "bench")
        for tensor in delta.parameters():
            tensor.data.add_((0.02 * torch.randn(tensor.shape, generator=draw)).to(tensor.device))
        own = delta.to("cpu")
        found[own.hash] = own
    return found


def throughput(model: nn.Module, engine: Engine, names: list[str], rows: list[Tensor]) -> None:
    device, whole = next(model.parameters()).device, torch.cat(rows)

    def base() -> None:
        with torch.inference_mode():
            for _ in range(BATCHES):
                model(whole.to(device)).cpu()

    def served(names: list[str]) -> None:
        futures = [
            engine.submit({"tokens": row}, name, tenant=name or "base")
            for _ in range(BATCHES)
            for row, name in zip(rows, names, strict=True)
        ]
        for future in futures:
            future.result()

    variants = {
        "base": base,
        "engine, no deltas": lambda: served([""] * TENANTS),
        "engine, 64 tenants": lambda: served(names),
    }
    times = interleaved(variants, rounds=9)
    print(f"\n{TENANTS} requests in flight, {TOKENS} tokens each")
    for name, took in times.items():
        low, middle, high = ratios(times, "base", name)
        bar = "; target: at least 0.9x" if "tenants" in name else ""
        print(
            f"  {name:20s} {BATCHES * TENANTS / statistics.median(took):7.0f} a second, "
            f"{middle:.3f}x ({low:.3f} .. {high:.3f}){bar}"
        )


def exactness(model: nn.Module, engine: Engine, deltas: dict[str, arch.Delta], row: Tensor) -> None:
    """How far an answer in a batch is from the model under its delta alone."""
    device, apart, base_apart = next(model.parameters()).device, 0.0, float("inf")
    names = list(deltas)[:8]
    futures = [engine.submit({"tokens": row}, name, tenant=name) for name in names]
    with torch.inference_mode():
        bare = model(row.to(device)).cpu()
    for name, future in zip(names, futures, strict=True):
        alone = peft.apply(model, deltas[name].to(device))
        with torch.inference_mode():
            wanted = alone(row.to(device)).cpu()
        said = future.result().outputs["output"]
        apart = max(apart, float((said - wanted).abs().max()))
        base_apart = min(base_apart, float((wanted - bare).abs().max()))
    print(f"\nfarthest from the model under its delta alone: {apart:.2e}")
    print(f"what the deltas change, at least: {base_apart:.2e}")
    assert apart < 0.01 * base_apart, (apart, base_apart)


def attach(engine: Engine, names: list[str], row: Tensor) -> None:
    def ask(name: str) -> float:
        begun = time.perf_counter()
        engine.submit({"tokens": row}, name, tenant="a").result()
        return 1e3 * (time.perf_counter() - begun)

    took = [ask(name) - min(ask(name), ask(name)) for name in names]
    print(f"\nattach on first use: {statistics.median(took):.2f} ms more than the second request")


def main() -> None:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here; python benchmarks/serve_gpu.py cpu runs a small model")
    torch.set_num_threads(1)
    small = device.type == "cpu"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{name}; {machine()}")
    torch.manual_seed(0)
    shape = (2, 64, 4) if small else (LAYERS, WIDTH, HEADS)
    model = Encoder(*shape).eval().to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {shape[0]} layers")
    deltas, more = fitted(model, range(TENANTS)), fitted(model, range(TENANTS, TENANTS + 40))
    draw = random.generator(0, "bench.tokens")
    rows = [torch.randint(WORDS, (1, TOKENS), generator=draw) for _ in range(TENANTS)]
    engine = Engine(model, {**deltas, **more}.__getitem__, slots=TENANTS, deadline_ms=20.0)
    throughput(model, engine, list(deltas), rows)
    exactness(model, engine, deltas, rows[0])
    engine.close()
    single = Engine(model, {**deltas, **more}.__getitem__, slots=TENANTS, deadline_ms=0.0)
    single.submit({"tokens": rows[0]}, next(iter(deltas)), tenant="a").result()
    attach(single, list(more), rows[0])
    single.close()


if __name__ == "__main__":
    main()
