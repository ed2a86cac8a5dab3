"""Where to cut and how to encode what crosses: arithmetic on profiles, links and codecs; nothing is run here."""

from __future__ import annotations

from torchsurgeon.plan.frontier import Frontier, Terms
from torchsurgeon.plan.latency import Estimate, best, estimate
from torchsurgeon.plan.objective import Constraints, Objective
from torchsurgeon.plan.rows import Row

__all__ = [
    "Constraints",
    "Estimate",
    "Frontier",
    "Objective",
    "Row",
    "Terms",
    "best",
    "estimate",
]
