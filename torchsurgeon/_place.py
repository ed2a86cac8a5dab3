"""What the place at which a model is cut is called, wherever people read it: in accounts, plans, tables and errors."""

from __future__ import annotations

ALL_ON_DEVICE, ALL_ON_SERVER = "all on the device", "all on the server"


def place_text(index: int, name: str, *, on_device: bool = False, before: str = "cut after ") -> str:
    """Return where a model is cut, in words.

    Args:
        index: how many layers run on the device.
        name: the last of them.
        on_device: whether all layers run there, and nothing crosses.
        before: what stands before the name of a layer; empty in the cells of a table whose header says it.
    """
    if on_device:
        return ALL_ON_DEVICE
    return ALL_ON_SERVER if index == 0 else f"{before}{name}"
