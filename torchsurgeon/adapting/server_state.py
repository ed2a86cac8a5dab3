"""The estimates of one server, in one place."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Generic, TypeVar

from torchsurgeon.adapting.breaker import CircuitBreaker
from torchsurgeon.adapting.clock import NowS
from torchsurgeon.adapting.link import LinkEstimator, ProbePolicy
from torchsurgeon.adapting.load import LoadEstimator
from torchsurgeon.link import Link

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False, slots=True)
class ServerState(Generic[_T]):
    """What is known of one server.

    Attributes:
        target: what the owner reaches the server by, such as a transport.
        link: estimates of the link to it.
        load: estimates of its load.
        breaker: whether to ask it.
        probes: when to probe the link to it.
    """

    target: _T
    link: LinkEstimator
    load: LoadEstimator
    breaker: CircuitBreaker
    probes: ProbePolicy

    @staticmethod
    def new(target: _T, prior: Link, *, now_s: NowS, jitter: random.Random | None = None) -> ServerState[_T]:
        """Return the state of a server that has not been asked yet.

        Args:
            target: what the owner reaches the server by.
            prior: the link to assume before anything has been sent.
            now_s: a monotonic clock in seconds.
            jitter: the source of randomness of the breaker's pauses.
        """
        return ServerState(
            target,
            LinkEstimator(prior, now_s=now_s),
            LoadEstimator(now_s=now_s),
            CircuitBreaker(now_s=now_s, jitter=jitter),
            ProbePolicy(now_s=now_s),
        )
