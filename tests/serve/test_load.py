"""``/v2/load``: how busy a server is; and what becomes of requests of a model that is no longer served."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchsurgeon.errors import CodecError, ModelNotReadyError
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.loading import ModelLoader
from torchsurgeon.serve.received import Received
from torchsurgeon.serve.repository import Loading
from torchsurgeon.serve.statistics import LATELY_S, Statistics

X = torch.ones(1, 4)
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}]}).encode()
INFER = "/v2/models/net/infer"


def ask(server: Server, path: str, body: bytes | None = None) -> tuple[int, Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request("GET" if body is None else "POST", path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


class Held(nn.Module):
    """Runs as long as its gate is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.inner = Gated(self.gate, self.entered)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Gated(nn.Module):
    """A module that stays one layer."""

    def __init__(self, gate: threading.Event, entered: threading.Event) -> None:
        super().__init__()
        self.gate, self.entered = gate, entered

    def forward(self, x: Tensor) -> Tensor:
        self.entered.set()
        self.gate.wait(20)
        # So long that the server does not run it in the thread that answers everybody else, as it does quick ones.
        time.sleep(0.01)
        return x * 2


def test_load_tells_of_every_model_what_waits_and_what_requests_take() -> None:
    model = Held().eval()
    registry = ModelRegistry(profiler=None, concurrency=1)
    registry.add("net", model, X, leaf_modules=["inner"])
    registry.announce("later")
    with contextlib.closing(registry), Server(create_app(registry)) as server:
        status, idle = ask(server, "/v2/load")
        assert status == 200
        assert idle["models"]["later"] == {"state": "loading", "reason": ""}
        net = idle["models"]["net"]
        assert (net["state"], net["answers"], net["waiting"], net["load_factor"]) == ("ready", 0, 0, 1.0)
        assert net["latency_s"] == {"p50": None, "p90": None, "p99": None}
        for _ in range(3):
            assert ask(server, INFER, BODY)[0] == 200
        model.gate.clear()
        model.entered.clear()
        threads = [threading.Thread(target=ask, args=(server, INFER, BODY)) for _ in range(4)]
        # The first one runs alone, and not together with one that has come at the same time.
        threads[0].start()
        assert model.entered.wait(20)
        for thread in threads[1:]:
            thread.start()
        end_s = time.monotonic() + 20
        while ask(server, "/v2/load")[1]["models"]["net"]["waiting"] < 3:
            assert time.monotonic() < end_s
        busy = ask(server, "/v2/load")[1]
        assert busy["connections"] >= 4
        assert busy["uptime_s"] > idle["uptime_s"] > 0
        time.sleep(0.3)
        model.gate.set()
        for thread in threads:
            thread.join()
        net = ask(server, "/v2/load")[1]["models"]["net"]
    assert net["answers"] == 7
    assert net["cuts"] == {"x": 7}
    assert net["rate_s"] == pytest.approx(7 / net["over_s"], rel=0.01)
    assert 0.3 < net["over_s"] <= LATELY_S
    # One ran for 0.3 s, and three waited as long.
    assert net["latency_s"]["p50"] > 0.25
    assert net["queue_s"] > 0.1 > net["unloaded_s"] > 0
    assert net["load_factor"] == pytest.approx((net["queue_s"] + net["compute_s"]) / net["unloaded_s"], rel=0.02)
    assert net["load_factor"] > 10


def test_only_what_was_answered_lately_counts_for_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr("torchsurgeon.serve.statistics.time.perf_counter", lambda: now_s)
    statistics = Statistics()
    statistics.ran([(1.0, 0.5, "x")], 1, 0.0, 1.0, 0.0)
    now_s += LATELY_S + 1
    assert statistics.lately()["answers"] == 0
    for _ in range(10):
        statistics.ran([(0.0, 0.1, "y"), (0.2, 0.1, "y")], 2, 0.05, 0.1, 0.05)
    found = statistics.lately()
    assert (found["answers"], found["rate_s"], found["queue_s"], found["compute_s"]) == (20, 2.0, 0.1, 0.2)
    assert found["latency_s"] == {"p50": 0.2, "p90": 0.4, "p99": 0.4}
    # Two in three took 0.2 or 0.4 s, where one alone takes 0.1 s.
    assert found["load_factor"] == 3.0
    assert statistics.by_requests == {1: 1, 2: 10}
    told = statistics.as_triton("net", "1")
    assert (told["inference_count"], told["execution_count"]) == (21, 11)
    assert told["inference_stats"]["compute_infer"] == {"count": 21, "ns": 3_000_000_000}
    assert told["batch_stats"][1]["compute_infer"] == {"count": 10, "ns": 1_000_000_000}


def test_where_more_was_answered_than_is_remembered_the_rate_goes_by_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr("torchsurgeon.serve.statistics.time.perf_counter", lambda: now_s)
    statistics = Statistics()
    for _ in range(10_000):
        now_s += 0.001
        statistics.ran([(0.0, 0.001, "x")], 1, 0.0, 0.001, 0.0)
    assert statistics.lately()["rate_s"] == pytest.approx(1000, rel=0.01)


def test_cuts_that_clients_make_up_are_counted_together() -> None:
    statistics = Statistics()
    for i in range(1000):
        statistics.ran([(0.0, 0.001, f"cut{i}")], 1, 0.0, 0.001, 0.0)
    assert len(statistics.cuts) == 101
    assert statistics.cuts["other"] == 900


def test_a_request_that_was_begun_for_a_model_that_is_gone_is_answered_by_the_one_in_its_place() -> None:
    registry = ModelRegistry(profiler=None)
    before = registry.add("net", nn.ReLU().eval(), X)
    body = BODY.replace(b'"x"', b'"input"')
    request = Received(memoryview(body), None, 0.0, time.perf_counter())
    with contextlib.closing(registry):
        registry.add("net", nn.ReLU().eval(), X, replace=True)
        assert not before.open
        assert registry.submit(before, request).result(20).size_bytes
        registry.unload("net")
        with pytest.raises(ModelNotReadyError, match="a client asked for it"):
            registry.submit(before, request)


def test_a_model_that_a_client_has_had_loaded_while_the_server_starts_is_not_loaded_again() -> None:
    registry, said = ModelRegistry(profiler=None), list[str]()
    models = {"one": "factories:small", "two": "factories:small"}
    loader = ModelLoader(
        registry, models, weights=None, input_specs=None, leaf_modules=None, codecs=None, backends=None, verify=True,
        seed=0, report=said.append,
    )  # fmt: skip
    with contextlib.closing(registry):
        for name in models:
            registry.announce(name)
        loader.load_again("two")
        served = registry.get("two")
        loader.load_all()
        assert registry.get("two") is served
        assert registry.ready()
    assert [line.split()[1] for line in said] == ["two", "one"]
    gc.unfreeze()


def test_a_model_whose_codec_cannot_be_loaded_does_not_take_the_place_of_the_one_that_is_served(tmp_path: Path) -> None:
    registry = ModelRegistry(profiler=None)
    with contextlib.closing(registry):
        before = registry.add("net", nn.ReLU().eval(), X)
        loader = ModelLoader(
            registry, {"net": "factories:small"}, weights=None, input_specs=None, leaf_modules=None,
            codecs={"net": [str(tmp_path / "absent.fitted")]}, backends=None, verify=True, seed=0, report=print,
        )  # fmt: skip
        with pytest.raises(CodecError):
            loader.load_again("net")
        assert registry.get("net") is before
        assert before.open


@pytest.mark.parametrize("path", ["models/net/unload", "models/net/load"])
def test_a_page_in_a_browser_may_not_load_and_unload_models(path: str) -> None:
    registry = ModelRegistry(profiler=None)
    registry.add("net", nn.ReLU().eval(), X)
    app = create_app(registry)
    app.loading = Loading(["net"], lambda name: None)
    with contextlib.closing(registry), Server(app) as server:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
            connection.request("POST", f"/v2/repository/{path}", b"", {"Origin": "https://elsewhere.example"})
            response = connection.getresponse()
            assert (response.status, "browser" in response.read().decode()) == (403, True)
        assert ask(server, "/v2/models/net/ready")[0] == 200


def test_a_model_whose_loading_ends_with_any_error_is_not_said_to_be_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise RuntimeError("secret: not enough memory")

    monkeypatch.setattr("torchsurgeon.serve.registry.trace", full)
    registry = ModelRegistry(profiler=None)
    with contextlib.closing(registry):
        with pytest.raises(RuntimeError, match="memory"):
            registry.add("net", nn.ReLU().eval(), X)
        with pytest.raises(ModelNotReadyError, match=r"could not be loaded: RuntimeError") as told:
            registry.get("net")
        assert "secret" not in str(told.value)
