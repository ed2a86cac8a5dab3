"""Where to cut and how to encode what crosses: arithmetic on profiles, links and codecs; nothing is run here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchsurgeon._lazy import names_of

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

if not TYPE_CHECKING:
    __getattr__ = names_of(
        __name__,
        {
            "chain": ("ChainPlan",),
            "decide": (
                "crossovers",
                "plan",
            ),
            "costs": ("Terms",),
            "frontier": ("Frontier",),
            "grid": (
                "Sweep",
                "sweep",
            ),
            "objective": (
                "Battery",
                "Constraints",
                "Objective",
            ),
            "plans": (
                "Crossover",
                "Plan",
            ),
            "row": ("Row",),
        },
    )
else:
    from torchsurgeon.planning.chain import ChainPlan as ChainPlan
    from torchsurgeon.planning.costs import Terms as Terms
    from torchsurgeon.planning.decide import crossovers as crossovers
    from torchsurgeon.planning.decide import plan as plan
    from torchsurgeon.planning.frontier import Frontier as Frontier
    from torchsurgeon.planning.grid import Sweep as Sweep
    from torchsurgeon.planning.grid import sweep as sweep
    from torchsurgeon.planning.objective import Battery as Battery
    from torchsurgeon.planning.objective import Constraints as Constraints
    from torchsurgeon.planning.objective import Objective as Objective
    from torchsurgeon.planning.plans import Crossover as Crossover
    from torchsurgeon.planning.plans import Plan as Plan
    from torchsurgeon.planning.row import Row as Row
