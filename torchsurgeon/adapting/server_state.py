"""Several servers that hold the same model, each with its own estimates."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torchsurgeon.adapting.breaker import CircuitBreaker
from torchsurgeon.adapting.clock import NowS
from torchsurgeon.adapting.link import LinkEstimator, ProbePolicy
from torchsurgeon.adapting.load import LoadEstimator
from torchsurgeon.errors import AdaptError
from torchsurgeon.link import Link

_T = TypeVar("_T")

_STAY = 0.9


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


class Servers(Generic[_T]):
    """Servers in the order to try them. May be asked by several threads at once.

    :param servers: in the order their user prefers them, which decides between equals
    """

    def __init__(self, servers: Sequence[ServerState[_T]]) -> None:
        if not servers:
            raise AdaptError("there is no server to order: give at least one")
        self.servers = tuple(servers)
        self._first = self.servers[0]

    def candidates(self, cost: Callable[[ServerState[_T]], float]) -> Iterator[ServerState[_T]]:
        """Servers that may be asked now, the cheapest first and those on trial last.

        The one that came first last time stays first unless another is a tenth cheaper. Each breaker is asked just
        before its server is given, so a trial is taken only by who gets that far.
        """
        ranks = {id(server): (server.breaker.state != "closed", self._cost(cost, server)) for server in self.servers}
        ordered = sorted(self.servers, key=lambda server: ranks[id(server)])
        self._first = ordered[0]
        return (server for server in ordered if server.breaker.allow())

    def _cost(self, cost: Callable[[ServerState[_T]], float], server: ServerState[_T]) -> float:
        return cost(server) * (_STAY if server is self._first else 1.0)

    def trials(self) -> list[ServerState[_T]]:
        """Servers whose breaker is not closed and allows a trial now. Asking for them starts the trials."""
        return [server for server in self.servers if server.breaker.state != "closed" and server.breaker.allow()]
