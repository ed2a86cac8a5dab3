"""The page at ``/``: it shows a server under real load, loads nothing from elsewhere, and leaks nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from browser import Browser
from torch import Tensor, nn

from torchsurgeon.cutting.partition import cut
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.tokens import Tokens
from torchsurgeon.transport import HttpTransport

# The name of a layer that would be more than text in a page, and so of a tensor that is sent.
EVIL = "<img src=x onerror=hacked=1>"
TOKEN = "a-token-0123456789"
HOLD_S = 60


class Layers(nn.Module):
    """Two layers, of which one has a name that does harm."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(EVIL, nn.Linear(8, 8))
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(getattr(self, EVIL)(x))


X = torch.ones(1, 8)


def registry_with(*announced: str) -> ModelRegistry:
    registry = ModelRegistry(profiler=None)
    registry.add("net", Layers().eval(), X)
    for name in announced:
        registry.announce(name)
    return registry


@contextlib.contextmanager
def under_load(server: Server, threads: int = 3) -> Iterator[None]:
    """Ask a server by several clients at once for two cuts of its model, of which one three times as often."""
    graph = server.app.registry.get("net").graph
    point = graph.points[1]
    with torch.no_grad():
        (sent,) = cut(graph, point).head(X)
    asked = [{"x": X}] * 3 + [{point.tensors[0].name: sent}]
    over = threading.Event()

    def client() -> None:
        with HttpTransport(server.url, 20, token=TOKEN) as transport:
            while not over.is_set():
                for tensors in asked:
                    transport.infer("net", tensors, max_answer_bytes=10_000)
                time.sleep(0.01)

    clients = [threading.Thread(target=client) for _ in range(threads)]
    for one in clients:
        one.start()
    try:
        yield
    finally:
        over.set()
        for one in clients:
            one.join()


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + HOLD_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.1)


def shown(browser: Browser) -> list[list[str]]:
    """The table's rows, as texts."""
    found = browser.run(
        "return [...document.querySelectorAll('#models tr')].map(row => [...row.cells].map(cell => cell.innerText))"
    )
    assert isinstance(found, list)
    return found


def text(browser: Browser, selector: str) -> str:
    return str(browser.run("return document.querySelector(arguments[0]).innerText", selector))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(1250, 1100) as browser:
        yield browser


def test_the_page_shows_a_server_under_load_in_light_and_in_dark(browser: Browser, tmp_path: Path) -> None:
    registry = registry_with("later")
    with contextlib.closing(registry), Server(create_app(registry)) as server, contextlib.ExitStack() as stack:
        browser.prefer("light")
        browser.visit(f"{server.url}/")
        # It is opened before any request comes, and shows the model that is asked then.
        until(lambda: len(shown(browser)) == 2)
        stack.enter_context(under_load(server))
        until(lambda: len(shown(browser)) == 2 and "%" in text(browser, "#cuts"))
        until(
            lambda: browser.run("return document.querySelectorAll('#rate .series')[0].getAttribute('d').includes('L')")
        )
        later, net = shown(browser)
        assert later[:2] == ["later", "loading"]
        assert net[:2] == ["net", "ready"]
        answers, waiting, *times = net[2:]
        assert float(answers) > 0
        assert int(waiting) >= 0
        assert all(float(one) >= 0 for one in times)
        median_ms, ninety_ms, most_ms = map(float, times[-3:])
        assert 0 < median_ms <= ninety_ms <= most_ms
        assert text(browser, "#state") == "loading"
        assert text(browser, "#shown") == "net"
        assert int(text(browser, "#connections").split()[0]) >= 3
        # Three in four requests have the first cut.
        until(lambda: text(browser, "#cuts").split("\n")[:2] == ["x", "75 %"])
        assert EVIL in text(browser, "#cuts")
        assert browser.run("return typeof hacked") == "undefined"
        labels = browser.run("return [...document.querySelectorAll('#latency .label')].map(one => one.textContent)")
        assert labels == ["99 in 100", "90 in 100", "median"]
        backgrounds = []
        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            backgrounds.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
        assert len(set(backgrounds)) == 2
        for width in (390, 1250):
            browser.resize(width, 1100)
            until(lambda: browser.run("return document.documentElement.scrollWidth <= innerWidth"))
        # Everything came from this server, and nothing was complained of.
        loaded = browser.run("return performance.getEntriesByType('resource').map(one => one.name)")
        assert set(loaded) == {f"{server.url}/v2/load"}
        assert browser.messages() == []
        registry.add("later", Layers().eval(), X)
        until(lambda: text(browser, "#state") == "ready")
        server.app.drain()
        until(lambda: text(browser, "#state") == "stopping")
    until(lambda: text(browser, "#state").startswith("no answer"))


def test_the_page_shows_nothing_without_a_token_where_the_server_has_tokens(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(TOKEN)
    registry = registry_with()
    app = create_app(registry)
    app.tokens = Tokens(tmp_path / "tokens")
    with contextlib.closing(registry), Server(app) as server, under_load(server, threads=1):
        browser.visit(f"{server.url}/")
        until(lambda: text(browser, "#state") == "a token is needed")
        assert shown(browser) == []
        assert "net" not in browser.run("return document.body.innerText").split()
        browser.press("#token", "wrong-token-0123456789\n")
        until(lambda: "does not know this token" in text(browser, "#refused"))
        assert shown(browser) == []
        browser.press("#token", f"{TOKEN}\n")
        until(lambda: [row[:2] for row in shown(browser)] == [["net", "ready"]])
        assert TOKEN not in browser.run("return document.documentElement.outerHTML + location + document.cookie")
        assert browser.run("return localStorage.length + sessionStorage.length") == 0
        browser.visit(f"{server.url}/")
        until(lambda: text(browser, "#state") == "a token is needed")


def ask(server: Server, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def test_the_page_itself_holds_nothing_and_may_load_nothing(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(TOKEN)
    registry = registry_with()
    app = create_app(registry)
    app.tokens = Tokens(tmp_path / "tokens")
    with contextlib.closing(registry), Server(app) as server:
        status, headers, page = ask(server, "GET", "/")
        assert status == 200
        assert headers["content-type"] == "text/html; charset=utf-8"
        rules = headers["content-security-policy"]
        assert rules.startswith("default-src 'none'; connect-src 'self'")
        assert "unsafe" not in rules
        assert b"http://www.w3.org/2000/svg" in page
        assert page.count(b"http") == page.count(b"http://www.w3.org/2000/svg")
        assert ask(server, "GET", "/v2/load")[0] == 401
        assert ask(server, "POST", "/")[0] == 405
        app.has_page = False
        status, headers, body = ask(server, "GET", "/")
        assert (status, headers["content-type"]) == (404, "application/json")
        assert "error" in json.loads(body)
