"""Who gets the candidate: the split of an alias's traffic by a hash of whoever asks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from tessera.errors import InputError
from tessera.serve.records import Alias, alias_name, content_hash

__all__ = ["BUCKETS", "MODES", "Arm", "Experiment", "arm_of", "bucket", "murmur3"]

BUCKETS = 10_000
MODES = ("split", "shadow")
SEED = 0

_WORD = 0xFFFFFFFF
_MOST_KEY = 256
_MOST_SALT = 64


def murmur3(data: bytes, seed: int = 0) -> int:
    """MurmurHash3_x86_32 of some bytes: 32 bits, well spread, and no secret.

    Args:
        data: Anything.
        seed: 0 to 2^32 - 1.

    Source: Austin Appleby, MurmurHash3 (public domain), the variant x86_32.

    Example:
        >>> hex(murmur3(b"Hello, world!")), hex(murmur3(b"", 1))
        ('0xc0363e43', '0x514e28b7')
    """
    h = seed & _WORD
    whole = len(data) & ~3
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * 0xCC9E2D51 & _WORD
        h ^= (k << 15 | k >> 17) * 0x1B873593 & _WORD
        h = ((h << 13 | h >> 19) & _WORD) * 5 + 0xE6546B64 & _WORD
    if whole < len(data):
        k = int.from_bytes(data[whole:], "little") * 0xCC9E2D51 & _WORD
        h ^= (k << 15 | k >> 17) * 0x1B873593 & _WORD
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & _WORD
    h = (h ^ h >> 13) * 0xC2B2AE35 & _WORD
    return h ^ h >> 16


def bucket(salt: str, key: str) -> int:
    """Which of 10,000 buckets a key falls into: ``murmur3("salt:key") mod 10000``.

    It is the rule of Unleash's clients ("groupId:id", seed 0) with 10,000 buckets counted from 0
    in place of 100 counted from 1. A key gets the candidate where its bucket lies below the share:
    a larger share has all the buckets of a smaller one, so that widening moves nobody back.

    Args:
        salt: Of the experiment; another salt deals all keys anew.
        key: Whose requests are to stay together.

    Example:
        >>> bucket("gr1", "123") % 100 + 1  # the value in Unleash's client specification
        73
    """
    return murmur3(f"{salt}:{key}".encode("utf-8", "surrogatepass"), SEED) % BUCKETS


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experiment:
    """A candidate beside what an alias points to.

    It holds while the alias is at the generation at which it began: a swap, a promotion or a
    rollback ends it, and nobody gets a candidate that was meant for something else.

    Attributes:
        id: Its name, 16 hex digits.
        tenant: Whose.
        alias: Of which alias.
        generation: Of the alias.
        incumbent: The delta there; "" the base.
        candidate: The delta beside it; "" the base.
        mode: "split": whose bucket lies below the share gets the candidate's answer; "shadow": all
            get the incumbent's, and the candidate computes theirs besides, which nobody sees.
        share: 0 to 10,000: hundredths of a percent.
        salt: Deals the keys.
        started_s: Seconds since 1970.
    """

    id: str
    tenant: str
    alias: str
    generation: int
    incumbent: str
    candidate: str
    mode: str
    share: int
    salt: str
    started_s: float

    def holds(self, alias: Alias) -> bool:
        """Whether it is about the alias as it is now."""
        return self.generation == alias.generation and self.incumbent == alias.delta


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arm:
    """What answers one request.

    Attributes:
        delta: The hash of the delta whose answer is sent.
        name: "candidate", "incumbent", or "" where no experiment holds.
        experiment: Its id, or "".
        bucket: Of the key; -1 where no experiment holds.
        shadow: The delta that computes the same besides; None: none does.
    """

    delta: str
    name: str = ""
    experiment: str = ""
    bucket: int = -1
    shadow: str | None = None

    def note(self) -> dict[str, Any]:
        """What the audit log has of it."""
        if not self.experiment:
            return {}
        return {"arm": self.name, "experiment": self.experiment, "bucket": self.bucket}

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the answer says of it."""
        if not self.experiment:
            return []
        return [
            (b"x-tessera-arm", self.name.encode()),
            (b"x-tessera-experiment", self.experiment.encode()),
        ]


def arm_of(experiments: Mapping[tuple[str, str], Experiment], alias: Alias, key: str) -> Arm:
    """Which arm a key is in.

    Args:
        experiments: (tenant, alias) -> the one that runs.
        alias: As it is now.
        key: Whose requests are to stay together.

    Example:
        >>> alias = Alias(
        ...     tenant="acme", name="m", generation=1, delta="", changed_s=0.0, reason=""
        ... )
        >>> arm_of({}, alias, "user-1").name
        ''
    """
    found = experiments.get((alias.tenant, alias.name))
    if found is None or not found.holds(alias):
        return Arm(delta=alias.delta)
    at = bucket(found.salt, key)
    below = at < found.share
    if found.mode == "shadow":
        return Arm(
            delta=alias.delta,
            name="incumbent",
            experiment=found.id,
            bucket=at,
            shadow=found.candidate if below else None,
        )
    return Arm(
        delta=found.candidate if below else alias.delta,
        name="candidate" if below else "incumbent",
        experiment=found.id,
        bucket=at,
    )


def sticky_key(said: object, header: bytes | None, key_id: str) -> str:
    """Whose requests stay together: what the request says, its header, or the key it came with.

    Args:
        said: The request's parameter ``session``; None: it has none.
        header: ``X-Tessera-Session``, or None.
        key_id: Of the tenant's key.

    Raises:
        InputError: It is no text of 1 to 256 characters.

    Example:
        >>> sticky_key(None, b"user-7", "k1"), sticky_key(None, None, "k1")
        ('user-7', 'key:k1')
    """
    if said is None and header is None:
        return f"key:{key_id}"
    found = header.decode("latin-1") if said is None and header is not None else said
    if isinstance(found, int) and not isinstance(found, bool):
        found = str(found)
    if isinstance(found, str) and 1 <= len(found) <= _MOST_KEY:
        return found
    raise InputError(
        "the parameter session (or the header X-Tessera-Session) says whose requests stay "
        f"together: 1 to {_MOST_KEY} characters; got {found!r:.60}"
    )


def checked_share(share: object) -> int:
    """A share as a fraction in hundredths of a percent.

    Raises:
        InputError: It is none.

    Example:
        >>> checked_share(0.05)
        500
    """
    if isinstance(share, int | float) and not isinstance(share, bool) and math.isfinite(share):
        found = round(share * BUCKETS)
        if 0 <= share <= 1 and math.isclose(found, share * BUCKETS, abs_tol=1e-6):
            return found
    raise InputError(
        f"the share of an experiment is 0 to 1, in steps of {1 / BUCKETS}; got {share!r:.40}"
    )


def check_experiment(alias: str, candidate: str, mode: str, salt: str) -> None:
    """Raise unless an experiment may be like this.

    Raises:
        InputError: It may not.
    """
    alias_name(alias)
    if candidate:
        content_hash(candidate)
    if mode not in MODES:
        raise InputError(f"an experiment is one of {', '.join(MODES)}; got {mode!r:.40}")
    if not (isinstance(salt, str) and len(salt) <= _MOST_SALT and salt.isprintable()):
        raise InputError(f"a salt is up to {_MOST_SALT} printable characters; got {salt!r:.80}")
