"""What ends with a module: its threads, and the connections that were made for it."""

from __future__ import annotations

from collections.abc import Sequence

from torchsurgeon.runtime.keeper import Bell
from torchsurgeon.runtime.pool import Pool
from torchsurgeon.runtime.stream import Stream
from torchsurgeon.transport import Transport


class Ending:
    """Ends the threads and connections of one module. Thread-safe.

    A module that the program drops is ended by a finalizer, which lives until then. So this refers to nothing that
    refers to the model or to the program's own functions: the module would never be collected.

    Args:
        pool: the threads of requests.
        bell: the end of the keeper's thread.
        transports: those that were made for URLs.

    Attributes:
        stream: the threads of ``submit()``; None before its first call.
    """

    def __init__(self, pool: Pool, bell: Bell, transports: Sequence[Transport]) -> None:
        self.stream: Stream | None = None
        self._pool, self._bell, self._transports = pool, bell, transports

    def reset_after_fork(self) -> None:
        """Forget the parent's threads."""
        self.stream = None
        self._pool.reset_after_fork()
        self._bell.reset_after_fork()

    def exchange(self, bell: Bell) -> None:
        """End the keeper's thread, since another keeper takes its place."""
        earlier, self._bell = self._bell, bell
        earlier.close()

    def drop(self) -> None:
        """End everything, since nothing refers to the module any more."""
        self.end("was dropped: keep a reference to it until its futures are done")

    def end(self, why: str = "has been closed; make a new one") -> None:
        """End everything. Ending twice is harmless.

        Args:
            why: what has happened to the SplitModule, for calls that have not begun.
        """
        if self.stream is not None:
            self.stream.close(f"the SplitModule {why}")
        for transport in self._transports:
            transport.close()
        self._bell.close()
        self._pool.close()
