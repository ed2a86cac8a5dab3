"""The rate of an uplink that several requests share, each of which sees only what it gets of it."""

from __future__ import annotations

_WINDOW = 16
# Answers are taken in nearly in the order they came: one from so long before was timed after the clock stepped back.
_STEPPED_BACK_S = 60.0


class Sharing:
    """Turns the transfers of requests side by side into such as they would be one after the other. Not thread-safe.

    While transfers overlap, what has arrived since the first of them began is divided by the time since then. Of what
    others have under way half is taken to have arrived, so nothing is said until that is little beside the rest.
    """

    def __init__(self) -> None:
        self._arrived_s = float("-inf")
        self._since_s = 0.0
        self._arrived_bytes = self._counted_bytes = self._moving_bytes = 0.0

    def alone(self, size_bytes: int, begun_s: float, arrived_s: float, others: int) -> tuple[int, float] | None:
        """Return bytes and the seconds that they took the link; None while that cannot be told.

        The transfer ``begun_s`` to ``arrived_s`` is the latest to arrive, and ``others`` like it may be under way.
        """
        stepped_back = arrived_s < self._arrived_s - _STEPPED_BACK_S
        if begun_s >= self._arrived_s or stepped_back:
            self._since_s = begun_s
            self._arrived_s = arrived_s
            self._arrived_bytes = self._counted_bytes = self._moving_bytes = 0.0
        self._arrived_s = max(self._arrived_s, arrived_s)
        self._arrived_bytes += size_bytes
        self._counted_bytes += size_bytes
        moving_bytes = others * size_bytes
        if self._counted_bytes < 2 * max(moving_bytes, self._moving_bytes):
            return None
        told = round(self._arrived_bytes + moving_bytes / 2), self._arrived_s - self._since_s
        if self._counted_bytes >= _WINDOW * size_bytes:
            # A window begins anew, so that a rate that changes is seen, with that half arrived already.
            self._since_s, self._arrived_bytes, self._counted_bytes = self._arrived_s, -moving_bytes / 2, 0.0
            self._moving_bytes = moving_bytes
        return told
