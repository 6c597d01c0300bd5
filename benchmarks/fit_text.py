"""Few-shot quality of `tessera fit` on texts: WordNet's glosses, told by their category.

    python benchmarks/fit_text.py [--draws 10] [--shots 3 8]

Needs the extra `text` and Debian's wordnet-base. Each draw takes other glosses: so many of each
class to fit to, 25 of each to ask. MiniLM as `tessera fit` uses it, with its defaults: the head
starts at the class means, then LoRA of rank 8 over queries and values, and the head, for 20 steps.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch

from _timing import machine
from tessera import peft, random
from tessera.cli.bases import base_of_texts
from tessera.cli.shots import Examples, numbers_of
from tessera.data import Batch
from tessera.retrieval.wordnet import wordnet_glosses

TASKS = {
    "8 things": "animal artifact food location person plant time feeling",
    "6 abstractions": "act attribute communication event state substance",
}
ASKED = 25


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--shots", type=int, nargs="+", default=[3, 8])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    by: dict[str, list[str]] = {}
    for gloss in wordnet_glosses(parts=["noun"]):
        by.setdefault(gloss.category.removeprefix("noun."), []).append(gloss.definition)
    print(f"{'':<16}{'shots':>6}{'class means':>13}{'fitted':>9}{'gained':>9}")
    for task, words in TASKS.items():
        names = words.split()
        base = base_of_texts(None, names)
        for count in args.shots:
            pairs = [one(base.model, base.encode, by, names, count, i) for i in range(args.draws)]
            gains = [100 * (after - before) for before, after in pairs]
            before, after = (100 * statistics.mean(p) for p in zip(*pairs, strict=True))
            spread = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains))
            gained = f"{statistics.mean(gains):+.1f} +- {spread:.1f}"
            print(f"{task:<16}{count:>6}{before:>13.1f}{after:>9.1f}   {gained}", flush=True)


def one(model, encode, by, names, count, draw) -> tuple[float, float]:
    """Accuracy of the class means, and after the fit."""
    parts: list[list[tuple[str, str]]] = [[], []]
    for name in names:
        order = random.permutation(len(by[name]), draw, "draw", name)[: count + ASKED].tolist()
        parts[0] += [(by[name][i], name) for i in order[:count]]
        parts[1] += [(by[name][i], name) for i in order[count:]]
    sets = []
    for pairs in parts:
        texts, labels = (list(column) for column in zip(*pairs, strict=True))
        some = Examples(path="wordnet", texts=texts, x=None, labels=labels)
        sets.append(Batch(encode(some), numbers_of(some, names)))
    shots, query = sets
    delta = peft.lora(model, 8, head="head", seed=draw)

    def right() -> float:
        with torch.no_grad():
            logits = torch.cat([peft.apply(model, delta)(x) for x in query.x.split(64)])
        return float((logits.argmax(1) == query.y).float().mean())

    with torch.no_grad():
        means, _ = peft.class_means(model.features(shots.x), shots.y, len(names))
        delta.tensors["head.weight.full"].copy_(means)
    before = right()
    peft.fit(delta, shots, model=model)
    return before, right()


if __name__ == "__main__":
    main()
