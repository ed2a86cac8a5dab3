"""Where to cut and how to encode what crosses: arithmetic on profiles, links and codecs; nothing is run here."""

from __future__ import annotations

from torchsurgeon.plan.decide import Crossover, Plan, crossovers, plan
from torchsurgeon.plan.frontier import Frontier, Terms
from torchsurgeon.plan.grid import Sweep, sweep
from torchsurgeon.plan.latency import Estimate, best, estimate
from torchsurgeon.plan.objective import Battery, Constraints, Objective
from torchsurgeon.plan.rows import Row
from torchsurgeon.plan.stages import ChainPlan

__all__ = [
    "Battery",
    "ChainPlan",
    "Constraints",
    "Crossover",
    "Estimate",
    "Frontier",
    "Objective",
    "Plan",
    "Row",
    "Sweep",
    "Terms",
    "best",
    "crossovers",
    "estimate",
    "plan",
    "sweep",
]
