"""What link, server and device are like at the moment, and what to do about it: estimates, decisions, and giving up.

Arithmetic and state only: whoever sends requests tells these classes what happened and asks them what to do.
"""

from __future__ import annotations

from torchsurgeon.adapting.breaker import CircuitBreaker
from torchsurgeon.adapting.deadline import SURE, Refusals, Rescue, check_deadline, late_probability, patience, rescue
from torchsurgeon.adapting.decide import Conditions, Decider, Decision, Estimates
from torchsurgeon.adapting.link import LinkEstimate, LinkEstimator, ProbePolicy
from torchsurgeon.adapting.load import LoadEstimate, LoadEstimator, SlowdownEstimator
from torchsurgeon.adapting.server_state import ServerState
from torchsurgeon.adapting.tracker import Quantity

__all__ = [
    "SURE",
    "CircuitBreaker",
    "Conditions",
    "Decider",
    "Decision",
    "Estimates",
    "LinkEstimate",
    "LinkEstimator",
    "LoadEstimate",
    "LoadEstimator",
    "ProbePolicy",
    "Quantity",
    "Refusals",
    "Rescue",
    "ServerState",
    "SlowdownEstimator",
    "check_deadline",
    "late_probability",
    "patience",
    "rescue",
]
