"""The account of every inference: counts, the last one, and its telemetry."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from torchsurgeon.runtime import telemetry
from torchsurgeon.runtime.inference import Inference


class Ledger:
    """Records the inferences of one model, called ``name``. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._last: Inference | Callable[[], Inference] | None = None
        self.reset_after_fork()

    @property
    def last(self) -> Inference | None:
        """The inference that ended last, in any thread; None before the first."""
        last = self._last
        if last is None or isinstance(last, Inference):
            return last
        made = last()
        # Kept, so that it is the same object until the next one ends.
        if self._last is last:
            self._last = made
        return made

    def reset_after_fork(self) -> None:
        """Start counting at zero, with a lock that no thread of the parent process holds."""
        self._lock = threading.Lock()
        self._rows: Counter[str] = Counter()
        self._degraded: Counter[str] = Counter()
        self._bits: Counter[str] = Counter()
        self._sent_bytes = self._received_bytes = 0

    def record(
        self,
        row: str,
        inference: Callable[[], Inference],
        why: str | None,
        *,
        bits: str,
        total_s: float,
        received_bytes: int = 0,
        by_server: bool = False,
    ) -> None:
        """Record one inference that has ended.

        Args:
            row: the name of the cut and codec that it used.
            inference: returns its account. It is made only for those who want to see it, since most are never seen.
            why: the kind of failure because of which the planned answer was not used, or None.
            bits: whether the answer had the model's own bits, as in the account.
            total_s: from the call to its result.
            received_bytes: what has been received for it.
            by_server: whether the answer is a server's.
        """
        self._last = inference
        with self._lock:
            self._rows[row] += 1
            self._bits[bits] += 1
            if why is not None:
                self._degraded[why] += 1
            self._received_bytes += received_bytes
        telemetry.record(self._name, total_s, inference, by_server=by_server)

    def record_sent(self, size_bytes: int) -> None:
        """Record what the request of a call has sent, whether its answer came, was used, or not."""
        with self._lock:
            self._sent_bytes += size_bytes

    def record_error(self, seconds: float, error: BaseException) -> None:
        """Record that an inference raised ``error`` after ``seconds``."""
        telemetry.record_error(self._name, seconds, error)

    def snapshot(self) -> dict[str, Any]:
        """Return the counts as plain data."""
        with self._lock:
            return {
                "inferences": self._rows.total(),
                "rows": dict(self._rows),
                "degraded": dict(self._degraded),
                "bits": dict(self._bits),
                "sent_bytes": self._sent_bytes,
                "received_bytes": self._received_bytes,
            }
