"""A delta as Hugging Face PEFT's configuration and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessera.arch.peft_names import OWN, PREFIX, TYPES, Content, pattern_of, targets

__all__ = ["encode"]

_UNCALLED = "NonDynamicallyQuantizableLinear"


def encode(content: Content) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's configuration and tensors of a delta.

    Args:
        content: Of any kind. ``info["layer_types"]`` (site -> class name) tells what the tensors
            alone do not: "Embedding", and for ia3 "Conv2d" and "Conv3d".

    Returns:
        (configuration, tensors); under our own names where PEFT cannot say it.

    Example:
        >>> import torch
        >>> config, tensors = encode(Content(
        ...     kind="lora", scales={"fc": 2.0}, info={},
        ...     tensors={"fc.A": torch.ones(1, 3), "fc.B": torch.zeros(2, 1)},
        ... ))
        >>> config["r"], config["lora_alpha"], sorted(tensors)
        (1, 2, ['base_model.model.fc.lora_A.weight', 'base_model.model.fc.lora_B.weight'])
    """
    if not _expressible(content):
        return {"peft_type": f"{OWN}{content.kind.upper()}"}, dict(content.tensors)
    prompting = content.kind in ("prefix", "prompt")
    config: dict[str, Any] = {
        "peft_type": TYPES[content.kind],
        # A model of transformers without a head; only a prompt asks PEFT for the class around it.
        "task_type": content.info.get("task_type", "FEATURE_EXTRACTION" if prompting else None),
        "base_model_name_or_path": content.info.get("base_name"),
        "inference_mode": True,
    }
    sites = _sites(content.tensors)
    saved = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in content.tensors.items():
        site, _, part = name.rpartition(".")
        if part != "full":
            key, value = _key(content, site, part, tensor)
            tensors[key] = value
            continue
        module, _, own = site.rpartition(".")
        if module in sites:
            tensors[f"{PREFIX}{module}.base_layer.{own}"] = tensor
        else:
            tensors[f"{'base_model.' if prompting else PREFIX}{site}"] = tensor
            saved.add(module)
    config["modules_to_save"] = sorted(saved) or None
    fill = {"lora": _lora_config, "ia3": _ia3_config}.get(content.kind, _prompt_config)
    return config | fill(content, sites), tensors


def _sites(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules with an adapter, sorted."""
    split = (name.rpartition(".") for name in tensors)
    return sorted({site for site, _, part in split if site and part != "full"})


def _types(info: Mapping[str, Any]) -> dict[str, str]:
    """`layer_types`; a folder from elsewhere may have put anything there."""
    said = info.get("layer_types")
    return {k: v for k, v in said.items() if isinstance(v, str)} if isinstance(said, dict) else {}


def _expressible(content: Content) -> bool:
    """Whether PEFT's format can say it."""
    info, tensors = content.info, content.tensors
    if content.kind not in TYPES or "sites" in info:
        return False
    if content.kind == "prefix" and not {"layers", "heads"} <= set(info):
        return False
    sites, types = _sites(tensors), _types(info)
    if content.kind in ("lora", "ia3") and not sites:
        return False
    for name in tensors:
        site, _, part = name.rpartition(".")
        if part in ("prefix", "prompt"):
            continue
        module = site if part != "full" else site.rpartition(".")[0]
        if not module:
            return False  # PEFT replaces a module in its parent
        # It also keeps adapters out of whatever has a step of the name of what is saved whole.
        if part == "full" and any(f".{module}." in f".{s}." and s != module for s in sites):
            return False
        if part == "gain_in" and f"{site}.gain_out" in tensors:
            return False
        # Over nn.MultiheadAttention PEFT changes the output along with the input, and up to 0.21
        # twice (see peft_read); which of both a reader does, the folder cannot say.
        if types.get(site) == _UNCALLED or (part == "A" and f"{site}.out_proj.A" in tensors):
            return False
    return True


def _key(content: Content, site: str, part: str, tensor: Tensor) -> tuple[str, Tensor]:
    kinds = _types(content.info)
    if part in ("prefix", "prompt"):
        return "prompt_embeddings", tensor
    if part in ("A", "B"):
        if kinds.get(site) == "Embedding":
            return f"{PREFIX}{site}.lora_embedding_{part}", tensor
        return f"{PREFIX}{site}.lora_{part}.weight", tensor
    spatial = {"Conv2d": 2, "Conv3d": 3}.get(kinds.get(site, ""), 0)
    if spatial:
        return f"{PREFIX}{site}.ia3_l", tensor.reshape(1, -1, *(1,) * spatial)
    return f"{PREFIX}{site}.ia3_l", tensor.reshape((1, -1) if part == "gain_in" else (-1, 1))


def _lora_config(content: Content, sites: list[str]) -> dict[str, Any]:
    ranks = {site: len(content.tensors[f"{site}.A"]) for site in sites}
    alphas = {site: _whole(content.scales[site] * ranks[site]) for site in sites}
    r, alpha = _commonest(ranks) or 8, _commonest(alphas) or 8
    kinds = set(_types(content.info).values())
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(s): n for s, n in ranks.items() if n != r},
        "alpha_pattern": {_exactly(s): a for s, a in alphas.items() if a != alpha},
        "target_modules": targets(sites),
        "fan_in_fan_out": "Conv1D" in kinds,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
    }


def _exactly(name: str) -> str:
    """A key of `rank_pattern` that is this module and no other's ending."""
    return f"^{pattern_of([name])}"


def _whole(value: float) -> float:
    return int(value) if value.is_integer() else value


def _commonest(values: Mapping[str, Any]) -> Any:
    seen = list(values.values())
    return max(sorted(set(seen)), key=seen.count, default=None)


def _ia3_config(content: Content, sites: list[str]) -> dict[str, Any]:
    before = [site for site in sites if f"{site}.gain_in" in content.tensors]
    kinds = set(_types(content.info).values())
    return {
        "target_modules": targets(sites),
        # PEFT takes a list for plain endings here: only a pattern is exact.
        "feedforward_modules": pattern_of(before) if before else [],
        "fan_in_fan_out": "Conv1D" in kinds,
        "init_ia3_weights": True,
    }


def _prompt_config(content: Content, sites: list[str]) -> dict[str, Any]:
    tokens, width = content.tensors[content.kind].shape
    config = {"num_virtual_tokens": tokens, "num_transformer_submodules": 1}
    if content.kind == "prompt":
        return config | {"token_dim": width, "prompt_tuning_init": "RANDOM"}
    layers, heads = content.info["layers"], content.info["heads"]
    dim = width // (2 * layers)
    return config | {
        "token_dim": dim,
        "num_layers": layers,
        "num_attention_heads": heads,
        "encoder_hidden_size": dim,
        "prefix_projection": False,
    }
