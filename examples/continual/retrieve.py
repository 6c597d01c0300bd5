"""Retrieval on real text: passages to condition on, and deltas to route to, read top to bottom.

    apt-get install wordnet-base && pip install 'tessera-lifelong[text]'
    python examples/continual/retrieve.py

The question: of which kind is a thing (an animal, a food, an event, ... of 24), given its
dictionary definition? A frozen MiniLM answers by the nearest of the kinds' names. It gets better
without a step of training by reading what it finds in a memory of other meanings whose kind is
known, and by small deltas of which retrieval picks the one to use. Takes about a minute.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessera import arch, peft, random, retrieval

MEMORY, ASKED, K, LAYER, SEED = 3000, 300, 8, 5, 0  # 8 passages; MiniLM's sixth layer fuses them

torch.set_num_threads(1)
encoder = retrieval.MiniLM()
nouns = [
    g
    for g in retrieval.wordnet_glosses(parts=["noun"])
    if g.category not in ("noun.Tops", "noun.motive")  # 51 and 42 meanings: hardly any
]
kinds = sorted({g.category.removeprefix("noun.") for g in nouns})
order = random.permutation(len(nouns), SEED, "retrieve").tolist()
memory = [nouns[i] for i in order[:MEMORY]]
asked = [nouns[i] for i in order[MEMORY : MEMORY + ASKED]]  # none of these is in the memory
others = [nouns[i] for i in order[MEMORY + ASKED :]]


def kind(gloss: retrieval.Gloss) -> str:
    return gloss.category.removeprefix("noun.")


def labels(glosses: list[retrieval.Gloss]) -> Tensor:
    return torch.tensor([kinds.index(kind(g)) for g in glosses])


# --- an index of passages: found by their definition, read with their kind --------------------

index = retrieval.Index(encoder=encoder, dim=encoder.dim)
index.encode(
    [g.definition for g in memory],
    payloads=[f"{kind(g)}: {g.definition}" for g in memory],
)
print("a bird that hunts at night:")
hits = index.query("a bird that hunts at night", k=3)
for score, passage in zip(hits.scores.tolist(), hits.payloads, strict=True):
    print(f"  {score:.2f}  {passage}")
print("nothing near:", index.query("qwx 7741 zzz", k=3, threshold=0.6).payloads)

# --- conditioning: fusion of passages that were encoded one by one ----------------------------

# A passage's states after layer 5 depend on the passage and the base alone: once is enough.
cache = retrieval.KVCache(
    index, base_hash=arch.base_hash(encoder.model), capacity_bytes=256 * 2**20
)
names = encoder(kinds)
questions = encoder.states([g.definition for g in asked], layer=LAYER)
vectors = encoder([g.definition for g in asked])
truth = labels(asked)


def lower(passages: list[str]) -> list[Tensor]:
    return encoder.states(passages, layer=LAYER)


def accuracy(found: list[Tensor]) -> float:
    """Of the answers, when each question reads the passages with these ids."""
    right = 0
    for question, ids, y in zip(questions, found, truth.tolist(), strict=True):
        passages = cache.get_or_compute(ids, lower)
        # In the last layer every token of the question attends over all passages' tokens.
        read = encoder.fuse([question, *passages], layer=LAYER)[: len(question)].mean(0)
        right += int((names @ read).argmax()) == y
    return right / ASKED


at_random = torch.randint(MEMORY, (ASKED, K), generator=random.generator(SEED, "at random"))
alone = accuracy([torch.empty(0, dtype=torch.int64)] * ASKED)
unrelated = accuracy(list(at_random))
retrieved = accuracy([h.ids for h in index.query_batch(vectors, K)])
print(f"\nkind of {ASKED} held-out meanings, of {len(kinds)} kinds; nothing was trained:")
print(f"  the definition alone          {alone:.3f}")
print(f"  with {K} passages at random     {unrelated:.3f}")
print(f"  with {K} passages retrieved     {retrieved:.3f}")
stats = cache.stats()
print(f"  {stats.misses} passages encoded, {stats.hits} taken from the cache")

# --- routing: the payloads are deltas, each fitted on a few examples of its domain ------------

DOMAINS = {
    "living": ("animal", "plant", "person", "body"),
    "made": ("artifact", "food", "substance", "communication"),
    "inner": ("cognition", "feeling", "attribute", "state"),
}
SHOTS, NEAR = 96, 0.4
base = nn.Linear(encoder.dim, len(kinds), bias=False).requires_grad_(False)
base.weight.copy_(10 * names)  # answers as before: the nearest name

router, deltas = retrieval.Index(dim=encoder.dim), {}
for domain, members in DOMAINS.items():
    shots = [g for g in others if kind(g) in members][:SHOTS]
    x = encoder([g.definition for g in shots])
    deltas[domain] = peft.fit(peft.lora(base, r=8), (x, labels(shots)), steps=40, lr=2e-2)
    router.add(x, [domain] * SHOTS)


def answer(x: Tensor, threshold: float) -> int:
    """By the delta of the nearest domain; by the base where no domain is near."""
    hits = router.query(x, k=1, threshold=threshold)
    model = peft.apply(base, deltas[hits.payloads[0]]) if hits.payloads else base
    return int(model(x).argmax())


inside = [any(kind(g) in m for m in DOMAINS.values()) for g in asked]
print(f"\n{len(DOMAINS)} domains, {SHOTS} examples each, a LoRA of rank 8 for each:")
print("                                  inside them  outside")
accuracies = {}
for name, threshold in (
    ("base", 2.0),  # nothing is as near as that
    ("nearest delta", -1.0),
    (f"nearest, from {NEAR} on", NEAR),
):
    right = [answer(x, threshold) == y for x, y in zip(vectors, truth.tolist(), strict=True)]
    within = sum(r for r, i in zip(right, inside, strict=True) if i) / sum(inside)
    beyond = sum(r for r, i in zip(right, inside, strict=True) if not i) / (ASKED - sum(inside))
    accuracies[name] = (within, beyond)
    print(f"  {name:<30}  {within:.3f}        {beyond:.3f}")
print(f"\nretrieved passages are worth {100 * (retrieved - alone):.1f} points")
