"""Deltas over transformers models, small ones drawn at random; PEFT: test_peft_interop."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tessera import peft
from tessera.errors import DeltaError, InputError

transformers = pytest.importorskip("transformers", reason="over a model of transformers")


def drawn(config):
    model = transformers.AutoModel.from_config(config)
    return model.eval()


@pytest.fixture
def bert():
    return drawn(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=32,
            max_position_embeddings=40,
            initializer_range=0.3,
        )
    )


@pytest.fixture
def llama():
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def gpt2():
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=40, initializer_range=0.3
    )
    return drawn(config)


@pytest.fixture
def inputs():
    ids = torch.tensor([[5, 9, 3, 7, 2], [8, 1, 4, 0, 0], [3, 3, 9, 9, 0], [1, 2, 3, 4, 5]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_sites_that_are_chosen(bert, llama, gpt2):
    assert peft.lora(bert, 2).sites == tuple(
        f"encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")
    )
    assert {s.rpartition(".")[2] for s in peft.lora(llama, 2).sites} == {"q_proj", "v_proj"}
    assert {s.rpartition(".")[2] for s in peft.lora(gpt2, 2).sites} == {"c_attn"}
    gains = peft.ia3(bert).tensors
    assert set(gains) == {
        f"encoder.layer.{i}.{n}"
        for i in (0, 1)
        for n in (
            "attention.self.key.gain_out",
            "attention.self.value.gain_out",
            "output.dense.gain_in",
        )
    }


def test_conv1d_of_gpt2_fresh_and_by_hand(gpt2, inputs, moved):
    delta = peft.lora(gpt2, 2, 4.0, sites=["c_attn", "c_proj"])
    with torch.no_grad():
        base = gpt2(**inputs).last_hidden_state
        assert torch.equal(peft.apply(gpt2, delta)(**inputs).last_hidden_state, base)
    delta, layer, x = moved(delta), gpt2.h[0].attn.c_attn, torch.randn(3, 16)
    A, B = (delta.tensors[f"h.0.attn.c_attn.{part}"] for part in "AB")
    under = peft.apply(gpt2, delta).module.h[0].attn.c_attn
    assert torch.allclose(under(x), layer(x) + 2.0 * x @ A.T @ B.T, atol=1e-5)
    assert torch.allclose(x @ under.weight + under.bias, under(x), atol=1e-5)


def test_every_kind_in_one_batch(bert, inputs, moved):
    deltas = [
        moved(peft.lora(bert, 2), 1),
        moved(peft.ia3(bert), 2),
        moved(peft.mask(bert, "LayerNorm"), 3),
        moved(peft.prefix(bert, 3), 4),
        moved(peft.prompt(bert, 2), 5),
        moved(peft.prefix(bert, 1), 6),
        moved(peft.prompt(bert, 4), 7),
        moved(peft.lora(bert, 3, sites="dense"), 8),
    ]
    virtual = [0, 0, 0, 0, 2, 0, 4, 0]
    applied = peft.apply(bert, peft.stack(deltas))
    lengths = inputs["attention_mask"].sum(1).tolist()
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [-1, 3, 4, 5], [6, 6, -1, 0], [3, 5, 3, 5]):
        with torch.no_grad():
            together = applied(**inputs, rows=torch.tensor(rows))
            for i, row in enumerate(rows):
                one = {n: t[i : i + 1] for n, t in inputs.items()}
                model = bert if row < 0 else peft.apply(bert, deltas[row])
                alone = model(**one)
                real = lengths[i] + (virtual[row] if row >= 0 else 0)
                got, wanted = (o.last_hidden_state for o in (together, alone))
                assert torch.allclose(got[i, :real], wanted[0, :real], atol=1e-5)
                assert torch.allclose(together.pooler_output[i], alone.pooler_output[0], atol=1e-5)


def test_causal_model_with_grouped_heads(llama, inputs, moved):
    """A prefix has as many heads as keys; logits are of the tokens, and generation goes on."""
    prefix = moved(peft.prefix(llama, 3))
    assert prefix.tensors["prefix"].shape == (3, 2 * 2 * 8)
    logits = peft.apply(llama, prefix)(**inputs).logits
    assert logits.shape == (4, 5, 50)
    with torch.no_grad():
        base = llama(**inputs).logits
        assert (logits - base).abs().max() > 1e-2
        lora = moved(peft.lora(llama, 2))
        applied = peft.apply(llama, lora)
        written = applied.module.generate(
            inputs["input_ids"][:1], max_new_tokens=5, do_sample=False
        )
        merged = peft.merge(llama, lora).generate(
            inputs["input_ids"][:1], max_new_tokens=5, do_sample=False
        )
    assert written.tolist() == merged.tolist()


def test_a_cache_and_a_prefix_do_not_go_together(llama, inputs, moved):
    past = transformers.DynamicCache()
    with pytest.raises(DeltaError, match="brings its own"):
        peft.apply(llama, moved(peft.prefix(llama, 2)))(
            input_ids=inputs["input_ids"], past_key_values=past
        )


def test_positional_inputs_and_embeddings(bert, inputs, moved):
    delta = moved(peft.prompt(bert, 2))
    applied = peft.apply(bert, delta)
    by_name = applied(**inputs).last_hidden_state
    assert torch.equal(applied(*inputs.values()).last_hidden_state, by_name)
    embeds = bert.get_input_embeddings()(inputs["input_ids"])
    by_vectors = applied(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert torch.allclose(by_vectors.last_hidden_state, by_name, atol=1e-6)


def test_what_does_not_fit(bert, gpt2, llama, inputs, moved):
    prompt = moved(peft.prompt(bert, 2))
    with pytest.raises(DeltaError, match="another base"):
        peft.apply(gpt2, prompt)
    short = peft.prefix(drawn(transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=32,
    )), 2)  # fmt: skip
    with pytest.raises(DeltaError, match=r"'prefix' \(2, 32\) does not fit BertModel.*64 numbers"):
        peft.apply(bert, dataclasses.replace(short, base_hash="", _home=[]))
    with pytest.raises(InputError, match="needs input_ids or inputs_embeds"):
        peft.apply(bert, prompt)(attention_mask=inputs["attention_mask"])
    with pytest.raises(InputError, match=r"attention_mask \[batch, sequence\]"):
        peft.apply(bert, prompt)(
            input_ids=inputs["input_ids"], attention_mask=torch.ones(4, 1, 5, 5)
        )


def test_compiles_with_a_prompt(bert, inputs, moved):
    applied = peft.apply(bert, moved(peft.prompt(bert, 2)).snapshot())
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(applied, backend="eager", fullgraph=True)
        wanted = applied(**inputs).last_hidden_state
        assert torch.allclose(compiled(**inputs).last_hidden_state, wanted, atol=1e-5)
