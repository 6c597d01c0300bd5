"""Fits in a process of their own: the same bits, no tie but the pipe, and nothing left behind."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch

from tessera import peft, random
from tessera.errors import (
    BusyError,
    CheckpointError,
    DeltaError,
    InputError,
    NonFiniteError,
    UnknownNameError,
)
from tessera.recipes.loading import run_file
from tessera.serve.client import Client
from tessera.serve.fitting import Fitter, FitterSettings, Order
from tessera.serve.fitting_frames import (
    Message,
    fitted_of,
    of_error,
    of_order,
    order_of,
    read,
    write,
)
from tessera.serve.fitting_values import FitSettings, Origin, Rehearsal
from tessera.serve.questions import check
from tessera.serve.service import Service, ServiceSettings
from tessera.serve.web import describe

HERE = Path(__file__).resolve()
BASES = HERE.with_name("_bases.py")
bases = run_file(str(BASES))
net, slow = bases.net, bases.slow
HOW = FitSettings(r=2, sites=["0"], head="2", steps=25, lr=0.05)


# Beside other tests, which take all there is, one that stands back would hardly begin.
BUSY = {"niceness": 0}


def origin(function="net"):
    return Origin(function="tessera.cli.served:build", arguments={"model": f"{BASES}:{function}"})


def shots(n=12):
    y = torch.arange(n) % 3
    draw = random.generator(0, "tests.fitting_process.shots")
    return {"input": 2 * torch.eye(6)[y] + 0.3 * torch.randn(n, 6, generator=draw)}, y


def order(how=HOW, tenant="acme", old=None, **other):
    x, y = shots()
    return Order(tenant=tenant, inputs=other or x, labels=y, settings=how, rehearsal=old)


@contextlib.contextmanager
def fitting(model, function="net", registry=None, **settings):
    fitter = Fitter(model, registry, FitterSettings(**BUSY | settings), origin(function))
    try:
        yield fitter
    finally:
        fitter.close()


def alive(pid):
    """Whether there is such a process; one that ended and is waited for by nobody counts."""
    return Path(f"/proc/{pid}").exists()


def gone(pid, within_s=20):
    until = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def pid_of(fitter):
    (process,) = fitter._processes
    return process.pid


FOREIGN = peft.lora(torch.nn.Linear(2, 2), 1).snapshot()


@pytest.fixture(scope="module")
def pair():
    """A fitter with a process, and one without."""
    model = net()
    held = peft.lora(model, 2, seed=5).snapshot()

    class Shelf:
        def load(self, hash, *, tenant=None):
            found = {held.hash: held, FOREIGN.hash: FOREIGN}
            if hash not in found or tenant != "acme":
                raise UnknownNameError(f"{tenant} has no delta {hash}")
            return found[hash]

    inside = Fitter(model, Shelf())
    with fitting(model, registry=Shelf()) as outside:
        yield outside, inside, held
    inside.close()


OLD = Rehearsal(inputs=shots(9)[0], labels=(torch.arange(9) + 1) % 3, rho=0.4, lam=5.0)
SAME = {
    "a lora and a head": lambda held: order(),
    "as it comes": lambda held: order(FitSettings(steps=5, seed=3)),
    "ia3": lambda held: order(FitSettings(kind="ia3", sites="0", steps=5)),
    "a mask": lambda held: order(FitSettings(kind="mask", sites=("*.bias",), steps=5)),
    "onwards": lambda held: order(FitSettings(parent=held.hash, steps=5)),
    "a budget": lambda held: order(FitSettings(r=1, steps=50, budget={"steps": 3})),
    "a rehearsal": lambda held: order(HOW, old=OLD),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_bits_as_in_a_thread(pair, case):
    outside, inside, held = pair
    wanted = SAME[case](held)
    there, here = outside.submit(wanted).result(), inside.submit(wanted).result()
    assert there.delta.hash == here.delta.hash
    assert there.delta.base_hash == here.delta.base_hash
    assert (there.steps, there.stopped_by, there.losses) == (
        here.steps,
        here.stopped_by,
        here.losses,
    )
    assert there.spent.ms > 0
    assert there.spent.joules >= 0
    assert there.spent.joules_source == here.spent.joules_source


def test_where_the_shots_lie_in_memory_does_not_matter(pair):
    outside, inside, _ = pair
    x, _ = shots()
    for start in (1, 2, 3):
        body = torch.zeros(x["input"].numel() + start)
        body[start:] = x["input"].reshape(-1)
        moved = order(input=body[start:].reshape(-1, 6))
        assert inside.submit(moved).result().delta.hash == (
            outside.submit(order()).result().delta.hash
        )


BAD = {
    "labels": (InputError, "labels: ", lambda: Order(
        tenant="acme", inputs=shots()[0], labels=torch.full((12,), 7), settings=HOW)),
    "a width": (InputError, "inputs: the model could not run", lambda: order(
        input=torch.ones(12, 5))),
    "a site": (InputError, "sites: .*nowhere", lambda: order(FitSettings(sites=["nowhere"]))),
    "a rate": (InputError, "lr is a finite number", lambda: order(FitSettings(lr=float("nan")))),
    "no number": (InputError, "plain values", lambda: order(FitSettings(lr=torch.ones(1)))),
    "a budget": (InputError, "budget: .* no step was left", lambda: order(
        FitSettings(budget={"ms": 1e-6}))),
    "it explodes": (NonFiniteError, "loss", lambda: order(FitSettings(r=1, lr=1e20))),
    "another base's": (DeltaError, "base", lambda: order(FitSettings(parent=FOREIGN.hash))),
    "no such delta": (UnknownNameError, "acme has no delta", lambda: order(
        FitSettings(parent="0" * 64))),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_come_back_as_what_they_are(pair, case):
    outside, inside, _ = pair
    kind, message, wanted = BAD[case]
    pid = pid_of(outside)
    with pytest.raises(kind, match=message) as there:
        outside.submit(wanted()).result()
    assert type(there.value) is kind
    if case != "no number":
        with pytest.raises(kind) as here:
            inside.submit(wanted()).result()
        assert str(here.value).split(" ms ")[-1] == str(there.value).split(" ms ")[-1]
    assert pid_of(outside) == pid  # it goes on with the next


def test_messages_keep_every_type_of_tensor():
    inputs = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (
            torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8,
            torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64,
        )
    }  # fmt: skip
    whole = torch.arange(12.0).reshape(2, 6)
    inputs |= {"part": whole[:, 1:3], "turned": whole.T, "labels": whole[0], "none": whole[:0]}
    sent = Order(tenant="a", inputs=inputs, labels=None, settings=HOW, rehearsal=OLD)
    found, parent = order_of(of_order(sent, None))
    assert parent is None
    assert found.labels is None
    assert found.inputs.keys() == inputs.keys()
    for name, tensor in inputs.items():
        assert found.inputs[name].dtype == tensor.dtype
        assert torch.equal(found.inputs[name], tensor)
    assert torch.equal(found.rehearsal.labels, OLD.labels)
    assert (found.rehearsal.rho, found.rehearsal.lam) == (0.4, 5.0)


@pytest.mark.parametrize(
    "words", [b"{}", b"[]", b"?", b'{"parts": 3}', b'{"parts": [-1]}', b'{"parts": ["9"]}',
              b'{"parts": [1099511627776]}', b'{"parts": [1, 1, 1]}'],
)  # fmt: skip
def test_what_is_no_message_is_not_read(words):
    with pytest.raises(CheckpointError, match="damaged"):
        read(io.BytesIO(len(words).to_bytes(8, "little") + words))


def test_a_message_that_breaks_off_is_the_end():
    whole = io.BytesIO()
    write(whole, Message(said={"a": 1}, parts=[b"12345"]))
    for length in range(len(whole.getvalue())):
        assert read(io.BytesIO(whole.getvalue()[:length])) is None


def test_an_error_that_is_none_of_ours_is_the_servers():
    with pytest.raises(RuntimeError, match="a fit failed: KeyError: 'x'"):
        fitted_of(of_error(KeyError("x")))
    with pytest.raises(RuntimeError, match="a fit failed: StatusError"):
        fitted_of(of_error(type("StatusError", (InputError,), {})("no name of errors.py")))


# --- ends --------------------------------------------------------------------------------------


def hang():
    """For a process of its own: print the number of one that fits, and wait."""
    fitter = Fitter(slow(), None, FitterSettings(**BUSY), origin("slow"))
    fitter.submit(order(FitSettings(r=1, steps=2))).result()
    fitter.submit(order(input=torch.full((12, 6), 99.0)))
    time.sleep(0.5)
    print(f"its number: {pid_of(fitter)}", flush=True)
    sys.stdin.read()


@pytest.mark.slow
def test_a_fit_ends_with_its_server_whatever_it_is_doing():
    code = f"from tessera.recipes.loading import run_file; run_file({str(HERE)!r}).hang()"
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        line = next(said for said in server.stdout if said.startswith("its number"))
        assert alive(int(line.split()[-1]))
    finally:
        server.kill()
        server.communicate()
    assert gone(int(line.split()[-1]), within_s=10)


@pytest.mark.slow
def test_a_killed_process_fails_its_fit_and_is_replaced():
    with fitting(slow(), "slow") as fitter:
        assert fitter.submit(order(FitSettings(r=1, steps=2))).result().steps > 0
        first = pid_of(fitter)
        hanging = fitter.submit(order(input=torch.full((12, 6), 99.0)))
        waiting = fitter.submit(order(FitSettings(r=1, steps=2), tenant="globex"))
        time.sleep(0.3)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(BusyError, match="ended before this fit did") as caught:
            hanging.result(30)
        status, body, headers = describe(caught.value, "r-1")
        assert (status, b'"type":"BusyError"' in body) == (503, True)
        assert dict(headers)[b"retry-after"] == b"5"
        assert waiting.result(30).steps > 0
        assert pid_of(fitter) != first
        assert gone(first)
        # One that is killed while it has nothing to do leaves nothing either.
        second = pid_of(fitter)
        os.kill(second, signal.SIGKILL)
        assert gone(second)
        assert fitter.submit(order(FitSettings(r=1, steps=2))).result().steps > 0
        third = pid_of(fitter)
    assert gone(third)


def test_a_fit_that_hangs_is_ended():
    with fitting(slow(), "slow", ms=300.0, grace_s=0.5) as fitter:
        first = pid_of(fitter)
        with pytest.raises(BusyError, match=r"the fit was ended after 0\.8 s"):
            fitter.submit(order(input=torch.full((12, 6), 99.0))).result(30)
        assert gone(first)


@pytest.mark.parametrize(
    ("function", "why"),
    [("Identity", "builds another model"), ("Nowhere", "no attribute 'Nowhere'")],
)
def test_one_that_cannot_build_the_model(function, why, caplog):
    where = Origin(function=f"torch.nn:{function}")
    fitter = Fitter(net(), None, FitterSettings(**BUSY), where)
    for _ in range(2):  # the second time by another process
        with pytest.raises(BusyError, match="fits cannot be run; the server's log says why"):
            fitter.submit(order()).result()
        assert why in caplog.text
        caplog.clear()
    pid = pid_of(fitter)
    fitter.close()
    assert gone(pid)


def test_it_starts_with_the_fitter_stands_back_and_is_out_of_reach_of_ctrl_c():
    with fitting(net(), niceness=7) as fitter:
        pid = pid_of(fitter)
        assert alive(pid)
        assert os.getpriority(os.PRIO_PROCESS, pid) == 7
        assert os.getpgid(pid) == pid
        assert os.getsid(pid) == os.getsid(0)
        fitter.submit(order()).result()
        threads = [int(t) for t in os.listdir(f"/proc/{pid}/task")]
        assert {os.getpriority(os.PRIO_PROCESS, t) for t in threads} == {7}
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
        assert fitter.submit(order()).result().steps > 0
        assert pid_of(fitter) == pid


def test_closing_waits_for_what_runs():
    with fitting(net()) as fitter:
        running = fitter.submit(order())
        waiting = fitter.submit(order(tenant="globex"))
        while not running.running():
            time.sleep(0.001)
        fitter.close()
        assert running.result().steps > 0
        assert waiting.cancelled()
        with pytest.raises(BusyError, match="shutting down"):
            fitter.submit(order())


# --- a whole server ----------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parents[2] / "benchmarks"))
    yield importlib.import_module("_served")
    sys.modules.pop("_served", None)


def children_of(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_servers_end_is_its_end(served, tmp_path, how):
    server = served.Served(tmp_path)
    server.start()
    try:
        with Client(server.url, server.tenant("acme")) as acme:
            found = acme.fit(*shots(), HOW)
        assert found.last_loss < found.first_loss
        (child,) = children_of(server.process.pid)
    finally:
        server.end(how)
    assert gone(child)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_over_http_it_is_503(tmp_path):
    where = ServiceSettings(
        db=f"sqlite:///{tmp_path}/registry.db",
        blobs=str(tmp_path / "blobs"),
        fits=FitterSettings(ms=200.0, grace_s=0.3, **BUSY),
    )
    with Service(slow(), where, origin("slow")) as service:
        server = service.server(port=0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.port}"
        with Client(url, service.admin_key, tenant="acme") as root:
            root.create_tenant("acme")
            headers = {"Authorization": f"Bearer {service.admin_key}"}
            tensor = {"name": "input", "shape": [1, 6], "datatype": "FP32", "data": [99.0] * 6}
            body = {"inputs": [tensor], "labels": [0]}
            path = f"{url}/v1/tenants/acme/deltas:fit"
            answer = httpx.post(path, json=body, headers=headers, timeout=120)
            assert (answer.status_code, answer.json()["type"]) == (503, "BusyError")
            assert "was ended after" in answer.json()["error"]
            with pytest.raises(BusyError, match="was ended after") as caught:
                check(answer)  # as the client does
            assert caught.value.retry_after_s == 5
            assert root.deltas() == []
        server.should_exit = True
        thread.join(20)
