"""What a device relies on: its answer, or a clear error within the timeout, whatever the other side does."""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from messages import joined
from serving import signed_by_itself
from tcp import listening, read_message, reserved_port

from torchsurgeon import wire
from torchsurgeon.errors import BodyTooLargeError, ProtocolError, RequestRefusedError, ServerUnavailableError
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.transport import HttpTransport
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.route import route_to
from torchsurgeon.transport.unreachable import unreachable

X = torch.arange(6.0).view(2, 3)
Script = Callable[[socket.socket], object]
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\nContent-Length: 3\r\n\r\n"


def answer_bytes(extra: str = "", tensors: dict[str, torch.Tensor] | None = None) -> bytes:
    message = wire.encode_response("m", "1", tensors or {"y": X * 2})
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {message.size_bytes}\r\n"
    head += f"Inference-Header-Content-Length: {message.header_bytes}\r\n{extra}\r\n"
    return head.encode() + joined(message)


def read_request(link: socket.socket) -> bytes:
    return b"\r\n\r\n".join(read_message(link) or ())


@contextmanager
def scripted(*scripts: Script) -> Iterator[str]:
    """A server that runs one script for each connection it accepts, and closes it."""
    left = iter(scripts)
    with listening(lambda link: next(left, closes)(link)) as port:
        yield f"http://127.0.0.1:{port}"


def closes(link: socket.socket) -> None:
    """A script that reads nothing and says nothing."""


def says(data: bytes, times: int = 1) -> Script:
    def script(link: socket.socket) -> None:
        for _ in range(times):
            read_request(link)
            link.sendall(data)

    return script


def ask(url: str, timeout_s: float = 5.0, max_answer_bytes: int = 1000) -> torch.Tensor:
    with HttpTransport(url, timeout_s) as transport:
        return transport.infer("m", {"x": X}, max_answer_bytes=max_answer_bytes).tensors["y"]


def chunked(data: bytes) -> bytes:
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    pieces = [body[:7], body[7:100], body[100:]]
    coded = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return b"\r\n".join([*lines, b"Transfer-Encoding: chunked"]) + b"\r\n\r\n" + coded


def without_length(data: bytes) -> bytes:
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    "answer",
    [
        answer_bytes(),
        answer_bytes("Server: x\r\nX-Empty:\r\n"),
        chunked(answer_bytes()),
        without_length(answer_bytes()),
        CONTINUE + answer_bytes(),
        EARLY_HINTS + answer_bytes(),
        CONTINUE + 20 * EARLY_HINTS + b"HTTP/1.1 102 \r\n\r\nHTTP/1.1 199 What\r\n\r\n" + answer_bytes(),
        EARLY_HINTS + chunked(answer_bytes()),
        EARLY_HINTS + without_length(answer_bytes()),
        answer_bytes("Connection: close\r\n"),
        answer_bytes().replace(b"HTTP/1.1", b"HTTP/1.0"),
        answer_bytes().replace(b"Content-Length", b"CONTENT-length"),
    ],
    ids=[
        "plain",
        "more headers",
        "chunked",
        "until closed",
        "interim",
        "hints",
        "many interim",
        "hints, chunked",
        "hints, until closed",
        "closing",
        "1.0",
        "odd case",
    ],
)
def test_every_way_to_frame_an_answer_is_understood(answer: bytes) -> None:
    with scripted(says(answer)) as url:
        assert torch.equal(ask(url), X * 2)


def test_a_connection_is_kept_after_interim_answers_however_they_arrive() -> None:
    def script(link: socket.socket) -> None:
        for step, cut_at in enumerate((0, 5, len(EARLY_HINTS), len(EARLY_HINTS) + 5, -5)):
            read_request(link)
            data = EARLY_HINTS + answer_bytes("X-More: 1\r\n" * (step % 2), {"y": X + step})
            link.sendall(data[:cut_at])
            time.sleep(0.005)
            link.sendall(data[cut_at:])

    with scripted(script) as url, HttpTransport(url) as transport:
        for step in range(5):
            assert torch.equal(transport.infer("m", {"x": X}, max_answer_bytes=1000).tensors["y"], X + step)


def test_an_interim_answer_is_not_taken_for_the_beginning_of_a_slow_one() -> None:
    def script(link: socket.socket) -> None:
        read_request(link)
        link.sendall(EARLY_HINTS)
        time.sleep(0.3)
        link.sendall(answer_bytes())

    with scripted(script) as url, HttpTransport(url) as transport:
        timing = transport.infer("m", {"x": X}, max_answer_bytes=1000).timing
    assert timing.first_byte_s - timing.send_end_s > 0.15


def test_a_request_is_sent_to_its_end_when_interim_answers_come_meanwhile() -> None:
    big = {"x": torch.zeros(8_000_000)}

    def script(link: socket.socket) -> None:
        link.recv(1000)
        link.sendall(CONTINUE)
        # Until the client has sent what the system takes, and waits.
        time.sleep(0.3)
        link.sendall(EARLY_HINTS)
        time.sleep(0.1)
        left = big["x"].nbytes - 1000
        while left > 0 and (piece := link.recv(1 << 20)):
            left -= len(piece)
        link.sendall(answer_bytes())
        link.recv(1000)

    with scripted(script) as url, HttpTransport(url, 20) as transport:
        assert torch.equal(transport.infer("m", big, max_answer_bytes=1000).tensors["y"], X * 2)


def test_interim_answers_without_an_end_are_not_read_for_long() -> None:
    def script(link: socket.socket) -> None:
        link.recv(65536)
        while True:
            link.sendall(EARLY_HINTS * 1000)

    with scripted(script, script, script) as url, HttpTransport(url, 60.0) as transport:
        with pytest.raises(ServerUnavailableError, match="interim answers"):
            transport.get_json("/v2")
        for tensor in (X, torch.zeros(8_000_000)):
            with pytest.raises(ProtocolError, match="more than 100 interim answers"):
                transport.infer("m", {"x": tensor}, max_answer_bytes=1000)


def test_the_control_plane_skips_interim_answers_and_another_protocol_is_none() -> None:
    json = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    other = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"
    with (
        scripted(says(CONTINUE + EARLY_HINTS + json), says(other), says(other)) as url,
        HttpTransport(url) as transport,
    ):
        assert transport.get_json("/v2") == {}
        with pytest.raises(RequestRefusedError, match="101"):
            transport.get_json("/v2")
        with pytest.raises(RequestRefusedError, match="101"):
            transport.infer("m", {"x": X}, max_answer_bytes=1000)


def test_the_tensor_arrives_as_it_was_sent_and_the_timing_is_in_order() -> None:
    seen: list[bytes] = []

    def script(link: socket.socket) -> None:
        seen.append(read_request(link))
        link.sendall(answer_bytes())

    with scripted(script) as url, HttpTransport(url) as transport:
        timing = transport.infer("m", {"x": X}, version="2", max_answer_bytes=1000).timing
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v2/models/m/versions/2/infer HTTP/1.1")
    length = int(head.split(b"Inference-Header-Content-Length: ")[1].split(b"\r\n")[0])
    assert torch.equal(wire.decode_request(body, length).tensors["x"], X)
    assert timing.sent_bytes == len(body)
    assert (
        timing.encoded_s
        == timing.ready_s
        <= timing.send_start_s
        <= timing.send_end_s
        <= timing.first_byte_s
        <= timing.end_s
    )


def test_a_connection_is_kept_and_reused() -> None:
    with scripted(says(answer_bytes(), times=3)) as url, HttpTransport(url) as transport:
        for _ in range(3):
            transport.infer("m", {"x": X}, max_answer_bytes=1000)


def test_answers_of_changing_lengths_are_told_apart_on_one_connection() -> None:
    tensors = [torch.arange(float(count)) for count in (6, 6, 50, 3, 3, 2000, 2000, 6)]
    extras = ["", "", "", "X-More: 1\r\n", "", "", "X-More: 1\r\n", f"X-Long: {'1' * 5000}\r\n"]

    def script(link: socket.socket) -> None:
        for tensor, extra in zip(tensors, extras, strict=True):
            data = answer_bytes(extra, {"y": tensor})
            for cut_at in (0, 10, len(data) - 5):
                read_request(link)
                link.sendall(data[:cut_at])
                time.sleep(0.005)
                link.sendall(data[cut_at:])

    with scripted(script) as url, HttpTransport(url) as transport:
        for tensor in tensors:
            for _ in range(3):
                answer = transport.infer("m", {"x": X}, max_answer_bytes=10_000)
                assert torch.equal(answer.tensors["y"], tensor)


def test_answers_kept_by_the_caller_are_not_overwritten_by_later_ones() -> None:
    def script(link: socket.socket) -> None:
        for step in range(6):
            read_request(link)
            link.sendall(answer_bytes(tensors={"y": X + step}))

    with scripted(script) as url, HttpTransport(url) as transport:
        kept = [transport.infer("m", {"x": X}, max_answer_bytes=1000).tensors["y"] for _ in range(6)]
    for step, tensor in enumerate(kept):
        assert torch.equal(tensor, X + step)


def test_what_a_server_sends_beyond_its_answer_is_not_taken_for_the_next() -> None:
    doubled = answer_bytes() + answer_bytes(tensors={"y": X * 3})

    def script(link: socket.socket) -> None:
        for data in (answer_bytes(), doubled):
            read_request(link)
            link.sendall(data)

    with scripted(script, says(answer_bytes())) as url, HttpTransport(url) as transport:
        for _ in range(3):
            assert torch.equal(transport.infer("m", {"x": X}, max_answer_bytes=1000).tensors["y"], X * 2)


def test_a_kept_connection_that_the_server_closed_is_replaced_silently() -> None:
    with scripted(says(answer_bytes()), says(answer_bytes())) as url, HttpTransport(url) as transport:
        for _ in range(2):
            assert torch.equal(transport.infer("m", {"x": X}, max_answer_bytes=1000).tensors["y"], X * 2)
            time.sleep(0.05)


def test_a_server_that_keeps_closing_is_not_asked_for_ever() -> None:
    with scripted(says(answer_bytes()), closes, closes, closes) as url, HttpTransport(url, 5) as transport:
        transport.infer("m", {"x": X}, max_answer_bytes=1000)
        with pytest.raises(ServerUnavailableError):
            transport.infer("m", {"x": X}, max_answer_bytes=1000)


def test_nothing_listens() -> None:
    with reserved_port() as port, pytest.raises(ServerUnavailableError, match=f"127.0.0.1:{port}"):
        ask(f"http://127.0.0.1:{port}")


def causes(url: str, **ways: Any) -> list[str]:
    """What is said where a server is not reached, when it is asked for its model and for an inference."""
    said = []
    with HttpTransport(url, 20, **ways) as transport:
        for call in (
            lambda: transport.get_json("/v2"),
            lambda: transport.infer("m", {"x": X}, max_answer_bytes=1000),
        ):
            with pytest.raises(ServerUnavailableError) as caught:
                call()
            said.append(str(caught.value))
    return said


def test_each_cause_why_a_server_is_not_reached_has_its_own_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = (str(signed_by_itself(tmp_path) / name) for name in ("cert.pem", "key.pem"))
    app = create_app(ModelRegistry())
    with Server(app) as plain, Server(app, ssl_certfile=cert, ssl_keyfile=key) as secure:
        for said in causes(plain.url.replace("http:", "https:")):
            assert re.fullmatch(rf"https.* answers, but not in https .*; if it serves http, write {plain.url}", said)
        for said in causes(secure.url.replace("https:", "http:")):
            assert re.search(rf"is the server running\? If it serves https, write {secure.url}$", said)
        for said in causes(secure.url):
            assert "not trusted here" in said
            assert "ca= of SplitModule, verify= of HttpTransport, --ca on the command line" in said
        for said in causes(secure.url.replace("127.0.0.1", "localhost"), verify=cert):
            assert "is for another host" in said
            assert said.endswith("write the name that it is for in the URL")
    with reserved_port() as port:
        for said in causes(f"http://127.0.0.1:{port}"):
            assert said.endswith("(ConnectionRefusedError: Connection refused); is the server running?")

    def unknown(*args: object, **more: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    refused = ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] (_ssl.c:2580)")
    refused.reason = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    said = unreachable(refused, route_to("https://127.0.0.1:1"), "https://127.0.0.1:1")
    assert "lets in only clients with a certificate" in said
    assert "_ssl.c" not in said
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for said in causes("http://servr:8000"):
        assert said == (
            "there is no host 'servr' (gaierror: Name or service not known); check the name in http://servr:8000"
        )


def silent(link: socket.socket) -> None:
    read_request(link)
    link.recv(1)


def trickle_head(link: socket.socket) -> None:
    read_request(link)
    for byte in b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 100:
        link.sendall(bytes([byte]))
        time.sleep(0.05)


def trickle_body(link: socket.socket) -> None:
    read_request(link)
    answer = answer_bytes()
    start = answer.index(b"\r\n\r\n") + 4
    link.sendall(answer[:start])
    for byte in answer[start:]:
        link.sendall(bytes([byte]))
        time.sleep(0.05)


@pytest.mark.parametrize("script", [silent, trickle_head, trickle_body], ids=lambda script: script.__name__)
def test_a_slow_server_is_given_up_at_the_deadline_whatever_it_dribbles(script: Script) -> None:
    start = time.monotonic()
    with scripted(script) as url, pytest.raises(ServerUnavailableError, match=r"0\.4 s"):
        ask(url, timeout_s=0.4)
    assert 0.35 < time.monotonic() - start < 3


def test_a_server_that_does_not_read_is_given_up_at_the_deadline() -> None:
    given_up = threading.Event()
    with scripted(lambda link: given_up.wait(20)) as url, HttpTransport(url, 0.4) as transport:
        with pytest.raises(ServerUnavailableError):
            transport.infer("m", {"x": torch.zeros(8_000_000)}, max_answer_bytes=1000)
        given_up.set()


def test_the_control_plane_has_one_deadline_too() -> None:
    def script(link: socket.socket) -> None:
        for byte in b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 100:
            link.sendall(bytes([byte]))
            time.sleep(0.05)

    with scripted(script) as url, HttpTransport(url, 0.4) as transport, pytest.raises(ServerUnavailableError):
        transport.get_json("/v2")


def control_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "torchsurgeon-control"]


@pytest.mark.parametrize("script", [silent, trickle_head, trickle_body], ids=lambda script: script.__name__)
@pytest.mark.parametrize("ended_by", ["deadline", "close"])
def test_a_control_call_that_is_over_leaves_no_thread_with_a_server_that_dribbles(
    script: Script, ended_by: str
) -> None:
    with scripted(script) as url, HttpTransport(url, 0.4 if ended_by == "deadline" else 60.0) as transport:
        if ended_by == "close":
            threading.Timer(0.3, transport.close).start()
        with pytest.raises(ServerUnavailableError, match=r"0\.4 s" if ended_by == "deadline" else "closed"):
            transport.get_json("/v2")
        for thread in control_threads():
            thread.join(5)
        assert not control_threads()


def endless(head: bytes) -> Script:
    def script(link: socket.socket) -> None:
        link.recv(65536)
        link.sendall(head)
        while True:
            link.sendall(b"0" * (1 << 20))

    return script


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n",
    ],
    ids=["until closed", "behind a redirect", "in a negative chunk", "compressed"],
)
def test_an_answer_without_an_end_is_not_read_for_long(head: bytes) -> None:
    with scripted(endless(head), endless(head)) as url, HttpTransport(url, 60.0) as transport:
        with pytest.raises((ProtocolError, ServerUnavailableError)):
            transport.get_json("/v2")
        with pytest.raises((ProtocolError, RequestRefusedError)):
            transport.infer("m", {"x": X}, max_answer_bytes=1000)


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e300, 1e9])
def test_a_timeout_may_be_as_long_as_one_likes(timeout_s: float) -> None:
    json = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    with scripted(says(answer_bytes())) as url:
        assert torch.equal(ask(url, timeout_s), X * 2)
    with scripted(lambda link: link.sendall(json)) as url, HttpTransport(url, timeout_s) as transport:
        assert transport.get_json("/v2") == {}


def test_a_timeout_that_is_no_number_has_passed() -> None:
    with scripted(says(answer_bytes())) as url, pytest.raises(ServerUnavailableError, match="nan s"):
        ask(url, float("nan"))


@pytest.mark.parametrize("cut", [1, 20, 150, -1])
def test_a_server_gone_in_mid_answer(cut: int) -> None:
    with scripted(says(answer_bytes()[:cut])) as url, pytest.raises(ServerUnavailableError):
        ask(url)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"\x00" * 20_000,
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 5_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nInference-Header-Content-Length: 9\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nInference-Header-Content-Length: -1\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
    ],
    ids=[
        "ssh",
        "zeros",
        "endless head",
        "no JSON",
        "header lies",
        "header negative",
        "no outputs",
        "gzip",
        "bad chunk",
        "negative chunk",
    ],
)
def test_an_answer_that_is_not_of_this_protocol(answer: bytes) -> None:
    with scripted(says(answer)) as url, pytest.raises((ProtocolError, ServerUnavailableError)):
        ask(url, timeout_s=2)


@pytest.mark.parametrize("frame", [lambda data: data, chunked, without_length])
def test_an_answer_larger_than_the_outputs_can_be_is_not_read(frame: Callable[[bytes], bytes]) -> None:
    huge = answer_bytes(tensors={"y": torch.zeros(1_000_000)})
    with scripted(says(frame(huge))) as url, pytest.raises(BodyTooLargeError, match="at most"):
        ask(url, max_answer_bytes=100)


def test_a_length_that_would_fill_the_memory_is_refused() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n"
    with scripted(says(answer)) as url, pytest.raises(BodyTooLargeError):
        ask(url)


def test_an_error_status_carries_the_servers_words() -> None:
    body = b'{"error": "no such layer"}'
    answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with scripted(says(answer)) as url, pytest.raises(RequestRefusedError, match="no such layer") as caught:
        ask(url)
    assert caught.value.status == 400


def test_a_refusal_that_comes_before_the_body_is_sent_is_heard() -> None:
    def script(link: socket.socket) -> None:
        link.recv(1000)
        body = b'{"error": "too large"}'
        link.sendall(b"HTTP/1.1 413 X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        time.sleep(0.3)

    big = {"x": torch.zeros(8_000_000)}
    with scripted(script) as url, HttpTransport(url, 5) as transport, pytest.raises(RequestRefusedError, match="large"):
        transport.infer("m", big, max_answer_bytes=1000)


def test_redirects_are_not_followed() -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    with scripted(says(answer)) as url, pytest.raises(RequestRefusedError) as caught:
        ask(url)
    assert caught.value.status == 302


def test_threads_share_a_transport() -> None:
    def script(link: socket.socket) -> None:
        while message := read_message(link):
            head, body = message
            length = int(head.split(b"Inference-Header-Content-Length: ")[1].split(b"\r\n")[0])
            link.sendall(answer_bytes(tensors={"y": wire.decode_request(body, length).tensors["x"] + 1}))

    def call(number: int) -> bool:
        value = torch.full((5,), float(number))
        return torch.equal(transport.infer("m", {"x": value}, max_answer_bytes=100).tensors["y"], value + 1)

    with (
        listening(script) as port,
        HttpTransport(f"http://127.0.0.1:{port}") as transport,
        ThreadPoolExecutor(8) as pool,
    ):
        assert all(pool.map(call, range(100)))


def test_closing_twice_is_harmless_and_calls_after_it_say_so() -> None:
    transport = HttpTransport("http://127.0.0.1:9")
    transport.close()
    transport.close()
    with pytest.raises(ServerUnavailableError, match="closed"):
        transport.infer("m", {"x": X}, max_answer_bytes=1)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a:99999", "http://u:p@a", "http://a?b"]
)
def test_a_url_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(ServerUnavailableError, match="URL"):
        HttpTransport(url)


def test_headers_are_sent_and_cannot_smuggle_others() -> None:
    seen: list[bytes] = []

    def script(link: socket.socket) -> None:
        seen.append(read_request(link))
        link.sendall(answer_bytes())

    with scripted(script) as url, HttpTransport(url, headers={"Authorization": "Bearer t"}) as transport:
        transport.infer("a b/c", {"x": X}, max_answer_bytes=1000)
    assert b"Authorization: Bearer t\r\n" in seen[0]
    assert seen[0].startswith(b"POST /v2/models/a%20b%2Fc/infer ")
    with pytest.raises(ProtocolError):
        HttpTransport("http://127.0.0.1:9", headers={"A": "b\r\nC: d"})


@pytest.mark.parametrize("backlog", [0, 5], ids=["connecting", "waiting for the answer"])
def test_a_cancelled_call_ends_at_once_and_leaves_the_transport_usable(backlog: int) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(backlog)
        for _ in range(4 - backlog):
            # Beyond the backlog nothing answers a connection that is opened.
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(listener.getsockname())
        transport = stack.enter_context(HttpTransport(f"http://127.0.0.1:{listener.getsockname()[1]}", 60.0))
        deadline = Deadline(60.0)
        timer = threading.Timer(0.2, deadline.cancel)
        timer.start()
        begin_s = time.monotonic()
        with pytest.raises(ServerUnavailableError):
            transport.infer("net", {"x": torch.ones(3)}, max_answer_bytes=100, deadline=deadline)
        assert time.monotonic() - begin_s < 20
        timer.join()
        with pytest.raises(ServerUnavailableError):
            transport.infer("net", {"x": torch.ones(3)}, max_answer_bytes=100, deadline=deadline)
        with pytest.raises(ServerUnavailableError):
            transport.probe(10, 0, timeout_s=0.1)
