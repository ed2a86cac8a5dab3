"""Handshake and inference reach the server by one route: through the proxy that the environment names, or directly."""

from __future__ import annotations

import base64
import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from classifier import EXAMPLE, degraded, net, remote, right, split_of, truth
from proxy import Proxy, proxying
from serving import serving
from tcp import reserved_port

import torchsurgeon as ts
from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.transport import HttpTransport

_NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No proxy is named but by the test."""
    for name in _NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy that knows where edge.invalid is, which nothing else on this machine does."""
    with proxying(hosts={"edge.invalid": server.port}) as running:
        yield running


EDGE = "http://edge.invalid:80"


def methods(proxy: Proxy) -> set[str]:
    return {line.split()[0] for line in proxy.seen}


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_handshake_and_inference_go_through_the_proxy(proxy: Proxy, environment: pytest.MonkeyPatch, name: str) -> None:
    # requests takes the upper-case name, too, outside of CGI programs.
    environment.setenv(name, proxy.url)
    with split_of(EDGE, partition=1) as split:
        assert right(split)
        assert remote(split), degraded(split)
    assert methods(proxy) == {"GET", "POST"}
    assert all(line.split()[1].startswith(f"{EDGE}/v2/") for line in proxy.seen)


def test_a_proxy_may_be_named_without_its_scheme(proxy: Proxy, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("http_proxy", f"127.0.0.1:{proxy.port}")
    with split_of(EDGE, partition=1) as split:
        assert right(split)
        assert remote(split), degraded(split)


def test_a_connection_to_the_proxy_is_used_again(proxy: Proxy, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("http_proxy", proxy.url)
    with HttpTransport(EDGE) as transport:
        for _ in range(5):
            transport.probe(10, 10)
    assert (len(proxy.seen), proxy.connections) == (5, 1)


@pytest.mark.parametrize("exempt", ["127.0.0.1", "localhost,127.0.0.0/8", "*"])
def test_no_proxy_holds_for_both(server: Server, proxy: Proxy, environment: pytest.MonkeyPatch, exempt: str) -> None:
    environment.setenv("http_proxy", proxy.url)
    environment.setenv("no_proxy", exempt)
    with split_of(server, partition=1) as split:
        assert right(split)
        assert remote(split), degraded(split)
    assert not proxy.seen


def test_this_machine_is_reached_through_the_proxy_too_unless_no_proxy_names_it(
    server: Server, proxy: Proxy, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("http_proxy", proxy.url)
    with split_of(server, partition=1) as split:
        assert right(split)
        assert remote(split), degraded(split)
    assert methods(proxy) == {"GET", "POST"}


def test_the_environment_is_read_when_the_transport_is_made(
    server: Server, proxy: Proxy, environment: pytest.MonkeyPatch
) -> None:
    with HttpTransport(server.url) as direct:
        environment.setenv("http_proxy", proxy.url)
        direct.get_json("/v2")
        direct.probe(1, 1)
        assert not proxy.seen
        with HttpTransport(server.url) as through:
            environment.delenv("http_proxy")
            through.get_json("/v2")
            through.probe(1, 1)
    assert methods(proxy) == {"GET", "POST"}


def test_the_proxys_password_is_sent_to_it_and_is_in_no_message(proxy: Proxy, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("http_proxy", f"http://me:s%40crets@127.0.0.1:{proxy.port}")
    with HttpTransport(EDGE) as transport:
        transport.get_json("/v2")
        transport.probe(1, 1)
        wanted = base64.b64encode(b"me:s@crets").decode()
        assert all(f"Proxy-Authorization: Basic {wanted}\r\n" in head for head in proxy.seen)
        for status in (b"407 Proxy Authentication Required", b"502 Bad Gateway"):
            proxy.answers = b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n"
            for ask in (lambda: transport.get_json("/v2"), lambda: transport.probe(1, 1)):
                with pytest.raises(ServerUnavailableError) as caught:
                    ask()
                assert f"the proxy {proxy.url} answered {status[:3].decode()}" in str(caught.value)
                assert "crets" not in str(caught.value)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_the_servers_own_error_is_not_blamed_on_the_proxy(
    proxy: Proxy, environment: pytest.MonkeyPatch, status: int
) -> None:
    environment.setenv("http_proxy", proxy.url)
    body = b'{"error": "the model is loading"}'
    proxy.answers = b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)
    with HttpTransport(EDGE) as transport:
        for ask in (lambda: transport.get_json("/v2"), lambda: transport.probe(1, 1)):
            with pytest.raises(ts.RequestRefusedError, match="the model is loading"):
                ask()


def test_a_proxy_that_is_down_is_named_and_the_device_answers(environment: pytest.MonkeyPatch) -> None:
    with reserved_port() as port:
        environment.setenv("http_proxy", f"http://127.0.0.1:{port}")
        with split_of(EDGE, partition=1) as split:
            assert right(split)
            assert f"through the proxy http://127.0.0.1:{port}" in degraded(split)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("socks5://127.0.0.1:1080", "SOCKS is not supported"),
        ("socks5h://u:crets@127.0.0.1:1080", "SOCKS is not supported"),
        ("ftp://127.0.0.1", "http:// or https://"),
        ("http://", "no host"),
        ("http://u:crets@[::1", "not the URL of a proxy"),
        ("http://u:crets@127.0.0.1:port", "not the URL of a proxy"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_refused_by_name_and_the_device_answers(
    environment: pytest.MonkeyPatch, text: str, why: str
) -> None:
    environment.setenv("all_proxy", text)
    with split_of(EDGE, partition=1) as split:
        assert right(split)
        assert why in degraded(split)
        assert "no_proxy=edge.invalid" in degraded(split)
        assert "crets" not in degraded(split)
    with HttpTransport(EDGE) as transport, pytest.raises(ServerUnavailableError, match=why):
        transport.probe(1, 1)


@pytest.mark.parametrize("asks", ["get_json", "probe"])
def test_a_proxy_that_does_not_answer_is_given_up_in_time(environment: pytest.MonkeyPatch, asks: str) -> None:
    with proxying(hosts={"edge.invalid": 1}) as proxy, reserved_port() as silent:
        # The proxy's own connection is refused, so it closes without an answer; the port answers nothing at all.
        for port in (proxy.port, silent):
            environment.setenv("http_proxy", f"http://127.0.0.1:{port}")
            with (
                HttpTransport(EDGE, 1.0) as transport,
                pytest.raises(ServerUnavailableError, match="through the proxy"),
            ):
                transport.get_json("/v2") if asks == "get_json" else transport.probe(1, 1)


# --- https, by CONNECT ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl: apt-get install openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=edge.invalid"]
    command += ["-addext", "subjectAltName=DNS:edge.invalid", "-keyout", str(folder / "key.pem")]
    subprocess.run([*command, "-out", str(folder / "cert.pem")], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def encrypted(certificate: Path) -> Iterator[Server]:
    registry = ModelRegistry(profiler=None)
    registry.add("net", net(), EXAMPLE)
    cert, key = str(certificate / "cert.pem"), str(certificate / "key.pem")
    with Server(create_app(registry), ssl_certfile=cert, ssl_keyfile=key) as server:
        yield server
    registry.close()


def to_edge(certificate: Path, timeout_s: float = 30.0) -> HttpTransport:
    cert = str(certificate / "cert.pem")
    return HttpTransport(
        "https://edge.invalid", timeout_s, ssl_context=ssl.create_default_context(cafile=cert), verify=cert
    )


def test_an_encrypted_server_is_reached_by_a_tunnel(
    encrypted: Server, certificate: Path, environment: pytest.MonkeyPatch
) -> None:
    with proxying(hosts={"edge.invalid": encrypted.port}) as proxy:
        environment.setenv("https_proxy", f"http://me:pw@127.0.0.1:{proxy.port}")
        with to_edge(certificate) as transport, split_of(transport, partition=1) as split:
            assert right(split)
            assert remote(split), degraded(split)
        assert methods(proxy) == {"CONNECT"}
        assert all("CONNECT edge.invalid:443 " in head for head in proxy.seen)
        assert all("roxy-" in head and base64.b64encode(b"me:pw").decode() in head for head in proxy.seen)


@pytest.mark.parametrize("asks", ["get_json", "probe"])
def test_a_tunnel_that_the_proxy_refuses_is_its_error(
    certificate: Path, environment: pytest.MonkeyPatch, asks: str
) -> None:
    with proxying(answers=b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n") as proxy:
        environment.setenv("https_proxy", proxy.url)
        with (
            to_edge(certificate) as transport,
            pytest.raises(ServerUnavailableError, match=f"the proxy {proxy.url} answered 407 Who are you"),
        ):
            transport.get_json("/v2") if asks == "get_json" else transport.probe(1, 1)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK", b"SSH-2.0-x\r\n\r\n", b"\x00" * 40_000])
@pytest.mark.parametrize("asks", ["get_json", "probe"])
def test_a_tunnel_to_nowhere_ends_in_time(
    certificate: Path, environment: pytest.MonkeyPatch, answer: bytes, asks: str
) -> None:
    with proxying(answers=answer) as proxy:
        environment.setenv("https_proxy", proxy.url)
        with (
            to_edge(certificate, 2.0) as transport,
            pytest.raises((ServerUnavailableError, ts.ProtocolError), match="through the proxy"),
        ):
            transport.get_json("/v2") if asks == "get_json" else transport.probe(1, 1)


def test_two_layers_of_encryption_are_refused(certificate: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("https_proxy", "https://127.0.0.1:9")
    with to_edge(certificate) as transport, pytest.raises(ServerUnavailableError, match="proxies with http://"):
        transport.get_json("/v2")


def test_a_server_behind_a_proxy_may_be_in_another_process_tree(proxy: Proxy, environment: pytest.MonkeyPatch) -> None:
    # A forked child makes connections of its own, by the same route.
    environment.setenv("http_proxy", proxy.url)
    with HttpTransport(EDGE) as transport:
        transport.probe(1, 1)
        child = os.fork()
        if not child:
            try:
                transport.probe(1, 1)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert proxy.connections == 2


def test_answers_through_a_proxy_are_the_models_own(environment: pytest.MonkeyPatch) -> None:
    model = net(3)
    with serving(model, EXAMPLE) as server, proxying(hosts={"edge.invalid": server.port}) as proxy:
        environment.setenv("http_proxy", proxy.url)
        with split_of(EDGE, model, partition=1) as split:
            x = torch.rand(4, 3, 32, 32)
            assert torch.equal(split(x), truth(x, model))
            assert remote(split), degraded(split)


_TRUSTED = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@pytest.mark.parametrize("named", _TRUSTED)
def test_handshake_and_inference_trust_the_same_authorities(
    encrypted: Server, certificate: Path, environment: pytest.MonkeyPatch, named: str
) -> None:
    """Those of the system, for which a file stands here, or those that the environment names for requests."""
    for name in _TRUSTED:
        environment.delenv(name, raising=False)
    with proxying(hosts={"edge.invalid": encrypted.port}) as proxy:
        environment.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        with HttpTransport("https://edge.invalid") as transport:
            for ask in (lambda: transport.get_json("/v2"), lambda: transport.probe(10, 0)):
                with pytest.raises(ts.ServerUnavailableError, match="certificate verify failed"):
                    ask()
        environment.setenv(named, str(certificate / "cert.pem"))
        with HttpTransport("https://edge.invalid") as transport, split_of(transport, partition=1) as split:
            assert transport.get_json("/v2")
            transport.probe(10, 0)
            assert right(split)
            assert remote(split), degraded(split)
