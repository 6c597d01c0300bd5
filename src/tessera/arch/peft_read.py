"""The delta that an adapter of Hugging Face PEFT is."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from tessera.arch.peft_names import (
    OWN,
    PREFIX,
    TYPES,
    Content,
    is_feedforward,
    is_saved,
    is_target,
    reader,
)
from tessera.errors import DeltaError

__all__ = ["decode"]

_LORA = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NAME = 256
_MOST = 1e30

# Fields that change what an adapter computes, beyond what a delta holds.
_REFUSED = (
    "use_dora",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "ensure_weight_tying",
)
# With these PEFT changes the base's own weights when it attaches the adapter.
_PLAIN_INIT = (None, True, False, "gaussian", "orthogonal", "eva")
_KNOWN_CONFIGS = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config")


def decode(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Content:
    """The delta that a PEFT adapter is.

    Args:
        config: adapter_config.json, from anywhere.
        tensors: adapter_model.safetensors, from anywhere.

    Returns:
        Its content; of our own names (`OWN`) without scales and info, which are not in there.

    Raises:
        DeltaError: PEFT would compute something else than a delta can, or the tensors and the
            configuration do not belong together. The message names the field or the tensor.

    Example:
        >>> decode({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "token_dim": 4},
        ...        {"prompt_embeddings": torch.zeros(2, 4)}).kind
        'prompt'
    """
    said = config.get("peft_type")
    tensors = dict(sorted(tensors.items()))  # so that the first to be refused is always the same
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, own=isinstance(said, str) and said.startswith(OWN))
    if isinstance(said, str) and said.startswith(OWN):
        return Content(kind=said[len(OWN) :].lower(), tensors=tensors, scales={}, info={})
    kinds = {peft: kind for kind, peft in TYPES.items()}
    kind = kinds.get(said) if isinstance(said, str) else None
    if kind is None:
        raise DeltaError(
            f"adapter_config.json: peft_type is {str(said)[:40]!r}; Tessera reads "
            f"{', '.join(kinds)}"
        )
    _refuse_features(config)
    info: dict[str, Any] = {}
    for field, ours in (("base_model_name_or_path", "base_name"), ("task_type", "task_type")):
        value = config.get(field)
        if value is not None and not isinstance(value, str):
            raise DeltaError(f"adapter_config.json: {field} must be a name, it is {value!r:.60}")
        if value:
            info[ours] = value
    read = {"lora": _read_lora, "ia3": _read_ia3}.get(kind, _read_prompt)
    return read(kind, config, tensors, info)


def _check_tensor(name: str, tensor: Tensor, *, own: bool) -> None:
    if not name.isprintable() or len(name) > _NAME or not name:
        raise DeltaError(
            f"adapter_model.safetensors: {name[:60]!r} is no name of a tensor: it must be 1 to "
            f"{_NAME} printable characters"
        )
    if own and name.rpartition(".")[2] == "mask":
        if tensor.dtype is not torch.bool:
            raise DeltaError(f"the adapter's {name!r} must be bool, it is {tensor.dtype}")
    elif tensor.dtype not in _DTYPES:
        raise DeltaError(
            f"the adapter's {name!r} must be floating (float16 to float64 or bfloat16), it is "
            f"{tensor.dtype}"
        )
    elif not _finite(tensor):
        raise DeltaError(f"the adapter's {name!r} holds NaN or infinite values")


def _finite(tensor: Tensor) -> bool:
    # A sum is finite only if all it adds up is; where it overflows, each entry is looked at.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _refuse_features(config: Mapping[str, Any]) -> None:
    """Raise where PEFT would compute what a delta does not say, also with features to come."""
    for field, value in config.items():
        later = field.startswith("use_") and field != "use_rslora"
        later |= field.endswith("_config") and field not in _KNOWN_CONFIGS
        if value and (field in _REFUSED or later):
            raise DeltaError(
                f"adapter_config.json: {field} is {value!r:.60}; Tessera reads adapters without it"
            )
    if config.get("bias", "none") != "none":
        raise DeltaError(
            f"adapter_config.json: bias is {config['bias']!r:.40}; Tessera reads adapters with "
            'bias="none"'
        )
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INIT:
        raise DeltaError(
            f"adapter_config.json: init_lora_weights is {init!r:.40}, with which PEFT changes the "
            "base's own weights. Save it with PEFT's path_initial_model_for_weight_conversion="
        )
    if config.get("num_transformer_submodules") not in (None, 1):
        raise DeltaError(
            "adapter_config.json: num_transformer_submodules is "
            f"{config['num_transformer_submodules']!r:.40}; Tessera reads prompts and prefixes "
            "for one stack of layers (1)"
        )


def _put(found: dict[str, Tensor], name: str, tensor: Tensor, key: str) -> None:
    if name in found:
        raise DeltaError(
            f"the adapter's {key!r} is a second tensor for {name!r}; a site has one adapter"
        )
    found[name] = tensor


def _put_whole(
    found: dict[str, Tensor], key: str, tensor: Tensor, config: Mapping[str, Any], sites: set[str]
) -> None:
    """Take in a replaced parameter, or refuse a tensor that is nothing."""
    prefix = PREFIX if config["peft_type"] in ("LORA", "IA3") else "base_model."
    name = key.removeprefix(prefix)
    site, base, own = name.rpartition(".base_layer.")
    if base and site in sites and "." not in own:
        name = f"{site}.{own}"
    elif name == key or not is_saved(config.get("modules_to_save"), name):
        raise DeltaError(
            f"the adapter's {key!r} is no tensor of a {config['peft_type']} adapter, and no "
            "module in modules_to_save holds it"
        )
    _put(found, f"{name}.full", tensor, key)


def _read_lora(
    kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], info: dict[str, Any]
) -> Content:
    found: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    owner: dict[str, str] = {}  # the module PEFT attaches it to: of an attention's output, that
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in _LORA if key.endswith(s)), None)
        if suffix is None or not key.startswith(PREFIX):
            rest[key] = tensor
            continue
        site = owned = key[len(PREFIX) : -len(suffix)]
        if site.endswith(".base_layer.out_proj"):
            owned = site.removesuffix(".base_layer.out_proj")
            site = f"{owned}.out_proj"
        owner[site] = owned
        if "embedding" in suffix:
            types[site] = "Embedding"
        elif tensor.dim() > 2:
            types[site] = f"Conv{tensor.dim() - 2}d"
        _put(found, f"{site}.{_LORA[suffix]}", tensor, key)
    for key, tensor in rest.items():
        _put_whole(found, key, tensor, config, set(owner))
    _require_sites(kind, owner.values(), config)
    rank = _pattern(config, "rank_pattern", "r")
    alpha = _pattern(config, "alpha_pattern", "lora_alpha")
    scales = {}
    for site, owned in owner.items():
        r = _check_rank(found, site, rank(owned))
        a = alpha(owned)
        # No math.isfinite: JSON has integers beyond any float.
        if isinstance(a, bool) or not isinstance(a, int | float) or not abs(a) < _MOST:
            raise DeltaError(
                f"adapter_config.json: lora_alpha of {site!r} must be a number, it is {a!r:.40}"
            )
        scales[site] = a / math.sqrt(r) if config.get("use_rslora") else a / r
        if owned != site and found[f"{site}.B"].any():
            scales[site] *= _applied(config, site)
    if types:
        info["layer_types"] = dict(sorted(types.items()))
    return Content(kind=kind, tensors=found, scales=scales, info=info)


def _applied(config: Mapping[str, Any], site: str) -> int:
    """How often the PEFT that wrote it adds the change of an attention's output: twice, up to 0.21.

    Its MultiheadAttention folds that change in and lets out_proj fold it in again
    (huggingface/peft, pull request 3774), in training as in use.
    """
    version = config.get("peft_version")
    parts = re.match(r"(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
    if version is None or (parts and (int(parts[1]), int(parts[2])) <= (0, 21)):
        return 2
    raise DeltaError(
        f"the adapter's {site!r} is the output of an nn.MultiheadAttention, which PEFT up to 0.21 "
        f"changes twice (its pull request 3774); what PEFT {version!r:.20} does, this Tessera "
        "does not know. Upgrade Tessera, or merge the adapter with that PEFT"
    )


def _pattern(config: Mapping[str, Any], field: str, default: str) -> Any:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise DeltaError(f"adapter_config.json: {field} must be a mapping, it is {patterns!r:.40}")
    return reader(field, patterns, config.get(default, 8))


def _check_rank(found: Mapping[str, Tensor], site: str, said: Any) -> int:
    A, B = found.get(f"{site}.A"), found.get(f"{site}.B")
    if A is None or B is None:
        there, missing = ("lora_B", "lora_A") if A is None else ("lora_A", "lora_B")
        raise DeltaError(f"the adapter's {site!r} has a {there} without its {missing}")
    if A.dim() < 2 or B.dim() != A.dim() or not A.numel() or not B.numel():
        raise DeltaError(
            f"the adapter's {site!r} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}; "
            "they must be [r, in, ...] and [out, r, ...]"
        )
    if A.dim() > 2 and B.shape[1] != len(A) and len(A) % B.shape[1] == 0:
        raise DeltaError(
            f"the adapter's {site!r} lies over a grouped convolution, of which PEFT's lora_A "
            f"{tuple(A.shape)} mixes the groups; that is no change of its weights"
        )
    if B.shape[1] != len(A):
        raise DeltaError(
            f"the adapter's {site!r} has rank {len(A)} in lora_A {tuple(A.shape)} and rank "
            f"{B.shape[1]} in lora_B {tuple(B.shape)}"
        )
    if isinstance(said, bool) or said != len(A):
        raise DeltaError(
            f"the adapter's {site!r} has rank {len(A)}, but adapter_config.json says {said!r:.40} "
            "(r, rank_pattern)"
        )
    return len(A)


def _require_sites(kind: str, sites: Collection[str], config: Mapping[str, Any]) -> None:
    for site in sites:
        if is_target(config.get("target_modules"), site) is False:
            raise DeltaError(
                f"the adapter has tensors for {site!r}, which target_modules in "
                "adapter_config.json does not name"
            )
    if not sites:
        raise DeltaError(f"the adapter has no tensor of a {kind} adapter")


def _read_ia3(
    kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], info: dict[str, Any]
) -> Content:
    found: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    sites = {
        key[len(PREFIX) : -len(".ia3_l")]
        for key in tensors
        if key.startswith(PREFIX) and key.endswith(".ia3_l")
    }
    feedforward = config.get("feedforward_modules")
    for key, tensor in tensors.items():
        site = key[len(PREFIX) : -len(".ia3_l")]
        if site not in sites or not key.endswith(".ia3_l"):
            _put_whole(found, key, tensor, config, sites)
            continue
        shape = tuple(tensor.shape)
        spatial = len(shape) - 2
        if spatial not in (0, 2, 3) or tensor.numel() != max(shape) or not tensor.numel():
            raise DeltaError(
                f"the adapter's {key!r} is {shape}; ia3_l is [out, 1], [1, in] or [1, n, 1, ...]"
            )
        before = said = is_feedforward(feedforward, site)
        if spatial:
            types[site] = f"Conv{spatial}d"
            fits = shape[1] == tensor.numel() and said is not None
        else:
            if said is None or shape != (1, 1):
                before = shape[0] == 1
            # A pattern too costly to match is left to the shape, which says it too.
            fits = said in (None, before) and (said is not None or shape != (1, 1))
        if not fits:
            raise DeltaError(
                f"the adapter's {key!r} is {shape}, which is not what feedforward_modules in "
                f"adapter_config.json says of {site!r}"
            )
        _put(found, f"{site}.gain_{'in' if before else 'out'}", tensor.reshape(-1), key)
    _require_sites(kind, sites, config)
    if types:
        info["layer_types"] = dict(sorted(types.items()))
    return Content(kind=kind, tensors=found, scales={}, info=info)


def _read_prompt(
    kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], info: dict[str, Any]
) -> Content:
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key == "prompt_embeddings":
            found[kind] = tensor
        else:
            _put_whole(found, key, tensor, config, set())
    if kind not in found:
        raise DeltaError("the adapter has no tensor 'prompt_embeddings'")
    tokens, width = _count(config, "num_virtual_tokens"), _count(config, "token_dim")
    if kind == "prefix":
        # What PEFT saves of a projected prefix is what the projection made of it.
        info["layers"] = _count(config, "num_layers")
        info["heads"] = _count(config, "num_attention_heads")
        if width % info["heads"]:
            raise DeltaError(
                f"adapter_config.json: token_dim {width} is no multiple of num_attention_heads "
                f"{info['heads']}"
            )
        width *= 2 * info["layers"]
    if found[kind].shape != (tokens, width):
        raise DeltaError(
            f"the adapter's 'prompt_embeddings' is {tuple(found[kind].shape)}, but "
            f"adapter_config.json says {(tokens, width)} (num_virtual_tokens, token_dim"
            f"{', num_layers' if kind == 'prefix' else ''})"
        )
    return Content(kind=kind, tensors=found, scales={}, info=info)


def _count(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if type(value) is not int or not 1 <= value < _MOST:
        raise DeltaError(f"adapter_config.json: {field} must be a count >= 1, it is {value!r:.40}")
    return value
