"""Several servers that hold the same model, each with its own estimates."""

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
    """What is known of one server; `target` is whatever its owner reaches it by, such as a transport."""

    target: _T
    link: LinkEstimator
    load: LoadEstimator
    breaker: CircuitBreaker
    probes: ProbePolicy

    @staticmethod
    def new(target: _T, prior: Link, *, now_s: NowS, jitter: random.Random | None = None) -> ServerState[_T]:
        """The state of a server that has not been asked yet."""
        return ServerState(
            target,
            LinkEstimator(prior, now_s=now_s),
            LoadEstimator(now_s=now_s),
            CircuitBreaker(now_s=now_s, jitter=jitter),
            ProbePolicy(now_s=now_s),
        )
