"""Driving a load test: one thread that hands each request to its device when it is due, and reads answers meanwhile."""

from __future__ import annotations

import gc
import heapq
import json
import select
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from torchsurgeon.errors import LoadTestError, ServerUnavailableError, is_finite, is_whole, short
from torchsurgeon.loadtest.device import Device, Ended
from torchsurgeon.loadtest.messages import LoadRequest
from torchsurgeon.loadtest.result import Array, KindResult, LoadRun
from torchsurgeon.loadtest.target import Target

Progress = Callable[[float, float], None]

_LOOK_S = 0.1
# In a closed loop, a device whose request has failed would otherwise fail again at once, as often as it can.
_PAUSE_S = 0.1


def try_each(target: Target, requests: Sequence[LoadRequest], timeout_s: float = 60.0) -> None:
    """Send each request once, one after the other, so that mistakes are told before the test and tails are cut.

    Args:
        target: the server.
        requests: the requests.
        timeout_s: how long each answer may take.

    Raises:
        ServerUnavailableError: the server cannot be reached, or does not answer in time.
        LoadTestError: the server refuses a request.
    """
    with _Driver(target, requests, len(requests), timeout_s) as driver:
        driver.open_all()
        for n in range(len(requests)):
            driver.run(np.zeros(1), [n], 0.0, 1.0, None)
        run = driver.result(None, 1.0)
    for kind in run.kinds:
        for error in kind.errors:
            reason = run.reasons.get(error, "")
            what = f"the request of {kind.model}, cut {kind.cut}, codec {kind.codec}"
            if error.startswith("HTTP "):
                raise LoadTestError(
                    f"{what} must be one that the server answers; it answered {error}: {short(reason, quote=False)}; "
                    "does it serve the same model under this name?"
                )
            raise ServerUnavailableError(f"{target.url[:300]} did not answer {what}: {error} {short(reason)}".rstrip())


def drive(
    target: Target,
    requests: Sequence[LoadRequest],
    times_s: Array | None,
    *,
    devices: int,
    seconds: float,
    warmup_s: float = 0.0,
    timeout_s: float = 30.0,
    rate_per_s: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LoadRun:
    """Put a server under load, and return what became of the requests.

    Each device has one connection and always sends the same request; the requests are dealt out to the devices in turn.
    When a request is due, a device is drawn at random. If its last request is not answered yet, the new one waits, and
    that counts.

    Args:
        target: the server.
        requests: the kinds of requests.
        times_s: when requests are due, in seconds from the start and rising, the warm-up included; None for a closed
            loop, in which each device sends its next request once it has its answer.
        devices: how many devices are emulated.
        seconds: for how long requests are due, after the warm-up.
        warmup_s: for how long before that requests are sent and not counted.
        timeout_s: a request that has no answer so long after it was due has failed.
        rate_per_s: the rate that is reported; by default that of ``times_s``.
        seed: which devices are drawn.
        progress: called about ten times a second with the seconds that have passed, and their number.

    Raises:
        LoadTestError: there are fewer devices than requests, or a number is not valid.
        ServerUnavailableError: the devices' connections could not be opened.
    """
    if not is_whole(devices) or devices < max(1, len(requests)):
        raise LoadTestError(
            f"there must be a device for each of the {len(requests)} kinds of requests (models × cuts × codecs); got "
            f"{short(devices)} devices; raise their number (--devices)"
        )
    for what, value, least in (("the duration", seconds, 1e-3), ("the warm-up", warmup_s, 0.0)):
        if not is_finite(value) or value < least:
            raise LoadTestError(f"{what} must be a finite number of seconds, at least {least:g}; got {short(value)}")
    if not is_finite(timeout_s) or timeout_s <= 0:
        raise LoadTestError(f"the timeout must be a positive number of seconds; got {short(timeout_s)}")
    with _Driver(target, requests, devices, timeout_s) as driver:
        driver.open_all()
        count = 0 if times_s is None else len(times_s)
        drawn = np.random.default_rng(seed).integers(devices, size=count).tolist()
        with _without_collections():
            driver.run(times_s, drawn, warmup_s, seconds, progress)
    if rate_per_s is None and times_s is not None:
        rate_per_s = float((times_s >= warmup_s).sum()) / seconds
    return driver.result(rate_per_s, seconds)


class _Counts:
    """What became of the requests of one kind that were due after the warm-up."""

    def __init__(self) -> None:
        self.latencies_s: list[float] = []
        self.queue_s: list[float] = []
        self.compute_s: list[float] = []
        self.errors: Counter[str] = Counter()


class _Driver(ExitStack):
    """The devices, and the loop that serves them. A context manager, which closes their connections."""

    def __init__(self, target: Target, requests: Sequence[LoadRequest], devices: int, timeout_s: float) -> None:
        super().__init__()
        self._url, self._requests, self._timeout_s = target.url, requests, timeout_s
        self._poller = self.enter_context(select.epoll())
        self._devices = [
            Device(target, requests[n % len(requests)].data, self._poller, self._ended) for n in range(devices)
        ]
        self._by_fd: dict[int, Device] = {}
        self._counts = [_Counts() for _ in requests]
        self._of_device = {device: self._counts[n % len(requests)] for n, device in enumerate(self._devices)}
        self._finished: list[tuple[Device, Ended]] = []
        self._reasons: dict[str, str] = {}
        self._late_s: list[float] = []
        self._counted_from_s = self._last_s = 0.0
        for device in self._devices:
            self.callback(device.close)

    def open_all(self) -> None:
        """Open all connections before anything is due."""
        end_s = time.perf_counter() + self._timeout_s
        for device in self._devices:
            # One after the other, since a server's queue of connections that it has not taken yet is short.
            device.open()
            while not device.ready:
                self._wait(min(end_s - time.perf_counter(), 1.0))
                failed = next((how for _, how in self._finished if how.error), None)
                if failed is None and time.perf_counter() > end_s:
                    failed = Ended(None, end_s, "the connection was not opened in time")
                if failed is not None:
                    opened = sum(one.ready for one in self._devices)
                    raise ServerUnavailableError(
                        f"only {opened} of {len(self._devices)} connections to {self._url[:300]} could be opened: "
                        f"{failed.error} {short(failed.reason, quote=False)}".rstrip()
                        + "; is the server running, and does it (--max-connections) and this process (ulimit -n) "
                        "allow so many?"
                    )

    def run(
        self,
        times_s: Array | None,
        drawn: Sequence[int],
        warmup_s: float,
        seconds: float,
        progress: Progress | None,
    ) -> None:
        """Send what is due when it is due, until all is answered or too late. ``drawn`` says on which devices it is."""
        begun_s = time.perf_counter()
        end_s = begun_s + warmup_s + seconds
        self._counted_from_s = begun_s + warmup_s
        due = [] if times_s is None else (begun_s + times_s).tolist()
        # When each device sends its next request in a closed loop.
        again = [(begun_s, n) for n in range(len(self._devices))] if times_s is None else []
        numbers = {device: n for n, device in enumerate(self._devices)}
        sent, look_s = 0, begun_s
        while True:
            now_s = time.perf_counter()
            while sent < len(due) and due[sent] <= now_s:
                device = self._devices[drawn[sent]]
                device.waiting.append(due[sent])
                if due[sent] >= self._counted_from_s:
                    self._late_s.append(now_s - due[sent])
                device.begin()
                sent += 1
            while again and again[0][0] <= now_s:
                _, n = heapq.heappop(again)
                if now_s < end_s:
                    self._devices[n].waiting.append(now_s)
                    self._devices[n].begin()
            if now_s >= look_s:
                look_s = now_s + _LOOK_S
                for device in self._devices:
                    device.give_up(now_s - self._timeout_s)
                if progress is not None:
                    progress(min(now_s - begun_s, warmup_s + seconds), warmup_s + seconds)
            while self._finished:
                finished, self._finished = self._finished, []
                for device, how in finished:
                    self._count(device, how)
                    if times_s is None and how.end_s < end_s:
                        heapq.heappush(again, (how.end_s + (_PAUSE_S if how.error else 0.0), numbers[device]))
                    device.begin()
            if sent == len(due) and not again and not any(device.busy for device in self._devices):
                return
            next_s = min(due[sent] if sent < len(due) else look_s, again[0][0] if again else look_s, look_s)
            self._wait(next_s - time.perf_counter())

    def result(self, rate_per_s: float | None, seconds: float) -> LoadRun:
        """Return what was counted."""
        kinds = tuple(
            KindResult(
                request.model,
                request.cut,
                request.codec,
                request.size_bytes,
                np.sort(np.array(counts.latencies_s)),
                np.sort(np.array(counts.queue_s)),
                np.sort(np.array(counts.compute_s)),
                dict(counts.errors),
            )
            for request, counts in zip(self._requests, self._counts, strict=True)
        )
        lasted_s = max(self._last_s - self._counted_from_s, 0.0)
        return LoadRun(rate_per_s, seconds, lasted_s, kinds, np.sort(np.array(self._late_s)), dict(self._reasons))

    def _ended(self, device: Device, how: Ended) -> None:
        self._finished.append((device, how))

    def _count(self, device: Device, how: Ended) -> None:
        if how.due_s is None or how.due_s < self._counted_from_s:
            return
        counts = self._of_device[device]
        self._last_s = max(self._last_s, how.end_s)
        if how.error:
            counts.errors[how.error] += 1
            if how.error not in self._reasons:
                self._reasons[how.error] = _said(how.reason)
            return
        counts.latencies_s.append(how.end_s - how.due_s)
        if how.queue_s is not None and how.compute_s is not None:
            counts.queue_s.append(how.queue_s)
            counts.compute_s.append(how.compute_s)

    def _wait(self, at_most_s: float) -> None:
        """Wait for sockets, and have their devices go on."""
        if at_most_s > 0:
            # epoll itself waits in whole milliseconds, rounded up, so requests would be sent late by up to one. A
            # poller can be waited for like any descriptor, and select() counts in microseconds.
            select.select([self._poller], [], [], at_most_s)
        for fd, mask in self._poller.poll(0):
            device = self._by_fd.get(fd)
            if device is None or device.fd != fd:
                device = self._by_fd[fd] = next(one for one in self._devices if one.fd == fd)
            device.event(mask)


def _said(text: str) -> str:
    """Return the reason in the body of a refusal; the text itself where it is no such body."""
    try:
        return str(json.loads(text)["error"])
    except (ValueError, LookupError, TypeError):
        return text.strip()


@contextmanager
def _without_collections() -> Iterator[None]:
    """Leave what is loaded out of garbage collection, which would pause the test for as long as it walks through it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
