"""JSON is for small messages: larger ones are refused before they cost the server much, and told why."""

from __future__ import annotations

import gzip
import http.client
import json
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from messages import joined
from torch import Tensor, nn

from torchsurgeon import wire
from torchsurgeon.errors import BodyTooLargeError
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.received import Received
from torchsurgeon.serve.served import ServedModel

MIB = 1 << 20
SIDE = 64
RAN: list[Tensor] = []


class Net(nn.Module):
    """One sample has 12,288 numbers, and its output has 15,376."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.conv.register_forward_pre_hook(lambda module, given: RAN.append(given[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def text_of(shape: tuple[int, ...], number: str = "1.5", *, space: str = "") -> bytes:
    data = ", ".join([number] * torch.Size(shape).numel())
    return f'{{"inputs":[{{"name":"x","datatype":"FP32","shape":{list(shape)},"data":[{data}]}}]{space}}}'.encode()


@pytest.fixture(scope="module")
def registry() -> Iterator[ModelRegistry]:
    registry = ModelRegistry(profiler=None)
    registry.add("net", Net().eval(), torch.zeros(1, 3, SIDE, SIDE))
    yield registry
    registry.close()


@pytest.fixture(scope="module", params=["direct", "asgi"])
def server(request: pytest.FixtureRequest, registry: ModelRegistry) -> Iterator[Server]:
    with Server(create_app(registry), direct=request.param == "direct") as server:
        yield server


def post(server: Server, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as link:
        link.request("POST", "/v2/models/net/infer", body, sent)
        response = link.getresponse()
        data = response.read()
        return response.status, json.loads(data[: int(response.headers.get(wire.HEADER_LENGTH, len(data)))])


def binary(x: Tensor, *, answer_in_json: bool = False) -> tuple[bytes, int]:
    """A binary request, and the length of its header."""
    message = wire.encode_request({"x": x})
    data, size = bytes(joined(message)), message.header_bytes
    header = json.loads(data[:size])
    header["parameters"]["binary_data_output"] = not answer_in_json
    text = json.dumps(header).encode()
    return text + data[size:], len(text)


def served(server: Server) -> ServedModel:
    return server.app.registry.get("net")


def test_json_has_a_limit_of_its_own(server: Server) -> None:
    net = served(server)
    assert net.max_body_bytes(binary=False) == 4 * MIB
    # 64 samples of the widest boundary, which JSON may not have.
    assert net.max_body_bytes(binary=True) == 64 * 4 * 4 * (SIDE - 2) ** 2 + MIB


@pytest.mark.parametrize("how", ["whole", "in chunks", "compressed"])
def test_a_large_body_of_json_is_refused_and_told_to_send_binary_data(server: Server, how: str) -> None:
    body, headers = text_of((30, 3, SIDE, SIDE), "0.123456789"), {}
    assert 4 * MIB < len(body) < 5 * MIB
    sent: Any = body
    if how == "in chunks":
        sent = iter([body[:MIB], body[MIB:]])
    elif how == "compressed":
        sent, headers = gzip.compress(body), {"Content_Encoding": "gzip"}
    RAN.clear()
    status, answer = post(server, sent, **headers)
    assert status == 413
    assert f"at most {4 * MIB} bytes" in answer["error"]
    assert "send tensors as binary data with Inference-Header-Content-Length" in answer["error"]
    assert str(served(server).max_body_bytes(binary=True)) in answer["error"]
    assert not RAN


def test_a_large_binary_body_is_not_told_so(server: Server) -> None:
    status, answer = post(server, iter([bytes(MIB)] * 20), Inference_Header_Content_Length="100")
    assert (status, "at most" in answer["error"], "JSON" in answer["error"]) == (413, True, False)


def test_small_messages_may_be_json(server: Server) -> None:
    status, answer = post(server, text_of((2, 3, SIDE, SIDE), "-1.2345678901234567e-123"))
    assert status == 200
    assert answer["outputs"][0]["shape"] == [2, 4, SIDE - 2, SIDE - 2]
    assert len(answer["outputs"][0]["data"]) == 2 * 4 * (SIDE - 2) ** 2


@pytest.mark.parametrize(("batch", "status"), [(8, 200), (9, 413), (64, 413)])
def test_an_answer_with_many_numbers_is_refused_in_json_before_it_is_computed(
    server: Server, batch: int, status: int
) -> None:
    body, header_bytes = binary(torch.zeros(batch, 3, SIDE, SIDE), answer_in_json=True)
    RAN.clear()
    got, answer = post(server, body, Inference_Header_Content_Length=str(header_bytes))
    assert got == status
    if status == 413:
        assert "at most 131072 numbers in JSON" in answer["error"]
        assert f"would have {batch * 4 * (SIDE - 2) ** 2}" in answer["error"]
        assert "binary_data_output" in answer["error"]
        assert not RAN
    body, header_bytes = binary(torch.zeros(batch, 3, SIDE, SIDE))
    assert post(server, body, Inference_Header_Content_Length=str(header_bytes))[0] == 200


@pytest.mark.parametrize("value", ["1", "[]", "{}", "[[]]"])
def test_a_body_of_many_small_values_is_refused_before_it_is_parsed(
    server: Server, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[object] = []
    monkeypatch.setattr("torchsurgeon.wire.header._JSON.decode", parsed.append)
    body = text_of((1, 300_000), value)
    assert len(body) < 4 * MIB
    status, answer = post(server, body)
    assert (status, not parsed) == (413, True)
    assert "at most 131072 numbers in JSON" in answer["error"]
    assert "send tensors as binary data with Inference-Header-Content-Length" in answer["error"]


def test_an_answer_for_another_size_of_picture_is_limited_as_well(server: Server) -> None:
    body, header_bytes = binary(torch.zeros(1, 3, 200, 200), answer_in_json=True)
    status, answer = post(server, body, Inference_Header_Content_Length=str(header_bytes))
    assert (status, f"would have {4 * 198**2}" in answer["error"]) == (413, True)
    assert post(server, text_of((1, 3, SIDE, SIDE)))[0] == 200


def test_one_sample_of_the_models_own_inputs_and_outputs_fits_however_large_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torchsurgeon.serve.served.JSON_NUMBERS", 1000)
    registry = ModelRegistry(profiler=None)
    example = torch.zeros(4, 3, SIDE, SIDE)
    net = registry.add("net", Net().eval(), example)
    one = text_of((1, 3, SIDE, SIDE), "-1.2345678901234567e-123", space=" " * 1000)

    def answer(body: bytes) -> Any:
        request = Received(memoryview(body), None, 0.0, time.perf_counter())
        with torch.no_grad():
            return json.loads(joined(net.answer(request)))["outputs"][0]["shape"]

    # The example has four samples, but others may have one.
    assert len(one) <= net.max_body_bytes(binary=False) == 32 * example[0].numel()
    assert answer(one) == [1, 4, SIDE - 2, SIDE - 2]
    with pytest.raises(BodyTooLargeError, match="numbers in JSON"):
        answer(text_of((2, 3, SIDE, SIDE)))
    nested = torch.zeros(1, 3, SIDE, SIDE).tolist()
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 3, SIDE, SIDE], "data": nested}
    assert answer(json.dumps({"inputs": [entry]}).encode()) == [1, 4, SIDE - 2, SIDE - 2]
    registry.close()
