"""Two rivals whose two sides exchange pickled tensors over one TCP connection, written down from public code.

Neither is that code; both do what it does for each inference, without what it only does to measure itself.
"""

from __future__ import annotations

import pickle
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from benchmarks.evaluate.rivals.rival import Rival, seconds, steady_rate
from benchmarks.evaluate.study import Study
from benchmarks.support.servers import LENGTH, by_socket, receive_into
from torchsurgeon.backends import Part
from torchsurgeon.emulate import LinkEmulator, SlowDevice
from torchsurgeon.link import PRESETS, Link
from torchsurgeon.planning import Row
from torchsurgeon.planning.rows import LayerCosts
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

PROBE_BYTES = 602_541
"""What the public code of the search sends to measure the rate: a picture of floats, pickled."""
_SKIPPED = ("relu", "dropout", "hardswish", "hardsigmoid")


def serve(graph: LayerGraph) -> int:
    """Run the tail of any point, as a request names it; return the port."""
    points = {point.index: point for point in graph.points}
    tails: dict[int, Callable[..., Sequence[Tensor]]] = {}

    @torch.inference_mode()
    def answer(body: memoryview) -> bytes:
        index, tensors = pickle.loads(body)  # noqa: S301, from the other process of this benchmark
        if index < 0:
            return b"probed"
        if index not in tails:
            tails[index] = tail(graph, points[index])
        return pickle.dumps(tails[index](*tensors)[0])

    return by_socket(answer)


def tail(graph: LayerGraph, point: PartitionPoint) -> Callable[..., Sequence[Tensor]]:
    """Return what computes the model's output tensors from a point's."""
    if point.index == len(graph.layers):
        return lambda *tensors: tensors
    return Part.tail(graph, [spec.name for spec in point.tensors]).segment


def chain_points(graph: LayerGraph) -> list[PartitionPoint]:
    """Return the points at which a single tensor crosses, as between the blocks of a chain.

    Points behind activations and dropout are left out, as the public code leaves them out.
    """
    return [
        point
        for point in graph.points
        if len(point.tensors) == 1
        and (point.index == 0 or not any(kind in graph.layers[point.index - 1].type.lower() for kind in _SKIPPED))
    ]


class _Sides(Rival):
    """Heads that run here, tails that run behind an emulated link, and pickled tensors in between."""

    def __init__(self, name: str, study: Study, port: int, device: SlowDevice, stack: ExitStack) -> None:
        super().__init__(name)
        self.study, self.device = study, device
        self.emulators = [stack.enter_context(LinkEmulator(0, "127.0.0.1", port, PRESETS["wifi"]))]
        self.link = PRESETS["wifi"]
        self.point = study.graph.points[0]
        self._heads: dict[int, Callable[..., Sequence[Tensor]]] = {}
        self._socket = stack.enter_context(socket.create_connection(("127.0.0.1", self.emulators[0].port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def use(self, link: Link) -> None:
        """Take on a link."""
        super().use(link)
        self.link = link

    def infer(self) -> Tensor:
        """Return the network's answer for its example."""
        self.push()
        return self.answer()

    def chosen(self) -> str:
        """Return where it cuts over the present link."""
        return "server" if self.point.index == 0 else self.point.name

    def push(self) -> None:
        """Run the head, and send what it returns."""
        tensors = self.device.call(self.head(self.point), self.study.example) if self.point.index else ()
        self.send(self.point.index, tensors or (self.study.example,))

    def head(self, point: PartitionPoint) -> Callable[..., Sequence[Tensor]]:
        """Return what computes a point's tensors."""
        if point.index not in self._heads:
            self._heads[point.index] = Part.head(self.study.graph, point).segment
        return self._heads[point.index]

    def send(self, index: int, tensors: Sequence[Tensor]) -> None:
        """Send the tensors of a point."""
        body = self.device.call(pickle.dumps, (index, tuple(tensors)))
        self._socket.sendall(LENGTH.pack(len(body)))
        self._socket.sendall(body)

    def received(self) -> bytes:
        """Return the next answer."""
        head = memoryview(bytearray(LENGTH.size))
        receive_into(self._socket, head)
        body = memoryview(bytearray(LENGTH.unpack(head)[0]))
        receive_into(self._socket, body)
        return bytes(body)

    def answer(self) -> Tensor:
        """Return the next answer as a tensor."""
        tensor: Tensor = pickle.loads(self.received())  # noqa: S301, from the other process of this benchmark
        return tensor


class Search(_Sides):
    """What Tjyy-1223/Neurosurgeon does: before each request, measure the rate, and run every head and every tail.

    For each point of the chain the device runs the head twice and the tail once, pickles the boundary to know its size,
    and adds up predicted times. The predictions here are the measured times, so they are better than regressions. In
    the search, the time is multiplied by the device's factor instead of waited for.
    """

    NAME = "a search per request (Tjyy-1223/Neurosurgeon)"

    def __init__(self, study: Study, port: int, device: SlowDevice, stack: ExitStack) -> None:
        super().__init__(self.NAME, study, port, device, stack)
        self._points = chain_points(study.graph)
        self._costs = _eager_rows(study)
        self._pickled: dict[int, int] = {}
        self.search_s = statistics.median(self._search() for _ in range(3))
        self._probe_s: dict[str, float] = {}

    def use(self, link: Link) -> None:
        """Take on a link, measure its rate once, and choose the point that its costs recommend."""
        super().use(link)
        if link.name not in self._probe_s:
            self._probe_s[link.name] = seconds(self._probe)
        rate_byte_s = PROBE_BYTES / self._probe_s[link.name]
        self.point = min(self._points, key=lambda point: self._foretold_s(point, rate_byte_s))

    def replanning_s(self) -> float:
        """Return what the probe and the search take, which precede every request."""
        return self._probe_s[self.link.name] + self.search_s

    def _foretold_s(self, point: PartitionPoint, rate_byte_s: float) -> float:
        costs = self._costs[point.index]
        return costs.head_s + self._pickled[point.index] / rate_byte_s + costs.tail_s

    def _probe(self) -> None:
        self.send(-1, (torch.zeros(PROBE_BYTES, dtype=torch.uint8),))
        self.received()

    def _search(self) -> float:
        """Run the search; return what it takes on the slow device."""
        graph, example = self.study.graph, self.study.example
        taken_s = 0.0
        for point in self._points:
            own = tail(graph, point)
            head = self.head(point)
            begun_s = time.perf_counter()
            for _ in range(2):
                tensors = head(example) if point.index else (example,)
            own(*tensors)
            self._pickled[point.index] = len(pickle.dumps(tensors[0]))
            taken_s += time.perf_counter() - begun_s
        return self.device.factor * taken_s


class OneWay(_Sides):
    """What ParetoPipe's TCP backend does: a fixed cut, chosen from trials of all, and tensors that are pushed.

    The cut is the point of the chain that costs foretell to be the quickest, as its trials would find. The server
    sends its answer back, which the public code does not do, since the inference is for the device here.
    """

    streams = True

    def __init__(self, study: Study, port: int, device: SlowDevice, stack: ExitStack) -> None:
        super().__init__("pushed over TCP (ParetoPipe)", study, port, device, stack)

    def use(self, link: Link) -> None:
        """Take on a link, and cut where its trials would."""
        super().use(link)
        self.point = best_inner(self.study, link)

    def before_stream(self, count: int) -> None:
        """Cut where the slowest stage is the quickest."""
        self.point = best_inner(self.study, self.link, stream=True)
        self.infer()

    def rate(self, count: int) -> float:
        """Return how many answers come in a second of so many, while boundaries are pushed."""
        came_s: list[float] = []

        def receive() -> None:
            for _ in range(count):
                self.answer()
                came_s.append(time.perf_counter())

        answers = threading.Thread(target=receive)
        answers.start()
        for _ in range(count):
            self.push()
        answers.join()
        return steady_rate(came_s)


def best_inner(study: Study, link: Link, *, stream: bool = False) -> PartitionPoint:
    """Return the point inside the network that is foretold to be the quickest, with one tensor sent as it is.

    Args:
        study: the network.
        link: the link.
        stream: whether the slowest of head, uplink and tail counts, as in a stream; otherwise their sum does.
    """
    rows = _eager_rows(study)
    last = len(study.graph.layers)
    inner: Iterator[PartitionPoint] = (
        point for point in study.graph.points if 0 < point.index < last and len(point.tensors) == 1
    )

    def foretold_s(point: PartitionPoint) -> float:
        row = rows[point.index]
        if stream:
            return max(row.head_s, 8 * row.size_bytes / link.uplink_bit_s, row.tail_s)
        return study.foretold_s(row, link.name)

    return min(inner, key=foretold_s)


def _eager_rows(study: Study) -> dict[int, Row]:
    """Return what each point costs in eager PyTorch with its tensors sent as they are."""
    rows = LayerCosts(study.graph, study.device["eager"], study.server["eager"]).rows()
    return {row.index: row for row in rows}
