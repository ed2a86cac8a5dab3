"""The tail server: the model's own answer at every cut, and an error that says why for everything else."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import joined
from torch import Tensor, nn

import torchsurgeon.serve.guarded
import torchsurgeon.serve.replies
from torchsurgeon import serve, wire
from torchsurgeon.cutting.partition import cut
from torchsurgeon.errors import (
    BackendError,
    RequestRefusedError,
    ServerError,
    ServerUnavailableError,
    SpecError,
    TraceError,
)
from torchsurgeon.models.weights import weight_digests
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.tracer import trace
from torchsurgeon.transport import HttpTransport, InProcessTransport, Transport
from torchsurgeon.wire.buffers import Buffers


class Residual(nn.Module):
    """Several boundary tensors inside a block, an in-place layer, two outputs of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.relu(self.stem(x))
        z = self.left(y) + self.right(y)
        logits = self.head(z.mean((2, 3)))
        return {"logits": logits, "label": logits.argmax(1)}


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def registry() -> Iterator[serve.ModelRegistry]:
    registry = serve.ModelRegistry(max_batch=8, max_tails=3, profiler=lambda graph: {"layers": len(graph.layers)})
    registry.add("net", make(Residual), (X.to(memory_format=torch.channels_last),))
    registry.add("fragile", make(Fragile), (torch.zeros(1, 4, dtype=torch.int64),))
    yield registry
    registry.close()


@pytest.fixture(scope="module", params=["direct", "asgi"])
def server(request: pytest.FixtureRequest, registry: serve.ModelRegistry) -> Iterator[serve.Server]:
    app = serve.create_app(registry, body_timeout_s=0.5)
    with serve.Server(app, direct=request.param == "direct") as server:
        yield server


@pytest.fixture(params=["direct", "asgi", "in process"])
def transport(request: pytest.FixtureRequest, registry: serve.ModelRegistry) -> Iterator[Transport]:
    app = serve.create_app(registry)
    if request.param == "in process":
        with InProcessTransport(app) as transport:
            yield transport
        return
    with serve.Server(app, direct=request.param == "direct") as server, HttpTransport(server.url, 10) as transport:
        yield transport


@pytest.fixture(scope="module")
def graph(registry: serve.ModelRegistry) -> LayerGraph:
    return registry.get("net").graph


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_cut_gives_the_models_own_bits(
    transport: Transport, graph: LayerGraph, batch: int, layout: torch.memory_format
) -> None:
    x = torch.randn(batch, 3, 8, 8).to(memory_format=layout)
    with torch.no_grad():
        want = graph.model(x)
        for point in graph.points[:-1]:
            boundary = cut(graph, point).head(x)
            sent = dict(zip([spec.name for spec in point.tensors], boundary, strict=True))
            answer = transport.infer("net", sent, max_answer_bytes=10_000)
            assert {name: tensor.dtype for name, tensor in answer.tensors.items()} == {
                "logits": torch.float32,
                "label": torch.int64,
            }
            assert torch.equal(answer.tensors["logits"], want["logits"]), point.name
            assert torch.equal(answer.tensors["label"], want["label"])


def test_an_answer_says_where_the_time_went_and_carries_the_id(transport: Transport) -> None:
    answer = transport.infer("net", {"x": X}, max_answer_bytes=10_000, version="1", outputs=["label"])
    assert list(answer.tensors) == ["label"]
    assert all(answer.parameters[key] >= 0 for key in ("receive_s", "queue_s", "decode_s", "compute_s"))


def test_the_cache_of_tails_is_bounded(transport: Transport, registry: serve.ModelRegistry, graph: LayerGraph) -> None:
    assert len(graph.points) > 4
    for point in graph.points[:-1]:
        sent = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in point.tensors}
        transport.infer("net", sent, max_answer_bytes=10_000)
    assert len(registry.get("net").tails) == 3


def test_the_control_plane(transport: Transport, registry: serve.ModelRegistry, graph: LayerGraph) -> None:
    assert transport.get_json("/v2")["name"] == "torchsurgeon"
    assert transport.get_json("/v2/health/live") == {"live": True}
    assert transport.get_json("/v2/health/ready") == {"ready": True}
    for path in ("/v2/models/net", "/v2/models/net/versions/1"):
        assert transport.get_json(f"{path}/ready")["ready"]
        metadata = transport.get_json(path)
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]
        assert {output["name"]: output["datatype"] for output in metadata["outputs"]} == {
            "logits": "FP32",
            "label": "INT64",
        }
    fingerprint = transport.get_json("/v2/models/net/fingerprint")
    assert fingerprint["graph"] == graph.fingerprint
    assert fingerprint["weights"] == weight_digests(graph.model).combined
    assert fingerprint["tensors"]["head.bias"]["shape"] == [5]
    assert transport.get_json("/v2/models/net/profile") == {"layers": len(graph.layers)}


def test_a_probe_moves_as_many_bytes_as_asked(transport: Transport) -> None:
    timing = transport.probe(20_000, 30_000)
    assert timing.sent_bytes == 20_000
    assert timing.received_bytes == 30_000
    with pytest.raises(RequestRefusedError) as caught:
        transport.probe(0, 1 << 30)
    assert caught.value.status == 400


REFUSED: list[tuple[str, dict[str, Tensor], int, str]] = [
    ("unknown name", {"layer9": X}, 400, "layer9"),
    ("nothing", {}, 400, "do not determine"),
    ("not enough", {"left": torch.zeros(1, 8, 8, 8)}, 400, "do not determine"),
    ("wrong dtype", {"x": X.double()}, 400, "FP64"),
    ("wrong rank", {"x": X[0]}, 400, "shape"),
    ("wrong size", {"x": torch.zeros(1, 5, 8, 8)}, 400, "shape"),
    ("no samples", {"x": torch.zeros(0, 3, 8, 8)}, 400, "shape"),
    ("too many samples", {"x": torch.zeros(9, 3, 8, 8)}, 400, "at most 8"),
    ("two batches", {"left": torch.zeros(1, 8, 8, 8), "right": torch.zeros(2, 8, 8, 8)}, 400, "batch of"),
    ("far too large", {"x": torch.zeros(1000, 3, 64, 64)}, 413, "at most"),
]


@pytest.mark.parametrize(("sent", "status", "text"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_tensors_the_model_cannot_take_are_refused_with_the_reason(
    transport: Transport, sent: dict[str, Tensor], status: int, text: str
) -> None:
    with pytest.raises(RequestRefusedError, match=text) as caught:
        transport.infer("net", sent, max_answer_bytes=10_000)
    assert caught.value.status == status
    transport.infer("net", {"x": X}, max_answer_bytes=10_000)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/models/nte", 404),
        ("/v2/models/net/versions/2", 404),
        ("/v2/models/net/infer", 405),
        ("/v2/nothing", 404),
        ("/index.html", 404),
    ],
)
def test_what_is_not_there_is_answered_in_json(transport: Transport, path: str, status: int) -> None:
    with pytest.raises(RequestRefusedError) as caught:
        transport.get_json(path)
    assert caught.value.status == status


def test_a_model_not_served_and_an_output_it_does_not_have(transport: Transport) -> None:
    with pytest.raises(RequestRefusedError, match="did you mean 'net'") as caught:
        transport.infer("nett", {"x": X}, max_answer_bytes=10_000)
    assert caught.value.status == 404
    with pytest.raises(RequestRefusedError, match="no output 'probability'"):
        transport.infer("net", {"x": X}, outputs=["probability"], max_answer_bytes=10_000)


def test_a_model_that_raises_is_a_500_and_the_server_lives_on(transport: Transport) -> None:
    for _ in range(3):
        with pytest.raises(RequestRefusedError, match="out of range") as caught:
            transport.infer("fragile", {"x": torch.full((1, 4), 9)}, max_answer_bytes=1000)
        assert caught.value.status == 500
        answer = transport.infer("fragile", {"x": torch.full((1, 4), 3)}, max_answer_bytes=1000)
        assert answer.tensors["output"].shape == (1, 4, 2)


def test_many_devices_at_once_get_each_its_own_answer(server: serve.Server, graph: LayerGraph) -> None:
    def call(seed: int) -> bool:
        x = torch.randn(1 + seed % 3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        answer = transport.infer("net", {"x": x}, max_answer_bytes=10_000)
        with torch.no_grad():
            return torch.equal(answer.tensors["logits"], graph.model(x)["logits"])

    with HttpTransport(server.url, 20) as transport, ThreadPoolExecutor(6) as pool:
        assert all(pool.map(call, range(60)))


def test_a_model_that_loads_answers_503_until_it_is_there() -> None:
    registry = serve.ModelRegistry()
    registry.announce("late")
    with InProcessTransport(serve.create_app(registry)) as transport:
        for path in ("/v2/health/ready", "/v2/models/late/ready", "/v2/models/late"):
            with pytest.raises(RequestRefusedError) as caught:
                transport.get_json(path)
            assert caught.value.status == 503
        with pytest.raises(RequestRefusedError, match="loading"):
            transport.infer("late", {"x": X}, max_answer_bytes=10_000)
        registry.add("late", make(Residual), (X,))
        assert transport.get_json("/v2/health/ready") == {"ready": True}
    with pytest.raises(SpecError, match="already served"):
        registry.add("late", make(Residual), (X,))
    with pytest.raises(SpecError, match="a model's name must consist of"):
        registry.add("a/b", make(Residual), (X,))
    with pytest.raises(SpecError, match="must not be named 'stats'"):
        registry.add("stats", make(Residual), (X,))


def test_layers_are_profiled_unless_that_is_switched_off() -> None:
    registry, silent = serve.ModelRegistry(), serve.ModelRegistry(profiler=None)
    served = registry.add("net", make(Residual), X)
    silent.add("net", make(Residual), X)
    with InProcessTransport(serve.create_app(registry)) as transport:
        LayerProfile.from_json(transport.get_json("/v2/models/net/profile")).check(served.graph)
    with (
        InProcessTransport(serve.create_app(silent)) as transport,
        pytest.raises(RequestRefusedError, match=r"profiler=None.*server_profile") as caught,
    ):
        transport.get_json("/v2/models/net/profile")
    assert caught.value.status == 404


def test_an_example_means_what_it_means_on_the_device() -> None:
    registry, batch = serve.ModelRegistry(), X.expand(2, -1, -1, -1)
    examples: list[Any] = [batch, (batch,), {"x": batch}]
    graphs = [registry.add(f"net{i}", make(Residual), example).graph for i, example in enumerate(examples)]
    graphs.append(registry.add("named", make(Residual), kwargs={"x": batch}).graph)
    assert {str(graph.inputs) for graph in graphs} == {str(trace(make(Residual), batch).inputs)}
    with pytest.raises(TraceError, match="missing a required argument"):
        registry.add("nothing", make(Residual))


def test_a_port_that_is_taken_is_said_so(server: serve.Server) -> None:
    with pytest.raises(ServerError, match="choose another port"):
        serve.Server(object(), port=server.port).start()


def test_a_buffer_is_used_again_only_when_nothing_refers_to_it() -> None:
    buffers = Buffers()
    first = buffers.take(4096)
    tensor = torch.frombuffer(first[64:128], dtype=torch.float32)
    address = tensor.data_ptr()
    del first
    second = torch.frombuffer(buffers.take(4096), dtype=torch.uint8)
    assert second.data_ptr() + 64 != address
    del tensor
    third = torch.frombuffer(buffers.take(4096), dtype=torch.uint8)
    assert third.data_ptr() + 64 == address
    assert third.data_ptr() % 64 == 0


# ---- over a raw socket: what no well-behaved client sends


def body_of(tensors: dict[str, Tensor]) -> tuple[bytes, int]:
    message = wire.encode_request(tensors)
    assert message.header_bytes is not None
    return bytes(joined(message)), message.header_bytes


def post(server: serve.Server, body: Any, path: str = "/v2/models/net/infer", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    with contextlib.closing(connection):
        connection.request("POST", path, body, sent)
        response = connection.getresponse()
        answer = response.read()
        length = response.getheader(wire.HEADER_LENGTH)
        if length is not None:
            return response.status, wire.decode_response(answer, int(length)).tensors
        return response.status, json.loads(answer)


def test_chunked_and_compressed_bodies(server: serve.Server, graph: LayerGraph) -> None:
    body, length = body_of({"x": X})
    with torch.no_grad():
        want = graph.model(X)["logits"]
    for encoding, coded in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
        status, answer = post(server, coded, Inference_Header_Content_Length=str(length), Content_Encoding=encoding)
        assert status == 200, answer
        assert torch.equal(answer["logits"], want)
    pieces = iter([body[:10], body[10:300], body[300:]])
    status, answer = post(server, pieces, Inference_Header_Content_Length=str(length))
    assert status == 200, answer
    assert torch.equal(answer["logits"], want)


def test_json_in_and_json_out(server: serve.Server, graph: LayerGraph) -> None:
    entry = {"name": "x", "datatype": "FP32", "shape": list(X.shape), "data": X.tolist()}
    status, answer = post(server, json.dumps({"id": "7", "inputs": [entry]}).encode())
    assert status == 200
    assert answer["id"] == "7"
    outputs = {output["name"]: output for output in answer["outputs"]}
    with torch.no_grad():
        want = graph.model(X)
    assert outputs["label"]["data"] == want["label"].tolist()
    assert torch.equal(torch.tensor(outputs["logits"]["data"]).view(1, 5), want["logits"])


GOOD, LENGTH = body_of({"x": X})
BINARY = {"Inference_Header_Content_Length": str(LENGTH)}
BOMB = gzip.compress(bytes(50_000_000))

HOSTILE: list[tuple[str, Any, dict[str, str], int]] = [
    ("empty", b"", {}, 400),
    ("garbage", bytes(range(256)), {}, 400),
    ("nesting bomb", b"[" * 100_000, {}, 400),
    ("header longer than body", b"{}", {"Inference_Header_Content_Length": "3"}, 400),
    ("header length negative", b"{}", {"Inference_Header_Content_Length": "-1"}, 400),
    ("header length text", b"{}", {"Inference_Header_Content_Length": "ten"}, 400),
    (
        "bytes left over",
        body_of({"x": X})[0] + b"1",
        {"Inference_Header_Content_Length": str(body_of({"x": X})[1])},
        400,
    ),
    ("bytes missing", GOOD[:-1], BINARY, 400),
    ("gzip bomb", BOMB, {"Content_Encoding": "gzip"}, 413),
    ("gzip damaged", BOMB[:100] + b"x" + BOMB[101:], {"Content_Encoding": "gzip"}, 400),
    ("gzip cut off", gzip.compress(b"{}" + b" " * 1000)[:-9], {"Content_Encoding": "gzip"}, 400),
    ("unknown encoding", b"{}", {"Content_Encoding": "br"}, 400),
]


@pytest.mark.parametrize(("body", "headers", "status"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_a_hostile_body_is_refused_in_json(
    server: serve.Server, body: Any, headers: dict[str, str], status: int
) -> None:
    got, answer = post(server, body, **headers)
    assert got == status, answer
    assert answer["error"]
    assert post(server, GOOD, **BINARY)[0] == 200


def test_an_endless_chunked_body_is_stopped(server: serve.Server) -> None:
    with contextlib.suppress(OSError):
        assert post(server, iter([bytes(1 << 20)] * 40))[0] == 413
    with HttpTransport(server.url) as transport:
        assert transport.get_json("/v2/health/live") == {"live": True}


def exchange(server: serve.Server, data: bytes, timeout_s: float = 5.0) -> bytes:
    """Send bytes and read until the server closes, or says nothing for a while."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s) as link:
        link.sendall(data)
        try:
            while piece := link.recv(65536):
                received += piece
        except (TimeoutError, ConnectionResetError):
            pass
    return received


def test_a_body_over_the_boundary_is_refused_before_it_is_sent(
    server: serve.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchsurgeon.serve.replies, "LINGER_S", 0.1)
    head = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
    start = time.monotonic()
    answer = exchange(server, head)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"at most" in answer
    assert time.monotonic() - start < 5


def test_expect_continue_is_answered(server: serve.Server) -> None:
    body, length = body_of({"x": X})
    head = f"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += f"Inference-Header-Content-Length: {length}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as link:
        link.sendall(head.encode())
        assert link.recv(1000).startswith(b"HTTP/1.1 100 Continue")
        link.sendall(body)
        assert link.recv(1000).startswith(b"HTTP/1.1 200 OK")


def test_pipelined_requests_are_answered_in_order(server: serve.Server) -> None:
    body, length = body_of({"x": X})
    head = f"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += f"Inference-Header-Content-Length: {length}\r\n"
    first = f"{head}\r\n".encode() + body
    last = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    received = exchange(server, first + first + last)
    assert received.count(b"HTTP/1.1 200 OK") == 3
    assert received.endswith(b'{"live":true}')


def request_of(x: Tensor, name: str = "net") -> tuple[bytes, bytes]:
    body, length = body_of({"x": x})
    head = f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Inference-Header-Content-Length: {length}\r\n\r\n".encode(), body


class Talk:
    """One kept connection on which requests are sent in any pieces."""

    def __init__(self, server: serve.Server) -> None:
        self.link = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        self.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, *pieces: bytes) -> None:
        for index, piece in enumerate(pieces):
            if index:
                time.sleep(0.01)
            self.link.sendall(piece)

    def status(self) -> int:
        return self._read()[0].status

    def logits(self) -> Tensor:
        response, body = self._read()
        assert response.status == 200, body
        return wire.decode_response(bytearray(body), int(response.headers[wire.HEADER_LENGTH])).tensors["logits"]

    def _read(self) -> tuple[http.client.HTTPResponse, bytes]:
        with contextlib.closing(http.client.HTTPResponse(self.link)) as response:
            response.begin()
            return response, response.read()


@pytest.fixture
def talk(server: serve.Server) -> Iterator[Talk]:
    talk = Talk(server)
    with contextlib.closing(talk.link):
        yield talk


def logits(graph: LayerGraph, x: Tensor) -> Tensor:
    with torch.no_grad():
        return graph.model(x)["logits"]


def test_requests_that_repeat_a_head_are_answered_from_their_own_bytes_however_they_arrive(
    talk: Talk, graph: LayerGraph
) -> None:
    head, _ = request_of(X)
    whole = len(head) + len(request_of(X)[1])
    cuts = [0, 1, 20, len(head) - 1, len(head), len(head) + 1, len(head) + 100, whole - 1]
    for step, cut_at in enumerate(cuts):
        x = X + step
        data = b"".join(request_of(x))
        talk.send(data[:cut_at], data[cut_at:])
        assert torch.equal(talk.logits(), logits(graph, x))


def test_requests_of_changing_kinds_share_a_connection(talk: Talk, graph: LayerGraph) -> None:
    for x in (X, X + 1, X.repeat(4, 1, 1, 1), X + 2, X + 3, X.repeat(2, 1, 1, 1)):
        talk.send(b"".join(request_of(x)))
        assert torch.equal(talk.logits(), logits(graph, x))
    talk.send(b"GET /v2/health/nothing HTTP/1.1\r\nHost: x\r\n\r\n")
    assert talk.status() == 404
    talk.send(b"".join(request_of(X)) * 3)
    received = b""
    while received.count(b"HTTP/1.1 200 OK") < 3:
        received += talk.link.recv(65536)


def test_what_an_earlier_request_left_in_memory_is_never_taken_for_this_one(talk: Talk) -> None:
    for _ in range(4):
        talk.send(b"".join(request_of(X)))
        assert talk.status() == 200
    head, body = request_of(X, "other")
    # As far as it goes the first piece is the same as the request before.
    same = len(b"POST /v2/models/")
    talk.send(head[:same], head[same:] + body)
    assert talk.status() == 404


def test_a_repeated_request_whose_body_does_not_come_is_cut_off(talk: Talk) -> None:
    head, body = request_of(X)
    talk.send(head + body)
    assert talk.status() == 200
    talk.send(head + body[:100])
    received = b""
    with contextlib.suppress(ConnectionResetError):
        received = talk.link.recv(1000)
    assert b"200 OK" not in received


@pytest.mark.parametrize("pause", ["head", "body"])
def test_a_client_that_dribbles_is_cut_off(server: serve.Server, monkeypatch: pytest.MonkeyPatch, pause: str) -> None:
    monkeypatch.setattr(torchsurgeon.serve.guarded, "HEAD_TIMEOUT_S", 0.5)
    monkeypatch.setattr(torchsurgeon.serve.replies, "LINGER_S", 0.1)
    data = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\n"
    if pause == "body":
        data += b"Content-Length: 1000\r\n\r\n{"
    start = time.monotonic()
    received = exchange(server, data)
    assert time.monotonic() - start < 4
    assert b"200 OK" not in received


def test_clients_that_vanish_in_mid_request_leave_nothing_behind(server: serve.Server) -> None:
    before = threading.active_count()
    body, length = body_of({"x": X.repeat(8, 1, 1, 1)})
    head = f"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += f"Inference-Header-Content-Length: {length}\r\n\r\n"
    data = head.encode() + body
    for cut_at in (10, len(head), len(head) + 30, len(data) - 1, len(data)):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port)) as link:
                link.sendall(data[:cut_at])
    with HttpTransport(server.url, 5) as transport:
        transport.infer("net", {"x": X}, max_answer_bytes=10_000)
    deadline = time.monotonic() + 5
    connections = server._server.server_state.connections
    while len(connections) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not connections
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_noise_on_the_socket_neither_kills_nor_hangs_the_server(server: serve.Server, connection: str) -> None:
    source = random.Random(0)
    body, length = body_of({"x": X})
    head = f"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += f"Inference-Header-Content-Length: {length}\r\nConnection: {connection}\r\n\r\n"
    good = head.encode() + body
    for _ in range(60):
        data = bytearray(good)
        for _ in range(source.randint(1, 6)):
            data[source.randrange(len(data))] = source.randrange(256)
        exchange(server, bytes(data), timeout_s=0.05)
    with HttpTransport(server.url, 5) as transport:
        transport.infer("net", {"x": X}, max_answer_bytes=10_000)


def test_the_server_process_says_when_it_is_ready_and_stops_when_a_model_cannot_be_loaded() -> None:
    said: list[str] = []
    with pytest.raises(SpecError, match="alexnot"):
        serve.run({"a": "torchvision:alexnot"}, port=0, say=said.append)
    assert not said


def test_the_server_process_takes_several_backends_of_a_model() -> None:
    with pytest.raises(SpecError, match="alexnot"):
        serve.run({"a": "torchvision:alexnot"}, port=0, backends={"a": "eager, eager"}, say=print)
    with pytest.raises(BackendError, match="'nothing'"):
        serve.run({"a": "torchvision:alexnot"}, port=0, backends={"a": "eager,nothing"}, say=print)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl: apt-get install openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key.pem")]
    subprocess.run([*command, "-out", str(folder / "cert.pem")], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("size", [8, 200])
def test_https(registry: serve.ModelRegistry, certificate: Path, graph: LayerGraph, size: int) -> None:
    cert, key = str(certificate / "cert.pem"), str(certificate / "key.pem")
    wide = serve.ModelRegistry()
    x = torch.randn(1, 3, size, size)
    wide.add("net", make(Residual), (x,))
    context = ssl.create_default_context(cafile=cert)
    with (
        serve.Server(serve.create_app(wide), ssl_certfile=cert, ssl_keyfile=key) as server,
        HttpTransport(server.url, 10, ssl_context=context, verify=cert) as transport,
    ):
        assert server.url.startswith("https://")
        assert transport.get_json("/v2/health/live") == {"live": True}
        for _ in range(3):
            answer = transport.infer("net", {"x": x}, max_answer_bytes=10_000)
        with torch.no_grad():
            assert torch.equal(answer.tensors["logits"], wide.get("net").graph.model(x)["logits"])
        with HttpTransport(server.url, 5) as strict, pytest.raises(ServerUnavailableError):
            strict.infer("net", {"x": x}, max_answer_bytes=10_000)
    wide.close()


def test_a_process_of_its_own_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    (tmp_path / "tiny_model_of_test.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make(): return nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.zeros(1, 3)\n"
    )
    script = "from torchsurgeon import serve; serve.run({'tiny': 'tiny_model_of_test:make'}, port=0)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline(), process.stdout.readline()]
            assert lines[0].startswith("loaded tiny from tiny_model_of_test:make")
            assert lines[1].startswith("ready: serving tiny at http://127.0.0.1:")
            with HttpTransport(lines[1].split()[-1], 10) as transport:
                assert transport.get_json("/v2/health/ready") == {"ready": True}
                name = transport.get_json("/v2/models/tiny")["inputs"][0]["name"]
                answer = transport.infer("tiny", {name: torch.zeros(2, 3)}, max_answer_bytes=1000)
                assert answer.tensors["output"].shape == (2, 4)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) in (0, 1, 130, -signal.SIGINT)
        finally:
            process.kill()


def test_listening_beyond_this_machine_warns() -> None:
    with pytest.warns(UserWarning, match="everyone who can reach"), pytest.raises(SpecError):
        serve.run({"a b": "torchvision:resnet18"}, host="0.0.0.0", port=0, insecure=True)
