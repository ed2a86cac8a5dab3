"""Whether to compress what crosses where nothing may be lost: by what compressing took and saved at each cut so far."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from torchsurgeon.codec import Codec, find_codec

_RAW, _ZSTD = find_codec("raw"), find_codec("zstd")
# zstd is not tried where even this much for the byte would lose: four times quicker than a desktop's core.
_LEAST_S_PER_BYTE = 0.5e-9
# What crosses changes with what the model is given; so often it is looked at anew.
_AGAIN = 64
_LEAST_GAIN = 0.05
_LEARNING = 0.3


@dataclass
class _Cut:
    """What zstd does to each byte that crosses at one cut; ``left`` requests until it is tried again."""

    s_per_byte: float = _LEAST_S_PER_BYTE
    share: float = 0.0
    left: int = 0
    used: Codec = _RAW


class Lossless:
    """Chooses between ``raw`` and ``zstd`` for each request. Thread-safe."""

    name = "auto"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cuts: dict[int, _Cut] = {}

    def choose(self, cut: int, size_bytes: int, uplink_bit_s: float) -> Codec:
        """Return how to send ``size_bytes`` at a cut: the quicker way of the two as far as is known, encoding, sending
        and decoding together, and now and then the other one, if it could be."""
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

    def observe(self, cut: int, size_bytes: int, sent_bytes: int, spent_s: float) -> None:
        """Take in what ``zstd`` made of ``size_bytes``, and what encoding and decoding them took."""
        if size_bytes <= 0:
            return
        with self._lock:
            known = self._cuts.setdefault(cut, _Cut())
            weight = _LEARNING if known.share else 1.0
            known.share += weight * (sent_bytes / size_bytes - known.share)
            known.s_per_byte += weight * (max(spent_s, 0.0) / size_bytes - known.s_per_byte)

    def __str__(self) -> str:
        return self.name
