"""A wireless link and a slow device on one machine, for demos, tests and benchmarks.

:class:`LinkEmulator` is a TCP proxy whose two directions have the rate and delay of a link. Each direction is one
bottleneck shared by all connections: bytes queue in a bounded buffer, pass at the link's rate, and arrive half a round
trip later. When bytes pass is computed from when the bytes before them passed, not from when a timer fired, so that late
timers delay single bytes but never add up. Headers, loss and the slow start of TCP are not emulated.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import math
import select
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from torchsurgeon.errors import DeviceError, LinkError
from torchsurgeon.link import BandwidthTrace, Link, TracedLink, parse_profile

__all__ = ["LinkCounts", "LinkEmulator", "SlowDevice", "parse_profile"]

_T = TypeVar("_T")

_CHUNK_S = 2e-3
_LEAST_CHUNK_BYTES, _MOST_CHUNK_BYTES = 1500, 1 << 16
_BUFFER_S = 0.1
_LEAST_BUFFER_BYTES = 1 << 14
_SOCKET_BUFFER_BYTES = 1 << 17
_MOST_SELECT_FD = 1024
_ACCEPT_PAUSE_S = 0.1
_MOST_DRAINED_CHUNKS = 8
_SPIN_S = 3e-4


@dataclass(frozen=True)
class LinkCounts:
    """What passed an emulated link: connections accepted, and payload bytes that arrived in each direction."""

    connections: int
    uplink_bytes: int
    downlink_bytes: int


class _Side:
    """One socket of a connection, and what the loop waits for on it."""

    def __init__(self, sock: socket.socket, selector: selectors.BaseSelector, owner: _Connection) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._selector = selector
        self._owner = owner
        self._mask = 0

    def wait_for(self, event: int, wanted: bool = True) -> None:
        mask = self._mask | event if wanted else self._mask & ~event
        if mask == self._mask:
            return
        if not mask:
            self._selector.unregister(self.sock)
        elif self._mask:
            self._selector.modify(self.sock, mask, (self._owner, self))
        else:
            self._selector.register(self.sock, mask, (self._owner, self))
        self._mask = mask

    def close(self, *, reset: bool = False) -> None:
        self.wait_for(self._mask, False)
        try:
            if reset:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                # Closing with bytes unread resets the connection, and the peer may lose what it was sent before.
                for _ in range(_MOST_DRAINED_CHUNKS):
                    if not self.sock.recv(_MOST_CHUNK_BYTES):
                        break
        except OSError:
            pass
        self.sock.close()


class _Flow:
    """One direction of one connection: `source` is read, `sink` written once it is there."""

    def __init__(self, connection: _Connection, path: _Path) -> None:
        self.connection = connection
        self.path = path
        self.source: _Side | None = None
        self.sink: _Side | None = None
        self.unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        self.readable_since_s = 0.0
        self.parked = False
        self.ended = False
        self.end_arrived = False
        self.done = False

    def wait_for_room(self, now_s: float) -> None:
        """Have the path read the source as soon as its queue has room."""
        self.parked = False
        self.readable_since_s = now_s
        self.path.readable.append(self)


class _Connection:
    def __init__(self, uplink: _Path, downlink: _Path) -> None:
        self.up = _Flow(self, uplink)
        self.down = _Flow(self, downlink)
        self.connecting = False
        self.closed = False

    def sides(self) -> Iterator[_Side]:
        return (side for side in (self.up.source, self.down.source) if side is not None)

    def close(self, *, reset: bool = False) -> None:
        self.closed = True
        for side in self.sides():
            side.close(reset=reset)


class _Packet(NamedTuple):
    """Bytes on their way; none at all mean that the source's side ended, in order or by a reset."""

    flow: _Flow
    data: bytes
    arrived_s: float
    reset: bool = False


class _Path:
    """One direction of the link: a bounded queue, a transmitter at the link's rate, and the delay of the way.

    All times are on the emulator's clock, and only :meth:`advance` looks at the present: what happened since is
    worked out as if it had been attended to at once.
    """

    def __init__(self) -> None:
        self.readable: deque[_Flow] = deque()
        self.passed_bytes = 0
        self._queue: deque[_Packet] = deque()
        self._queued_bytes = 0
        self._free_at_s = -math.inf
        self._head_passed_s: float | None = None
        self._flying: deque[tuple[float, _Packet]] = deque()
        self._last_arrival_s = -math.inf

    def shape(self, rate: float | BandwidthTrace, delay_s: float, now_s: float) -> None:
        """Take on another rate and one-way delay from now on; what has passed keeps its time of arrival."""
        self.advance(now_s)
        if isinstance(rate, BandwidthTrace):
            mean_bit_s = rate.mean_bit_s
            self._passed_s: Callable[[float, int], float] = lambda start_s, size_bytes: (
                now_s + rate.delivered_at(start_s - now_s, size_bytes)
            )
        else:
            mean_bit_s = rate
            self._passed_s = lambda start_s, size_bytes: start_s + size_bytes * 8 / rate
        self.delay_s = delay_s
        self.chunk_bytes = min(max(int(mean_bit_s * _CHUNK_S / 8), _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES)
        self.buffer_bytes = max(int(mean_bit_s * _BUFFER_S / 8), _LEAST_BUFFER_BYTES)
        self._free_at_s = now_s
        self._head_passed_s = None

    @property
    def full(self) -> bool:
        return self._queued_bytes >= self.buffer_bytes

    def push(self, packet: _Packet) -> None:
        self._queue.append(packet)
        self._queued_bytes += len(packet.data)

    def advance(self, now_s: float) -> None:
        """Let everything pass the transmitter that would have passed by now."""
        while self._queue and (passed_s := self._head_passes()) <= now_s:
            packet = self._queue.popleft()
            self._head_passed_s = None
            self._queued_bytes -= len(packet.data)
            self._free_at_s = passed_s
            self._last_arrival_s = max(passed_s + self.delay_s, self._last_arrival_s)
            self._flying.append((self._last_arrival_s, packet))

    def arrivals(self, now_s: float) -> Iterator[_Packet]:
        while self._flying and self._flying[0][0] <= now_s:
            packet = self._flying.popleft()[1]
            self.passed_bytes += len(packet.data)
            yield packet

    def wake_at_s(self) -> float:
        """When there is something to do next: an arrival, or room for bytes that wait to be read."""
        if self.readable and not self.full:
            return -math.inf
        room_s = self._head_passes() if self._queue and self.readable else math.inf
        if self._flying:
            return min(room_s, self._flying[0][0])
        return min(room_s, self._head_passes() + self.delay_s) if self._queue else math.inf

    def _head_passes(self) -> float:
        if self._head_passed_s is None:
            head = self._queue[0]
            self._head_passed_s = self._passed_s(max(self._free_at_s, head.arrived_s), len(head.data))
        return self._head_passed_s


class LinkEmulator:
    """A TCP proxy that makes `target_host:target_port` look as if it were behind `link`.

    The port is listened on from construction, connections are served between :meth:`start` and :meth:`close` (or in a
    ``with`` block), or for as long as :meth:`run` blocks. Opening a connection costs one round trip, as TCP's handshake
    does. A half that its sender closes is closed at the other end in order, after the bytes before; so is a connection
    whose target is not there. What waits in the emulator is bounded by a tenth of a second of the link's rate in each
    direction, again for each receiver that does not read, and by the sockets' buffers: a sender that outruns the link
    is held back.

    :param listen_port: 0 for a free one, which :attr:`port` then tells
    :param link: constant rates or a replay of recordings, which starts with the emulator
    :raises LinkError: the port cannot be listened on, or the target's name not resolved
    """

    def __init__(
        self,
        listen_port: int,
        target_host: str,
        target_port: int,
        link: Link | TracedLink,
        *,
        host: str = "127.0.0.1",
    ) -> None:
        try:
            family, kind, proto, _, self._target = socket.getaddrinfo(
                target_host, target_port, type=socket.SOCK_STREAM
            )[0]
        except (OSError, OverflowError) as error:
            raise LinkError(f"no address for the link's target {target_host}:{target_port}: {error}") from error
        self._target_socket = (family, kind, proto)
        self._listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bound_buffers(self._listener)
            self._listener.bind((host, listen_port))
            self._listener.listen(128)
        except (OSError, OverflowError) as error:
            self._listener.close()
            reason = getattr(error, "strerror", None) or error
            raise LinkError(f"cannot listen on {host}:{listen_port}: {reason}; port 0 takes a free one") from error
        self._listener.setblocking(False)
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self._link = link
        self._link_is_new = True
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._uplink, self._downlink = _Path(), _Path()
        self._connections: set[_Connection] = set()
        self._accepted = 0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_order = itertools.count()
        self._thread: threading.Thread | None = None
        self._lifecycle = threading.Lock()
        self._running = False
        self._stopping = False

    @property
    def link(self) -> Link | TracedLink:
        """The link emulated now."""
        return self._link

    def set_link(self, link: Link | TracedLink) -> None:
        """Change the link under open connections; bytes already on their way arrive as before."""
        self._link = link
        self._link_is_new = True
        self._wake()

    def counts(self) -> LinkCounts:
        """What has passed so far."""
        return LinkCounts(self._accepted, self._uplink.passed_bytes, self._downlink.passed_bytes)

    def start(self) -> LinkEmulator:
        """Serve connections in a thread of its own until :meth:`close`."""
        self._thread = threading.Thread(target=self.run, name=f"link emulator {self.port}", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop serving and close every connection; from any thread, any number of times."""
        with self._lifecycle:
            self._stopping = True
            if not self._running:
                self._release()
        self._wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> LinkEmulator:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self) -> None:
        """Serve connections in the calling thread until :meth:`close` is called from elsewhere, or an interrupt."""
        with self._lifecycle:
            if self._stopping:
                return
            self._running = True
        try:
            self._listen()
            self._selector.register(self._wake_in, selectors.EVENT_READ, self._drain_wake)
            while not self._stopping:
                self._step()
        finally:
            self._release()

    def _release(self) -> None:
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._selector.close()
        for sock in (self._listener, self._wake_in, self._wake_out):
            sock.close()

    def _wake(self) -> None:
        try:
            self._wake_out.send(b"x")
        except OSError:
            pass

    def _drain_wake(self) -> None:
        self._wake_in.recv(4096)

    def _step(self) -> None:
        now_s = time.monotonic()
        if self._link_is_new:
            self._link_is_new = False
            self._take_on(self._link, now_s)
        while self._timers and self._timers[0][0] <= now_s:
            heapq.heappop(self._timers)[2]()
        wake_s = self._timers[0][0] if self._timers else math.inf
        for path in (self._uplink, self._downlink):
            self._pump(path, now_s)
            wake_s = min(wake_s, path.wake_at_s())
        for key, mask in self._poll(wake_s):
            if callable(key.data):
                key.data()
            else:
                self._attend(*key.data, mask)

    def _take_on(self, link: Link | TracedLink, now_s: float) -> None:
        rates = (link.uplink_bit_s, link.downlink_bit_s) if isinstance(link, Link) else (link.uplink, link.downlink)
        for path, rate in zip((self._uplink, self._downlink), rates, strict=True):
            path.shape(rate, link.round_trip_s / 2, now_s)

    def _poll(self, wake_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        timeout_s = None if wake_s == math.inf else max(wake_s - time.monotonic(), 0.0)
        # epoll waits in whole milliseconds, which is several percent of a short round trip; select on it does not.
        fileno = getattr(self._selector, "fileno", lambda: _MOST_SELECT_FD)()
        if fileno >= _MOST_SELECT_FD:
            return self._selector.select(timeout_s)
        return self._selector.select(0) if select.select([fileno], [], [], timeout_s)[0] else []

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._timer_order), action))

    def _listen(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # A pending connection that cannot be accepted keeps the listener readable: without a pause, a busy loop.
                self._selector.unregister(self._listener)
                self._after(_ACCEPT_PAUSE_S, self._listen)
            return
        self._accepted += 1
        connection = _Connection(self._uplink, self._downlink)
        connection.up.source = connection.down.sink = _Side(sock, self._selector, connection)
        self._connections.add(connection)
        self._after(self._uplink.delay_s, lambda: self._connect(connection))
        self._after(self._uplink.delay_s + self._downlink.delay_s, lambda: self._read_again(connection.up))

    def _connect(self, connection: _Connection) -> None:
        if connection.closed:
            return
        try:
            sock = socket.socket(*self._target_socket)
        except OSError:
            self._refuse(connection)
            return
        _bound_buffers(sock)
        connection.up.sink = connection.down.source = server = _Side(sock, self._selector, connection)
        connection.connecting = True
        code = sock.connect_ex(self._target)
        if code == errno.EINPROGRESS:
            server.wait_for(selectors.EVENT_WRITE)
        else:
            self._connected(connection, code)

    def _connected(self, connection: _Connection, code: int) -> None:
        if code:
            self._refuse(connection)
            return
        connection.connecting = False
        self._flush(connection.up)
        self._read_again(connection.down)

    def _refuse(self, connection: _Connection) -> None:
        connection.up.ended = True
        self._downlink.push(_Packet(connection.down, b"", time.monotonic()))
        connection.up.done = True

    def _read_again(self, flow: _Flow) -> None:
        if flow.source is not None and not flow.ended and not flow.connection.closed:
            flow.source.wait_for(selectors.EVENT_READ)

    def _attend(self, connection: _Connection, side: _Side, mask: int) -> None:
        if connection.closed:
            return
        incoming, outgoing = (
            (connection.up, connection.down) if side is connection.up.source else (connection.down, connection.up)
        )
        if connection.connecting and side is connection.up.sink:
            side.wait_for(selectors.EVENT_WRITE, False)
            self._connected(connection, side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            return
        if mask & selectors.EVENT_READ:
            side.wait_for(selectors.EVENT_READ, False)
            incoming.wait_for_room(time.monotonic())
        if mask & selectors.EVENT_WRITE:
            self._flush(outgoing)

    def _pump(self, path: _Path, now_s: float) -> None:
        path.advance(now_s)
        while self._read(path):
            path.advance(now_s)
        for packet in path.arrivals(now_s):
            self._deliver(packet)

    def _read(self, path: _Path) -> bool:
        took = False
        while path.readable and not path.full:
            flow = path.readable.popleft()
            source = flow.source
            if source is None or flow.ended or flow.connection.closed:
                continue
            if flow.unsent_bytes >= path.buffer_bytes:
                flow.parked = True
                continue
            try:
                packet = _Packet(flow, source.sock.recv(path.chunk_bytes), flow.readable_since_s)
            except BlockingIOError:
                source.wait_for(selectors.EVENT_READ)
                continue
            except OSError:
                packet = _Packet(flow, b"", flow.readable_since_s, reset=True)
            path.push(packet)
            took = True
            if not packet.data:
                flow.ended = True
            elif len(packet.data) < path.chunk_bytes:
                source.wait_for(selectors.EVENT_READ)
            else:
                path.readable.append(flow)
        return took

    def _deliver(self, packet: _Packet) -> None:
        flow = packet.flow
        if flow.done or flow.connection.closed:
            return
        if packet.reset:
            self._drop(flow.connection, reset=True)
            return
        if packet.data:
            flow.unsent.append(memoryview(packet.data))
            flow.unsent_bytes += len(packet.data)
        else:
            flow.end_arrived = True
        self._flush(flow)

    def _flush(self, flow: _Flow) -> None:
        connection, sink = flow.connection, flow.sink
        if connection.connecting or connection.closed or sink is None:
            return
        try:
            while flow.unsent:
                sent = sink.sock.send(flow.unsent[0])
                flow.unsent_bytes -= sent
                if sent == len(flow.unsent[0]):
                    flow.unsent.popleft()
                else:
                    flow.unsent[0] = flow.unsent[0][sent:]
            sink.wait_for(selectors.EVENT_WRITE, False)
            if flow.end_arrived:
                flow.done = True
                sink.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            sink.wait_for(selectors.EVENT_WRITE)
        except OSError:
            self._give_up(flow)
        if connection.up.done and connection.down.done:
            self._drop(connection)
        elif flow.parked and flow.unsent_bytes < flow.path.buffer_bytes:
            flow.wait_for_room(time.monotonic())

    def _give_up(self, flow: _Flow) -> None:
        """Nobody reads this direction any more; what the other still carries arrives before the connection closes."""
        flow.done = flow.ended = True
        flow.unsent.clear()
        flow.unsent_bytes = 0
        for side in (flow.source, flow.sink):
            if side is not None:
                side.wait_for(selectors.EVENT_READ if side is flow.source else selectors.EVENT_WRITE, False)

    def _drop(self, connection: _Connection, *, reset: bool = False) -> None:
        connection.close(reset=reset)
        self._connections.discard(connection)


def _bound_buffers(sock: socket.socket) -> None:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)


class SlowDevice:
    """A device `factor` times slower than this one: every call takes `factor` times what it took.

    :param factor: 1 or more
    :raises DeviceError: the factor is below 1 or not finite
    """

    def __init__(self, factor: float) -> None:
        if not (math.isfinite(factor) and factor >= 1):
            raise DeviceError(f"a device cannot be slowed by a factor of {factor}: give 1 or more")
        self.factor = factor

    def call(self, function: Callable[..., _T], /, *args: Any, **kwargs: Any) -> _T:
        """What `function` returns, `factor` times as late. CUDA work it launches is waited for and counted."""
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if cuda:
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        result = function(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize()
        end_s = start_s + self.factor * (time.perf_counter() - start_s)
        rest_s = end_s - time.perf_counter() - _SPIN_S
        if rest_s > 0:
            time.sleep(rest_s)
        while time.perf_counter() < end_s:
            pass
        return result

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module that computes what `module` does, with its parameters and attributes, as slowly as this device."""
        return _Slowed(module, self)


class _Slowed(nn.Module):
    def __init__(self, module: nn.Module, device: SlowDevice) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self._device = device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._device.call(self.module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)
