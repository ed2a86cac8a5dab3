"""Notices that a model's weights have changed: at once where PyTorch counts the write, or else by their bytes.

Device and server both watch their model with this. A ``Patrol`` is the background thread that compares the bytes.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from torchsurgeon.models.checksums import Contents, Sample
from torchsurgeon.models.weights import Snapshot

# A pass over the bytes begins at least this long after the one before. Half a second, so that a change is noticed
# within a second also where the thread has to wait for a processor.
_PASS_S = 0.5
# The thread works for about so long at a time, and then rests this many times as long. With what it takes to rest and
# to wake, it stays below 2 % of one core, and it never takes the processor for long.
_WORK_S = 1e-3
_REST = 60
# A model that nobody calls is left alone.
_IDLE_S = 10.0
_JOIN_S = 1.0
# After so many pieces of a pass, it is ended if the tensors have been replaced.
_PIECES = 8


class WatchedWeights:
    """The weights of a model at one moment, and whether they have changed since. Thread-safe.

    Args:
        model: the model.
        plain: other tensors that it reads.
    """

    def __init__(self, model: nn.Module, plain: Iterable[Tensor] = ()) -> None:
        self._snapshot = Snapshot(model, plain)
        self._sample: Sample | None = None
        self._contents: Contents | None = None
        self._changed = False

    def remember(self) -> None:
        """Keep checksums of the bytes, with which they are compared from now on.

        To be called before the bytes are used for anything: a write that comes in between is then noticed later.
        """
        if self._contents is None:
            self._sample = Sample(self._snapshot.tensors)
            self._contents = Contents(self._snapshot.tensors)

    def same(self, *, quickly: bool = False) -> bool:
        """Return whether the weights have always been the same, as far as that is known without reading them all.

        Noticed are writes that PyTorch counts, tensors that were replaced, what ``compare()`` has found, and whatever
        was written to a small model. Of a larger model a few bytes are read, which shows when most of it was written.

        Args:
            quickly: True to read no bytes of a larger model.
        """
        sample = self._sample
        if not self._changed and (
            not self._snapshot.same_weights()
            or (sample is not None and (sample.whole or not quickly) and not sample.same())
        ):
            self._changed = True
        return not self._changed

    def compare(self) -> Iterator[None]:
        """Compare all bytes, one piece for each step of the iterator. It ends early where something has changed."""
        contents = self._contents
        if contents is None or not self.same():
            return
        for i, same in enumerate(contents.compare()):
            if not same:
                self._changed = True
            if self._changed or (i % _PIECES == 0 and not self._snapshot.same_weights()):
                return
            yield

    def same_in_full(self) -> bool:
        """Return whether the weights are the same, after reading all of them."""
        for _ in self.compare():
            pass
        return self.same()


class Patrol:
    """A background thread that compares weights with their checksums while the model is in use.

    It begins with ``start()`` and ends with ``close()``, or when the owner is collected. In a forked child, it begins
    with the next ``start()``.

    Args:
        weights: a method of the owner that returns the weights to compare now. The owner is not kept alive.
    """

    def __init__(self, weights: Callable[[], WatchedWeights | None]) -> None:
        self._weights = weakref.WeakMethod(weights, lambda _: self.end())
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        # Unlike an Event, it may be used by a finalizer that runs while this very thread waits for it.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = self._sleeps = False
        self._used_s = -math.inf

    def start(self) -> None:
        """Start the thread, unless it runs already. Where there can be no more threads, do without."""
        self.used()
        with self._starting:
            if self._thread is None and not self._ended:
                thread = threading.Thread(target=self._run, name="torchsurgeon-weights", daemon=True)
                with contextlib.suppress(RuntimeError):
                    thread.start()
                    self._thread = thread

    def used(self) -> None:
        """Note that the model is in use."""
        self._used_s = time.monotonic()
        if self._sleeps:
            self._sleeps = False
            self._wakes.put(None)

    def end(self) -> None:
        """Ask the thread to end."""
        self._ended = True
        self._wakes.put(None)

    def close(self) -> None:
        """End the thread, and wait for it. Closing twice is harmless."""
        self.end()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)

    def _run(self) -> None:
        while not self._ended:
            self._sleeps = True
            if self._in_use():
                self._sleeps = False
                begun_s = time.monotonic()
                self._pass()
                self._rest(_PASS_S - (time.monotonic() - begun_s))
            else:
                self._wakes.get()

    def _in_use(self) -> bool:
        return not self._ended and 0 <= time.monotonic() - self._used_s < _IDLE_S

    def _pass(self) -> None:
        weights = self._current()
        if weights is None:
            return
        begun_s = time.thread_time()
        for _ in weights.compare():
            worked_s = time.thread_time() - begun_s
            if worked_s >= _WORK_S:
                self._rest(_REST * worked_s)
                if not self._in_use() or self._current() is not weights:
                    return
                begun_s = time.thread_time()
        self._rest(_REST * (time.thread_time() - begun_s))

    def _current(self) -> WatchedWeights | None:
        method = self._weights()
        return None if method is None else method()

    def _rest(self, seconds: float) -> None:
        if seconds > 0 and not self._ended:
            with contextlib.suppress(queue.Empty):
                self._wakes.get(timeout=seconds)


_all: weakref.WeakSet[Patrol] = weakref.WeakSet()


def _reset_after_fork() -> None:
    for patrol in list(_all):
        patrol._reset()


def _end_all() -> None:
    # A thread that Python stops in the middle of an operator of PyTorch, while it ends, would abort the process.
    for patrol in list(_all):
        patrol.end()
    for patrol in list(_all):
        patrol.close()


os.register_at_fork(after_in_child=_reset_after_fork)
atexit.register(_end_all)
