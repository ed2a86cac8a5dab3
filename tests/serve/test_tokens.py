"""Who is let in: tokens, certificates, and addresses that other machines reach."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import environment
from serving import signed_by_itself
from torch import nn

import torchsurgeon as ts
from torchsurgeon import serve
from torchsurgeon.errors import ProtocolError, RequestRefusedError, ServerError, ServerUnavailableError
from torchsurgeon.models import specs
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.certificates import certificates_of
from torchsurgeon.serve.failure import OncePerPeriod
from torchsurgeon.serve.tokens import Tokens
from torchsurgeon.transport import HttpTransport

X = torch.ones(1, 4)
BODY = json.dumps({"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}]}).encode()
INFER = "/v2/models/net/infer"
ONE, OTHER, THIRD = "first-token-0123456789", "second-token-0123456789", "third-token-0123456789"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# devices\n{ONE}\n\n  {OTHER}  \n")
    return path


@pytest.fixture(params=["direct", "asgi"])
def server(request: pytest.FixtureRequest, file: Path) -> Iterator[Server]:
    registry = ModelRegistry(profiler=None)
    registry.add("net", nn.Linear(4, 2).eval(), X)
    app = create_app(registry)
    app.tokens = Tokens(file)
    with Server(app, direct=request.param == "direct") as server:
        yield server
    registry.close()


def ask(port: int, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET" if body is None else "POST", path, body, headers)
        response = connection.getresponse()
        told = {name.lower(): value for name, value in response.getheaders()}
        return response.status, told, json.loads(response.read())


@pytest.mark.parametrize(
    ("path", "body"),
    [(INFER, BODY), ("/v2", None), ("/v2/models/net/fingerprint", None), ("/v2/probe", b"1"), ("/x", None)],
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong-token-0123456789"),
        bearer(ONE[:-1]),
        bearer(ONE + "0"),
        {"Authorization": f"Basic {ONE}"},
        bearer(""),
    ],
)
def test_a_request_without_one_of_the_tokens_is_refused(
    server: Server, path: str, body: bytes | None, headers: dict[str, str]
) -> None:
    status, told, answer = ask(server.port, path, body, **headers)
    assert status == 401
    assert told["www-authenticate"] == "Bearer"
    if headers.get("Authorization", "").startswith("Bearer ") and headers != bearer(""):
        assert "the token that was sent is none of this server's: correct token= (--token-file)" in answer["error"]
    else:
        assert "asks for a token: send it as Authorization: Bearer TOKEN" in answer["error"]
        assert "SplitModule and HttpTransport take token=" in answer["error"]
    assert ONE not in json.dumps(answer)


@pytest.fixture
def heard() -> Iterator[list[logging.LogRecord]]:
    """What a server tells its operator, which no earlier test has told within the last seconds."""
    log, records = logging.getLogger("torchsurgeon.serve.failure"), list[logging.LogRecord]()
    handler, before = logging.Handler(), log.filters
    handler.emit = records.append  # type: ignore[method-assign]
    log.filters = [OncePerPeriod(period_s=60.0)]
    log.addHandler(handler)
    yield records
    log.removeHandler(handler)
    log.filters = before


def test_the_operator_hears_of_refused_tokens_once_in_a_while_and_never_reads_one(
    server: Server, heard: list[logging.LogRecord]
) -> None:
    for _ in range(3):
        assert ask(server.port, INFER, BODY, **bearer(THIRD))[0] == 401
        assert ask(server.port, "/v2")[0] == 401
    said = [record.getMessage() for record in heard]
    assert said == [
        "refused a request: the token that was sent is none of this server's",
        "refused a request: this server asks for a token",
    ]
    assert all(record.levelno == logging.WARNING and record.__dict__["client"] for record in heard)
    assert THIRD not in str([record.__dict__ for record in heard])


@pytest.mark.parametrize("head", [f"GET {INFER}", "GET /v2/load", "POST /v2/probe", f"POST {INFER}"])
def test_a_refused_request_without_a_body_leaves_its_connection_open(server: Server, head: str) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        method, path = head.split()
        for headers in ({}, {}, bearer(ONE)):
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            response.read()
            assert (response.status == 401) == (not headers)
            assert response.headers["connection"] is None
            assert connection.sock is not None


@pytest.mark.parametrize("token", [ONE, OTHER])
def test_each_of_the_tokens_lets_its_client_in(server: Server, token: str) -> None:
    assert ask(server.port, INFER, BODY, **bearer(token))[0] == 200
    assert ask(server.port, INFER, BODY, Authorization=f"bearer   {token}")[0] == 200
    assert ask(server.port, "/x", None, **bearer(token))[0] == 404


def test_health_needs_no_token(server: Server) -> None:
    assert ask(server.port, "/v2/health/live")[0] == 200
    assert ask(server.port, "/v2/health/ready")[0] == 200


def test_a_body_that_is_not_let_in_is_not_read(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{" % INFER.encode())
        assert link.recv(1000).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    ("in_head", "in_trailer", "status"),
    [
        ("", f"Authorization: Bearer {ONE}", 401),
        (f"Authorization: Bearer {ONE}\r\n", "Authorization: Bearer wrong-token-0123456789", 200),
        (f"Authorization: Bearer {ONE}\r\n", "Content-Encoding: gzip", 200),
        (f"Authorization: Bearer {ONE}\r\n", "Torchsurgeon-Deadline-S: soon", 200),
        (f"Authorization: Bearer {ONE}\r\n", "X-Request-Id: forged", 200),
    ],
)
@pytest.mark.parametrize("pause", [False, True], ids=["in one piece", "later"])
def test_what_stands_in_a_trailer_is_no_header(
    server: Server, in_head: str, in_trailer: str, status: int, pause: bool
) -> None:
    """A proxy checks headers, and hands trailers on as they come."""
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{in_head}Transfer-Encoding: chunked\r\n\r\n"
    body = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(head.encode() + body)
        if pause:
            time.sleep(0.05)
        with contextlib.suppress(ConnectionError):
            link.sendall(f"{in_trailer}\r\n\r\n".encode())
        answer = link.recv(1000)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"forged" not in answer


def test_a_token_that_is_taken_back_counts_no_more_on_an_open_connection(server: Server, file: Path) -> None:
    with HttpTransport(server.url, 10, headers=bearer(ONE)) as transport:
        for _ in range(3):
            transport.infer("net", {"input": X}, max_answer_bytes=1000)
        file.write_text(f"{OTHER}\n{THIRD}\n")
        assert server.app.tokens.reload() == 2
        for _ in range(2):
            with pytest.raises(RequestRefusedError) as refused:
                transport.infer("net", {"input": X}, max_answer_bytes=1000)
            assert refused.value.status == 401
    with HttpTransport(server.url, 10, headers=bearer(THIRD)) as transport:
        transport.infer("net", {"input": X}, max_answer_bytes=1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one token"),
        ("# nobody\n", "at least one token"),
        (f"{ONE}\nshort\n", "that in line 2"),
        ("two words 0123456789", "that in line 1"),
        ("ümläut-0123456789abc", "that in line 1"),
    ],
)
def test_a_file_without_proper_tokens_is_refused_and_the_old_ones_stay(file: Path, text: str, message: str) -> None:
    tokens = Tokens(file)
    file.write_text(text)
    with pytest.raises(ServerError, match=message) as refused:
        tokens.reload()
    assert text.strip() == "" or text.strip() not in str(refused.value)
    assert tokens.holder_of(f"Bearer {ONE}".encode())
    with pytest.raises(ServerError, match=message):
        Tokens(file)
    file.unlink()
    with pytest.raises(ServerError, match="cannot be read"):
        tokens.reload()


# --- the command ---


@pytest.mark.filterwarnings("error")
def test_an_address_that_others_reach_needs_a_token_or_to_be_called_insecure() -> None:
    with pytest.raises(ServerError, match=r"--token-file FILE for 0\.0\.0\.0, or --insecure"):
        serve.run({"net": "factories:small"}, host="0.0.0.0", port=0)
    with pytest.raises(UserWarning, match="everyone who can reach this address"):
        serve.run({"net": "factories:small"}, host="0.0.0.0", port=0, insecure=True)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return signed_by_itself(tmp_path_factory.mktemp("tls"))


@contextlib.contextmanager
def command(*options: str) -> Iterator[tuple[subprocess.Popen[str], int, Callable[[], str]]]:
    arguments = [sys.executable, "-m", "torchsurgeon", "serve", "net=factories:small", "--port", "0", *options]
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            line = ""
            while not line.startswith("ready"):
                line = child.stdout.readline()
                assert line
            yield child, int(line.rpartition(":")[2]), child.stdout.readline
        finally:
            child.kill()


def test_the_command_reads_its_tokens_again_on_sighup(file: Path) -> None:
    with command("--token-file", str(file)) as (child, port, said):
        assert ask(port, INFER, BODY)[0] == 401
        assert ask(port, INFER, BODY, **bearer(ONE))[0] == 200
        file.write_text(f"{THIRD}\n")
        child.send_signal(signal.SIGHUP)
        assert said() == "reloaded 1 tokens\n"
        assert ask(port, INFER, BODY, **bearer(ONE))[0] == 401
        assert ask(port, INFER, BODY, **bearer(THIRD))[0] == 200
        file.write_text("")
        child.send_signal(signal.SIGHUP)
        assert said().startswith("the tokens stay as they were: ")
        assert ask(port, INFER, BODY, **bearer(THIRD))[0] == 200


def test_the_command_serves_https_and_asks_clients_for_certificates(certificate: Path) -> None:
    cert, key = str(certificate / "cert.pem"), str(certificate / "key.pem")
    with command("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", cert) as (_, port, _said):
        known = ssl.create_default_context(cafile=cert)
        stranger = ssl.create_default_context(cafile=cert)
        known.load_cert_chain(cert, key)
        url = f"https://127.0.0.1:{port}"
        with HttpTransport(url, 10, ssl_context=known) as transport:
            transport.infer("net", {"input": X}, max_answer_bytes=1000)
        with HttpTransport(url, 5, ssl_context=stranger) as transport, pytest.raises(ServerError):
            transport.infer("net", {"input": X}, max_answer_bytes=1000)


def test_the_command_reads_its_certificates_again_on_sighup(certificate: Path, tmp_path: Path) -> None:
    """New connections get the new certificate, and clients are let in by the new file only; open ones go on."""
    cert, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    (tmp_path / "new").mkdir()
    new = signed_by_itself(tmp_path / "new")
    old = certificate
    for name in ("cert.pem", "key.pem"):
        shutil.copy(old / name, tmp_path / name)
    shutil.copy(old / "cert.pem", ca)

    def known(trusted: Path, shown: Path) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=trusted / "cert.pem")
        context.load_cert_chain(shown / "cert.pem", shown / "key.pem")
        return context

    def let_in(context: ssl.SSLContext) -> bool:
        try:
            with HttpTransport(url, 5, ssl_context=context) as transport:
                transport.infer("net", {"input": X}, max_answer_bytes=1000)
        except ServerError:
            return False
        return True

    options = "--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(ca)
    with command(*options) as (child, port, said):
        url = f"https://127.0.0.1:{port}"
        with HttpTransport(url, 5, ssl_context=known(old, old)) as opened:
            opened.infer("net", {"input": X}, max_answer_bytes=1000)
            assert not let_in(known(new, old))
            assert not let_in(known(old, new))
            cert.write_text("nonsense")
            child.send_signal(signal.SIGHUP)
            assert said().startswith("the certificates stay as they were: ")
            assert let_in(known(old, old))
            for name in ("cert.pem", "key.pem"):
                shutil.copy(new / name, tmp_path / name)
            shutil.copy(new / "cert.pem", ca)
            child.send_signal(signal.SIGHUP)
            assert said() == "reloaded the certificates, for new connections\n"
            assert let_in(known(new, new))
            assert not let_in(known(old, new))
            assert not let_in(known(new, old))
            opened.infer("net", {"input": X}, max_answer_bytes=1000)


def test_a_sighup_that_comes_while_the_server_starts_does_not_end_it(file: Path) -> None:
    arguments = [sys.executable, "-m", "torchsurgeon", "serve", "net=factories:small", "--port", "0"]
    with subprocess.Popen(
        [*arguments, "--token-file", str(file)], env=environment(), stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            status = Path(f"/proc/{child.pid}/status")
            end_s = time.monotonic() + 30
            while not is_ignored_or_caught(status.read_text(), signal.SIGHUP):
                assert time.monotonic() < end_s
            while child.poll() is None and "ready" not in (child.stdout.readline() if is_readable(child) else ""):
                child.send_signal(signal.SIGHUP)
                time.sleep(0.01)
            assert child.poll() is None
        finally:
            child.kill()


def is_ignored_or_caught(status: str, number: int) -> bool:
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith(("SigIgn", "SigCgt")))
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks.values())


def is_readable(child: subprocess.Popen[str]) -> bool:
    return bool(select.select([child.stdout], [], [], 0)[0])


def test_a_split_model_shows_its_token_and_its_certificate(certificate: Path, file: Path) -> None:
    cert, key = str(certificate / "cert.pem"), str(certificate / "key.pem")
    loaded = specs.load("factories:small")
    options = "--token-file", str(file), "--tls-cert", cert, "--tls-key", key, "--tls-client-ca", cert
    way: dict[str, Any] = {"token": ONE, "ca": cert, "cert": (cert, key)}
    with command(*options) as (_, port, _said), torch.no_grad():
        given = {"server": f"https://127.0.0.1:{port}", "name": "net", "partition": 0, "fallback": "error"}
        with ts.SplitModule(loaded.model, X, **given, **way) as split:
            torch.testing.assert_close(split(X), loaded.model(X))
        for wrong, error, message in (
            ({"token": THIRD}, RequestRefusedError, "is none of this server's"),
            ({"token": None}, RequestRefusedError, "asks for a token"),
            ({"ca": True}, ServerUnavailableError, "is not trusted here .*: ca= of SplitModule"),
            (
                {"cert": None},
                ServerUnavailableError,
                "is the server running\\? If it lets in only clients with a certificate, give cert=",
            ),
        ):
            with (
                ts.SplitModule(loaded.model, X, **given, **(way | wrong)) as split,
                pytest.raises(error, match=message),
            ):
                split(X)


def test_a_device_says_which_certificate_it_cannot_use(file: Path) -> None:
    for wrong in ({"verify": str(file)}, {"cert": str(file)}, {"cert": ("/nowhere", "/nowhere")}):
        with pytest.raises(ServerUnavailableError, match="cannot be used"):
            HttpTransport("https://127.0.0.1:1", **wrong)  # type: ignore[arg-type]
    for secret in ("secret\r\nb: c", "secret\u0436", "  ", 7):
        with pytest.raises(ProtocolError, match=r"token= must be .* without a line break") as refused:
            HttpTransport("http://127.0.0.1:1", token=secret)  # type: ignore[arg-type]
        assert "secret" not in str(refused.value)


def test_a_token_that_was_read_with_its_line_break_lets_its_client_in(server: Server) -> None:
    with HttpTransport(server.url, 20, token=f" {ONE}\n") as transport:
        assert transport.get_json("/v2")


def test_a_device_says_which_file_of_a_certificate_is_wrong_and_what_to_give(certificate: Path) -> None:
    cert, key = str(certificate / "cert.pem"), str(certificate / "key.pem")
    url, wrongs = "https://127.0.0.1:1", [
        ({"verify": "/nowhere.pem"}, r"to trust in '/nowhere\.pem' cannot be used: .*No such file.* as ca= of Split"),
        ({"verify": key}, r"to trust in '.*key\.pem' cannot be used: .* as ca= of SplitModule"),
        ({"cert": (cert, "/nowhere.key")}, r"there is no file '/nowhere\.key'; correct its name in cert="),
        ({"cert": cert}, r"'.*cert\.pem' holds no key in PEM format; give both files as cert=\(certificate, key\)"),
        ({"cert": (cert, cert)}, r"'.*cert\.pem' holds no key in PEM format; give both files"),
        ({"cert": key}, r"give files in PEM format, of a certificate and of its own key"),
    ]  # fmt: skip
    for wrong, message in wrongs:
        with pytest.raises(ServerUnavailableError, match=message) as refused:
            HttpTransport(url, **wrong)  # type: ignore[arg-type]
        assert "_ssl.c" not in str(refused.value)
        assert "None" not in str(refused.value)


def test_files_that_are_no_certificates_are_refused_before_a_model_is_loaded(certificate: Path, file: Path) -> None:
    cert, key = str(certificate / "cert.pem"), str(certificate / "key.pem")
    certificates_of(cert, key, cert)
    certificates_of(None, None, None)
    for given in ((str(file), None, None), (cert, None, None), (cert, key, str(file)), ("/nowhere", key, None)):
        with pytest.raises(ServerError, match="cannot be used"):
            certificates_of(*given)
    with pytest.raises(ServerError, match="holds no key; give --tls-key FILE"):
        certificates_of(cert, None, None)
    with pytest.raises(ServerError, match="give --tls-cert"):
        certificates_of(None, key, None)


def test_how_long_a_wrong_token_takes_does_not_depend_on_how_wrong_it_is(file: Path) -> None:
    """Every token is compared, and by a function whose time does not depend on what differs."""
    compared: list[bytes] = []
    tokens = Tokens(file)

    def compare(given: bytes, token: bytes) -> bool:
        compared.append(token)
        return given == token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchsurgeon.serve.tokens.hmac.compare_digest", compare)
        for token in (ONE, OTHER, "x"):
            tokens.holder_of(f"Bearer {token}".encode())
    assert len(compared) == 6
