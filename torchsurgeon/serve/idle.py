"""What a busy server has kept of freed memory goes back to the system once the server has had nothing to do."""

from __future__ import annotations

import threading

from torchsurgeon._allocator import give_freed_memory_back
from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.served import ServedModel

# Under load, giving memory back would cost page faults at every request.
_IDLE_S = 10.0
_JOIN_S = 1.0


class IdleMemory:
    """A background thread that gives freed memory back when no request has ended for ten to twenty seconds.

    It does so once, and again only after further requests.

    Args:
        registry: the models.
        idle_s: how often the thread looks, in seconds.
    """

    def __init__(self, registry: ModelRegistry, *, idle_s: float = _IDLE_S) -> None:
        self._registry, self._idle_s = registry, idle_s
        self._ended, self._given_back = 0, 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="torchsurgeon-idle", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(_JOIN_S)

    def look(self) -> bool:
        """Give memory back if requests have ended since that was last done, and none since the look before.

        Returns:
            Whether it was given back.
        """
        models = [model for model, _ in self._registry.states().values() if isinstance(model, ServedModel)]
        before, self._ended = self._ended, sum(model.statistics.ended for model in models)
        if self._ended != before or self._ended == self._given_back:
            return False
        self._given_back = self._ended
        give_freed_memory_back()
        return True

    def _run(self) -> None:
        while not self._closed.wait(self._idle_s):
            self.look()
