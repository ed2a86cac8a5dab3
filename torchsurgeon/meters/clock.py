"""Clocks that note marks cheaply, and give the time between them afterwards."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from torchsurgeon import _native
from torchsurgeon.errors import MeterError, NativeUnavailableError

if TYPE_CHECKING:
    import torch


class Clock(ABC):
    """Notes marks; as a context manager, it closes itself.

    Attributes:
        name: the kind of clock, as profiles record it.
    """

    name: ClassVar[str]

    @abstractmethod
    def mark(self) -> None:
        """Note this moment in the device's work, without waiting for the device."""

    @abstractmethod
    def intervals_ns(self) -> list[int]:
        """Wait for the device, and return the nanoseconds between neighbouring marks since the last call.

        Returns:
            One interval fewer than there were marks. The marks are then forgotten.

        Raises:
            MeterError: the clock ran backwards. The marks are forgotten all the same.
        """

    def close(self) -> None:
        """Release what the clock holds."""

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class WallClock(Clock):
    """The host's monotonic clock, for work that runs on the CPU.

    If the compiled extension is missing, the first such clock of a process warns that Python's slower clock is used.

    Args:
        read_ns: another clock to read, in nanoseconds.
    """

    name = "wall"

    def __init__(self, read_ns: Callable[[], int] | None = None) -> None:
        self._read_ns = _native.clock() if read_ns is None else read_ns
        self._marks: list[int] = []

    def mark(self) -> None:
        self._marks.append(self._read_ns())

    def intervals_ns(self) -> list[int]:
        marks, self._marks = self._marks, []
        intervals = [end - start for start, end in pairwise(marks)]
        for index, interval in enumerate(intervals):
            if interval < 0:
                raise MeterError(
                    f"the wall clock must not run backwards, and went back {-interval} ns between marks {index} and "
                    f"{index + 1}; measure again, and keep the machine from sleeping or migrating meanwhile"
                )
        return intervals


class CudaEventClock(Clock):
    """Events on a CUDA stream: the device's time between marks, resolved to about half a microsecond.

    It uses the compiled extension's preallocated events, or PyTorch's where the extension is missing.

    Args:
        capacity: the most marks between two calls of ``intervals_ns()``.
        stream: the stream; the current one by default.

    Raises:
        NativeUnavailableError: PyTorch sees no CUDA device.
    """

    name = "cuda-events"

    def __init__(self, capacity: int, stream: torch.cuda.Stream | None = None) -> None:
        import torch

        if not torch.cuda.is_available():
            raise NativeUnavailableError("timing with CUDA events needs a CUDA device, and PyTorch sees none")
        torch.cuda.init()
        self._tape = _EventTape(capacity) if _native.available() else _TorchTape()
        self._stream = stream if stream is not None else torch.cuda.current_stream()

    def mark(self) -> None:
        self._tape.record(self._stream)

    def intervals_ns(self) -> list[int]:
        return [end - start for start, end in pairwise(self._tape.rewind())]

    def close(self) -> None:
        self._tape.close()


class _EventTape:
    """Marks as the extension's events, which are allocated beforehand."""

    def __init__(self, capacity: int) -> None:
        self._ops: Any = _native.open_cuda_driver("timing with CUDA events")
        self._record = self._ops.event_record.default
        self._handle = self._ops.event_tape_open(capacity)

    def record(self, stream: torch.cuda.Stream) -> None:
        self._record(self._handle, stream.cuda_stream)

    def rewind(self) -> list[int]:
        elapsed: list[int] = self._ops.event_rewind(self._handle).flatten().tolist()
        return elapsed

    def close(self) -> None:
        self._ops.event_tape_close(self._handle)


class _TorchTape:
    """Marks as PyTorch's events, each allocated when it is recorded."""

    def __init__(self) -> None:
        import torch

        self._new_event = torch.cuda.Event
        self._events: list[torch.cuda.Event] = []

    def record(self, stream: torch.cuda.Stream) -> None:
        event = self._new_event(enable_timing=True)
        event.record(stream)
        self._events.append(event)

    def rewind(self) -> list[int]:
        events, self._events = self._events, []
        elapsed = [0] * len(events)
        for index, (start, end) in enumerate(pairwise(events), start=1):
            end.synchronize()
            elapsed[index] = elapsed[index - 1] + round(start.elapsed_time(end) * 1e6)
        return elapsed

    def close(self) -> None:
        self._events = []


class CuptiClock(Clock):
    """CUPTI's own times of kernels: how long the kernels launched between two marks kept the device busy.

    Gaps between kernels do not count.

    Raises:
        NativeUnavailableError: kernels are not traced here; ``torchsurgeon.hooks.kernel_trace()`` says what it needs.
    """

    name = "cupti"

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        from torchsurgeon import hooks

        self._exit = contextlib.ExitStack()
        self._trace = self._exit.enter_context(hooks.kernel_trace())
        ranges = hooks.active()
        assert ranges is not None
        self._ranges = ranges
        self._marks = 0
        self._slot: int | None = None

    def mark(self) -> None:
        if self._slot is not None:
            self._ranges.pop(self._slot)
        self._slot = self._ranges.push(self._ranges.id_of(f"interval {self._marks}"))
        self._marks += 1

    def intervals_ns(self) -> list[int]:
        busy_ns = [0] * max(self._marks - 1, 0)
        self.close()
        for kernel in self._trace.kernels:
            if kernel.call is not None:
                index = int(kernel.layer.rpartition(" ")[2])
                if index < len(busy_ns):
                    busy_ns[index] += kernel.end_ns - kernel.start_ns
        self._start()
        return busy_ns

    def close(self) -> None:
        if self._slot is not None:
            self._ranges.pop(self._slot)
            self._slot = None
        self._exit.close()
