"""The rate of an uplink that several requests share, while each request sees only its own part of it."""

from __future__ import annotations

_WINDOW = 16
# Transfers are reported nearly in the order of their arrival. One that arrived this long before the latest was timed
# after the clock had stepped back.
_STEPPED_BACK_S = 60.0


class Sharing:
    """Computes what single transfers would take alone, from transfers that overlap. Not thread-safe.

    While transfers overlap, the link's rate is the bytes that arrived since the first of them began, over the time
    since then. Transfers that are still under way are assumed to be half done, and no result is given until that guess
    is small next to the bytes counted.
    """

    def __init__(self) -> None:
        self._arrived_s = float("-inf")
        self._since_s = 0.0
        self._arrived_bytes = self._counted_bytes = self._moving_bytes = 0.0

    def alone(self, size_bytes: int, begun_s: float, arrived_s: float, others: int) -> tuple[int, float] | None:
        """Return bytes, and the seconds for which they kept the link busy; None while that is too uncertain.

        Args:
            size_bytes: bytes of the transfer that has just arrived.
            begun_s: when it began, by the clock that all transfers are timed with.
            arrived_s: when its last byte arrived.
            others: how many transfers of about this size are under way at that moment.
        """
        stepped_back = arrived_s < self._arrived_s - _STEPPED_BACK_S
        if begun_s >= self._arrived_s or stepped_back:
            # Nothing overlaps with this transfer, so the link was idle and the count starts with it.
            self._since_s = begun_s
            self._arrived_s = arrived_s
            self._arrived_bytes = self._counted_bytes = self._moving_bytes = 0.0
        self._arrived_s = max(self._arrived_s, arrived_s)
        self._arrived_bytes += size_bytes
        self._counted_bytes += size_bytes
        moving_bytes = others * size_bytes
        if self._counted_bytes < 2 * max(moving_bytes, self._moving_bytes):
            return None
        alone = round(self._arrived_bytes + moving_bytes / 2), self._arrived_s - self._since_s
        if self._counted_bytes >= _WINDOW * size_bytes:
            # Start a new window, so that a change of the rate shows. The half of the moving bytes that the last window
            # counted as arrived is subtracted from the new one.
            self._since_s, self._arrived_bytes, self._counted_bytes = self._arrived_s, -moving_bytes / 2, 0.0
            self._moving_bytes = moving_bytes
        return alone
