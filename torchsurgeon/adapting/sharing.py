"""The rate of an uplink that several requests share, while each request sees only its own part of it."""

from __future__ import annotations

# A window of counting ends after this many transfers.
_WINDOW = 16
# So many times as many bytes must have arrived as were under way at either end of the window.
_SURE = 3
# Transfers are reported nearly in the order of their arrival. One that arrived this long before the latest was timed
# after the clock had stepped back.
_STEPPED_BACK_S = 60.0


class Sharing:
    """Computes what single transfers would take alone, from transfers that overlap. Not thread-safe.

    While transfers overlap, the link's rate is the number of bytes that have arrived since the first of them began,
    divided by the time since then. Transfers that are still under way are assumed to be half done. No result is given
    until so many bytes are known to have arrived that this guess makes the result at most half as large again as the
    true rate.
    """

    def __init__(self) -> None:
        # The latest arrival of all, and when the present window of counting began.
        self._arrived_s = float("-inf")
        self._since_s = 0.0
        # In this window: the bytes that arrived, less those that the window before counted already; the bytes that
        # arrived; and the bytes that were under way when it began.
        self._arrived_bytes = self._counted_bytes = self._moving_bytes = 0.0

    def alone(self, size_bytes: int, begun_s: float, arrived_s: float, others: int) -> tuple[int, float] | None:
        """Return a number of bytes, and the seconds that they alone kept the link busy; None while that is uncertain.

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
        if self._counted_bytes < _SURE * max(moving_bytes, self._moving_bytes):
            return None
        alone = round(self._arrived_bytes + moving_bytes / 2), self._arrived_s - self._since_s
        if self._counted_bytes >= _WINDOW * size_bytes:
            # Start a new window, so that a change of the rate shows. The half of the moving bytes that the last window
            # counted as arrived is subtracted from the new one.
            self._since_s, self._arrived_bytes, self._counted_bytes = self._arrived_s, -moving_bytes / 2, 0.0
            self._moving_bytes = moving_bytes
        return alone
