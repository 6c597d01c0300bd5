"""What the clients ask of rollouts; see `questions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

import orjson
from torch import Tensor

from tessera.serve.oip import encode_request
from tessera.serve.questions import Question
from tessera.serve.records import Alias
from tessera.serve.rollout import Experiment
from tessera.serve.rollout_values import Asked, Feedback, Gate, Gated

__all__ = [
    "begin_experiment",
    "end_experiment",
    "experiment",
    "feedback",
    "gate",
    "gate_evidence",
    "gates",
]

Slices = Mapping[str, str | int | bool]


def begin_experiment(
    tenant: str, alias: str, candidate: str, *, share: float, mode: str, salt: str
) -> Question[Experiment]:
    """Give a candidate a share."""
    return Question(
        method="POST",
        path=_of(tenant, "aliases", alias, "experiment"),
        json={"candidate": candidate, "share": share, "mode": mode, "salt": salt},
        read=lambda r: Experiment(**r.json()),
    )


def experiment(tenant: str, alias: str) -> Question[dict[str, Any]]:
    """One, and what is known of it."""
    return Question(
        method="GET",
        path=_of(tenant, "aliases", alias, "experiment"),
        read=lambda r: {**r.json(), "experiment": Experiment(**r.json()["experiment"])},
    )


def end_experiment(tenant: str, alias: str, reason: str) -> Question[None]:
    """End one."""
    path = _of(tenant, "aliases", alias, "experiment")
    said = f"?reason={quote(reason, safe='')}" if reason else ""
    return Question(method="DELETE", path=path + said, read=lambda r: None)


def feedback(
    tenant: str,
    request: str,
    *,
    label: int | Sequence[int] | None,
    correct: bool | Sequence[bool] | None,
    metric: float | None,
    slices: Slices,
) -> Question[Feedback]:
    """Say what became of an answer."""
    said = {"label": label, "correct": correct, "metric": metric}
    body: dict[str, Any] = {"request": request, "slices": dict(slices)}
    for name, value in said.items():
        if value is not None:
            body[name] = value if isinstance(value, int | float) else list(value)
    return Question(
        method="POST",
        path=_of(tenant, "feedback"),
        json=body,
        read=lambda r: Feedback(**r.json()),
    )


def gate(tenant: str, alias: str, asked: Asked) -> Question[Gated]:
    """Have a gate decided."""
    body: dict[str, Any] = {
        "candidate": asked.candidate,
        "policy": asked.policy.json(),
        "output": asked.output,
        "promote": asked.promote,
        "watch": None if asked.watch is None else asdict(asked.watch),
    }
    if asked.shots is not None:
        asked.shots.check()
        body["shots"] = {
            "inputs": _tensors(asked.shots.inputs),
            "labels": [int(label) for label in asked.shots.labels],
            "ids": list(asked.shots.ids),
            "slices": {name: list(values) for name, values in asked.shots.slices.items()},
        }
    return Question(
        method="POST",
        path=_of(tenant, "aliases", alias) + ":gate",
        json=body,
        read=lambda r: _gated(r.json()),
    )


def gates(tenant: str, alias: str) -> Question[list[Gate]]:
    """Those of an alias."""
    return Question(
        method="GET",
        path=_of(tenant, "aliases", alias, "gates"),
        read=lambda r: [Gate(**g) for g in r.json()],
    )


def gate_evidence(tenant: str, alias: str, id: str) -> Question[dict[str, Any]]:
    """What one was decided on."""
    return Question(
        method="GET",
        path=_of(tenant, "aliases", alias, "gates", id),
        read=lambda r: dict(r.json()["evidence"]),
    )


def _tensors(inputs: Mapping[str, Tensor]) -> Any:
    body, _ = encode_request(inputs, binary=False)
    return orjson.loads(body)["inputs"]


def _gated(said: Mapping[str, Any]) -> Gated:
    alias = said["alias"]
    return Gated(gate=Gate(**said["gate"]), alias=None if alias is None else Alias(**alias))


def _of(tenant: str, *words: str) -> str:
    return "/".join(["/v1/tenants", *(quote(word, safe="") for word in (tenant, *words))])
