"""Time that passes only when a test says so, for what would otherwise judge the machine the tests run on.

``Clock``        is a clock for what takes ``now_s``; a test sets its ``s``.
``TimeModule``   stands for the module ``time``: sleeping takes no time and moves the clock on.
``VirtualLink``  is the link emulator with its real sockets in virtual time: ``connect``, ``carry`` and ``request`` move
                 bytes through it, and ``now_s`` says when they arrived.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.link import Link, TracedLink

# The kernel hands bytes from one socket of this machine to another at once, or very nearly.
_SURELY_THERE_S = 1e-3
_PIECE = bytes(1 << 16)


class Clock:
    """Called, says how many seconds ``s`` are."""

    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


class TimeModule:
    """Stands for the module ``time`` where it is patched in; each reading takes a tenth of a microsecond."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        self.now_s += 1e-7
        return self.now_s

    perf_counter = monotonic

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@dataclass
class Transfer:
    """So many bytes from one of two connected sockets to the other; ``arrivals`` has (seconds, bytes) of each read."""

    sender: socket.socket
    receiver: socket.socket
    size_bytes: int
    sent_bytes: int = 0
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def received_bytes(self) -> int:
        return sum(size_bytes for _, size_bytes in self.arrivals)

    def move(self, now_s: float) -> bool:
        """Send and read what can be without waiting; whether anything was."""
        before = self.sent_bytes, len(self.arrivals)
        with suppress(BlockingIOError):
            while self.sent_bytes < self.size_bytes:
                self.sent_bytes += self.sender.send(_PIECE[: self.size_bytes - self.sent_bytes])
        with suppress(BlockingIOError):
            while self.received_bytes < self.size_bytes:
                self.arrivals.append((now_s, len(self.receiver.recv(len(_PIECE)))))
        return (self.sent_bytes, len(self.arrivals)) != before


class VirtualLink(LinkEmulator):
    """A link emulator, and a device and a server at its ends, all run by the thread of the test.

    The clock stands still while bytes can be moved, and jumps to the emulator's next step when none can. So a slow or
    busy machine changes nothing about the seconds that a transfer takes.
    """

    def __init__(self, link: Link | TracedLink) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.setblocking(False)
        self._ends = ExitStack()
        self._ends.enter_context(self._listening)
        self._transfers: list[Transfer] = []
        self.now_s = 0.0
        super().__init__(0, "127.0.0.1", self._listening.getsockname()[1], link)

    def __enter__(self) -> VirtualLink:
        self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._ends.close()

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Return a new connection's ends at the device and at the server."""
        device = self._ends.enter_context(socket.create_connection(("127.0.0.1", self.port)))
        while True:
            with suppress(BlockingIOError):
                server = self._ends.enter_context(self._listening.accept()[0])
                break
            self._step()
        for end in (device, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setblocking(False)
        return device, server

    def carry(self, transfers: Iterable[Transfer]) -> None:
        """Run until all has arrived."""
        self._transfers = list(transfers)
        while any(transfer.received_bytes < transfer.size_bytes for transfer in self._transfers):
            self._step()
        self._transfers = []

    def request(self, ends: tuple[socket.socket, socket.socket], up_bytes: int, down_bytes: int) -> float:
        """Return the seconds that a request takes that is answered as soon as the server has all of it."""
        start_s, (device, server) = self.now_s, ends
        self.carry([Transfer(device, server, up_bytes)])
        self.carry([Transfer(server, device, down_bytes)])
        return self.now_s - start_s

    def _now_s(self) -> float:
        return self.now_s

    def _poll(self, wake_s: float) -> Any:
        moved = [transfer.move(self.now_s) for transfer in self._transfers]
        if any(moved) or wake_s <= self.now_s:
            return self._selector.select(0)
        ready = self._selector.select(_SURELY_THERE_S)
        if not ready:
            assert wake_s < math.inf, "the emulator, the device and the server all wait for each other"
            self.now_s = wake_s
        return ready
