"""What the operator of a server reads: a line for each request, and complaints that do not fill the disk."""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import environment
from torch import Tensor, nn
from waiting import wait_for

import torchsurgeon as ts
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.access import AccessLog, access
from torchsurgeon.serve.failure import OncePerPeriod, complain
from torchsurgeon.serve.logs import JsonFormatter, LogFormat, LogHandler, TextFormatter, log_handler
from torchsurgeon.serve.outcome import CLIENT_GONE, Outcome
from torchsurgeon.serve.received import given_id
from torchsurgeon.serve.served import measured_profile

X = torch.ones(1, 4)
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}]}).encode()


class Failing(nn.Module):
    """Fails for negative inputs, which its example has not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x.long())


@pytest.fixture(scope="module", params=["direct", "asgi"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    registry = ModelRegistry(profiler=None)
    registry.add("net", Failing().eval(), X)
    with Server(create_app(registry, body_timeout_s=0.3), direct=request.param == "direct") as server:
        yield server
    registry.close()


@pytest.fixture
def outcomes(server: Server) -> Iterator[list[Outcome]]:
    found: list[Outcome] = []
    server.app.listeners.append(found.append)
    yield found
    server.app.listeners.clear()


def ask(port: int, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET" if body is None else "POST", path, body, headers)
        response = connection.getresponse()
        told = {name.lower(): value for name, value in response.getheaders()}
        return response.status, told, json.loads(response.read())


def test_every_request_is_noted_with_what_an_operator_asks_for(server: Server, outcomes: list[Outcome]) -> None:
    infer = "/v2/models/net/infer"
    for path, body, status in [
        (infer, BODY, 200),
        (infer, BODY.replace(b"1.0", b"-1.0"), 500),
        (infer, b"{}", 400),
        ("/v2/models/other/infer", BODY, 404),
        ("/v2/health/live", None, 200),
        ("/v2/probe?down=9", b"12345", 200),
        ("/nothing", None, 404),
    ]:
        headers = {"X-Request-Id": f"{path}-{status}".replace("?", "_")}
        found, told, _ = ask(server.port, path, body, **headers)
        assert (found, told["x-request-id"]) == (status, headers["X-Request-Id"])
        wait_for(lambda: outcomes)
        outcome = outcomes.pop()
        method = "GET" if body is None else "POST"
        assert outcome.asked == f"{method} {path.partition('?')[0]}"
        assert (outcome.status, outcome.request_id) == (status, headers["X-Request-Id"])
        assert re.fullmatch(r"127\.0\.0\.1:\d+", outcome.client)
        assert outcome.model == (path.split("/")[3] if path.endswith("infer") else "")
        assert outcome.cut == ("x" if path == infer and body != b"{}" else "")
        assert 0 < outcome.duration_s < 20
        assert outcome.sent_bytes > 0
        assert not outcomes


def test_a_request_without_an_id_is_given_one_and_an_error_tells_it(server: Server, outcomes: list[Outcome]) -> None:
    _, told, _ = ask(server.port, "/v2/models/net/infer", BODY)
    assert "x-request-id" not in told
    status, told, _ = ask(server.port, "/v2/models/net/infer", b"{}")
    wait_for(lambda: len(outcomes) == 2)
    assert status == 400
    assert told["x-request-id"] == outcomes[1].request_id != outcomes[0].request_id != ""


@pytest.mark.parametrize("forged", ["two words", "a" * 129, "", "x\tlevel=INFO", "ü", '"}'])
def test_an_id_that_could_forge_a_line_is_replaced(server: Server, outcomes: list[Outcome], forged: str) -> None:
    assert given_id(forged.encode("latin-1")) is None
    status, told, _ = ask(server.port, "/v2/models/net/infer", BODY, **{"X-Request-Id": forged})
    assert status == 200
    assert "x-request-id" not in told
    wait_for(lambda: outcomes)
    assert given_id(outcomes[0].request_id.encode()) == outcomes[0].request_id


def test_what_is_no_request_and_who_leaves_early_are_noted_too(server: Server, outcomes: list[Outcome]) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(b"nonsense\r\n\r\n")
        answer = link.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 400 ")
    wait_for(lambda: outcomes)
    refused = outcomes.pop()
    assert (refused.status, refused.asked, refused.model) == (400, "", "")
    assert f"x-request-id: {refused.request_id}\r\n".encode() in answer
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    time.sleep(0.1)
    assert all(one.status == CLIENT_GONE for one in outcomes)


@pytest.mark.parametrize("missing", ["head", "body"])
def test_what_comes_too_late_is_answered_in_json(
    server: Server, outcomes: list[Outcome], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchsurgeon.serve.guarded.HEAD_TIMEOUT_S", 0.3)
    head = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nX-Request-Id: mine\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(head if missing == "head" else head + b"\r\n{")
        answer = b""
        while piece := link.recv(10_000):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert f"the {missing}" in json.loads(body)["error"] or f"a {missing}" in json.loads(body)["error"]
    wait_for(lambda: outcomes)
    assert [one.status for one in outcomes] == [408]
    assert outcomes[0].model == ("" if missing == "head" else "net")
    assert outcomes[0].asked == ("" if missing == "head" else "POST /v2/models/net/infer")
    assert (outcomes[0].request_id == "mine") == (missing == "body")
    assert f"x-request-id: {outcomes[0].request_id}".encode() in head
    # By the time that the server of these tests allows.
    assert missing == "head" or 0.3 <= outcomes[0].duration_s < 20


@pytest.fixture
def periods(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """The ends of periods that have begun, to be called by the test: no clock decides when a period is over."""
    ends: list[Callable[[], object]] = []

    class Timer:
        daemon = False

        def __init__(self, period_s: float, end: Callable[..., object], arguments: tuple[object, ...]) -> None:
            self._end = functools.partial(end, *arguments)

        def start(self) -> None:
            ends.append(self._end)

    monkeypatch.setattr("torchsurgeon.serve.failure.threading.Timer", Timer)
    return ends


def end_all(periods: list[Callable[[], object]]) -> None:
    while periods:
        periods.pop(0)()


def test_the_same_complaint_is_written_once_in_a_period_and_then_how_many_more_there_were(
    caplog: pytest.LogCaptureFixture, periods: list[Callable[[], object]]
) -> None:
    logger = logging.getLogger("test.complaints")
    once = OncePerPeriod(0.3)
    logger.addFilter(once)
    for i in range(1000):
        logger.warning("invalid request %d", i)
        logger.error("the disk is full")
    assert [record.getMessage() for record in caplog.records] == ["invalid request 0", "the disk is full"]
    end_all(periods)
    said = [record.getMessage() for record in caplog.records[2:]]
    assert said == ["invalid request 0: 999 more in 0.3 s", "the disk is full: 999 more in 0.3 s"]
    caplog.clear()
    logger.warning("invalid request %d", 7)
    assert [record.getMessage() for record in caplog.records] == ["invalid request 7"]
    end_all(periods)
    # It was the only one in its period, so there is nothing more to say.
    assert len(caplog.records) == 1
    logger.removeFilter(once)


def test_the_kinds_of_complaints_that_are_remembered_are_bounded(
    caplog: pytest.LogCaptureFixture, periods: list[Callable[[], object]]
) -> None:
    logger = logging.getLogger("test.complaints")
    once = OncePerPeriod(0.3)
    logger.addFilter(once)
    for i in range(1000):
        logger.warning(f"complaint {i}")
    assert len(caplog.records) == 65
    end_all(periods)
    assert [record.getMessage() for record in caplog.records[65:]] == [
        "others that were not written: 935 more in 0.3 s"
    ]
    logger.removeFilter(once)


def test_a_period_of_complaints_ends_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("test.complaints")
    once = OncePerPeriod(0.1)
    logger.addFilter(once)

    def told() -> bool:
        logger.warning("again")
        logger.warning("again")
        return any("more in" in one.getMessage() for one in caplog.records)

    wait_for(told)
    logger.removeFilter(once)


def test_a_model_that_fails_at_every_request_is_complained_of_once(
    server: Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    periods: list[Callable[[], object]],
) -> None:
    log = logging.getLogger("torchsurgeon.serve.failure")
    monkeypatch.setattr(log, "filters", [OncePerPeriod()])
    for i in range(20):
        status, _, _ = ask(
            server.port, "/v2/models/net/infer", BODY.replace(b"1.0", b"-1.0"), **{"X-Request-Id": f"r{i}"}
        )
        assert status == 500
    (record,) = [one for one in caplog.records if one.name == log.name]
    assert record.exc_info is not None
    text = json.loads(JsonFormatter().format(record))
    assert (text["level"], text["model"], text["cut"], text["request_id"]) == ("ERROR", "net", "x", "r0")
    assert "IndexError" in text["exception"]
    assert text["client"].startswith("127.0.0.1:")
    assert "request_id=r0" in TextFormatter().format(record)


def test_a_message_cannot_begin_a_line_of_its_own() -> None:
    record = logging.LogRecord("x", logging.ERROR, "", 0, "one\ntwo\rthree", (), None)
    assert len(TextFormatter().format(record).splitlines()) == 1
    assert json.loads(JsonFormatter().format(record))["message"] == "one\ntwo\rthree"


OUTCOMES = [
    Outcome("127.0.0.1:1", "id-1", "POST /v2/models/net/infer", "net", "x", 200, 0.0012345, 10, 20),
    Outcome("", "id-2", "", "", "", 400, 0.0, 0, 0, "ProtocolError"),
    Outcome("[::1]:2", "id-3", "GET /ü", "two\nlines\x1b[31m", 'a"b\\', 499, 1e3, 0, 0, "GoneError"),
]


def written(handlers: list[logging.Handler], monkeypatch: pytest.MonkeyPatch, outcomes: list[Outcome]) -> None:
    """Have an access log write to these handlers, and to none of the program's."""
    monkeypatch.setattr(access, "handlers", handlers)
    monkeypatch.setattr(access, "propagate", False)
    monkeypatch.setattr("torchsurgeon.serve.access.time.time", lambda: 1234567890.12345)
    log = AccessLog()
    for one in outcomes:
        log(one)
    log.close()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_many_lines_at_once_are_those_that_are_written_one_by_one(
    log_format: LogFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, single = io.StringIO(), io.StringIO()
    written([log_handler(many, log_format)], monkeypatch, OUTCOMES * 200)
    calls: list[int] = []
    one_by_one = log_handler(single, log_format)
    one_by_one.addFilter(lambda record: not calls.append(1))
    written([one_by_one], monkeypatch, OUTCOMES * 200)
    assert len(calls) == len(many.getvalue().splitlines()) == 600
    assert many.getvalue() == single.getvalue()
    assert "two\nlines" not in many.getvalue()


def test_another_handler_is_told_of_each_request_beside_the_servers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, other = io.StringIO(), Blocked()
    other.free.set()
    written([log_handler(stream, "text"), other], monkeypatch, OUTCOMES)
    assert other.count == len(stream.getvalue().splitlines()) == 3


def test_a_stream_that_fails_once_does_not_end_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        tries = 0

        def write(self, text: str) -> int:
            Full.tries += 1
            if Full.tries == 1:
                raise OSError("no space left on device")
            return super().write(text)

    stream = Full()
    handler = log_handler(stream, "text")
    assert isinstance(handler, LogHandler)
    written([handler], monkeypatch, OUTCOMES * 200)
    assert len(stream.getvalue().splitlines()) == 400
    assert "no space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/a%0ab", "/v2/models/ne%0At/infer", "/a%20status=200"])
def test_a_path_cannot_forge_a_line(server: Server, outcomes: list[Outcome], path: str) -> None:
    body = BODY if path.endswith("infer") else None
    assert ask(server.port, path, body)[0] == 404
    asked = f"{'POST' if body else 'GET'} {path}"
    # A request of the test before may be noted late.
    wait_for(lambda: asked in [one.asked for one in outcomes])
    for one in outcomes:
        (line,) = TextFormatter().lines("", [(0.0, one)])
        assert len(line.splitlines()) == 1


class Blocked(logging.Handler):
    """A handler whose disk does not answer until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.free.wait(20)
        self.count += 1


def test_an_access_log_that_cannot_be_written_delays_no_answer(server: Server) -> None:
    blocked = Blocked()
    noted: list[Outcome]
    access.addHandler(blocked)
    log, noted = AccessLog(), []
    server.app.listeners += [log, noted.append]
    try:
        start_s = time.monotonic()
        for _ in range(20):
            assert ask(server.port, "/v2/health/live")[0] == 200
        assert time.monotonic() - start_s < 10
        wait_for(lambda: len(noted) == 20)
        blocked.free.set()
    finally:
        server.app.listeners.clear()
        log.close()
        access.removeHandler(blocked)
    assert blocked.count == 20


def test_lines_that_come_faster_than_they_are_written_are_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torchsurgeon.serve.access._MOST_WAITING", 10)
    monkeypatch.setattr("torchsurgeon.serve.access._EVERY_S", 60.0)
    log = AccessLog()
    for i in range(25):
        log(Outcome("", str(i), "", "", "", 200, 0.0, 0, 0))
    log.close()
    # Another test's complaint may still be due in its own thread.
    told = [record for record in caplog.records if record.name == "torchsurgeon.serve.access"]
    assert [record.__dict__.get("request_id") for record in told] == [*map(str, range(15, 25)), None]
    assert told[-1].getMessage().startswith("15 requests are missing here")


@contextlib.contextmanager
def command(tmp_path: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int, Path, Path]]:
    """``torchsurgeon serve`` of two models, with what it writes in files; it is stopped at the end of the block."""
    out, err = tmp_path / "out", tmp_path / "err"
    arguments = [sys.executable, "-m", "torchsurgeon", "serve", "net=factories:small", "slow=factories:slow"]
    with out.open("wb") as one, err.open("wb") as other:
        child = subprocess.Popen([*arguments, "--port", "0", *options], stdout=one, stderr=other, env=environment())
    try:
        wait_for(lambda: "ready" in out.read_text() + err.read_text() or child.poll() is not None)
        found = re.search(r"ready: .*:(\d+)", out.read_text() + err.read_text())
        assert found is not None, err.read_text()
        yield child, int(found[1]), out, err
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(30)


def test_the_command_writes_everything_as_json(tmp_path: Path) -> None:
    with command(tmp_path, "--log-format", "json", "--access-log") as (_, port, out, err):
        body = BODY.replace(b'"x"', b'"input"')
        assert ask(port, "/v2/models/net/infer", body, **{"X-Request-Id": "abc"})[0] == 200
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
                link.sendall(b"\x16\x03\x01 this is TLS\r\n\r\n")
                link.recv(1000)
    lines = [json.loads(line) for line in err.read_text().splitlines()]
    assert out.read_text() == ""
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"]) for line in lines)
    (line,) = [line for line in lines if line.get("request_id") == "abc"]
    assert line["logger"] == "torchsurgeon.serve.access"
    assert (line["asked"], line["model"], line["cut"]) == ("POST /v2/models/net/infer", "net", "input")
    assert line["status"] == 200
    assert line["duration_ms"] > 0
    assert [line["message"] for line in lines].count("request") == 31
    assert sum("not valid HTTP" in line["message"] and line["level"] == "WARNING" for line in lines) == 1
    assert any(line["message"].startswith("stopped after") for line in lines)


def test_no_line_is_lost_where_the_server_is_told_to_stop(tmp_path: Path) -> None:
    script = (
        "import signal, urllib.request, threading\n"
        "from torchsurgeon import serve\n"
        "serve.access._EVERY_S = 60\n"
        "def ask(url):\n"
        "    for _ in range(20):\n"
        "        urllib.request.urlopen(url + '/v2/health/live').close()\n"
        "    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)\n"
        "def say(line):\n"
        "    if line.startswith('ready'):\n"
        "        threading.Thread(target=ask, args=(line.split()[-1],), daemon=True).start()\n"
        "serve.run({'net': 'factories:small'}, port=0, access_log=True, say=say)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr.count("asked=GET /v2/health/live status=200") == 20, done.stderr


def test_the_command_prints_its_progress_and_no_line_for_a_request_by_default(tmp_path: Path) -> None:
    with command(tmp_path) as (_, port, out, err):
        assert ask(port, "/v2/models/slow/infer", BODY)[0] == 200
        assert "ready: serving net, slow at" in out.read_text()
    assert "request" not in err.read_text()
    assert "request under way" in out.read_text()


def test_a_program_that_has_set_up_logging_keeps_its_own_handlers() -> None:
    script = (
        "import logging, threading, os, signal\n"
        "from torchsurgeon import serve\n"
        "logging.basicConfig(format='MINE %(message)s', level=logging.INFO)\n"
        "def say(line):\n"
        "    if line.startswith('ready'):\n"
        "        logging.getLogger('torchsurgeon.serve').warning('a line')\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "serve.run({'net': 'factories:small'}, port=0, log_format='json', say=say)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if "a line" in line]
    assert lines == ["MINE a line"], done.stderr


def test_complaints_reach_a_handler_of_the_operators() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("torchsurgeon.serve.failure")
    log.addHandler(handler)
    try:
        complain("only in this test", "a complaint", {"client": "c"})
    finally:
        log.removeHandler(handler)
    assert stream.getvalue() == "a complaint\n"


def test_the_operator_reads_that_a_device_asked_for_layer_times_while_the_server_was_busy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is no warning of Python, which would advise to start something again that only a device has asked for."""
    monkeypatch.setattr("torchsurgeon.profiling.measure._NOISY_SPREAD", -1.0)
    log = logging.getLogger("torchsurgeon.serve.served")
    log.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            measured_profile(ts.trace(nn.Linear(2, 2).eval(), torch.zeros(1, 2)))
    finally:
        log.removeHandler(caplog.handler)
    said = caplog.records[0].getMessage()
    assert said.startswith("the layer times of Linear that a device asked for are rough: 10 runs differ widely")
    assert said.endswith("; its calls correct them")
