"""A request that the calling thread drives itself, until it has something better to do than to wait."""

from __future__ import annotations

import functools
import inspect
import select
import threading
import time
from typing import TypeVar

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.runtime.pool import Pool, Task
from torchsurgeon.runtime.telemetry import below_current
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.steps import Steps, as_raised, resumed

T = TypeVar("T")


class Driven(Task[T]):
    """A task in steps, which run in the thread that made it while that thread waits for it.

    To hand a request to another thread and to be woken by it takes longer than a quick server does. So the thread that
    calls sends the request, and waits for the answer, by itself. A thread of the pool goes on with it only where its
    next step may wait by itself, or once ``hand_over()`` is called.

    Args:
        steps: the work, which has not begun.
        deadline: when it has to be over.
        pool: whose threads go on with it.
    """

    __slots__ = ("_deadline", "_handed", "_owner", "_pool", "_steps", "_wanted")

    def __init__(self, steps: Steps[T], deadline: Deadline, pool: Pool) -> None:
        super().__init__(None, deadline.cancel)
        self._steps, self._deadline, self._pool = steps, deadline, pool
        self._wanted: select.poll | None = None
        self._handed, self._owner = False, threading.get_ident()

    def begin(self) -> None:
        """Run its first step, in which most requests are sent.

        Raises:
            ServerUnavailableError: the pool has been closed.
        """
        self._pool.watch(self.interrupt)
        self._step(None)
        if self._wanted is None:
            self.hand_over()

    @property
    def here(self) -> bool:
        return not self._handed

    def wait(self, timeout_s: float) -> bool:
        """Run further steps for up to ``timeout_s``, and return whether it has ended."""
        end_s = time.monotonic() + timeout_s
        while not (self.ended or self._handed):
            if self._wanted is None:
                self.hand_over()
                break
            left_s, patience_s = self._deadline.remaining_s(), end_s - time.monotonic()
            # Whole milliseconds, as the system counts them, and none too many: the tail on the device is to begin.
            wait_ms = int(max(patience_s, 0.0) * 1e3) if patience_s <= left_s else left_s * 1e3
            come = left_s > 0 and bool(self._wanted.poll(wait_ms))
            if not come and self._deadline.remaining_s() > 0:
                return False
            self._step(come)
            if not self.ended and time.monotonic() >= end_s:
                # However quickly more comes: whoever waits has something else to do now.
                return False
        return self.ended or super().wait(end_s - time.monotonic())

    def hand_over(self) -> None:
        """Have a thread of the pool go on with it; where there is none, it ends with an error that says so."""
        if self.ended or self._handed:
            return
        if self._over():
            return
        work = below_current(functools.partial(resumed, self._steps, self._wanted, self._deadline))
        # Both at once, wherever a signal handler raises: from now on, who takes the work is who may run the steps.
        self._work, self._handed = work, True
        try:
            self._pool.take(self)
        except ServerUnavailableError as error:
            if by_signal_handler(error):
                raise
            self.give_up()
            self.fail(error)

    def interrupt(self) -> None:
        """Interrupt it. Whoever runs its steps, or is about to, finds its deadline over and puts all in order."""
        self._deadline.cancel()

    def give_up(self) -> None:
        """Interrupt it. Where nobody runs its steps any more, they put everything in order at once."""
        self.interrupt()
        work, self._work = self._work, None
        if work is None and (self._handed or threading.get_ident() != self._owner):
            return
        # A signal handler may have interrupted a step, and given the request up. The step then ends by itself.
        if inspect.getgeneratorstate(self._steps) != inspect.GEN_RUNNING:
            self._steps.close()
            self._pool.forget(self.interrupt)

    def _over(self) -> bool:
        """Return whether it was given up, as by a signal handler while this thread waited, and end it then."""
        over = inspect.getgeneratorstate(self._steps) == inspect.GEN_CLOSED
        if over:
            self.fail(ServerUnavailableError("the request was given up while it was under way"))
        return over

    def _step(self, come: bool | None) -> None:
        """Run one step; ``come`` is whether what it waits for has come, and None for the first."""
        if self._over():
            return
        try:
            self._wanted = self._steps.send(come)  # type: ignore[arg-type]
            return
        except StopIteration as end:
            if by_signal_handler(end):
                raise
            self.value = end.value
        except Exception as error:
            raised = as_raised(error)
            if raised is not error:
                raise raised from None
            if by_signal_handler(error):
                raise
            self.error = error
        self._pool.forget(self.interrupt)
        self.end()
