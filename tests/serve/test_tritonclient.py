"""NVIDIA's own client works against the server as it comes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from torchsurgeon import serve

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
