"""Cut a ``LayerGraph`` into a head and a tail, which are ordinary modules."""

from __future__ import annotations

from torchsurgeon.cutting.partition import Partition, cut, tail_for
from torchsurgeon.cutting.segment import Segment

__all__ = ["Partition", "Segment", "cut", "tail_for"]
