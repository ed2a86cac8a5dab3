"""A small network behind a server of its own core, beside running it here and servers written by hand."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest
import torch
from torch import Tensor

from benchmarks.support.servers import ask_socket, classifier, serve_classifier
from benchmarks.support.side_by_side import SideBySide
from benchmarks.support.tail_process import beside
from torchsurgeon.transport import HttpTransport

ANSWER_BYTES = 4_000
CLIENTS, EACH = 8, 4


@pytest.fixture(scope="module")
def ports(device: torch.device) -> Iterator[dict[str, int]]:
    with beside(serve_classifier, str(device)) as told:
        yield told


def clients(ports: dict[str, int], x: Tensor, stack: ExitStack) -> dict[str, Callable[[], object]]:
    """One client of each server, with a connection of its own."""
    ask = ask_socket(ports["raw"], ANSWER_BYTES, stack)
    link = stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", ports["starlette"])))
    transport = stack.enter_context(HttpTransport(f"http://127.0.0.1:{ports['http']}"))

    def by_http() -> object:
        link.request("POST", "/infer", x.cpu().numpy().tobytes())
        return link.getresponse().read()

    return {
        "raw socket by hand": lambda: ask(x.cpu().numpy().data.cast("B")),
        "Starlette by hand": by_http,
        "torchsurgeon": lambda: transport.infer("classifier", {"input": x}, max_answer_bytes=ANSWER_BYTES),
    }


@pytest.mark.benchmark(group="a served network, one client")
def test_one_client(side_by_side: SideBySide, device: torch.device, ports: dict[str, int]) -> None:
    model, x = classifier(str(device))
    with ExitStack() as stack:
        side_by_side({"the network, not served": lambda: model(x), **clients(ports, x, stack)})


@pytest.mark.benchmark(group=f"a served network, {CLIENTS} clients with {EACH} inferences each")
def test_several_clients(side_by_side: SideBySide, device: torch.device, ports: dict[str, int]) -> None:
    _, x = classifier(str(device))
    with ThreadPoolExecutor(CLIENTS) as pool, ExitStack() as stack:
        connected = [clients(ports, x, stack) for _ in range(CLIENTS)]

        def all_at_once(name: str) -> Callable[[], object]:
            def inferences(one: dict[str, Callable[[], object]]) -> None:
                for _ in range(EACH):
                    one[name]()

            return lambda: list(pool.map(inferences, connected))

        side_by_side({name: all_at_once(name) for name in connected[0]})
