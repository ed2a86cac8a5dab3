"""Transports that stand before another one, to delay, spoil or silence what passes.

``Relay``    hands on everything; the others, and those of single tests, change one thing of it
``Between``  waits before it hands on, and tells another load than the server's
``Silent``   lets every exchange last until its timeout, or refuses it
``Held``     keeps inferences back until it is told to go on
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import torch

from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.transport import Answer, Transport

_SILENCE_S = 30.0


class Relay(Transport):
    """Hands on to ``inner``, and closes it."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner.timeout_s)
        self.inner = inner

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        return self.inner.get_json(path, timeout_s=timeout_s)

    def infer(self, model: str, tensors: Mapping[str, torch.Tensor], **options: Any) -> Answer:
        return self.inner.infer(model, tensors, **options)

    def probe(self, up_bytes: int, down_bytes: int, **options: Any) -> Any:
        return self.inner.probe(up_bytes, down_bytes, **options)

    def _post(self, *_: Any) -> Any:
        raise AssertionError("a relay posts nothing itself")

    def close(self) -> None:
        self.inner.close()


class Between(Relay):
    """Hands an inference on after ``delay_s``, counts it in ``asked``, and adds ``told`` to what the answer tells."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self.delay_s, self.asked = 0.0, 0
        self.told: dict[str, float] = {}

    def infer(self, model: str, tensors: Mapping[str, torch.Tensor], **options: Any) -> Answer:
        self.asked += 1
        deadline = options["deadline"]
        end_s = time.monotonic() + self.delay_s
        while time.monotonic() < end_s:
            deadline.left_s()
            time.sleep(0.002)
        answer = self.inner.infer(model, tensors, **options)
        timing = answer.timing._replace(end_s=answer.timing.end_s + self.told.get("queue_s", 0.0))
        return Answer(answer.tensors, {**answer.parameters, **self.told}, timing)


class Silent(Relay):
    """Lets every exchange last until its timeout while it is ``silent``, and refuses it at once while it is ``down``.

    ``over`` ends what waits.
    """

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self.silent, self.down, self.over = False, False, threading.Event()

    def _wait(self, timeout_s: float | None) -> None:
        if self.down:
            raise ServerUnavailableError("refused")
        if self.silent:
            self.over.wait(_SILENCE_S if timeout_s is None else timeout_s)
            raise ServerUnavailableError("timed out")

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        self._wait(timeout_s)
        return super().get_json(path, timeout_s=timeout_s)

    def infer(self, model: str, tensors: Mapping[str, torch.Tensor], **options: Any) -> Answer:
        self._wait(options["deadline"].left_s())
        return super().infer(model, tensors, **options)

    def probe(self, up_bytes: int, down_bytes: int, **options: Any) -> Any:
        self._wait(None)
        return super().probe(up_bytes, down_bytes, **options)

    def close(self) -> None:
        self.over.set()
        super().close()


class Held(Relay):
    """Hands on an inference only once ``go`` is set, as it is until ``hold()``; ``begun`` is set when one has come."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def hold(self) -> None:
        self.begun.clear()
        self.go.clear()

    def infer(self, model: str, tensors: Mapping[str, torch.Tensor], **options: Any) -> Answer:
        self.begun.set()
        assert self.go.wait(_SILENCE_S)
        return super().infer(model, tensors, **options)
