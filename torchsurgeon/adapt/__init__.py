"""What link, server and device are like at the moment, and what to do about it: estimates, decisions, and giving up.

Arithmetic and state only: whoever sends requests tells these classes what happened and asks them what to do.
"""

from __future__ import annotations

from torchsurgeon.adapt.breaker import CircuitBreaker
from torchsurgeon.adapt.deadline import SURE, Refusals, Rescue, check_deadline, late_probability, rescue
from torchsurgeon.adapt.decide import Conditions, Decider, Decision, Estimates
from torchsurgeon.adapt.link import LinkEstimate, LinkEstimator, ProbePolicy
from torchsurgeon.adapt.load import LoadEstimate, LoadEstimator, SlowdownEstimator
from torchsurgeon.adapt.servers import Servers, ServerState
from torchsurgeon.adapt.tracker import Quantity

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
    "Servers",
    "SlowdownEstimator",
    "check_deadline",
    "late_probability",
    "rescue",
]
