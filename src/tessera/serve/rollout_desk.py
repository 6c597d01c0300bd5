"""What rollouts do besides keeping things: run shots, judge labels, watch what was promoted."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from tessera import trees
from tessera.errors import BusyError, CheckpointError, ConflictError, InputError
from tessera.serve.blobs import Blobs
from tessera.serve.feedback import Journal, Said, no_answer
from tessera.serve.gates_store import Gates
from tessera.serve.ledger import Ledger
from tessera.serve.ports import Answering, Recording
from tessera.serve.records import Event, Key
from tessera.serve.rollout import Experiment
from tessera.serve.rollout_store import Experiments
from tessera.serve.rollout_values import Asked, Feedback, Gated, Shots

__all__ = ["Desk", "Rollouts"]

_CHUNK = 8  # rows that go to the engine at a time: others' requests go in between
_WAIT_S = 60.0
_MOST_SHADOWS = 10_000
_MOST_SLICES = 500  # of one gate


@final
class Rollouts:
    """Experiments, feedback and gates: what the registry keeps of rollouts.

    Args:
        ledger: The database.
        blobs: Where evidence is kept, and the inputs of past requests are.
        base_hash: Of the model that is served.
    """

    def __init__(self, ledger: Ledger, blobs: Blobs, base_hash: str) -> None:
        self.blobs = blobs
        self.audit = ledger.audit
        self.experiments = Experiments(ledger, base_hash)
        self.journal = Journal(ledger)
        self.gates = Gates(ledger, blobs, base_hash)

    def refresh(self) -> None:
        """Look for what other processes changed."""
        self.experiments.refresh()


@final
class Desk:
    """Answers /v1's questions about rollouts; each call waits, for a database or the engine.

    Args:
        rollouts: What is kept.
        engine: Runs shots.
        recorder: Flushed where an answer is not in the log yet.
    """

    def __init__(self, rollouts: Rollouts, engine: Answering, recorder: Recording | None) -> None:
        self.rollouts = rollouts
        self._engine, self._recorder = engine, recorder
        self._gating: set[str] = set()
        self._quiet: dict[tuple[str, str], tuple[tuple[int, str], int]] = {}
        self._turn = threading.Lock()

    def shadows(self, tenant: str, experiment: Experiment) -> dict[str, int]:
        """What the log has of an experiment's shadows, 10,000 of them at most."""
        found = {"requests": 0, "rows": 0, "agree": 0}
        began = self.rollouts.experiments.began(tenant, experiment.alias)
        events = self.rollouts.audit.read(tenant=tenant, kinds=["shadow"], after_seq=began)
        for event in itertools.islice(events, _MOST_SHADOWS):
            if event.body["experiment"] == experiment.id:
                found["requests"] += 1
                found["rows"] += event.body["rows"]
                found["agree"] += event.body.get("agree", 0)
        return found

    # --- feedback --------------------------------------------------------------------------------

    def feedback(self, tenant: str, said: Said, *, by: Key) -> Feedback:
        """Keep feedback, and look at what is watched.

        Raises:
            UnknownNameError: The log has no answer to that request.
            ConflictError: Other feedback was given for it.
            InputError: It does not fit the answer, or a label cannot be judged.
        """
        journal = self.rollouts.journal
        found = journal.find(tenant, said)
        if found is None:
            answer = journal.answer(tenant, said.request)
            if answer is None and self._recorder is not None:
                self._recorder.flush()  # it is behind by a twentieth of a second
                answer = journal.answer(tenant, said.request)
            if answer is None:
                raise no_answer(tenant, said.request)
            outcomes = self._judge(tenant, said, answer) if said.label else said.outcomes()
            found = journal.add(tenant, said, outcomes, answer, by=by)
        self._watch(found)
        return found

    def _judge(self, tenant: str, said: Said, answer: Event) -> str:
        """Compute the answer again, and compare it with the label."""
        body = answer.body
        if not body.get("blob"):
            raise InputError(
                "this server keeps no inputs, so it cannot compare an answer with a label; say "
                "correct: true or false"
            )
        try:
            kept = load(self.rollouts.blobs.get(str(body["blob"])))
        except SafetensorError as error:
            raise CheckpointError(f"the blob {body['blob']} holds no inputs: {error}") from error
        start = f"{body['at']}."
        inputs = {n.removeprefix(start): t for n, t in kept.items() if n.startswith(start)}
        rows = len(next(iter(inputs.values()), ()))
        if len(said.label) != rows:
            raise InputError(f"the request had {rows} rows, and {len(said.label)} labels came")
        found = self._classes(tenant, inputs, str(body["delta"]), "")
        return "".join("01"[a == b] for a, b in zip(found, said.label, strict=True))

    def _watch(self, found: Feedback) -> None:
        gates, now = self.rollouts.gates, (found.generation, found.delta)
        at = found.tenant, found.alias
        if not found.outcomes or gates.watched(*at) != now:
            return
        known, left = self._quiet.get(at, (now, 0))
        left -= len(found.outcomes)
        if known == now and left > 0:
            self._quiet[at] = now, left
            return
        outcomes = self.rollouts.journal.live(*at, *now)
        gates.look(*at, outcomes)
        # They may be a million, and are read again only where a look could have come due; a
        # quarter of the way, for other processes take feedback too.
        self._quiet[at] = now, gates.until_look(*at, len(outcomes)) // 4

    # --- gates -----------------------------------------------------------------------------------

    def gate(self, tenant: str, alias: str, asked: Asked, *, by: Key) -> Gated:
        """Compare a candidate with what an alias points to, decide, and do what was asked.

        Raises:
            BusyError: A gate of this tenant is being computed.
            ConflictError: The alias moved meanwhile; there is no experiment with this candidate.
            InputError: The shots or outputs are none that can be judged.
            UnknownNameError: No such alias, delta or experiment.
        """
        with self._turn:
            if tenant in self._gating:
                raise BusyError(f"a gate of {tenant}'s is being computed; one is at a time")
            self._gating.add(tenant)
        try:
            evidence = self._evidence(tenant, alias, asked, by)
        finally:
            self._gating.discard(tenant)
        watch = asked.watch if asked.promote else None
        gate = self.rollouts.gates.record(evidence, watch=watch, by=by)
        moved = None
        if gate.passed and asked.promote:
            moved = self.rollouts.gates.promote(gate, by=by)
        return Gated(gate=gate, alias=moved)

    def _evidence(self, tenant: str, name: str, asked: Asked, by: Key) -> dict[str, Any]:
        rollouts, candidate, running = self.rollouts, asked.candidate, None
        if candidate is None or asked.shots is None:
            running = rollouts.experiments.in_force(tenant, name)
            if candidate is not None and candidate != running.candidate:
                raise ConflictError(
                    f"the experiment on {name!r} is with {running.candidate or 'the base'}, so "
                    "there is no feedback on another candidate; send shots"
                )
            candidate = running.candidate
        alias, look = rollouts.gates.prepare(tenant, name, candidate, by=by)
        if running is not None and not running.holds(alias):
            raise ConflictError(f"the alias {name!r} was moved just now; try again")
        found: dict[str, Any] = {
            "version": 1,
            "tenant": tenant,
            "alias": name,
            "generation": alias.generation,
            "incumbent": alias.delta,
            "candidate": candidate,
            "experiment": "" if running is None else running.id,
            "policy": asked.policy.json(),
            "look": look,
            "paired": asked.shots is not None,
        }
        if asked.shots is None:
            found["examples"] = rollouts.journal.examples(tenant, found["experiment"])
        else:
            found |= self._run(tenant, asked.shots, asked.output, alias.delta, candidate)
        _require_few(found["examples"], asked.policy.slices)
        return found

    def _run(
        self, tenant: str, shots: Shots, output: str, incumbent: str, candidate: str
    ) -> dict[str, Any]:
        shots.check()
        arms = [
            self._classes(tenant, shots.inputs, delta, output) for delta in (incumbent, candidate)
        ]
        ids = shots.ids or [str(i) for i in range(len(shots.labels))]
        examples = [
            [
                ids[i],
                {feature: str(values[i]) for feature, values in shots.slices.items()},
                *(int(arm[i] == label) for arm in arms),
            ]
            for i, label in enumerate(shots.labels)
        ]
        return {
            "examples": examples,
            "inputs": trees.sha256(dict(shots.inputs)),
            "labels": list(shots.labels),
            "predicted": {"incumbent": arms[0], "candidate": arms[1]},
        }

    def _classes(
        self, tenant: str, inputs: Mapping[str, Tensor], delta: str, output: str
    ) -> list[int]:
        found: list[int] = []
        rows = len(next(iter(inputs.values())))
        for at in range(0, rows, _CHUNK):
            part = {name: tensor[at : at + _CHUNK] for name, tensor in inputs.items()}
            future = self._engine.submit(part, delta, tenant=tenant, timeout_s=_WAIT_S)
            try:
                outputs = future.result(timeout=2 * _WAIT_S).outputs
            except (TimeoutError, CancelledError) as error:
                raise BusyError("the engine did not get to the shots; nothing was kept") from error
            found += classes_of(outputs, output)
        return found


def _require_few(examples: Sequence[Sequence[Any]], features: Sequence[str]) -> None:
    """A feature that tells the examples apart makes no slices, and a decision without end."""
    found = {(f, e[1][f]) for e in examples for f in features if f in e[1]}
    if len(found) > _MOST_SLICES:
        most, name = max((sum(f == g for g, _ in found), f) for f in features)
        raise InputError(
            f"these examples have {len(found)} slices, {most} of them by {name!r}, and a gate "
            f"takes up to {_MOST_SLICES}; leave that feature out of the policy's slices"
        )


def classes_of(outputs: Mapping[str, Tensor], wanted: str = "") -> list[int]:
    """The class of each row: where its scores are largest.

    Args:
        outputs: Of a model.
        wanted: Which; "": the only one, or "logits".

    Raises:
        InputError: There is no such output, or it has no scores of classes.

    Example:
        >>> import torch
        >>> classes_of({"logits": torch.tensor([[0.1, 0.9], [2.0, 1.0]])})
        [1, 0]
    """
    name = wanted or ("logits" if "logits" in outputs else "")
    if not name and len(outputs) == 1:
        name = next(iter(outputs))
    if name not in outputs:
        raise InputError(
            f"accuracy needs an output with the scores of classes; name one of "
            f"{', '.join(sorted(outputs))[:200]}, not {name!r:.60}"
        )
    scores = outputs[name]
    if scores.dim() != 2 or scores.shape[1] < 2 or not scores.is_floating_point():
        raise InputError(
            f"accuracy needs scores [rows, classes >= 2]; the output {name!r} is "
            f"{tuple(scores.shape)} of {scores.dtype}"
        )
    return [int(i) for i in scores.argmax(dim=1)]
