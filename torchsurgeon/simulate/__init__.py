"""How many inferences a datacenter sustains: queues of servers, and fleets of devices that react to their load.

No model is run here. ``simulate_queue()`` simulates servers that answer queries in the order of arrival.
``highest_rate()`` finds the highest rate of inferences at which a percentile of their times stays within a limit.
``settle()`` computes where ten thousand servers and ten million devices settle, and ``Prices`` what that costs. The
experiment is that of Neurosurgeon (Kang et al., ASPLOS 2017, section 6.4), which its authors ran in BigHouse (Meisner
et al., ISPASS 2012).
"""

from __future__ import annotations

from torchsurgeon.simulate.capacity import Capacity, gain, highest_rate
from torchsurgeon.simulate.demand import Demand
from torchsurgeon.simulate.estimate import Estimate
from torchsurgeon.simulate.fluid import Choice, DeviceClass, Settled, servers_needed, settle
from torchsurgeon.simulate.formulas import erlang_c, mean_wait_s
from torchsurgeon.simulate.price import PerMillion, Prices
from torchsurgeon.simulate.queue import QueueTimes, simulate_queue
from torchsurgeon.simulate.shape import CONSTANT, EXPONENTIAL, SHAPES, Shape
from torchsurgeon.simulate.ways import Sustained, sustained

__all__ = [
    "CONSTANT",
    "EXPONENTIAL",
    "SHAPES",
    "Capacity",
    "Choice",
    "Demand",
    "DeviceClass",
    "Estimate",
    "PerMillion",
    "Prices",
    "QueueTimes",
    "Settled",
    "Shape",
    "Sustained",
    "erlang_c",
    "gain",
    "highest_rate",
    "mean_wait_s",
    "servers_needed",
    "settle",
    "simulate_queue",
    "sustained",
]
