"""NVIDIA's own client works against the server as it comes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from torchsurgeon import serve
from torchsurgeon.serve.repository import Loading

tritonhttp = pytest.importorskip("tritonclient.http")
np = pytest.importorskip("numpy")

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["direct", "asgi"])
def client(request: pytest.FixtureRequest) -> Iterator[object]:
    registry = serve.ModelRegistry()
    registry.add("net", model(), (X,))
    with serve.Server(serve.create_app(registry), direct=request.param == "direct") as server:
        client = tritonhttp.InferenceServerClient(url=f"127.0.0.1:{server.port}")
        yield client
        client.close()
    registry.close()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def want() -> object:
    with torch.no_grad():
        return model()(X).numpy()


def test_health_and_metadata(client: object) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("net")
    assert client.is_model_ready("net", "1")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "torchsurgeon"
    metadata = client.get_model_metadata("net")
    assert metadata["inputs"][0]["shape"] == [-1, 4]
    assert metadata["outputs"][0]["datatype"] == "FP32"


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("version", ["", "1"])
def test_inference(client: object, binary_in: bool, binary_out: bool | None, version: str) -> None:
    metadata = client.get_model_metadata("net")
    name = metadata["inputs"][0]["name"]
    given = tritonhttp.InferInput(name, list(X.shape), "FP32")
    given.set_data_from_numpy(X.numpy(), binary_data=binary_in)
    outputs = None
    if binary_out is not None:
        outputs = [tritonhttp.InferRequestedOutput(metadata["outputs"][0]["name"], binary_data=binary_out)]
    result = client.infer("net", [given], outputs=outputs, model_version=version, request_id="7")
    assert np.array_equal(result.as_numpy(metadata["outputs"][0]["name"]), want())
    assert result.get_response()["id"] == "7"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client: object, algorithm: str) -> None:
    metadata = client.get_model_metadata("net")
    given = tritonhttp.InferInput(metadata["inputs"][0]["name"], list(X.shape), "FP32")
    given.set_data_from_numpy(X.numpy())
    result = client.infer("net", [given], request_compression_algorithm=algorithm)
    assert np.array_equal(result.as_numpy(metadata["outputs"][0]["name"]), want())


def test_a_refusal_reaches_its_user(client: object) -> None:
    given = tritonhttp.InferInput("nothing", [1], "FP32")
    given.set_data_from_numpy(np.zeros(1, dtype=np.float32))
    with pytest.raises(Exception, match="no tensor 'nothing'"):
        client.infer("net", [given])


def test_the_configuration_has_types_shapes_and_batches(client: object) -> None:
    config = client.get_model_config("net")
    assert config == client.get_model_config("net", "1")
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("net", "torchsurgeon", 64)
    assert config["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": [4]}]
    assert config["output"] == [{"name": "output", "data_type": "TYPE_FP32", "dims": [3]}]
    assert config["instance_group"][0]["kind"] == "KIND_CPU"
    with pytest.raises(Exception, match="'other' is not served"):
        client.get_model_config("other")


def test_statistics_count_requests_samples_and_nanoseconds(client: object) -> None:
    (before,) = client.get_inference_statistics("net")["model_stats"]
    given = tritonhttp.InferInput("input", list(X.shape), "FP32")
    given.set_data_from_numpy(X.numpy())
    begin_s = time.time()
    for _ in range(3):
        client.infer("net", [given])
    wrong = tritonhttp.InferInput("nothing", [1], "FP32")
    wrong.set_data_from_numpy(np.zeros(1, dtype=np.float32))
    with pytest.raises(Exception, match="no tensor 'nothing'"):
        client.infer("net", [wrong])
    taken_ns = (time.time() - begin_s) * 1e9
    (after,) = client.get_inference_statistics()["model_stats"]
    assert (after["name"], after["version"]) == ("net", "1")
    assert after["inference_count"] - before["inference_count"] == 6
    assert after["execution_count"] - before["execution_count"] == 3
    assert abs(after["last_inference"] - time.time() * 1e3) < 60_000
    spent = {}
    for kind, found in after["inference_stats"].items():
        known = before["inference_stats"][kind]
        spent[kind] = (found["count"] - known["count"], found["ns"] - known["ns"])
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert {kind: count for kind, (count, _) in spent.items()} == {
        "success": 3, "fail": 1, "cache_hit": 0, "cache_miss": 0, **dict.fromkeys(parts, 3)
    }  # fmt: skip
    assert 0 < spent["compute_infer"][1] < spent["success"][1] < taken_ns
    assert spent["success"][1] == pytest.approx(sum(spent[part][1] for part in parts), abs=10)
    (twos,) = [one for one in after["batch_stats"] if one["batch_size"] == 2]
    assert twos["compute_infer"]["count"] >= 3


def test_the_index_lists_models_that_are_ready_and_those_that_are_not(client: object) -> None:
    assert client.get_model_repository_index() == [{"name": "net", "version": "1", "state": "READY", "reason": ""}]


def test_models_are_not_unloaded_unless_the_operator_allows_it(client: object) -> None:
    for ask in (client.unload_model, client.load_model):
        with pytest.raises(Exception, match="--allow-load"):
            ask("net")
    assert client.is_model_ready("net")


@pytest.mark.parametrize("direct", [True, False])
def test_a_model_is_unloaded_and_loaded_again_where_that_is_allowed(direct: bool) -> None:
    registry = serve.ModelRegistry()
    registry.add("net", model(), (X,))
    registry.add("broken", model(), (X,))
    settled: list[int] = []

    def load(name: str) -> None:
        if name == "broken":
            registry.load(name, "factories:nothing", replace=True)
        registry.add(name, model(), (X,), replace=True)

    app = serve.create_app(registry)
    app.loading = Loading(["net", "broken"], load, lambda: settled.append(1))
    given = tritonhttp.InferInput("input", list(X.shape), "FP32")
    given.set_data_from_numpy(X.numpy())
    with contextlib.closing(registry), serve.Server(app, direct=direct) as server:
        client = tritonhttp.InferenceServerClient(url=f"127.0.0.1:{server.port}")
        assert np.array_equal(client.infer("net", [given]).as_numpy("output"), want())
        client.unload_model("net")
        assert settled == [1]
        assert not client.is_model_ready("net")
        assert client.is_server_ready()
        for ask in (lambda: client.infer("net", [given]), lambda: client.unload_model("net")):
            with pytest.raises(Exception, match="'net' is not loaded: a client asked for it"):
                ask()
        entry = {"name": "net", "version": "", "state": "UNAVAILABLE", "reason": "a client asked for it"}
        assert entry in client.get_model_repository_index()
        client.load_model("net")
        assert np.array_equal(client.infer("net", [given]).as_numpy("output"), want())
        # One that is served stays if it cannot be loaded again, and one that is not does not make the server unready.
        for _ in range(2):
            with pytest.raises(Exception, match="'broken' could not be loaded"):
                client.load_model("broken")
            assert client.is_server_ready()
        assert client.is_model_ready("broken")
        client.unload_model("broken")
        with pytest.raises(Exception, match="'broken' could not be loaded"):
            client.load_model("broken")
        assert client.is_server_ready()
        assert not client.is_model_ready("broken")
        # What is loaded is the operator's to say.
        for ask in (
            lambda: client.load_model("net", config="{}"),
            lambda: client.load_model("other"),
            lambda: client.unload_model("other"),
        ):
            with pytest.raises(Exception, match=r"no parameters are taken|is none of those"):
                ask()
        client.close()


def test_a_model_that_is_loaded_anew_loses_no_answer() -> None:
    registry = serve.ModelRegistry(batching="off")
    registry.add("net", model(), (X,))
    given = tritonhttp.InferInput("input", list(X.shape), "FP32")
    given.set_data_from_numpy(X.numpy())
    over, wrong, expected = threading.Event(), [], want()
    again = [model() for _ in range(5)]

    def ask(port: int) -> None:
        with contextlib.closing(tritonhttp.InferenceServerClient(url=f"127.0.0.1:{port}")) as client:
            while not over.is_set():
                try:
                    if not np.array_equal(client.infer("net", [given]).as_numpy("output"), expected):
                        wrong.append("another answer")
                except Exception as error:
                    wrong.append(str(error))

    with contextlib.closing(registry), serve.Server(serve.create_app(registry)) as server:
        threads = [threading.Thread(target=ask, args=(server.port,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for one in again:
            registry.add("net", one, (X,), replace=True)
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []
