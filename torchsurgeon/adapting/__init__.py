"""Estimates of the link, the servers and the device, and the decisions that rest on them.

These classes estimate how fast the link is, how busy a server is and how much the device is slowed down. From that they
decide where to cut the model, when to stop asking a server, and when to start the tail on the device. They hold
arithmetic and state only: the runtime, which sends the requests, reports what it measured and asks what to do next.
"""

from __future__ import annotations

from torchsurgeon.adapting.allowance import Allowance
from torchsurgeon.adapting.breaker import CircuitBreaker
from torchsurgeon.adapting.deadline import SURE, Refusals, Rescue, check_deadline, late_probability, patience, rescue
from torchsurgeon.adapting.decide import Conditions, Decider, Decision, Estimates
from torchsurgeon.adapting.link import LinkEstimate, LinkEstimator, ProbePolicy
from torchsurgeon.adapting.load import LoadEstimate, LoadEstimator, SlowdownEstimator
from torchsurgeon.adapting.mean import Quantity
from torchsurgeon.adapting.server_state import ServerState

__all__ = [
    "SURE",
    "Allowance",
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
