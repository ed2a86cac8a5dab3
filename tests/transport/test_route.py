"""A server's URL is used rightly, or refused by name."""

from __future__ import annotations

import socket
from pathlib import PurePosixPath
from typing import Any

import pytest
from classifier import EXAMPLE, degraded, net, remote, right, split_of

import torchsurgeon as ts
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.transport import HttpTransport
from torchsurgeon.transport.route import route_to


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (b"http://127.0.0.1:8000", "no text but bytes"),
        (PurePosixPath("http://127.0.0.1"), "no text but"),
        (None, "no text but NoneType"),
        ("", "does not begin with http"),
        ("127.0.0.1:8000", "does not begin with http"),
        ("localhost:8000", "does not begin with http"),
        ("ws://127.0.0.1:8000", "does not begin with http"),
        ("unix:///run/server.sock", "does not begin with http"),
        ("http://", "no host"),
        ("http:///v2", "no host"),
        ("http://127.0.0.1:8000/#model", "a fragment"),
        ("http://127.0.0.1:8000#", "a fragment"),
        ("http://127.0.0.1:8000?model=net", "a query"),
        ("http://127.0.0.1:8000?", "a query"),
        ("http://127.0.0.1:0", "port is 0"),
        ("http://127.0.0.1:65536", "Port out of range"),
        ("http://127.0.0.1:http", "Port could not be cast"),
        ("http://[::1", "Invalid IPv6"),
        ("http://::1:8000", "not a server's URL"),
        ("http://127.0.0.1 :8000", "a space"),
        ("http://127.0.\n0.1:8000", "a space or a control"),
        ("http://127.0.0.1:8000/a\x00b", "a control"),
        ("http://.example", "not a server's URL"),
    ],
)
def test_what_is_no_servers_url_is_refused_by_name(url: Any, why: str) -> None:
    with pytest.raises(ts.ServerUnavailableError, match=r"not a server's URL.*write it like http://") as caught:
        HttpTransport(url)
    assert why in str(caught.value)


@pytest.mark.parametrize("user", ["me:crets@", "me@", ":crets@", "@"])
def test_credentials_are_refused_and_not_repeated(user: str) -> None:
    with pytest.raises(ts.ServerUnavailableError, match="Authorization") as caught:
        HttpTransport(f"http://{user}127.0.0.1:8000")
    assert "crets" not in str(caught.value)
    assert "127.0.0.1:8000" in str(caught.value)


@pytest.mark.parametrize("server", [b"http://127.0.0.1:8000", b"", [b"http://127.0.0.1:8000"]])
def test_a_module_refuses_bytes_by_name(server: Any) -> None:
    with pytest.raises(ts.ServerUnavailableError, match="server must be a URL such as"):
        split_of(server, partition=1)


@pytest.mark.parametrize("form", ["{}", "{}/", " {}\n", "HTTP://127.0.0.1:{port}", "http://LOCALHOST:{port}//"])
def test_forms_of_one_url_reach_the_server(server: Server, form: str) -> None:
    with split_of(form.format(server.url, port=server.port), partition=1) as split:
        assert right(split)
        assert remote(split), degraded(split)


def test_a_path_precedes_every_path_of_the_server_in_the_same_form() -> None:
    route = route_to("http://Edge.example:8000/a b/../ü/".replace(" ", "%20"))
    assert route.url == "http://edge.example:8000/%C3%BC"
    assert route.target == "/%C3%BC"


@pytest.mark.parametrize(
    ("url", "address", "host"),
    [
        ("http://[::1]:8000", ("::1", 8000), "[::1]:8000"),
        ("http://[::1]", ("::1", 80), "[::1]"),
        ("http://[fe80::1%25eth0]:8000", ("fe80::1%eth0", 8000), "[fe80::1]:8000"),
        ("https://edge.example", ("edge.example", 443), "edge.example"),
        ("http://münchen.example:80", ("xn--mnchen-3ya.example", 80), "xn--mnchen-3ya.example:80"),
    ],
)
def test_hosts_in_all_forms(url: str, address: tuple[str, int], host: str) -> None:
    route = route_to(url)
    assert (route.connect_to, route.netloc) == (address, host)


def test_a_server_at_an_ipv6_address_is_used() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 on this machine")
    registry = ModelRegistry(profiler=None)
    registry.add("net", net(), EXAMPLE)
    with Server(create_app(registry), "::1") as running, split_of(running, partition=1) as split:
        assert right(split)
        assert remote(split), degraded(split)
    registry.close()
