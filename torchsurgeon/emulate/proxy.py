"""A TCP proxy that has the rates and the delay of a wireless link.

Not emulated are the headers below TCP's payload, the loss of packets, and the slow start of a new connection. One
thread does everything in a loop (``_step``). Other threads set a flag and wake it through a socket pair.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import math
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torchsurgeon.emulate.bottleneck import Bottleneck, Packet
from torchsurgeon.emulate.sides import Direction, ProxiedConnection, Side
from torchsurgeon.errors import LinkError, short
from torchsurgeon.link import Link, TracedLink

_SOCKET_BUFFER_BYTES = 1 << 17
_MOST_SELECT_FD = 1024
_ACCEPT_PAUSE_S = 0.1
_WAKES_LATE_S = 1e-4


@dataclass(frozen=True)
class LinkCounts:
    """What an emulated link has carried.

    Attributes:
        connections: connections that were accepted.
        uplink_bytes: payload bytes that arrived at the target.
        downlink_bytes: payload bytes that arrived at the client.
    """

    connections: int
    uplink_bytes: int
    downlink_bytes: int


class LinkEmulator:
    """A TCP proxy that makes a target look as if it were behind a wireless link.

    The proxy listens from its construction on, and serves connections between ``start()`` and ``close()``, in a
    ``with`` block, or while ``run()`` blocks. Opening a connection costs one round trip, as TCP's handshake does. The
    end of a half that its sender closes arrives after the bytes before it; a connection whose target does not answer is
    closed in the same way. A sender that is faster than the link is held back: in each direction the emulator holds a
    tenth of a second of the link's rate, as much again for each receiver that does not read, and the sockets' buffers.

    Args:
        listen_port: the port to listen on; 0 for any free one.
        target_host: the target's address or name.
        target_port: the target's port.
        link: constant rates, or a replay of recorded rates that starts with the emulator.
        host: the address to listen on.

    Raises:
        LinkError: the link, the port or the target's name is not valid, or the port is taken.

    Attributes:
        host: the address that the proxy listens on.
        port: its port.
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
        _checked_link(link)
        if not 0 < target_port < 1 << 16:
            raise LinkError(f"the port of the link's target must be from 1 to 65535; got {target_port}")
        try:
            family, kind, proto, _, target = socket.getaddrinfo(target_host, target_port, type=socket.SOCK_STREAM)[0]
        except (OSError, OverflowError) as error:
            raise LinkError(f"no address for the link's target {target_host[:300]}: {short(error)}") from error
        self._target: Any = target
        self._target_socket = (family, kind, proto)
        self._listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bound_buffers(self._listener)
            self._listener.bind((host, listen_port))
            self._listener.listen(128)
        except (OSError, OverflowError) as error:
            self._listener.close()
            reason = getattr(error, "strerror", None) or short(error)
            where = f"{host[:300]}:{listen_port}"
            raise LinkError(f"cannot listen on {where}: {reason}; port 0 takes a free one") from error
        self._listener.setblocking(False)
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self._link = link
        self._link_is_new = True
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._uplink, self._downlink = Bottleneck[Direction](), Bottleneck[Direction]()
        self._connections: set[ProxiedConnection] = set()
        self._accepted = 0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_order = itertools.count()
        self._thread: threading.Thread | None = None
        self._lifecycle = threading.Lock()
        self._running = False
        self._stopping = False

    @property
    def link(self) -> Link | TracedLink:
        """The link that is emulated now."""
        return self._link

    def set_link(self, link: Link | TracedLink) -> None:
        """Change the link, under open connections too, from any thread. A replay of recorded rates starts now.

        Raises:
            LinkError: ``link`` is no link.
        """
        self._link = _checked_link(link)
        self._link_is_new = True
        self._wake()

    def counts(self) -> LinkCounts:
        """Return what the link has carried so far."""
        return LinkCounts(self._accepted, self._uplink.passed_bytes, self._downlink.passed_bytes)

    def start(self) -> LinkEmulator:
        """Serve connections in a thread of its own until ``close()``."""
        self._thread = threading.Thread(target=self.run, name=f"link emulator {self.port}", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop serving and close every connection. May be called from any thread, and more than once."""
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
        """Serve connections in the calling thread, until another thread calls ``close()`` or an error ends it."""
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
        with contextlib.suppress(OSError):
            self._wake_out.send(b"x")

    def _drain_wake(self) -> None:
        self._wake_in.recv(4096)

    def _now_s(self) -> float:
        # When bytes pass depends on this clock and on _poll alone, so that a test can replace both by a virtual time.
        return time.monotonic()

    def _step(self) -> None:
        now_s = self._now_s()
        if self._link_is_new:
            self._link_is_new = False
            self._take_on(self._link, now_s)
        # Linux wakes a sleeping thread about this late. On each hop of a short round trip that would add a percent.
        now_s += _WAKES_LATE_S
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
                connection, side = key.data
                self._attend(connection, side, mask)

    def _take_on(self, link: Link | TracedLink, now_s: float) -> None:
        up, down = (link.uplink_bit_s, link.downlink_bit_s) if isinstance(link, Link) else (link.uplink, link.downlink)
        self._uplink.shape(up, link.round_trip_s / 2, now_s)
        self._downlink.shape(down, link.round_trip_s / 2, now_s)

    def _poll(self, wake_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        timeout_s = None if wake_s == math.inf else max(wake_s - _WAKES_LATE_S - self._now_s(), 0.0)
        # epoll waits for whole milliseconds, which is several percent of a short round trip; select() on it does not.
        fileno = getattr(self._selector, "fileno", lambda: _MOST_SELECT_FD)()
        if fileno >= _MOST_SELECT_FD:
            return self._selector.select(timeout_s)
        return self._selector.select(0) if select.select([fileno], [], [], timeout_s)[0] else []

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self._now_s() + delay_s, next(self._timer_order), action))

    def _listen(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # Nothing was accepted, so the listener stays readable; without a pause the loop would spin.
                self._selector.unregister(self._listener)
                self._after(_ACCEPT_PAUSE_S, self._listen)
            return
        self._accepted += 1
        connection = ProxiedConnection(self._uplink, self._downlink)
        connection.up.source = connection.down.sink = Side(sock, self._selector, connection)
        self._connections.add(connection)
        self._after(self._uplink.delay_s, lambda: self._connect(connection))
        self._after(self._uplink.delay_s + self._downlink.delay_s, lambda: self._read_again(connection.up))

    def _connect(self, connection: ProxiedConnection) -> None:
        if connection.closed:
            return
        try:
            sock = socket.socket(*self._target_socket)
        except OSError:
            self._refuse(connection)
            return
        _bound_buffers(sock)
        connection.up.sink = connection.down.source = server = Side(sock, self._selector, connection)
        connection.connecting = True
        code = sock.connect_ex(self._target)
        if code == errno.EINPROGRESS:
            server.wait_for(selectors.EVENT_WRITE)
        else:
            self._connected(connection, code)

    def _connected(self, connection: ProxiedConnection, code: int) -> None:
        connection.connecting = False
        if code:
            self._refuse(connection)
            return
        self._flush(connection.up)
        self._read_again(connection.down)

    def _refuse(self, connection: ProxiedConnection) -> None:
        connection.up.ended = True
        self._downlink.push(Packet(connection.down, b"", self._now_s()))
        connection.up.done = True

    def _read_again(self, flow: Direction) -> None:
        if flow.source is not None and not flow.ended and not flow.connection.closed:
            flow.source.wait_for(selectors.EVENT_READ)

    def _attend(self, connection: ProxiedConnection, side: Side, mask: int) -> None:
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
            incoming.wait_for_room(self._now_s())
        if mask & selectors.EVENT_WRITE:
            self._flush(outgoing)

    def _pump(self, path: Bottleneck[Direction], now_s: float) -> None:
        path.advance(now_s)
        while self._read(path):
            path.advance(now_s)
        for packet in path.arrivals(now_s):
            self._deliver(packet)

    def _read(self, path: Bottleneck[Direction]) -> bool:
        """Let bytes of waiting flows enter while the queue has room; return whether any did."""
        entered = False
        while path.readable and not path.full:
            flow = path.readable.popleft()
            source = flow.source
            if source is None or flow.ended or flow.connection.closed:
                continue
            if flow.unsent_bytes >= path.buffer_bytes:
                # Its receiver does not read. It is left out until the receiver does, or it would fill the shared queue.
                flow.parked = True
                continue
            try:
                packet = Packet(flow, source.sock.recv(path.chunk_bytes), flow.readable_since_s)
            except BlockingIOError:
                source.wait_for(selectors.EVENT_READ)
                continue
            except OSError:
                packet = Packet(flow, b"", flow.readable_since_s, reset=True)
            path.push(packet)
            entered = True
            if not packet.data:
                flow.ended = True
            elif len(packet.data) < path.chunk_bytes:
                source.wait_for(selectors.EVENT_READ)
            else:
                path.readable.append(flow)
        return entered

    def _deliver(self, packet: Packet[Direction]) -> None:
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

    def _flush(self, flow: Direction) -> None:
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
            flow.wait_for_room(self._now_s())

    def _give_up(self, flow: Direction) -> None:
        """Stop a direction whose receiver has gone. What the other direction carries still arrives."""
        flow.done = flow.ended = True
        flow.unsent.clear()
        flow.unsent_bytes = 0
        for side in (flow.source, flow.sink):
            if side is not None:
                side.wait_for(selectors.EVENT_READ if side is flow.source else selectors.EVENT_WRITE, False)

    def _drop(self, connection: ProxiedConnection, *, reset: bool = False) -> None:
        connection.close(reset=reset)
        self._connections.discard(connection)


def _checked_link(link: Link | TracedLink) -> Link | TracedLink:
    if not isinstance(link, Link | TracedLink):
        raise LinkError(f"a link must be a Link or a TracedLink, such as parse_profile('lte'); got {short(link)}")
    return link


def _bound_buffers(sock: socket.socket) -> None:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
