"""One way to get a network's answers, beside which others are measured."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.link import Link

UNDER_WAY = 4
"""How many inferences a rival has under way at once in a stream, if it can."""


class Rival(abc.ABC):
    """One way to get a network's answers, over one emulated link after the other.

    Attributes:
        name: what tables call it.
        streams: whether it has several inferences under way at once; otherwise a stream is one call after the other.
        of_any_length: whether a stream may have more inferences than it was prepared for.
        lossless: whether the server gets the picture's or the boundary's own bits.
        emulators: the links that its bytes cross; none where everything runs on the device.
    """

    streams: bool = False
    of_any_length: bool = True
    lossless: bool = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.emulators: list[LinkEmulator] = []

    def use(self, link: Link) -> None:
        """Take on a link, and prepare what is prepared before the first call; this is not timed."""
        for emulator in self.emulators:
            emulator.set_link(link)

    @abc.abstractmethod
    def infer(self) -> Tensor:
        """Return the network's answer for its example; this is timed."""

    def before_stream(self, count: int) -> None:
        """Prepare streams of so many inferences over the present link; this is not timed."""

    def rate(self, count: int) -> float:
        """Return how many answers come in a second of a stream of so many; this is timed."""
        raise NotImplementedError(f"{self.name} has one inference under way at a time")

    def replanning_s(self) -> float | None:
        """Return what it takes to choose a cut for a link that has changed; None where it chooses none."""
        return None

    def chosen(self) -> str:
        """Return where it cuts over the present link."""
        return ""

    def sent_bytes(self) -> int:
        """Return the bytes that have crossed its uplinks so far, with all headers."""
        return sum(emulator.counts().uplink_bytes for emulator in self.emulators)


def seconds(function: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    begun_s = time.perf_counter()
    function()
    return time.perf_counter() - begun_s


def steady_rate(came_s: Sequence[float]) -> float:
    """Return how many answers come in a second once a stream goes on, from the times at which they came.

    Counted are those in the middle. While the first come, the way still fills. And the last of several that share a
    link come sooner than in a stream that goes on, since nobody sends behind them.
    """
    counted = len(came_s) - 2 * UNDER_WAY
    return counted / (came_s[UNDER_WAY + counted - 1] - came_s[UNDER_WAY - 1])
