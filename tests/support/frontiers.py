"""Small frontiers of known costs."""

from __future__ import annotations

from torchsurgeon.planning import Frontier, Row


def way(
    index: int, codec: str, head_s: float, size_bytes: float, tail_s: float, *, on_device: bool = False,
    device_j: float | None = None,
) -> Row:  # fmt: skip
    """A row of a frontier with nothing to encode or decode."""
    return Row(
        index, f"layer{index}", codec, head_s, 0.0, size_bytes, tail_s, 0.0, device_j=device_j, on_device=on_device
    )


def frontier(*, joules: bool = True) -> Frontier:
    """All on the server (50 ms), a cut that sends an eighth of the input (30 ms), or all on the device (2 s)."""
    rows = (
        way(0, "raw", 0.0, 8e5, 0.05, device_j=0.0 if joules else None),
        way(1, "raw", 0.2, 1e5, 0.03, device_j=0.8 if joules else None),
        way(2, "raw", 2.0, 0.0, 0.0, on_device=True, device_j=8.0 if joules else None),
    )
    return Frontier("Net", "", 1, 2, 0, rows)
