"""Where to cut and how to encode what crosses: arithmetic on profiles, links and codecs; nothing is run here."""

from __future__ import annotations

from torchsurgeon.planning.chain import ChainPlan
from torchsurgeon.planning.decide import crossovers, plan
from torchsurgeon.planning.frontier import Frontier, Terms
from torchsurgeon.planning.grid import Sweep, sweep
from torchsurgeon.planning.objective import Battery, Constraints, Objective
from torchsurgeon.planning.plans import Crossover, Plan
from torchsurgeon.planning.rows import Row

__all__ = [
    "Battery",
    "ChainPlan",
    "Constraints",
    "Crossover",
    "Frontier",
    "Objective",
    "Plan",
    "Row",
    "Sweep",
    "Terms",
    "crossovers",
    "plan",
    "sweep",
]
