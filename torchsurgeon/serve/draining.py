"""Stopping a server so that no client loses a request."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from torchsurgeon.serve.connections import Connections

# After a signal, so long a connection that waits for a request is kept: one may be on its way.
_QUIET_S = 0.5
_STEP_S = 0.02
# Requests that still run after everything was closed are cancelled after this time, in whole seconds.
_CANCEL_S = 1


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which drains before it stops.

    While it drains, it is not ready. On each connection the requests that are under way are answered, and one more if
    it comes soon; the answers say ``Connection: close``. New connections get answers to health checks, and 503 for the
    rest. What is not answered after ``grace_s``, or not taken by its client, is cut off.

    Args:
        config: uvicorn's configuration.
        connections: all connections of the server.
        grace_s: the most seconds that draining takes.
        on_drain: called when draining begins.
        say: called with lines about what happens.
        on_end: called when all connections are closed. What is done after the server's ``run()`` is too late: uvicorn
            sends itself the signal again that stopped it, and SIGTERM then ends the process.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        connections: Connections,
        *,
        grace_s: float,
        on_drain: Callable[[], None],
        say: Callable[[str], None],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        config.timeout_graceful_shutdown = _CANCEL_S
        super().__init__(config)
        self._connections = connections
        self._grace_s = grace_s
        self._on_drain = on_drain
        self._say = say
        self._on_end = on_end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, and then stop; called by uvicorn."""
        try:
            if not self.force_exit:
                await self._drain()
            await super().shutdown(sockets)
        finally:
            self._on_end()

    async def _drain(self) -> None:
        clock = asyncio.get_running_loop().time
        begun_s = clock()
        self._on_drain()
        busy = self._connections.drain()
        self._say(
            f"stopping: {len(self._connections)} connections, {busy} with a request under way, which has "
            f"{self._grace_s:g} s to end"
        )
        while len(self._connections) and clock() < begun_s + self._grace_s and not self.force_exit:
            await asyncio.sleep(_STEP_S)
            if clock() >= begun_s + _QUIET_S:
                self._connections.close_idle(clock() - _QUIET_S)
        cut_off = self._connections.abort()
        self._say(f"stopped after {clock() - begun_s:.1f} s: {cut_off} requests were cut off")
