"""What real servers answered is computed again by the command, in a process of its own.

1,000 requests of tenants with deltas of every kind, and fits; then a byte is flipped, here and
there.
"""

from __future__ import annotations

import importlib
import shutil
import sqlite3
import sys
import threading
from pathlib import Path

import pytest
import torch

from tessera import random
from tessera.cli import main
from tessera.serve.client import Client
from tessera.serve.fitting_values import FitSettings

THREADS = 8
ASKED = {"net": 700, "bert": 300}


@pytest.fixture(scope="module")
def served():
    place = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, place)
    try:
        yield importlib.import_module("_served")
    finally:
        sys.path.remove(place)
        sys.modules.pop("_served", None)


def inputs(model: str, draw: torch.Generator) -> dict[str, torch.Tensor]:
    rows = int(torch.randint(1, 4, (), generator=draw))
    if model == "net":
        return {"input": torch.randn(rows, 6, generator=draw)}
    length = int(torch.randint(1, 24, (), generator=draw))
    ids = torch.randint(1, 50, (rows, length), generator=draw)
    if rows == 2:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[:, 1 + length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def ask_many(served, server, secrets: list[str], count: int) -> None:
    failed: list[object] = []

    def ask(at: int) -> None:
        try:
            lines = [served.Line(server.port, secret) for secret in secrets]
            draw = random.generator(at, "tests.replay")
            for number in range(at, count, THREADS):
                alias = ("one", "two", "plain")[number // 3 % 3]
                line = lines[number % len(lines)]
                said = line.infer(alias, inputs(server.model, draw), f"r{number}")
                assert said.status == 200, said.status
            for line in lines:
                line.close()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def fit_some(server, secret: str) -> None:
    """In the server's own process for fits, below the requests that come meanwhile."""
    y = torch.arange(12) % 3
    x = {
        "input": 2 * torch.eye(6)[y]
        + 0.3 * torch.randn(12, 6, generator=random.generator(0, "tests.replay.fits"))
    }
    with Client(server.url, secret) as client:
        one = client.fit(x, y, FitSettings(r=2, sites=["0"], head="2", steps=300, lr=0.05))
        client.fit(x, y, FitSettings(parent=one.hash, steps=7))
        client.fit(x, y, FitSettings(kind="ia3", sites=["0", "2"], steps=1000, budget={"ms": 40}))
        client.session(ttl_s=60, inputs=x, labels=y, how=FitSettings(r=1, steps=9, seed=5))


@pytest.fixture(scope="module", params=["net", "bert"])
def server(request, served, tmp_path_factory):
    """One that has answered, and ended."""
    if request.param == "bert":
        pytest.importorskip("transformers", reason="over a model of transformers")
    made = served.Served(
        tmp_path_factory.mktemp("replay"), request.param, ["--slots", "4", "--max-rows", "16"]
    )
    base = served.MODELS[request.param]()
    try:
        made.start()
        secrets = [made.tenant(name) for name in ("acme", "globex", "hooli")]
        for t, secret in enumerate(secrets):
            with Client(made.url, secret) as client:
                client.set_alias("plain", "", generation=0)
                for v, alias in enumerate(("one", "two")):
                    delta = served.drawn(base, request.param, 2 * t + v)
                    client.upload(delta)
                    client.set_alias(alias, delta.hash, generation=0)
        if request.param == "net":
            fit_some(made, secrets[0])
        ask_many(served, made, secrets, ASKED[request.param])
        made.end()
    finally:
        if made.process is not None:
            made.process.kill()
            made.process.wait()
    return made


@pytest.fixture
def copy(server, tmp_path):
    """Its things, to be spoilt."""
    shutil.copytree(server.data, tmp_path / "data")
    return tmp_path / "data"


def replayed(served, server, data: Path, capsys, *options: str) -> tuple[int, str]:
    """The command, in this process: the other one is proven by the first test."""
    model = f"{served.__file__}:{server.model}"
    status = main(["replay", "--model", model, "--data", str(data), *options])
    said = capsys.readouterr()
    return status, said.out + said.err


@pytest.mark.slow
def test_every_answer_again_to_the_last_bit(server):
    done = server.replay()
    assert done.returncode == 0, done.stdout + done.stderr
    count = ASKED[server.model]
    assert f"{count} requests: {count} identical" in done.stdout
    assert ("4 fits: 4 identical" if server.model == "net" else "0 fits: none") in done.stdout
    assert "\r" not in done.stdout + done.stderr  # no progress in a pipe
    with sqlite3.connect(server.data / "registry.db") as log:
        plans = [row[0] for row in log.execute("select body from audit where kind = 'batch'")]
    log.close()
    assert len(plans) < count  # some went together


def edit(data: Path, statement: str) -> None:
    log = sqlite3.connect(data / "registry.db")
    for (name,) in log.execute("select name from sqlite_master where type = 'trigger'").fetchall():
        log.execute(f"drop trigger {name}")
    assert log.execute(statement).rowcount == 1
    log.commit()
    log.close()


EDITS = {
    "who": "update audit set tenant = 'hooli' where seq = {seq} and tenant = 'acme'",
    "the answer": 'update audit set body = replace(body, \'"response":"\', \'"response":"0\') '
    "where seq = {seq}",
    "when": "update audit set time_s = time_s + 1e-6 where seq = {seq}",
    "gone": "delete from audit where seq = {seq}",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", EDITS)
def test_an_edited_log_is_seen_and_the_event_named(served, server, copy, capsys, what):
    log = sqlite3.connect(copy / "registry.db")
    seq = log.execute(
        "select seq from audit where kind = 'request' and tenant = 'acme' order by seq limit 1 "
        "offset 20"
    ).fetchone()[0]
    log.close()
    edit(copy, EDITS[what].format(seq=seq))
    status, said = replayed(served, server, copy, capsys)
    assert status == 1, said
    assert str(seq) in said


@pytest.mark.slow
def test_a_log_cut_off_at_its_end_is_seen(served, server, copy, capsys):
    edit(copy, "delete from audit where seq = (select max(seq) from audit)")
    status, said = replayed(served, server, copy, capsys)
    assert status == 1, said


@pytest.mark.slow
@pytest.mark.parametrize("which", ["a request's id", "a batch's plan"])
def test_a_flipped_byte_in_the_logs_file_is_seen(served, server, copy, capsys, which):
    log = sqlite3.connect(copy / "registry.db")
    log.execute("pragma wal_checkpoint(truncate)")
    log.close()
    path = copy / "registry.db"
    content = bytearray(path.read_bytes())
    content[content.index(b'"request":"r1' if which == "a request's id" else b'"plan":{') + 11] ^= 1
    path.write_bytes(content)
    status, said = replayed(served, server, copy, capsys)
    assert status == 1, said
    assert "event" in said


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


@pytest.mark.slow
def test_a_row_that_was_changed_is_seen(served, server, copy, capsys):
    edit(copy, "update aliases set generation = 7 where tenant = 'acme' and name = 'one'")
    status, said = replayed(served, server, copy, capsys, "--what", "gates")
    assert status == 1, said
    assert "the alias one of acme has generation 7, the log says 1" in said


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flipped", "lost"])
@pytest.mark.parametrize("which", ["inputs", "delta"])
def test_a_spoilt_blob_is_seen_and_named(served, server, copy, capsys, which, how):
    log = sqlite3.connect(copy / "registry.db")
    asked = "select json_extract(body, '$.blob') from audit where kind = 'request' limit 1"
    held = "select blob from deltas limit 1"
    blob = log.execute(asked if which == "inputs" else held).fetchone()[0]
    log.close()
    path = copy / "blobs" / "sha256" / blob[:2] / blob
    if how == "flipped":
        flip(path)
    else:
        path.unlink()
    what = "requests" if which == "inputs" else "gates"  # all files of deltas are looked at anyway
    status, said = replayed(served, server, copy, capsys, "--what", what)
    assert status == 1, said
    assert blob in said
    assert ("damaged" if how == "flipped" else "there is no blob") in said
