"""``/metrics``: what a server does, as Prometheus reads it."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import nn
from waiting import wait_for

from torchsurgeon.cli import main
from torchsurgeon.serve import ModelRegistry, Server, TailApp, create_app
from torchsurgeon.serve.metrics import Metrics
from torchsurgeon.serve.outcome import Outcome
from torchsurgeon.serve.quick import QuickRequests

X = torch.ones(1, 4)
BODY = json.dumps({"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}]}).encode()
INFER = "/v2/models/net/infer"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(params=["direct", "asgi"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    registry = ModelRegistry(profiler=None)
    registry.add("net", nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), X)
    registry.announce("later")
    app = create_app(registry)
    with Server(app, direct=request.param == "direct") as server:
        measure(app, registry, lambda: len(server.connections))
        yield server
    registry.close()


def measure(app: TailApp, registry: ModelRegistry, connections: Callable[[], int]) -> None:
    counts = Metrics(registry, connections)
    app.listeners.append(counts)
    app.metrics = counts.text


def ask(server: Server, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, str]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request("GET" if body is None else "POST", path, body, headers)
        response = connection.getresponse()
        return response.status, response.read(), response.headers["content-type"]


def samples(server: Server) -> Samples:
    status, text, kind = ask(server, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain")
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text.decode())
        for one in family.samples
    }


def of(found: Samples, name: str, **labels: str) -> float:
    return found[f"torchsurgeon_{name}", tuple(sorted(labels.items()))]


def test_what_was_asked_is_counted_by_status_kind_cut_and_bytes(server: Server) -> None:
    for _ in range(3):
        assert ask(server, INFER, BODY)[0] == 200
    middle = BODY.replace(b'"input"', b'"0"')
    assert ask(server, INFER, middle)[0] == 200
    assert ask(server, INFER, b"{}")[0] == 400
    assert ask(server, "/v2/models/nobody/infer", BODY)[0] == 404
    assert ask(server, "/v2/models/later/infer", BODY)[0] == 503
    assert ask(server, "/nothing")[0] == 404
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(b"nonsense\r\n\r\n")
        link.recv(1000)
    found = samples(server)
    end_s = time.monotonic() + 20
    while of(found, "requests_total", model="", status="404") < 2 and time.monotonic() < end_s:
        found = samples(server)
    assert of(found, "requests_total", model="net", status="200") == 4
    assert of(found, "requests_total", model="net", status="400") == 1
    assert of(found, "requests_total", model="later", status="503") == 1
    assert of(found, "requests_total", model="", status="404") == 2
    assert of(found, "errors_total", model="net", kind="ProtocolError") == 1
    assert of(found, "errors_total", model="later", kind="ModelNotReadyError") == 1
    assert of(found, "errors_total", model="", kind="ModelNotServedError") == 1
    assert of(found, "errors_total", model="", kind="ProtocolError") == 1
    assert of(found, "cut_requests_total", model="net", cut="input") == 3
    assert of(found, "cut_requests_total", model="net", cut="0") == 1
    assert of(found, "received_bytes_total", model="net") >= 4 * len(middle)
    assert of(found, "sent_bytes_total", model="net") > 0
    assert of(found, "request_seconds_count", model="net") == 5
    assert of(found, "request_seconds_bucket", model="net", le="+Inf") == 5
    assert 0 < of(found, "request_seconds_sum", model="net") < 50


def test_a_compressed_body_counts_as_it_was_sent(server: Server) -> None:
    padded = BODY.ljust(4000)
    sent = gzip.compress(padded)
    assert ask(server, INFER, sent, **{"Content-Encoding": "gzip"})[0] == 200
    assert ask(server, INFER, padded)[0] == 200
    wait_for(lambda: of(samples(server), "requests_total", model="net", status="200") == 2)
    assert of(samples(server), "received_bytes_total", model="net") == len(sent) + len(padded)


def test_what_the_server_is_like_now_is_told(server: Server) -> None:
    assert ask(server, INFER, BODY)[0] == 200
    with socket.create_connection(("127.0.0.1", server.port), timeout=20):
        found = samples(server)
    assert of(found, "model_ready", model="net") == 1
    assert of(found, "model_ready", model="later") == 0
    assert of(found, "queue", model="net") == 0
    assert of(found, "tails", model="net") == 1
    assert of(found, "slowdown", model="net") >= 1
    assert of(found, "batch_requests_count", model="net") == 1
    assert of(found, "batch_requests_bucket", model="net", le="1.0") == 1
    assert of(found, "connections") >= 1


def test_names_that_clients_make_up_are_no_labels() -> None:
    registry = ModelRegistry(profiler=None)
    registry.announce("net")
    metrics = Metrics(registry, lambda: 0)
    for i in range(1000):
        metrics(Outcome("", "", "", f"made up {i}", "", 404, 0.1, 0, 0, "ModelNotServedError"))
        metrics(Outcome("", "", "", "net", f"cut{i}", 200, 0.1, 0, 0))
    text = metrics.text()[0].decode()
    assert text.count("torchsurgeon_cut_requests_total{") == 101
    assert 'cut="other",model="net"} 900.0' in text or 'model="net",cut="other"} 900.0' in text
    assert "made up" not in text


def test_without_metrics_there_is_no_such_path() -> None:
    registry = ModelRegistry(profiler=None)
    with Server(create_app(registry)) as server:
        status, body, _ = ask(server, "/metrics")
    assert status == 404
    assert "error" in json.loads(body)


def test_the_command_says_which_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "torchsurgeon.serve.metrics", raising=False)
    assert main(["serve", "net=factories:small", "--port", "0", "--metrics"]) == 2
    assert "pip install 'torchsurgeon[metrics]'" in capsys.readouterr().err


def test_the_slowdown_compares_each_kind_of_request_with_its_own_quickest() -> None:
    quick = QuickRequests()
    for _ in range(100):
        quick.took(1, 0.1)
        quick.took(2, 0.001)
    assert quick.slowdown == pytest.approx(1.0)
    for _ in range(100):
        quick.took(1, 0.3)
        quick.took(2, 0.003)
    assert quick.slowdown == pytest.approx(3.0, rel=0.01)
