"""Work in steps: it stops wherever it would wait, so whoever runs it decides in which thread it waits, and how long."""

from __future__ import annotations

import select
from collections.abc import Generator
from typing import TypeVar

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.transport.deadline import Deadline

T = TypeVar("T")

Steps = Generator["select.poll | None", bool, T]
"""A generator that yields what it has to wait for, and takes whether that has come before the deadline.

It yields None before it calls what may wait by itself, such as opening a connection. Whoever may not be kept waiting
then has another thread go on.
"""


def complete(steps: Steps[T], deadline: Deadline) -> T:
    """Run all steps in this thread, and return what they return.

    Args:
        steps: the work, which has not begun.
        deadline: when it has to be over; the work raises TimeoutError then.
    """
    return _driven(steps, None, deadline)


def resumed(steps: Steps[T], wanted: select.poll | None, deadline: Deadline) -> T:
    """Run the steps that are left in this thread, and return what they return.

    Args:
        steps: the work.
        wanted: what it has yielded last.
        deadline: when it has to be over.
    """
    return _driven(steps, wanted is None or has_come(wanted, deadline), deadline)


def _driven(steps: Steps[T], come: bool | None, deadline: Deadline) -> T:
    try:
        while True:
            wanted = steps.send(come)  # type: ignore[arg-type]  # None for the first
            come = wanted is None or has_come(wanted, deadline)
    except StopIteration as end:
        if by_signal_handler(end):
            raise
        return end.value  # type: ignore[no-any-return]
    except RuntimeError as error:
        raised = as_raised(error)
        if raised is error:
            raise
        raise raised from None
    finally:
        # What a signal handler raises here leaves the work where it was, with what it has to put in order.
        steps.close()


def has_come(wanted: select.poll, deadline: Deadline) -> bool:
    """Wait for what work has yielded, and return whether it has come before the deadline."""
    left_s = deadline.remaining_s()
    return left_s > 0 and bool(wanted.poll(left_s * 1000))


def as_raised(error: Exception) -> Exception:
    """Return the StopIteration of a signal handler, in place of what Python makes of one that leaves a generator."""
    cause = error.__cause__
    return cause if isinstance(cause, StopIteration) and by_signal_handler(cause) else error
