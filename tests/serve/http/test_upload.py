"""Deltas that are uploaded: PEFT's folder and our own file; and what is no delta."""

from __future__ import annotations

import tempfile
from pathlib import Path

import httpx
import pytest
import safetensors.torch
import torch

from tessera.arch import Delta
from tessera.errors import BusyError
from tessera.serve.packing import pack

ADAPTER = "adapter_model.safetensors"
Files = list[tuple[str, bytes]]


@pytest.fixture
def send(house, start):
    url = f"http://{start(house.app())}/v1/tenants/acme/deltas"

    def post(files: Files, who: str = "acme", **fields: str) -> httpx.Response:
        form = [("files", (name, data)) for name, data in files]
        return httpx.post(url, files=form, data=fields, headers=house.headers(who))

    return post


def folder(place: Path, delta: Delta) -> Files:
    delta.save(place / "adapter")
    return [(p.name, p.read_bytes()) for p in sorted((place / "adapter").iterdir())]


LORA = Delta(
    kind="lora",
    tensors={"fc.A": torch.ones(2, 3), "fc.B": torch.ones(4, 2)},
    scales={"fc": 2.0},
    base_hash="0" * 64,
)


def test_a_peft_folder_with_our_manifest_and_without(send, tmp_path, house):
    files = folder(tmp_path, LORA)
    assert [name for name, _ in files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tessera.json",
    ]
    made = send(files)
    assert made.status_code == 201, made.text
    assert made.json()["hash"] == LORA.hash
    assert house.registry.load(LORA.hash).hash == LORA.hash
    readme = [("README.md", b"# PEFT writes one")]
    again = send([(f"my-adapter/{name}", data) for name, data in files[:2] + readme])
    assert again.json() == made.json()


def test_our_own_file_with_its_parent(send, house):
    made = send([("any name.bin", pack(LORA))], parent=house.times(2).hash)
    assert made.status_code == 201, made.text
    assert made.json()["parent"] == house.times(2).hash
    assert made.json()["hash"] == LORA.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: [], "has no files"),
        (lambda f: f[1:], "the upload is no adapter folder: it has no adapter_config.json"),
        (lambda f: f[:1], "it has no adapter_model.safetensors"),
        (lambda f: [f[0], f[0], f[1]], "'adapter_config.json' twice"),
        (lambda f: [f[0], ("adapter_model.bin", b"cos\nsystem")], "no file 'adapter_model.bin'"),
        (lambda f: [f[0], ("../" + f[1][0], f[1][1])], "not a path out of its folder"),
        (lambda f: [("/etc/adapter_config.json", f[0][1]), f[1]], "not a path out"),
        (lambda f: [("..\\adapter_config.json", f[0][1]), f[1]], "not a path out"),
        (lambda f: [f[0], (f[1][0], f[1][1][:-5])], "the upload is no whole adapter"),
        (lambda f: [f[0], (f[1][0], b"\xff" * 100)], "the upload is no whole adapter"),
        (lambda f: [(f[0][0], b"[" * 100_000), f[1]], "the upload is no whole adapter"),
        (lambda f: [("x.safetensors", f[1][1])], "goes with its adapter_config.json"),
        (lambda f: [("x.safetensors", b"")], "this is no delta's file"),
        (lambda f: [("x.safetensors", b"PK\3\4" + bytes(100))], "this is no delta's file"),
        (lambda f: [("x", pack(LORA)[:-1])], "this is no delta's file"),
        (lambda f: [("x", pack(LORA.to("cpu")) + b"\0")], "this is no delta's file"),
        (lambda f: [(f"f{i}", b"") for i in range(40)], "."),
    ],
)
def test_what_is_no_delta_is_refused_and_leaves_nothing(send, tmp_path, house, change, message):
    seen = house.registry.audit.head()
    response = send(change(folder(tmp_path, LORA)))
    assert response.status_code in (400, 415), response.text
    if response.status_code == 400:
        assert response.json()["type"] in ("InputError", "DeltaError")
        assert message == "." or message in response.json()["error"]
    assert "tessera-upload" not in response.text
    assert house.registry.audit.head() == seen
    assert not list(Path(tempfile.gettempdir()).glob("tessera-upload-*"))


def test_a_delta_of_another_base_and_one_that_is_not_finite(send, house):
    other = Delta(kind="prompt", tensors={"prompt": torch.ones(1, 4)}, base_hash="1" * 64)
    assert send([("x", pack(other))]).json()["type"] == "DeltaError"
    nan = Delta(kind="prompt", tensors={"prompt": torch.full((1, 4), torch.nan)})
    assert "not finite" in send([("x", pack(nan))]).json()["error"]
    assert send([("x", pack(LORA))], parent="f" * 64).status_code == 404


def test_a_folder_that_claims_to_be_another(send, tmp_path):
    files = dict(folder(tmp_path, LORA))
    changed = {k: v + 1 for k, v in safetensors.torch.load(files[ADAPTER]).items()}
    files[ADAPTER] = safetensors.torch.save(changed, {"format": "pt"})
    assert "their hashes differ" in send(list(files.items())).json()["error"]


def test_an_upload_has_files_and_a_parent_only(send, house):
    response = send([("x", pack(LORA))], alias="m")
    assert response.status_code == 400
    assert "has a field 'alias'" in response.json()["error"]


def test_a_tenant_uploads_one_delta_at_a_time(send, monkeypatch):
    answers = []

    def slow(*_: object) -> None:
        answers.append(send([("x", pack(LORA))]))
        raise BusyError("enough")

    monkeypatch.setattr("tessera.serve.management._put", slow)
    assert send([("x", pack(LORA))]).json()["error"] == "enough"
    (refused,) = answers
    assert refused.status_code == 429
    assert "an upload of acme's is under way" in refused.json()["error"]
    monkeypatch.undo()
    assert send([("x", pack(LORA))]).status_code == 201


def test_what_the_temporary_folder_cannot_hold_is_503(send, tmp_path, monkeypatch, caplog):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    files = folder(tmp_path, LORA)
    monkeypatch.setattr("tessera.serve.upload.Path.write_bytes", full)
    response = send(files)
    assert response.status_code == 503
    assert response.json()["type"] == "StorageError"
    assert response.headers["x-request-id"] in response.json()["error"]
    assert "No space left" not in response.text  # the log's business, which has the folder too
    assert "the upload could not be kept: No space left on device" in caplog.text
