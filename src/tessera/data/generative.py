"""Generative replay: a network that learned to draw the past, in place of rows kept from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from tessera import graph as tg
from tessera import random
from tessera.data.checks import is_count
from tessera.data.rows import row_problem, shown
from tessera.data.vae import VAE, check
from tessera.errors import CheckpointError, InputError

__all__ = ["GenerativeReplay"]

_VERSION = 1


@final
class GenerativeReplay:
    """A replay that holds no row: a conditional VAE draws examples of the classes of before.

    `add` is one training step of the VAE: it learns the new rows, and to go on drawing the old
    classes as its decoder did at the last `consolidate`. Samples come from that frozen decoder.

    Of k_old classes consolidated (each counts once a phase it was learned in) and k_new in this
    phase, the new rows weigh ``k_new / (k_old + k_new)`` in a step.

    Every class opens its own, fixed 30 % of the decoder's hidden units, so that learning others
    changes it little; without these gates the old classes blur into the new.

    It goes on bit for bit from a `state_dict`, and lives on the device of the first rows added.
    That no row is kept is no promise of privacy: a generator can learn one by heart. Unlike
    `ReplayBuffer` it is not for several threads at once.

    Args:
        num_classes: Labels are 0 .. num_classes - 1.
        latent: Dimensions of the code of an example.
        hidden: Units of each of the two hidden layers of encoder and decoder.
        lr: Adam's learning rate, finite and > 0.
        seed: Of the weights, the gates, the noise and the samples.

    Raises:
        InputError: An argument is out of range.

    Source:
        Shin et al. 2017, "Continual learning with deep generative replay" (arXiv:1705.08690).
        Gates: van de Ven, Siegelmann & Tolias 2020, "Brain-inspired replay for continual learning
        with artificial neural networks", Nature Communications 11:4069. Old drawings held code by
        code: Wu et al. 2018, "Memory replay GANs", replay alignment (arXiv:1809.02058).

    Example:
        >>> replay = GenerativeReplay(4, latent=2, hidden=16)
        >>> x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 2
        >>> len(replay.sample_like(x)[0])
        0
        >>> for step in range(20):
        ...     loss = replay.add(x, y)
        >>> replay.consolidate()
        >>> x_old, y_old = replay.sample_like(x, ratio=0.5)
        >>> x_old.shape, replay.classes, replay.seen
        (torch.Size([4, 1, 6, 6]), (0, 1), 160)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        latent: int = 32,
        hidden: int = 400,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        for name, value in (("num_classes", num_classes), ("latent", latent), ("hidden", hidden)):
            if not is_count(value) or value == 0:
                raise InputError(f"GenerativeReplay needs a whole {name} >= 1, got {value!r}")
        if not (math.isfinite(lr) and lr > 0):
            raise InputError(f"GenerativeReplay needs a finite lr > 0, got {lr}")
        self._settings: dict[str, Any] = {
            "version": _VERSION,
            "num_classes": int(num_classes),
            "latent": int(latent),
            "hidden": int(hidden),
            "lr": float(lr),
            "seed": int(seed),
        }
        self._vae: VAE | None = None  # the first rows decide its size
        self._optimizer: torch.optim.Optimizer | None = None
        self._source: dict[str, Tensor] = {}  # the decoder's weights at the last `consolidate`
        self._shape: tuple[int, ...] = ()
        self._phases = [0] * int(num_classes)  # in how many each class was learned
        self._new: set[int] = set()  # classes of this phase
        self._seen = self._steps = self._draws = 0
        self._carry = 0.0  # what `sample_like` rounded away

    @property
    def seen(self) -> int:
        """How many rows were ever added."""
        return self._seen

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes it draws: those added before the last `consolidate`, ascending."""
        return tuple(c for c, phases in enumerate(self._phases) if phases)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in training and of those it draws with; 0 before the first `add`."""
        weights = [*(self._vae.weights.values() if self._vae else ()), *self._source.values()]
        return sum(w.nbytes for w in weights)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """One training step of the generator on new rows and on drawings of old classes.

        The loss on new rows is the negative evidence bound of a Bernoulli likelihood, in nats a
        row: ``-E_q(z|x,y) log p(x|z,y) + KL(q(z|x,y) || N(0, 1))``. Old classes are held by the
        cross-entropy of ``p(x|z,y)`` to that of the frozen decoder, for as many codes z.

        Args:
            x: Floating rows [n, ...] with values in [0, 1]. The first call fixes their shape.
            y: Whole labels [n] in 0 .. num_classes - 1.

        Returns:
            The loss, 0-d, detached; 0 for a batch with no rows, which changes nothing.

        Raises:
            InputError: The rows or labels are out of range or of another shape. Nothing changed.
            NonFiniteError: The loss diverged; no weight was changed.

        Example:
            >>> replay = GenerativeReplay(2, latent=2, hidden=8)
            >>> x, y = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
            >>> losses = [replay.add(x, y).item() for step in range(50)]
            >>> losses[-1] < losses[0]
            True
        """
        self._check(x, y)
        if not len(x):
            return torch.zeros(())
        if self._vae is None:
            vae = self._made(x[0].numel(), x.device)
            optimizer: torch.optim.Optimizer = tg.Adam(
                vae.weights.values(), lr=self._settings["lr"]
            )
        else:
            assert self._optimizer is not None
            vae, optimizer = self._vae, self._optimizer
        labels = y.to(vae.device, torch.int64)
        new = self._new | set(labels.tolist())
        past = sum(self._phases)

        @tg.training_step(optimizer=optimizer)
        def learn(rows: Tensor) -> Tensor:
            g = random.generator(self._settings["seed"], "generative", "learn", self._steps)
            loss = vae.loss(rows, labels, g)
            if not past:
                return loss
            share = len(new) / (past + len(new))
            relearned = torch.zeros(len(self._phases), dtype=torch.bool, device=vae.device)
            relearned[list(new)] = True
            old = vae.recall(self._source, self._labels(vae, len(rows), g), relearned, g)
            return share * loss + (1 - share) * old

        loss = learn(x.detach().to(vae.device, torch.float32).flatten(1))
        self._vae, self._optimizer, self._shape = vae, optimizer, tuple(x.shape[1:])
        self._new, self._steps, self._seen = new, self._steps + 1, self._seen + len(x)
        return loss

    def consolidate(self) -> None:
        """End a task or a phase: replay what was learned up to here from now on.

        Without rows since the last call nothing changes.
        """
        if self._vae is None or not self._new:
            return
        self._source = {k: w.detach().clone() for k, w in self._vae.decoder.items()}
        for c in self._new:
            self._phases[c] += 1
        self._new = set()

    def sample(self, n: int, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """`n` drawn examples, each of a class of `classes` chosen with equal probability.

        Args:
            n: How many, >= 0.
            device: Where to put them; None is the CPU.

        Returns:
            (x, y): float32 [n, ...] of the shape of the rows added, with values in [0, 1], and
            int64 [n].

        Raises:
            InputError: Nothing was consolidated yet, or `n` is negative.

        Example:
            >>> replay = GenerativeReplay(2, latent=2, hidden=8)
            >>> _ = replay.add(torch.rand(4, 3), torch.ones(4, dtype=torch.int64))
            >>> replay.consolidate()
            >>> x, y = replay.sample(3)
            >>> x.shape, y.tolist()
            (torch.Size([3, 3]), [1, 1, 1])
        """
        if not is_count(n):
            raise InputError(f"GenerativeReplay.sample needs a whole n >= 0, got {n!r}")
        if self._vae is None or not self._source:
            raise InputError(
                "GenerativeReplay.sample has nothing to draw from: add() rows and consolidate() at "
                "the end of the task, or call sample_like(x), which gives zero rows until then"
            )
        g = random.generator(self._settings["seed"], "generative", "sample", self._draws)
        y = self._labels(self._vae, int(n), g)
        x = self._vae.draw(self._source, y, g)
        self._draws += 1
        place = torch.device("cpu" if device is None else device)
        return x.reshape(len(x), *self._shape).to(place), y.to(place)

    def sample_like(self, x: Tensor, ratio: float = 1.0) -> tuple[Tensor, Tensor]:
        """Old examples to train on beside a new batch: ``len(x) * ratio`` of them on average.

        What a call rounds away is carried to the next, as by `ReplayBuffer.sample_like`.

        Args:
            x: The new batch's rows, floating [n, ...].
            ratio: Replayed rows a new row, finite and >= 0.

        Returns:
            As `sample`, on x's device and in x's dtype. Zero rows before the first `consolidate`.

        Raises:
            InputError: `ratio` is negative or not finite, or x is no batch of such rows.

        Example:
            >>> replay = GenerativeReplay(2)
            >>> x, y = torch.rand(4, 2), torch.tensor([0, 1, 0, 1])
            >>> x_old, y_old = replay.sample_like(x)
            >>> torch.cat([x, x_old]).shape, torch.cat([y, y_old]).dtype
            (torch.Size([4, 2]), torch.int64)
        """
        who = "GenerativeReplay.sample_like"
        if not isinstance(x, Tensor) or x.ndim < 1 or not x.is_floating_point():
            raise InputError(f"{who} needs a floating batch x [n, ...], got {shown(x)}")
        if self._vae is not None and x.shape[1:] != self._shape:
            raise InputError(f"{who} draws rows {list(self._shape)}, got a batch x {shown(x)}")
        wanted = self._carry + len(x) * ratio
        if not (math.isfinite(wanted) and ratio >= 0):
            raise InputError(f"{who} needs a finite ratio >= 0, got {ratio}")
        # The slack lets 10 x 0.1 be one row, though the sum falls short of 1 in binary.
        n = math.floor(wanted + 1e-9)
        self._carry = wanted - n
        if not n or not self._source:
            none = torch.empty(0, dtype=torch.int64, device=x.device)
            return x.new_empty((0, *x.shape[1:])), none
        x_old, y_old = self.sample(n, device=x.device)
        return x_old.to(x.dtype), y_old

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue bit for bit, as plain values and tensors.

        Example:
            >>> replay, other = GenerativeReplay(2, hidden=8), GenerativeReplay(2, hidden=8)
            >>> x, y = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
            >>> _ = replay.add(x, y)
            >>> other.load_state_dict(replay.state_dict())
            >>> bool(replay.add(x, y) == other.add(x, y))
            True
        """
        weights = self._vae.weights if self._vae else {}
        return {
            **self._settings,
            "shape": list(self._shape),
            "phases": list(self._phases),
            "new": sorted(self._new),
            "seen": self._seen,
            "steps": self._steps,
            "draws": self._draws,
            "carry": self._carry,
            "weights": {name: w.detach().clone() for name, w in weights.items()},
            "source": {name: w.clone() for name, w in self._source.items()},
            "optimizer": copy.deepcopy(self._optimizer.state_dict()) if self._optimizer else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` gave, replacing all that was learned.

        Args:
            state: Of one with the same arguments.

        Raises:
            CheckpointError: The state is damaged or of other arguments; this one is unchanged.
        """
        self._check_state(state)
        vae, optimizer = None, None
        if state["weights"]:
            first = next(iter(state["weights"].values()))
            vae = self._made(math.prod(state["shape"]), first.device)
            vae.load(state["weights"])
            optimizer = tg.Adam(vae.weights.values(), lr=self._settings["lr"])
            try:
                optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
                moments = [optimizer.state[w]["exp_avg"].shape for w in vae.weights.values()]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"damaged generative replay state: {error}") from error
            if moments != [w.shape for w in vae.weights.values()]:
                raise CheckpointError("damaged generative replay state: the optimizer's shapes")
            if state["source"]:
                check(state["source"], vae.decoder)
        self._vae, self._optimizer = vae, optimizer
        self._source = {name: w.detach().clone() for name, w in state["source"].items()}
        self._shape, self._phases = tuple(state["shape"]), list(state["phases"])
        self._new, self._seen = set(state["new"]), state["seen"]
        self._steps, self._draws = state["steps"], state["draws"]
        self._carry = float(state["carry"])

    def _made(self, features: int, device: torch.device) -> VAE:
        s = self._settings
        return VAE(
            features,
            s["num_classes"],
            latent=s["latent"],
            hidden=s["hidden"],
            seed=s["seed"],
            device=device,
        )

    def _labels(self, vae: VAE, n: int, g: torch.Generator) -> Tensor:
        known = torch.tensor(self.classes)
        return known[torch.randint(len(known), (n,), generator=g)].to(vae.device)

    def _check(self, x: Tensor, y: Tensor) -> None:
        who, most = "GenerativeReplay.add(x, y)", self._settings["num_classes"] - 1
        for name, value in (("x", x), ("y", y)):
            if problem := row_problem(value):
                raise InputError(f"{who} cannot learn {name}: it {problem}")
        if not x.is_floating_point() or x.ndim < 2 or (len(x) and (x.min() < 0 or x.max() > 1)):
            span = f" from {x.min():g} to {x.max():g}" if len(x) else ""
            raise InputError(
                f"{who} needs floating rows x [n, ...] with values in [0, 1], got "
                f"{shown(x)}{span}; scale them, bytes by x.float() / 255"
            )
        if y.ndim != 1 or y.is_floating_point() or y.dtype is torch.bool or len(x) != len(y):
            raise InputError(f"{who} needs one whole label a row, got x {shown(x)}, y {shown(y)}")
        if len(y) and (y.min() < 0 or y.max() > most):
            raise InputError(
                f"{who} needs labels in 0 .. {most}, got {int(y.min())} .. {int(y.max())}; "
                "the number of classes is given by GenerativeReplay(num_classes)"
            )
        if self._vae is not None and x.shape[1:] != self._shape:
            raise InputError(
                f"{who} got x {shown(x)}, but draws rows of shape {list(self._shape)} since its "
                "first add; convert them, or start another"
            )

    def _check_state(self, state: Mapping[str, Any]) -> None:
        names = self.state_dict().keys()
        if not isinstance(state, Mapping) or set(state) != set(names):
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise CheckpointError(
                f"a generative replay state has the entries {sorted(names)}, got {got}; give what "
                "GenerativeReplay.state_dict() returned"
            )
        for name, own in self._settings.items():
            if type(state[name]) is not type(own) or state[name] != own:
                raise CheckpointError(
                    f"this generative replay state was saved with {name}={state[name]!r}, the one "
                    f"that loads it has {name}={own!r}; build GenerativeReplay as the saved one was"
                )
        counts = [state[name] for name in ("seen", "steps", "draws")]
        lists = [state[name] for name in ("shape", "phases", "new")]
        most = self._settings["num_classes"]
        if (
            not all(is_count(n) for n in counts)
            or not all(isinstance(v, list | tuple) and all(map(is_count, v)) for v in lists)
            or len(state["phases"]) != most
            or any(c >= most for c in state["new"])
            or not isinstance(state["carry"], int | float)
            or not -1e-6 < state["carry"] < 1
            or not isinstance(state["weights"], Mapping)
            or not isinstance(state["source"], Mapping)
            or bool(state["source"]) != any(state["phases"])
            or (not state["weights"] and (state["seen"] or state["source"]))
        ):
            raise CheckpointError(
                "damaged generative replay state: its counters and its weights do not fit together"
            )
