"""How busy a server is, as ``/v2/load`` tells it."""

from __future__ import annotations

import time
from typing import Any

from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.served import ServedModel


def load(registry: ModelRegistry, connections: int, started_s: float, draining: bool) -> dict[str, Any]:
    """Return what ``/v2/load`` answers.

    Args:
        registry: the models.
        connections: how many connections are open.
        started_s: when the server started, in seconds of ``time.monotonic``.
        draining: whether the server is about to stop.
    """
    return {
        "uptime_s": round(time.monotonic() - started_s, 3),
        "draining": draining,
        "connections": connections,
        "models": {name: _of(model, reason) for name, (model, reason) in sorted(registry.states().items())},
    }


def _of(model: ServedModel | str, reason: str) -> dict[str, Any]:
    if not isinstance(model, ServedModel):
        return {"state": model, "reason": reason}
    intake = model.intake
    clients, by_priority = intake.worker.who_waits()
    return {
        "state": "ready",
        "reason": "",
        "waiting": intake.worker.waiting,
        "waiting_clients": clients,
        "waiting_by_priority": by_priority,
        "concurrency": intake.worker.concurrency,
        "slowdown": round(intake.slowdown, 3),
        **model.statistics.lately(),
        "cuts": dict(model.statistics.cuts),
    }
