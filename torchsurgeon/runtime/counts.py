"""What happened so far, in numbers."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from torchsurgeon.runtime.inference import Inference


class Counts:
    """Counts of inferences. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: Counter[str] = Counter()
        self._degraded: Counter[str] = Counter()
        self._sent_bytes = self._received_bytes = 0

    def add(self, row: str, inference: Inference, why: str | None) -> None:
        """Count one inference; ``why`` is the kind of failure that degraded it."""
        with self._lock:
            self._rows[row] += 1
            if why is not None:
                self._degraded[why] += 1
            self._sent_bytes += inference.sent_bytes
            self._received_bytes += inference.received_bytes

    def told(self) -> dict[str, Any]:
        """The numbers as plain data."""
        with self._lock:
            return {
                "inferences": self._rows.total(),
                "rows": dict(self._rows),
                "degraded": dict(self._degraded),
                "sent_bytes": self._sent_bytes,
                "received_bytes": self._received_bytes,
            }
