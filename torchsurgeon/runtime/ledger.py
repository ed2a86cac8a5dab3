"""The account of every inference: counts, the last one, and its telemetry."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from torchsurgeon.runtime import telemetry
from torchsurgeon.runtime.inference import Inference


class Ledger:
    """Records the inferences of one model, called ``name``. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.last: Inference | None = None
        """The inference that ended last, in any thread."""
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start counting at zero, with a lock that no thread of the parent process holds."""
        self._lock = threading.Lock()
        self._rows: Counter[str] = Counter()
        self._degraded: Counter[str] = Counter()
        self._bits: Counter[str] = Counter()
        self._sent_bytes = self._received_bytes = 0

    def record(self, row: str, inference: Inference, why: str | None) -> None:
        """Record one inference that has ended.

        Args:
            row: the name of the cut and codec that it used.
            inference: where its time went.
            why: the kind of failure because of which the planned answer was not used, or None.
        """
        self.last = inference
        with self._lock:
            self._rows[row] += 1
            self._bits[inference.bits] += 1
            if why is not None:
                self._degraded[why] += 1
            self._received_bytes += inference.received_bytes
        telemetry.record(self._name, inference)

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
