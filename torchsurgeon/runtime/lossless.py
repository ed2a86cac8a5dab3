"""Whether zstd pays at a cut, judged by what compressing took and saved there so far."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from torchsurgeon.codec import Codec, find_codec

_RAW, _ZSTD = find_codec("raw"), find_codec("zstd")
# zstd is not tried where the link is so fast that it would lose even at this speed, four times a desktop core's.
_LEAST_S_PER_BYTE = 0.5e-9
# How well a boundary compresses changes with the input, so zstd is tried again after so many requests.
_AGAIN = 64
# zstd replaces raw only if it saves this share of the time, so that the choice does not flap.
_LEAST_GAIN = 0.05
# The weight of the latest request in the running averages.
_LEARNING = 0.3
# A request that took more than this many times as long as usual counts as that: something else kept the processor busy.
_MOST_TIMES = 3.0


@dataclass
class _Cut:
    """What zstd does at one cut.

    Attributes:
        s_per_byte: seconds of encoding and decoding for each byte.
        share: compressed over original bytes; 0 before it was tried.
        left: how many requests until it is tried again.
        seen: how many requests have used it.
        used: what was used last.
    """

    s_per_byte: float = _LEAST_S_PER_BYTE
    share: float = 0.0
    left: int = 0
    seen: int = 0
    used: Codec = _RAW


class Lossless:
    """Chooses between ``raw`` and ``zstd`` for each request. Thread-safe."""

    name = "auto"

    def __init__(self) -> None:
        self._cuts: dict[object, _Cut] = {}
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Replace the lock, which a thread of the parent may hold."""
        self._lock = threading.Lock()

    def choose(self, cut: object, size_bytes: int, uplink_bit_s: float) -> Codec:
        """Return the codec that is quicker from end to end, or now and then zstd, to learn how it does.

        Args:
            cut: what tells the cut from others.
            size_bytes: the boundary's bytes.
            uplink_bit_s: the uplink's rate.
        """
        with self._lock:
            known = self._cuts.setdefault(cut, _Cut())
            byte_s = 8 / uplink_bit_s
            if known.left <= 0 and byte_s > _LEAST_S_PER_BYTE and size_bytes:
                known.left = _AGAIN
                return _ZSTD
            known.left -= 1
            gain = 1 - known.share - known.s_per_byte / byte_s
            if gain > (0 if known.used is _ZSTD else _LEAST_GAIN) and known.share:
                known.used = _ZSTD
            else:
                known.used = _RAW
            return known.used

    def observe(self, cut: object, size_bytes: int, sent_bytes: int, spent_s: float) -> None:
        """Learn from a request that used zstd.

        Args:
            cut: what tells the cut from others.
            size_bytes: the boundary's bytes.
            sent_bytes: what crossed.
            spent_s: seconds of encoding and decoding.
        """
        if size_bytes <= 0:
            return
        with self._lock:
            known = self._cuts.setdefault(cut, _Cut())
            known.seen += 1
            share, s_per_byte = sent_bytes / size_bytes, max(spent_s, 0.0) / size_bytes
            if known.seen <= 2:
                # The first request that uses it also loads the library, so the quicker one of the first two counts.
                known.share = share
                known.s_per_byte = s_per_byte if known.seen == 1 else min(s_per_byte, known.s_per_byte)
                return
            most = _MOST_TIMES * max(known.s_per_byte, _LEAST_S_PER_BYTE)
            known.share += _LEARNING * (share - known.share)
            known.s_per_byte += _LEARNING * (min(s_per_byte, most) - known.s_per_byte)

    def __str__(self) -> str:
        return self.name
