"""The protocol's own client against a real server, unchanged."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

http = pytest.importorskip(
    "tritonclient.http", reason="tritonclient is not installed: pip install tritonclient[http]"
)


@pytest.fixture
def client(house, start):
    found = http.InferenceServerClient(start(house.app()))
    yield found
    found.close()


def tensor(name: str, values: np.ndarray, datatype: str, *, binary: bool) -> object:
    made = http.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def test_live_ready_and_metadata(client, house):
    acme = house.headers("acme")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("m", headers=acme)
    assert client.is_model_ready("m", "1", headers=acme)
    assert not client.is_model_ready("m", "2", headers=acme)
    assert not client.is_model_ready("n", headers=acme)
    assert not client.is_model_ready("m")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("m", headers=acme)["versions"] == ["1"]
    assert client.get_model_config("m", headers=acme)["name"] == "m"
    index = client.get_model_repository_index(headers=acme)
    assert index == [{"name": "m", "version": "1", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("back", [True, False, None])
@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [("FP32", "f4"), ("FP64", "f8"), ("FP16", "f2"), ("INT64", "i8"), ("INT8", "i1")],
)
def test_infer_in_json_and_in_binary(client, house, there, back, datatype, dtype):
    x = np.arange(6, dtype=dtype).reshape(2, 3)
    wanted = None if back is None else [http.InferRequestedOutput("x_times", binary_data=back)]
    result = client.infer(
        "m",
        [tensor("x", x, datatype, binary=there)],
        outputs=wanted,
        request_id="r-1",
        headers=house.headers("acme"),
    )
    got = result.as_numpy("x_times")
    assert_array_equal(got, 2 * x)
    assert result.get_response()["id"] == "r-1"
    assert result.get_response()["model_version"] == "1"
    size = result.get_output("x_times").get("parameters", {}).get("binary_data_size")
    assert (size is not None) == (back is not False)


def test_several_inputs_some_of_them_binary(client, house):
    x, flags = np.ones((2, 3), np.float32), np.array([[True, False]] * 2)
    result = client.infer(
        "m",
        [
            tensor("a", flags, "BOOL", binary=True),  # two bytes a row: x after it is not aligned
            tensor("b", x, "FP32", binary=True),
            tensor("c", x.astype(np.int32), "INT32", binary=False),
            tensor("d", x[:, :1], "FP32", binary=True),
        ],
        headers=house.headers("globex"),
    )
    assert_array_equal(result.as_numpy("a_times"), flags)
    assert_array_equal(result.as_numpy("b_times"), 3 * x)
    assert_array_equal(result.as_numpy("c_times"), np.full((2, 3), 3))
    assert_array_equal(result.as_numpy("d_times"), 3 * x[:, :1])


def test_the_tenant_is_the_keys(client, house):
    x = tensor("x", np.ones((1, 2), np.float32), "FP32", binary=True)

    def answer(headers: dict[str, str]) -> float:
        return client.infer("m", [x], headers=headers).as_numpy("x_times")[0, 0]

    assert answer(house.headers("acme")) == 2
    assert answer({"X-API-Key": house.secrets["globex"]}) == 3
    assert answer({**house.headers("admin"), "X-Tessera-Tenant": "globex"}) == 3
    for headers, status in (
        ({}, "401"),
        ({"Authorization": "Bearer tsr_guessed"}, "401"),
        ({**house.headers("acme"), "X-Tessera-Tenant": "globex"}, "404"),
        (house.headers("manager"), "403"),
        (house.headers("admin"), "400"),
    ):
        with pytest.raises(http.InferenceServerException) as caught:
            answer(headers)
        assert caught.value.status() == status


def test_faults_come_back_as_the_clients_own_errors(client, house):
    x = tensor("x", np.ones((1, 2), np.float32), "FP32", binary=True)
    words = tensor("x", np.array(["a", "b"], dtype=object), "BYTES", binary=True)
    nan = tensor("x", np.full((1, 2), np.nan, np.float32), "FP32", binary=True)
    z = http.InferRequestedOutput("z")
    classes = http.InferRequestedOutput("x_times", class_count=2)
    as_json = http.InferRequestedOutput("x_times", binary_data=False)
    for model, given, wanted, message in (
        ("m", words, None, "'x' is of BYTES, text"),
        ("other", x, None, "there is no model 'other'"),
        ("m", x, [z], "there is no output 'z'"),
        ("m", x, [classes], "asks for classification"),
        ("m", nan, [as_json], "holds NaN or infinity"),
    ):
        with pytest.raises(http.InferenceServerException, match=message):
            client.infer(model, [given], outputs=wanted, headers=house.headers("acme"))
    with pytest.raises(http.InferenceServerException, match="not loaded and unloaded here"):
        client.load_model("m", headers=house.headers("acme"))
    with pytest.raises(http.InferenceServerException, match="compressed bodies are not taken"):
        client.infer("m", [x], headers=house.headers("acme"), request_compression_algorithm="gzip")


def test_nan_travels_as_binary_data(client, house):
    nan = tensor("x", np.full((1, 2), np.nan, np.float32), "FP32", binary=True)
    # An answer that may be compressed need not be.
    result = client.infer(
        "m", [nan], headers=house.headers("acme"), response_compression_algorithm="gzip"
    )
    assert np.isnan(result.as_numpy("x_times")).all()


def test_statistics_count_what_was_asked(client, house):
    acme = house.headers("acme")
    x = tensor("x", np.ones((3, 2), np.float32), "FP32", binary=True)
    for _ in range(2):
        client.infer("m", [x], headers=acme)
    with pytest.raises(http.InferenceServerException):
        client.infer("m", [x], outputs=[http.InferRequestedOutput("z")], headers=acme)
    for stats in (
        client.get_inference_statistics("m", headers=acme),
        client.get_inference_statistics(headers=acme),
    ):
        (one,) = stats["model_stats"]
        assert (one["name"], one["inference_count"], one["execution_count"]) == ("m", 6, 2)
        assert one["inference_stats"]["fail"]["count"] == 1
    globex = client.get_inference_statistics(headers=house.headers("globex"))
    assert globex["model_stats"][0]["inference_count"] == 0
