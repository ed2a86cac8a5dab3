"""How requests reach a server: what its URL says, and the proxy that the environment names for it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import SplitResult, urlsplit

import requests
from requests.models import PreparedRequest
from requests.utils import get_auth_from_url, get_environ_proxies, select_proxy
from urllib3.util import make_headers

from torchsurgeon.errors import ServerUnavailableError, short

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Route:
    """The way to one server. Handshake and inference take the same.

    Attributes:
        url: the server's URL in its normal form, without a slash at its end.
        netloc: host and port as the ``Host`` header names them.
        connect_to: host and port of the server, or of the proxy.
        encrypts_as: the name that the certificate of the other end has to be for; None where nothing is encrypted.
        target: what stands before the path in a request's first line.
        headers: header lines for the proxy, in every request.
        tunnel: the request by which the proxy is asked to connect to the server; empty where it is not.
        proxy: the proxy's URL without credentials; None without a proxy.
        proxy_url: the proxy's URL with its credentials, for ``requests``; None without a proxy.
        refused_because: why the proxy cannot be used; None where it can, or without a proxy.
    """

    url: str
    netloc: str
    connect_to: tuple[str, int]
    encrypts_as: str | None
    target: str
    headers: str = ""
    tunnel: bytes = b""
    proxy: str | None = None
    proxy_url: str | None = None
    refused_because: str | None = None

    @property
    def through(self) -> str:
        """Words that name the proxy; empty without one."""
        return "" if self.proxy is None else f" through the proxy {self.proxy}"

    def check(self) -> None:
        """Check that requests can take this way.

        Raises:
            ServerUnavailableError: the environment names a proxy of another kind.
        """
        if self.refused_because is not None:
            host = urlsplit(self.url).hostname
            raise ServerUnavailableError(
                f"{self.url[:300]} is not asked, since the environment names the proxy {self.proxy} for it, and "
                f"{self.refused_because}; set no_proxy={host} to connect without it"
            )

    def context(self, given: ssl.SSLContext | None) -> ssl.SSLContext | None:
        """Return how connections are encrypted: as ``given``, or by default; None where they are not."""
        if self.encrypts_as is None:
            return None
        return given if given is not None and self.url.startswith("https:") else ssl.create_default_context()


def route_to(url: object) -> Route:
    """Return the way to a server, through the proxy that the environment names now, if it names one.

    Which proxy that is, and for which hosts there is none (``no_proxy``), is decided by ``requests``.

    Args:
        url: the server's URL.

    Raises:
        ServerUnavailableError: ``url`` is not the URL of a server.
    """
    parts = _checked(url)
    # A zone, such as that of [fe80::1%25eth0], is known on this machine only.
    host = (parts.hostname or "").replace("%25", "%")
    port = parts.port or _PORTS[parts.scheme]
    netloc = parts.netloc if "%" not in host else f"[{host.partition('%')[0]}]:{port}"
    encrypts_as = host if parts.scheme == "https" else None
    base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    direct = Route(base, netloc, (host, port), encrypts_as, parts.path.rstrip("/"))
    found = select_proxy(base, get_environ_proxies(base))
    return direct if not found else _through(direct, parts, found)


def _through(direct: Route, parts: SplitResult, proxy_url: str) -> Route:
    proxy_url = proxy_url if "://" in proxy_url else f"http://{proxy_url}"
    proxy, authorization, refused = None, "", None
    try:
        proxy = urlsplit(proxy_url)
        label = f"{proxy.scheme}://{proxy.netloc.rpartition('@')[2]}"
        connect_to = (proxy.hostname or "", proxy.port or _PORTS.get(proxy.scheme, 1080))
        if "@" in proxy.netloc:
            fields = make_headers(proxy_basic_auth=":".join(get_auth_from_url(proxy_url)))
            authorization = f"Proxy-Authorization: {fields['proxy-authorization']}\r\n"
    except ValueError:
        # The text itself is not quoted, since it may hold a password.
        label, connect_to, refused = "(an unreadable URL)", ("", 0), "that is not the URL of a proxy"
    if proxy is not None and refused is None:
        if proxy.scheme.startswith("socks"):
            refused = "SOCKS is not supported: name an HTTP proxy"
        elif proxy.scheme not in _PORTS:
            refused = "only proxies with http:// or https:// are supported"
        elif not proxy.hostname:
            refused = "that URL has no host"
        elif proxy.scheme == parts.scheme == "https":
            refused = "a server with https:// is reached through proxies with http:// only"
    there = f"{direct.connect_to[0]}:{direct.connect_to[1]}"
    there = there if ":" not in direct.connect_to[0] else f"[{direct.connect_to[0]}]:{direct.connect_to[1]}"
    tunnels = parts.scheme == "https"
    return Route(
        direct.url,
        direct.netloc,
        connect_to,
        direct.encrypts_as if tunnels else connect_to[0] if proxy is not None and proxy.scheme == "https" else None,
        direct.target if tunnels else direct.url,
        headers="" if tunnels else authorization,
        tunnel=f"CONNECT {there} HTTP/1.1\r\nHost: {there}\r\n{authorization}\r\n".encode() if tunnels else b"",
        proxy=label,
        proxy_url=proxy_url,
        refused_because=refused,
    )


def _checked(url: object) -> SplitResult:
    if not isinstance(url, str):
        _refuse(short(url), f"it is no text but {type(url).__name__}")
    text = url.strip()
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        _refuse(_shown(text), "it cannot be read" if "@" in text else short(error))
    if "@" in parts.netloc:
        _refuse(_shown(text), 'it holds a user or a password; give HttpTransport(url, headers={"Authorization": …})')
    if any(character.isspace() or not character.isprintable() for character in text):
        _refuse(_shown(text), "it holds a space or a control character")
    if parts.scheme not in _PORTS:
        _refuse(_shown(text), "it does not begin with http:// or https://")
    for mark, name in (("#", "a fragment"), ("?", "a query")):
        if mark in text:
            _refuse(_shown(text), f"it has {name}, which no request would carry")
    if not parts.hostname:
        _refuse(_shown(text), "it has no host")
    if port == 0:
        _refuse(_shown(text), "its port is 0")
    prepared = PreparedRequest()
    try:
        prepared.prepare_url(text, None)
    except (requests.RequestException, ValueError) as error:
        _refuse(_shown(text), short(error, quote=False))
    return urlsplit(str(prepared.url))


def _shown(text: str) -> str:
    """Return a URL as messages quote it, without credentials."""
    before, at, behind = text.rpartition("@")
    return short(f"{before.partition('//')[0]}//…@{behind}" if at else text)


def _refuse(shown: str, why: str) -> NoReturn:
    raise ServerUnavailableError(f"{shown} is not a server's URL: {why}; write it like http://127.0.0.1:8000")
